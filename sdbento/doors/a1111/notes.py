"""What an answer says of the differences between what was asked for and what was done."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Notes:
    """Collected while a body is translated; clients find them in `info.extra_generation_params`."""

    changed: list[str] = field(default_factory=list)
    not_applied: list[str] = field(default_factory=list)

    def change(self, name: str, asked: object, used: object) -> None:
        if asked != used:
            self.changed.append(f"{name} {_short(asked)} -> {used}")

    def ignore(self, name: str) -> None:
        self.not_applied.append(_short(name))

    def as_params(self) -> dict[str, str]:
        listed = {"Changed": self.changed, "Not applied": self.not_applied}
        return {title: "; ".join(lines) for title, lines in listed.items() if lines}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""What requests may name beyond this server's own models: paths, and what is on the Hub.

The operator says so, or else who can reach the server decides (`doors/http/exposure.py`). As long
as nobody has decided, the answer is no.
"""

from __future__ import annotations

from sdbento.settings import Settings


def paths_allowed(settings: Settings) -> bool:
    return settings.allow_any_model is True


def models_allowed(repo: str, settings: Settings) -> bool:
    """Whether a model or ControlNet may be this one of the Hub."""
    return _of_owners(repo, settings, otherwise=settings.allow_any_model is True)


def loras_allowed(repo: str, settings: Settings) -> bool:
    """Whether a LoRA may be one of this repository of the Hub."""
    return settings.allow_lora_hub and _of_owners(repo, settings, otherwise=True)


def explain_models(settings: Settings) -> str:
    """What to add to a message that there is no such model or ControlNet: which settings keep this
    server from looking further; empty where none does."""
    if settings.hub_owners:
        return "; of the Hub, only what SDBENTO_HUB_OWNERS names may be used"
    if settings.allow_any_model is True:
        return ""
    return (
        "; other paths and models of the Hub are not allowed here (SDBENTO_ALLOW_ANY_MODEL, or "
        "SDBENTO_HUB_OWNERS for those of some owners)"
    )


def _of_owners(repo: str, settings: Settings, otherwise: bool) -> bool:
    """Names on the Hub are the same in any case."""
    if not settings.hub_owners:
        return otherwise
    repo = repo.casefold()
    allowed = settings.hub_owners.casefold().split(",")
    return repo in allowed or repo.partition("/")[0] in allowed

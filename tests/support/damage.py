"""Strategies for hypothesis: files as they should be, damaged in some places."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def damaged(draw: st.DrawFn, files: st.SearchStrategy[bytes]) -> bytes:
    """A file with some bytes changed, a piece missing or repeated, or its end cut off."""
    data = bytearray(draw(files))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["change", "remove", "repeat", "insert", "cut"])):
            case "change" if data:
                data[place] = draw(st.integers(0, 255))
            case "remove":
                del data[place : place + draw(st.integers(1, 16))]
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 64))]
            case "insert":
                data[place:place] = draw(st.binary(max_size=8))
            case _:
                del data[place:]
    return bytes(data)

"""Documents with parts that programs write, each between two markers that name it."""

from __future__ import annotations

import re


def replaced(document: str, name: str, text: str) -> str:
    """`document` with `text` between the markers `name`; all around it is written by hand.

    Raises ValueError for a document without them.
    """
    marked = re.compile(rf"(<!-- {name}:begin[^\n]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not marked.search(document):
        raise ValueError(f"the document has lost its {name} markers")
    return marked.sub(lambda match: f"{match[1]}{text}\n{match[2]}", document)

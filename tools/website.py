"""Makes the website of docs/ stand alone: a hook of MkDocs, for `make docs`.

The documents are written for the repository, where a link may lead to any file. In the site, those
of `PAGES` become pages too. A link to any other file outside docs/ leads to the repository's
address, `extra.repository` in mkdocs.yml, and is plain text where that has none.

Runs in an environment of its own, which has neither sdbento nor its packages.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Files outside docs/ that become pages, and what these are called. (There is a security.md, too,
# and some file systems take SECURITY.md for the same.)
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "CHANGELOG.md": "changelog.md",
}
MERMAID = "mermaid.min.js"  # fetched by tools/mermaid.py
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
# What a browser would load from elsewhere. A link that a reader may follow is no such thing.
FOREIGN = re.compile(r'<(?:script|link|img|iframe)\b[^>]* (?:src|href)="?(?:https?:)?//[^">]+')
ITEM = re.compile(r"(?:-|\d+\.) ")
FENCE = re.compile(r"^( *```.*?^ *```[^\n]*$)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # type: ignore[import-not-found]

    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    mermaid = Path(sys.prefix) / MERMAID
    files.append(File.generated(config, MERMAID, abs_src_path=str(mermaid)))
    config.extra_javascript.append(MERMAID)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    name = page.file.src_uri
    folder = "" if name in PAGES.values() else "docs"
    parts = FENCE.split(markdown)  # every other one is a block of code
    for index in range(0, len(parts), 2):
        text = in_site(parts[index], folder, config.extra.get("repository"))
        parts[index] = with_lists_apart(text)
    return "".join(parts)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Fails the build where a page would load something from another host."""
    if found := FOREIGN.search(output):
        raise ValueError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


def in_site(text: str, folder: str, repository: str | None) -> str:
    """`text` of a document in `folder` of the repository, with links as the site needs them."""

    def link(match: re.Match[str]) -> str:
        words, address = match.groups()
        if re.match(r"[a-z]+:|#|/", address):
            return match[0]
        path, mark, anchor = address.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path == "README.md":
            path = "docs/index.md"
        if path in PAGES:
            return f"[{words}]({PAGES[path]}{mark}{anchor})"
        if path.startswith("docs/"):
            return f"[{words}]({path.removeprefix('docs/')}{mark}{anchor})"
        return f"[{words}]({repository}/{path})" if repository else words

    return LINK.sub(link, text)


def with_lists_apart(text: str) -> str:
    """`text` with an empty line before each list that follows a paragraph at once. GitHub needs
    none; Python-Markdown would take the list for a part of the paragraph."""
    lines: list[str] = []
    in_paragraph = False
    for line in text.split("\n"):
        if in_paragraph and ITEM.match(line):
            lines.append("")
            in_paragraph = False
        elif not line:
            in_paragraph = False
        elif not lines or not lines[-1]:
            in_paragraph = not ITEM.match(line) and not line.startswith((" ", "|", ">", "#"))
        lines.append(line)
    return "\n".join(lines)

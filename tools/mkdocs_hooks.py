"""What `mkdocs build` needs to know of this repository: pages link to files outside docs/, as they do where the
repository is read, and the README is the site's first page.

A link to a file outside docs/ brings that file into the site, under its path in the repository; pages of docs/ lie at
the site's top. Links are written anew for that. What is linked and is not there is left for mkdocs to complain of.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()([^()\s#]+)((?:#[^()\s]*)?)(?=\))")


def site_path(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def repository_path(uri: str) -> str:
    """The inverse of `site_path`."""
    if uri == "index.md":
        return "README.md"
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri


def linked(path: str, target: str) -> str | None:
    """The file of the repository that a link in the page `path` leads to, or None for what is no link to a file."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return found if "://" not in target and (ROOT / found).is_file() else None


def on_files(files: Files, config: Any) -> Files:
    """Brings in the README, and what pages link to."""
    pages = ["README.md"] + [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    outside = ["README.md"]
    for path in pages:  # which grows
        for target, _ in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
            found = linked(path, target)
            if found and not found.startswith("docs/") and found not in outside:
                outside.append(found)
                pages += [found] if found.endswith(".md") else []
    for path in outside:
        file = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
        if path.startswith("benchmarks/results/"):
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Writes the links of a page as the site needs them."""
    path = repository_path(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        found = linked(path, match[1])
        if found is None:
            return match[0]
        return posixpath.relpath(site_path(found), posixpath.dirname(page.file.src_uri) or ".") + match[2]

    return LINK.sub(rewritten, markdown)

"""MkDocs hook: links work on GitHub and in the site, also to what does not lie in docs/; intervals keep to one line.

In the repository README.md is the front page and `data/` and `training/` have pages of their own. Here they get a place
in the site, and links are moved from the one tree to the other.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PLACES = {
    "README.md": "index.md",
    "data/README.md": "data.md",
    "training/README.md": "training.md",
    "data/emoji/LICENSE.md": "emoji-licence.md",
    "LICENSE": "LICENSE.txt",
}
"""What lies outside of docs/ -> where it is in the site."""

INTERVAL = re.compile(r"(\d) \[([^][ ]+), ([^][ ]+)\]")
LINK = re.compile(r'(\]\(|src=")(?!\w+:|#)([^)"#\s]+)')


def on_files(files: Files, config: Any) -> Files:
    for source, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = page.file.src_uri
    source = next((source for source, other in PLACES.items() if other == place), f"docs/{place}")

    def move(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        if not (ROOT / target).exists():  # code that looks like a link; a link to nothing stops the build by itself
            return link[0]
        return link[1] + posixpath.relpath(PLACES.get(target, target.removeprefix("docs/")), posixpath.dirname(place))

    return INTERVAL.sub("\\1\u00a0[\\2,\u00a0\\3]", LINK.sub(move, markdown))

"""Check a built site: every link within it leads somewhere, and every page can be reached.

    python docs/check_links.py docs/_build/html

Exit status: 0 all is well, 1 it is not, with a line for each fault.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

UNLINKED = {"search.html", "genindex.html"}  # Sphinx's own, which the theme links by scripts


class Page(HTMLParser):
    """The anchors and the links of a page.

    Args:
        text: Its HTML.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one element has."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif (tag, name) in (("a", "href"), ("img", "src"), ("link", "href")) and value:
                self.links.append(value)


def faults(site: Path) -> list[str]:
    """What is wrong with the site in a folder, a line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found, reached = [], {site / "index.html"}
    waiting = list(reached)
    while waiting:
        for target in _targets(waiting.pop(), pages):
            if target in pages and target not in reached:
                reached.add(target)
                waiting.append(target)
    for path, page in sorted(pages.items()):
        name = path.relative_to(site)
        if path not in reached and path.name not in UNLINKED:
            found.append(f"{name}: no page links to it")
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = _resolved(path, parts.path)
            anchor = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{name}: {link} leads nowhere")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{name}: {link} has an anchor that is not there")
    return found


def _targets(path: Path, pages: dict[Path, Page]) -> list[Path]:
    parts = [urlsplit(link) for link in pages[path].links]
    return [_resolved(path, part.path) for part in parts if not (part.scheme or part.netloc)]


def _resolved(page: Path, path: str) -> Path:
    return (page.parent / unquote(path)).resolve() if path else page


def main(arguments: list[str]) -> int:
    """Print the faults of the site in the folder that is named."""
    site = Path(arguments[0]).resolve()
    found = faults(site)
    print("\n".join(found) or f"{site}: every link leads somewhere, every page can be reached")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

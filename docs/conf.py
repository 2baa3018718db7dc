"""How Sphinx builds the site: `nox -s docs`.

Pages are Markdown that reads well in the repository too. Their links to files of the repository,
which the site does not have, become links to the repository.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")  # the one that needs least, for Keras's layer
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCE = f"{PROJECT['urls']['Source']}/blob/main"

project = PROJECT["name"]
author = PROJECT["authors"][0]["name"]
copyright = author
version = release = re.findall(
    r'__version__ = "(.+)"', (ROOT / "anymha/version.py").read_text(encoding="utf-8")
)[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "examples"]
nitpicky = True
smartquotes_action = "D"  # dashes alone: quotes in docstrings are those of Python's strings
# Names of Python, of the frameworks and of arguments have no page here; names of anymha have one.
nitpick_ignore_regex = [
    ("py:(class|exc|meth|attr|data|func|mod)", r"(?!anymha[._]).*"),
    ("py:obj", r"(?!anymha\.).*"),
    # Types in signatures that are described where they are used.
    ("py:class", r"anymha\.(framework|layer|parity|options|interchange|testing)\..*"),
    # Parts that an author of a backend or of a layout finds in the source.
    ("py:obj", r"anymha\.(attention|execution|framework|interchange|layer|testing)\..*"),
]
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_domain_indices = False
html_theme_options = {
    "source_repository": PROJECT["urls"]["Source"],
    "source_branch": "main",
    "source_directory": "docs/",
}
pygments_style = "default"
pygments_dark_style = "github-dark"
copybutton_prompt_text = "$ "
copybutton_here_doc_delimiter = "EOF"
copybutton_line_continuation_character = "\\"

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings: one backtick is a name, which is linked where the reference has it.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Differs from"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
maximum_signature_line_length = 88

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
INCLUDED = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
FENCE = re.compile(r"^(?:```.*?^```|~~~.*?^~~~)$", re.MULTILINE | re.DOTALL)
PAGES = {  # pages of the site that show a file of the repository
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}


def linked(text: str, folder: Path, page: Path) -> str:
    """`text`, a file in `folder`, with links that work from `page` in the site."""

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = Path(os.path.normpath(folder / target))
        if not path.is_relative_to(ROOT) or not path.exists():
            return match[0]  # Sphinx reports it
        name = path.relative_to(ROOT).as_posix()
        path = ROOT / "docs" / PAGES.get(name, "") if name in PAGES else path
        shown = path.is_relative_to(ROOT / "docs") and path.suffix in (".md", ".svg", ".png")
        if not shown:
            return f"{label}({SOURCE}/{name}{anchor})"
        if label.strip("[]") in (path.name, f"docs/{path.name}"):
            label = "[]"  # Sphinx puts the page's title there
        return f"{label}({os.path.relpath(path, page.parent)}{anchor})"

    parts, end = [], 0
    for code in FENCE.finditer(text):
        parts += [LINK.sub(link, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(link, text[end:])])


def read(app: Any, name: str, content: list[str]) -> None:
    """Put in the files that a page includes, and turn links to the repository's files."""
    page = Path(app.env.doc2path(name))
    text = content[0]

    def included(match: re.Match[str]) -> str:
        path = (page.parent / match[1]).resolve()
        app.env.note_dependency(str(path))
        return linked(path.read_text(encoding="utf-8"), path.parent, page)

    content[0] = INCLUDED.sub(included, linked(text, page.parent, page))


def marked_up(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring: plurals of names, shapes with a star, linked errors."""
    text = "\n".join(lines)
    text = re.sub(r"(?<![`\\])(`[^`\n]+`)(?=[a-z])", r"\1\\ ", text)
    text = re.sub(r"(?<=, )\*O\)", r"\\*O)", text)
    text = re.sub(r"^:raises (?=\w+Error:)", ":raises ~anymha.errors.", text, flags=re.MULTILINE)
    text = text.replace("~anymha.errors.ParityError", "~anymha.parity.ParityError")
    text = text.replace("~anymha.errors.AnymhaError", "~anymha.AnymhaError")
    lines[:] = text.split("\n")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", marked_up, priority=900)  # after napoleon

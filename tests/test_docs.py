"""Every example runs: the Python blocks of README and docs, and the docstrings' examples."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import anymha
from anymha.framework.registry import BUILT_IN, LAYERS
from tests.frameworks import skip_or_fail

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"keras.md": "in tests/keras_checks.py, since importing Keras fixes its backend"}
PEERS = ("haiku", "optax")  # imported by pages of their own
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BACKENDS = [*BUILT_IN, *(layer for layer in LAYERS if f"{layer.name}.md" not in ELSEWHERE)]
NEEDS = {b.name: re.compile(rf"\b(anymha_)?{b.name}\b") for b in (*BUILT_IN, *LAYERS)}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(anymha.__path__, "anymha.")
    if not module.name.endswith((".matrix.pictures", "__main__"))  # that needs matplotlib
]


def skip_without(text: str) -> None:
    """Skip where `text` needs a framework that is not installed."""
    for backend in (*BUILT_IN, *LAYERS):
        if NEEDS[backend.name].search(text) and not backend.installed:
            pytest.skip(f"{backend.framework} is not installed")
    for name in PEERS:
        if re.search(rf"^import {name}\b", text, re.MULTILINE) and not find_spec(name):
            skip_or_fail(name, f"{name} is not installed")


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ELSEWHERE],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_python_blocks_of_a_page_run_in_order(page: Path) -> None:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    skip_without("\n".join(blocks))
    namespace: dict[str, object] = {"__name__": "example"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("name", [*MODULES, *(f"{b.package}.layer" for b in BACKENDS)])
def test_examples_of_a_module_give_what_they_show(name: str) -> None:
    for backend in BACKENDS:
        if name.startswith(backend.package) and not backend.installed:
            pytest.skip(f"{backend.framework} is not installed")
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module)
    assert failed == 0


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and the repository's host make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_of_a_page_lead_somewhere(page: Path) -> None:
    link = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
    for target, anchor in link.findall(prose(page)):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def test_the_page_of_use_has_the_lowest_versions_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    section = page.partition("## Your framework\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if "`pip install" in line]
    shown = {row[2].strip("`"): row[3].rstrip(" |").split(", ") for row in rows}
    wanted = {"pip install anymha": ["numpy>=2.1"]}
    for backend in (*BUILT_IN[1:], *LAYERS):
        wanted[f"pip install 'anymha[{backend.name}]'"] = extras[backend.name]
    assert shown == {
        command: [needed.replace(">=", " ") for needed in needs]
        for command, needs in wanted.items()
    }
    assert "numpy>=2.1" in project["dependencies"]
    assert f"Python {project['requires-python'].removeprefix('>=')} and NumPy 2.1" in section

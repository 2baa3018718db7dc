"""The reference has every public name; each docstring says shapes, errors, and has an example."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from anymha.framework.registry import BUILT_IN, LAYERS
from anymha.options.constraints import CONSTRAINTS
from anymha.options.initializers import INITIALIZERS
from anymha.options.regularizers import REGULARIZERS
from tests.frameworks import skip_or_fail

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text("utf-8") for path in (ROOT / "docs/reference").glob("*.md")}
DIRECTIVE = re.compile(
    r"^\.\. (?:auto|py:)(?:function|class|exception|data):: ([\w.]+)", re.MULTILINE
)
SHOWN = [name for page in PAGES.values() for name in DIRECTIVE.findall(page)]
MODULES = ("anymha", "anymha.parity", "anymha.testing")
HOMES = [f"{home.package}.MultiHeadAttention" for home in (*BUILT_IN, *LAYERS)]
PUBLIC = [
    f"{module}.{name}"
    for module in MODULES
    for name in importlib.import_module(module).__all__
    if not name.startswith("__")  # the version, a string, which the first page names
]
# What the layers have in common stands in `AttentionConfig` and `multi_head_attention`.
LAYER = "anymha.MultiHeadAttention"
PARITY = ("Comparison", "ParityError")
TESTS = ("Conformance", "FunctionTests", "SemanticsTests", "CAPABILITIES")
# These take no arrays and return none.
NO_SHAPES = ("convert", "explain", "layouts", "save", "AnymhaError", *PARITY, *TESTS)
NO_ERRORS = ("AnymhaError", "layouts", *PARITY, *TESTS)


def named(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def section(path: str) -> str:
    """What the reference shows of a name that has no docstring of its own."""
    (page,) = [page for page in PAGES.values() if path in DIRECTIVE.findall(page)]
    return page.split(f":: {path}\n", 1)[1]


def test_every_public_name_is_shown_once() -> None:
    assert sorted(name for name in SHOWN if name in {*PUBLIC, *HOMES}) == sorted([*PUBLIC, *HOMES])
    assert len(set(SHOWN)) == len(SHOWN)
    assert "`anymha.__version__`" in PAGES["index.md"]


@pytest.mark.parametrize(
    ("module", "table"),
    [("initializers", INITIALIZERS), ("regularizers", REGULARIZERS), ("constraints", CONSTRAINTS)],
)
def test_every_object_that_an_option_takes_is_shown(module: str, table: dict[str, type]) -> None:
    shown = [name for name in SHOWN if name.startswith(f"anymha.options.{module}.")]
    classes = dict.fromkeys(table.values())
    assert shown == [f"anymha.options.{module}.{each.__name__}" for each in classes]


def test_every_shown_name_exists() -> None:
    for path in SHOWN:
        if path not in HOMES:
            assert named(path) is not None, path


def test_every_page_is_in_the_table_and_the_contents() -> None:
    for name in PAGES:
        if name != "index.md":
            assert f"({name})" in PAGES["index.md"]
            assert f"\n{name.removesuffix('.md')}\n" in PAGES["index.md"]


@pytest.mark.parametrize("path", [path for path in PUBLIC if path != LAYER])
def test_docstring_has_shapes_errors_and_an_example(path: str) -> None:
    name = path.rsplit(".", 1)[1]
    text = section(path) if name == "CAPABILITIES" else inspect.getdoc(named(path)) or ""
    assert ">>>" in text or "```python" in text, f"{path} has no example"
    assert name in NO_ERRORS or "Raises:" in text, f"{path}: no errors"
    shaped = re.search(r"\([A-Z], ?[\w, *]+\)|\(\d+, [\d, ]+\)|shapes?\b", text)
    assert name in NO_SHAPES or shaped, f"{path} has no shapes"


@pytest.mark.parametrize("path", HOMES)
def test_every_layer_has_an_example(path: str) -> None:
    (home,) = [h for h in (*BUILT_IN, *LAYERS) if path.startswith(f"{h.package}.")]
    if not home.installed:
        skip_or_fail(home.name, f"{home.framework} is not installed")
    if home.name == "keras":
        pytest.skip("importing Keras fixes its backend; tests/keras_checks.py runs its example")
    assert ">>> layer = MultiHeadAttention(" in (inspect.getdoc(named(path)) or "")

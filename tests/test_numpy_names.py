"""Every name of NumPy's that the package uses is there in the NumPy that is installed.

`nox -s lowest` runs it with the oldest NumPy that is promised, also for lines which no test runs
there.
"""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

from tests.wheel_lines import ROOT, wheel_files

FILES = [str(path.relative_to(ROOT)) for path in wheel_files()]


def names_in(tree: ast.AST) -> set[str]:
    """The names ``np.a.b`` of a file as "a.b", each as long as it is written there."""
    found = set()
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        parts: list[str] = []
        at: ast.AST = node if id(node) not in inner else ast.Pass()
        while isinstance(at, ast.Attribute):
            parts.append(at.attr)
            at = at.value
        if parts and isinstance(at, ast.Name) and at.id == "np":
            found.add(".".join(reversed(parts)))
    return found


def is_there(name: str) -> bool:
    at: object = np
    for part in name.split("."):
        if not hasattr(at, part):
            return False
        at = getattr(at, part)
    return True


def test_names_are_found() -> None:
    tree = ast.parse("np.add.reduce(np.linalg.nothing(x).T, np.float33)")
    assert names_in(tree) == {"add.reduce", "linalg.nothing", "float33"}
    assert not is_there("linalg.nothing")
    assert not is_there("float33")


def test_names_are_there() -> None:
    used = {path: names_in(ast.parse((ROOT / path).read_text(encoding="utf-8"))) for path in FILES}
    assert len(set().union(*used.values())) > 100
    missing = {path: [n for n in names if not is_there(n)] for path, names in used.items()}
    assert {path: names for path, names in missing.items() if names} == {}


def test_numpy_has_one_name_in_the_package() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(Path(ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(
                    a.asname == "np" for a in node.names if a.name.split(".")[0] == "numpy"
                ), path

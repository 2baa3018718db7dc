"""Count the Python lines of the wheel: ``python -m tests.wheel_lines``, a row for each folder.

A line of code has something of Python on it; lines of docstrings, comments and blank ones have not.
"""

from __future__ import annotations

import ast
import io
import tokenize
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SILENT = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
)  # fmt: skip


@dataclass(frozen=True)
class Lines:
    """The lines of a file.

    Args:
        total: All.
        code: Those with code.
        docstrings: Those of docstrings.
    """

    total: int
    code: int
    docstrings: int


def wheel_files() -> list[Path]:
    """The Python files of the packages that pyproject.toml puts into the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def count(text: str) -> Lines:
    """Count the lines of a file's text."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            code.update(range(token.start[0], token.end[0] + 1))
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            docstrings.update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return Lines(len(text.splitlines()), len(code - docstrings), len(docstrings))


def main() -> None:
    """Print a row for each folder, and the sums."""
    rows: dict[str, Counter[str]] = {}
    for path in wheel_files():
        depth = 3 if path.is_relative_to(ROOT / "anymha" / "parity") else 2
        folder = "/".join(path.relative_to(ROOT).parts[:depth])
        lines = Counter(vars(count(path.read_text(encoding="utf-8"))))
        for name in (folder, "all"):
            rows[name] = rows.get(name, Counter()) + lines
    print(f"{'':32} {'lines':>7} {'code':>7} {'docstrings':>11}")
    for name in [*sorted(rows.keys() - {"all"}), "all"]:
        total, code, docstrings = (rows[name][key] for key in ("total", "code", "docstrings"))
        print(f"{name:32} {total:7,} {code:7,} {docstrings:11,}")


if __name__ == "__main__":
    main()

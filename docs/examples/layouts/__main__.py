"""Print how far our layer is from each library's, on its converted weights.

``python docs/examples/layouts`` for every library that is installed, as the table in
``docs/layouts.md``; ``--only`` for some of them. Exit status 1 where an error is too large.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import libraries
import numpy as np

DISTRIBUTIONS = {"haiku": "dm-haiku", "x_transformers": "x-transformers"}
BOUND = 1e-5
"""Of the largest output: what float32 arithmetic in one of the two may cost."""


def cases() -> Iterator[tuple[str, str, str, Callable[[], libraries.Pair]]]:
    """Each case: its name, its layout, the library that it needs, and what computes."""
    for name, (layout, library, pair) in libraries.LIBRARIES.items():
        yield name, layout, library, pair
    if not all(map(importlib.util.find_spec, ("transformers", "torch"))):
        return
    import families  # noqa: PLC0415  needs both

    for name, pair in families.FAMILIES.items():
        yield name, f"transformers.{name.partition(',')[0]}", "transformers", pair


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="WORD", help="cases whose name or layout holds this")
    only = parser.parse_args().only or ""
    print("| layer | layout | version | largest output | largest error |")
    print("|---|---|---|---|---|")
    failed = 0
    for name, layout, library, pair in cases():
        if only not in name and only not in layout:
            continue
        if importlib.util.find_spec(library) is None:
            print(f"| {name} | `{layout}` | not installed | | |")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries
                _, theirs, ours = pair()
        except ImportError as error:
            print(f"| {name} | `{layout}` | cannot be imported: {error} | | |")
            continue
        version = importlib.metadata.version(DISTRIBUTIONS.get(library, library))
        largest, error = np.abs(theirs).max(), np.abs(ours - theirs).max()
        failed += not error <= BOUND * largest
        print(
            f"| {name} | `{layout}` | {library} {version.partition('+')[0]} | {largest:.1f} | "
            f"{error:.1e} |",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

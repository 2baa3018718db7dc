"""All attention layers of a model's file from one layout to another, one layer at a time.

First everything is decided by names and shapes, and refused where it cannot be done; then each
layer is read, converted and written, so that the memory of one layer is enough for any model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anymha.errors import BiasWarning, UsageError
from anymha.interchange.anymha_files import ENTRY, configs_of
from anymha.interchange.conversion_plan import (
    OWN,
    Conversion,
    Converted,
    Job,
    chosen_layers,
    planned,
)
from anymha.interchange.detect import Candidate
from anymha.interchange.files.formats import create_file, format_of, open_file, writable_format
from anymha.interchange.layouts import get_layout
from anymha.interchange.naming import spellings


def convert_file(
    source: Path,
    target: Path,
    layout: str,
    to: str,
    *,
    prefix: str = "",
    to_prefix: str | None = None,
    others: bool = False,
    told: Callable[[int, int, str], None] = lambda done, count, prefix: None,
    check: Callable[[Converted], None] = lambda layer: None,
    **sizes: Any,
) -> Conversion:
    """Convert the attention layers of a file, and write them to another.

    Args:
        source: A file of any format that is known.
        target: The new file; its name tells the format. It is written whole or not at all.
        layout: The layout of the source's layers.
        to: The layout that they get; "anymha" for files that `anymha.load` reads.
        prefix: Only layers whose names begin so; ``{i}`` stands for a number, ``*`` for any text.
        to_prefix: What their names begin with in the target, with ``{i}``, ``{j}`` ... for the
            numbers of the source; default as in the source.
        others: Whether the other tensors of the source are copied as they are.
        told: Is called before each layer with how many are done, how many there are, and its
            prefix.
        check: Is called with each layer; what it raises ends the conversion without a file.
        **sizes: What the shapes do not show, as `anymha.to_canonical` takes it.

    Raises:
        UsageError: there is no such layer, or it cannot be converted.
        FileError: a file cannot be read or written.
        UnknownLayoutError: no layout has this name.
    """
    goal = writable_format(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"The two files must be different ones. Received: {source} twice.")
    kinds = get_layout(layout), get_layout(to)
    with open_file(source) as reader:
        ways = spellings(kinds[0], format_of(source))
        configs = configs_of(reader) if layout == OWN and ENTRY in reader.metadata else {}
        job = Job(reader, ways, spellings(kinds[1], goal)[0], sizes, configs)
        found = chosen_layers(job, prefix)
        plan, metadata = planned(job, found, to_prefix, others)
        if to == OWN and not goal.metadata:
            plan.note(f"{target.name} has no place for the configuration: `anymha.load` will not "
                      "read it. Write a .safetensors file.")  # fmt: skip
        with create_file(target, plan.tensors, metadata if goal.metadata else {}) as writer:
            for number, (start, one) in enumerate(found.items()):
                told(number, len(found), start)
                for name, array in _layer(job, start, one, plan, check):
                    writer.write(name, array)
            for name in plan.copied:
                writer.write(name, reader.read(name))
        return plan


def _layer(
    job: Job, start: str, one: Candidate, plan: Conversion, check: Callable[[Converted], None]
) -> Iterator[tuple[str, np.ndarray]]:
    """The names and arrays of a layer in the target."""
    arrays = {name: job.reader.read(start + place) for name, place in one.held.items()}
    wrong = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        names = ", ".join(start + one.held[name] for name in wrong)
        plan.note(f"Not all values are finite, and are carried as they are: {names}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasWarning)  # they are notes of the plan
        layer = job.converted(start, arrays)
        check(layer)
    end = plan.layers[start]
    for name, array in layer.result.items():
        yield end + job.target.names[name], array

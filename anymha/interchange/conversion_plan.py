"""What a conversion of a file will give, decided by names and shapes before a value is read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anymha.errors import AnymhaError, BiasWarning, UsageError
from anymha.interchange.anymha_files import entry
from anymha.interchange.detect import Candidate, candidate, find, matches, numbers_of, pattern_of
from anymha.interchange.files.formats import format_of
from anymha.interchange.files.reader import Reader, Tensor
from anymha.interchange.naming import Spelled
from anymha.interchange.weights import Weights
from anymha.options.config import AttentionConfig

OWN = "anymha"

Arrays = dict[str, np.ndarray]
Signature = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Converted:
    """A layer on its way from one layout to another.

    Args:
        prefix: What its names begin with in the source.
        arrays: The source's arrays by their names in its layout.
        weights: The canonical weights.
        config: The config that they fit.
        result: The target's arrays by their names in its layout.
    """

    prefix: str
    arrays: Arrays
    weights: Weights
    config: AttentionConfig
    result: Weights


@dataclass
class Conversion:
    """What was, or will be, converted.

    Args:
        layers: The prefix of each layer in the target by that in the source.
        tensors: Shape and dtype of all tensors of the target.
        copied: Names of the tensors that are copied as they are.
        left: Names of those of the source that are left out.
        notes: What is worth knowing beside: biases that were added, what else the forward pass
            needs, values that are not finite.
    """

    layers: dict[str, str]
    tensors: dict[str, Tensor]
    copied: list[str]
    left: list[str]
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Job:
    """The two layouts, and what the shapes do not tell."""

    reader: Reader
    source: list[Spelled]
    target: Spelled
    sizes: Mapping[str, Any]
    configs: Mapping[str, AttentionConfig]

    def converted(self, prefix: str, arrays: Arrays) -> Converted:
        """A layer, converted."""
        layout = self.source[0].layout
        try:
            weights, config = layout.to_canonical(arrays, **self.sizes)
            config = self.configs.get(prefix, config)
            return Converted(
                prefix, arrays, weights, config, self.target.layout.from_canonical(weights, config)
            )
        except AnymhaError as error:
            raise UsageError(f"{self.reader.path}, layer {prefix!r}: {error}") from error


def chosen_layers(job: Job, pattern: str) -> dict[str, Candidate]:
    """The layers of the source's layout whose names begin as the pattern says."""
    tensors, path = job.reader.tensors, job.reader.path
    layout = job.source[0].layout
    every = {
        start: candidate(spelled, tensors, start)
        for spelled in job.source
        for start in spelled.prefixes(tensors)
    }
    if not every:
        marks = " and ".join(repr(job.source[0].names[n]) for n in layout.required()[0])
        raise UsageError(
            f"{path} holds no layer of the layout {layout.name!r}, whose names end with {marks}. "
            "See what it holds with: anymha inspect FILE."
        )
    found = {start: one for start, one in every.items() if matches(start, pattern)}
    if not found:
        known = ", ".join(dict.fromkeys(repr(pattern_of(start)) for start in every))
        raise UsageError(
            f"{path} holds no layer whose names begin with {pattern!r}. Its layers begin with "
            f"{known}."
        )
    for group in find(tensors, format_of(path)):
        for start in group.prefixes:
            if start in found and layout.name not in [one.name for one in group.fits]:
                reason = group.misfits.get(layout.name, "")
                raise UsageError(f"{path}, layer {start!r}: {layout.name} does not fit: {reason}")
    return found


def planned(
    job: Job, found: Mapping[str, Candidate], to_prefix: str | None, others: bool
) -> tuple[Conversion, dict[str, str]]:
    """What the target will hold, from names and shapes alone; and its metadata."""
    tensors = job.reader.tensors
    used = {start + name for start, one in found.items() for name in one.held.values()}
    rest = [name for name in tensors if name not in used]
    plan = Conversion({}, {}, rest if others else [], [] if others else rest)
    kinds: dict[Signature, Converted] = {}
    configs = {}
    for start, one in found.items():
        signature = tuple((n, t.shape, t.dtype.name) for n, t in _tensors(job, start, one).items())
        if signature not in kinds or start in job.configs:
            zeros = {n: np.zeros(t.shape, t.dtype) for n, t in _tensors(job, start, one).items()}
            with warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always", BiasWarning)
                kinds[signature] = job.converted(start, zeros)
            for warning in given:
                plan.note(str(warning.message))
        kind = kinds[signature]
        for need in kind.result.needs:
            plan.note(f"Beside attention, the forward pass needs {need}.")
        end = _target_prefix(start, to_prefix, job.target.separator)
        plan.layers[start], configs[end] = end, kind.config
        for name, array in kind.result.items():
            _add(plan.tensors, end + job.target.names[name], Tensor(array.shape, array.dtype))
    for name in plan.copied:
        _add(plan.tensors, name, tensors[name])
    return plan, entry(configs) if job.target.layout.name == OWN else {}


def _add(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in tensors:
        raise UsageError(
            f"Two tensors of the new file would have the name {name!r}. Choose another "
            "`--to-prefix`, with {i} for the layers' numbers."
        )
    tensors[name] = tensor


def _tensors(job: Job, start: str, one: Candidate) -> dict[str, Tensor]:
    return {name: job.reader.tensors[start + place] for name, place in one.held.items()}


def _target_prefix(start: str, pattern: str | None, separator: str) -> str:
    """What a layer's names begin with in the target."""
    if pattern is None:
        end = start.replace("/" if separator == "." else ".", separator)
    else:
        end = pattern
        for letter, number in numbers_of(start).items():
            end = end.replace(f"{{{letter}}}", number)
    return end + separator if end and not end.endswith((".", "/")) else end

"""Plan the conversion of a file by names and shapes, before any value is read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anymha.errors import AnymhaError, BiasWarning, UsageError
from anymha.interchange.anymha_files import config_metadata
from anymha.interchange.detect import (
    LayoutFit,
    find_layer_groups,
    layout_fit,
    matches,
    numbers_of,
    pattern_of,
)
from anymha.interchange.files.formats import format_of
from anymha.interchange.files.reader import Reader, Tensor
from anymha.interchange.leftovers import refusal
from anymha.interchange.name_index import NameIndex
from anymha.interchange.naming import FileNaming
from anymha.interchange.weights import Weights
from anymha.options.config import AttentionConfig

OWN = "anymha"

Arrays = dict[str, np.ndarray]
Signature = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer in its old layout, in the canonical form, and in its new layout.

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
    """The content of the new file, and notes about it.

    Args:
        layers: The prefix of each layer in the target by that in the source.
        tensors: Shape and dtype of all tensors of the target.
        copied: Names of the tensors that are copied as they are.
        left: Names of the source's tensors that are left out.
        notes: Facts that the user should know: biases that were added, what else the forward pass
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
class ConversionJob:
    """A source, its layout and the new layout.

    Args:
        reader: The source.
        namings: The names that the source may use for its layout.
        target: The names in the new file.
        sizes: Sizes and options that the shapes do not show, as `to_canonical` takes them.
        configs: The configs that the source states, by prefix.
    """

    reader: Reader
    namings: list[FileNaming]
    target: FileNaming
    sizes: Mapping[str, Any]
    configs: Mapping[str, AttentionConfig]

    def convert(self, prefix: str, arrays: Arrays) -> ConvertedLayer:
        """Convert a layer.

        Raises:
            UsageError: it cannot be converted.
        """
        layout = self.namings[0].layout
        try:
            weights, config = layout.to_canonical(arrays, **self.sizes)
            config = self.configs.get(prefix, config)
            result = self.target.layout.from_canonical(weights, config)
        except AnymhaError as error:
            raise UsageError(f"{self.reader.path}, layer {prefix!r}: {error}") from error
        return ConvertedLayer(prefix, arrays, weights, config, result)


def choose_layers(job: ConversionJob, pattern: str) -> dict[str, LayoutFit]:
    """Choose the layers of the source's layout whose names begin with a pattern.

    Raises:
        UsageError: there is none, or the layout does not fit one of them.
    """
    tensors, path = job.reader.tensors, job.reader.path
    layout = job.namings[0].layout
    index, groups = NameIndex(tensors), find_layer_groups(tensors, format_of(path))
    layers = {
        prefix: layout_fit(naming, tensors, prefix)
        for naming in job.namings
        for prefix in naming.prefixes(index)
    }
    for group in groups:
        if group.kind and any(matches(prefix, pattern) for prefix in group.prefixes):
            raise UsageError(f"{path}, layer {group.prefixes[0]!r}: {refusal(group.kind)}")
    if not layers:
        marks = " and ".join(repr(job.namings[0].names[name]) for name in layout.required()[0])
        raise UsageError(
            f"{path} holds no layer of the layout {layout.name!r}, whose names end with {marks}. "
            "See what it holds with: anymha inspect FILE."
        )
    chosen = {prefix: fit for prefix, fit in layers.items() if matches(prefix, pattern)}
    if not chosen:
        known = ", ".join(dict.fromkeys(repr(pattern_of(prefix)) for prefix in layers))
        raise UsageError(
            f"{path} holds no layer whose names begin with {pattern!r}. Its layers begin with "
            f"{known}."
        )
    for group in groups:
        for prefix in group.prefixes:
            if prefix in chosen and layout.name not in [fit.name for fit in group.fits]:
                reason = group.misfits.get(layout.name, "")
                raise UsageError(f"{path}, layer {prefix!r}: {layout.name} does not fit: {reason}")
    return chosen


def plan_conversion(
    job: ConversionJob, layers: Mapping[str, LayoutFit], to_prefix: str | None, others: bool
) -> tuple[Conversion, dict[str, str]]:
    """Plan the content of the new file from names and shapes alone; and its metadata.

    Raises:
        UsageError: a layer cannot be converted, or two tensors would have one name.
    """
    tensors = job.reader.tensors
    used = {prefix + name for prefix, fit in layers.items() for name in fit.names.values()}
    rest = [name for name in tensors if name not in used]
    plan = Conversion({}, {}, rest if others else [], [] if others else rest)
    examples: dict[Signature, ConvertedLayer] = {}
    configs = {}
    for prefix, fit in layers.items():
        layer = _layer_tensors(job, prefix, fit)
        signature = tuple((name, t.shape, t.dtype.name) for name, t in layer.items())
        if signature not in examples or prefix in job.configs:
            zeros = {name: np.zeros(t.shape, t.dtype) for name, t in layer.items()}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", BiasWarning)
                examples[signature] = job.convert(prefix, zeros)
            for warning in caught:
                plan.note(str(warning.message))
        example = examples[signature]
        for need in example.result.needs:
            plan.note(f"Besides attention, the forward pass needs {need}.")
        new_prefix = _target_prefix(prefix, to_prefix, job.target.separator)
        plan.layers[prefix], configs[new_prefix] = new_prefix, example.config
        for name, array in example.result.items():
            _add(
                plan.tensors, new_prefix + job.target.names[name], Tensor(array.shape, array.dtype)
            )
    for name in plan.copied:
        _add(plan.tensors, name, tensors[name])
    return plan, config_metadata(configs) if job.target.layout.name == OWN else {}


def _add(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in tensors:
        raise UsageError(
            f"Two tensors of the new file would have the name {name!r}. Choose another "
            "`--to-prefix`, with {i} for the layers' numbers."
        )
    tensors[name] = tensor


def _layer_tensors(job: ConversionJob, prefix: str, fit: LayoutFit) -> dict[str, Tensor]:
    return {name: job.reader.tensors[prefix + place] for name, place in fit.names.items()}


def _target_prefix(prefix: str, pattern: str | None, separator: str) -> str:
    """The prefix of a layer in the target."""
    if pattern is None:
        new = prefix.replace("/" if separator == "." else ".", separator)
    else:
        new = pattern
        for letter, number in numbers_of(prefix).items():
            new = new.replace(f"{{{letter}}}", number)
    return new + separator if new and not new.endswith((".", "/")) else new

"""Plan the conversion of a file by names and shapes, before any value is read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anymha.errors import AnymhaError, BiasWarning, UsageError
from anymha.interchange.anymha_files import config_metadata
from anymha.interchange.compared_options import result_options
from anymha.interchange.detect import LayerGroup, LayoutFit, matches, numbers_of
from anymha.interchange.files.reader import Reader, Tensor
from anymha.interchange.layer_config import LayerConfig
from anymha.interchange.leftovers import learned, refusal, remarks_on
from anymha.interchange.model_config import NAME
from anymha.interchange.naming import FileNaming, natural_key
from anymha.interchange.weights import Weights
from anymha.options.config import AttentionConfig
from anymha.text import escaped, listed, quoted, shown

OWN = "anymha"

Arrays = dict[str, np.ndarray]
Signature = tuple[Any, ...]


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer in its old layout, in the canonical form, and in its new layout.

    Args:
        prefix: What its names begin with in the source.
        arrays: The source's arrays by their names in its layout.
        weights: The canonical weights.
        config: The config that they fit.
        result: The target's arrays by their names in its layout.
        model: The model's configuration; empty where there is none.
    """

    prefix: str
    arrays: Arrays
    weights: Weights
    config: AttentionConfig
    result: Weights
    model: LayerConfig


@dataclass
class Conversion:
    """The content of the new file, and notes about it.

    Args:
        layers: The prefix of each layer in the target by that in the source.
        tensors: Shape and dtype of all tensors of the target.
        copied: Names of the tensors that are copied as they are.
        left: Names of the source's tensors that are left out.
        notes: Facts that the user should know: biases that were added, what else the forward pass
            needs, arrays that the layout does not know, values that are not finite.
        verification: What was proved about the layers, in lines; empty where nothing was verified.
        layout: The layers' layout in the source.
        files: The new files: the one to open, then its shards where there are any.
    """

    layers: dict[str, str]
    tensors: dict[str, Tensor]
    copied: list[str]
    left: list[str]
    notes: list[str] = field(default_factory=list)
    verification: list[str] = field(default_factory=list)
    layout: str = ""
    files: list[Path] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once; control characters in it are escaped."""
        text = escaped(text)
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class ConversionJob:
    """A source, its layout and the new layout.

    Args:
        reader: The source.
        namings: The names that the source may use for its layout.
        target: The names in the new file.
        sizes: Gives the sizes and options that the shapes do not show, as `to_canonical` takes
            them, by a layer's prefix; the same object where they are the same.
        configs: The configs that the source states, by prefix.
        model: Gives the model's configuration by a layer's prefix.
    """

    reader: Reader
    namings: list[FileNaming]
    target: FileNaming
    sizes: Callable[[str], Mapping[str, Any]]
    configs: Mapping[str, AttentionConfig]
    model: Callable[[str], LayerConfig]

    def convert(self, prefix: str, arrays: Arrays) -> ConvertedLayer:
        """Convert a layer.

        Raises:
            UsageError: it cannot be converted.
        """
        layout, known = self.namings[0].layout, self.configs.get(prefix)
        own = () if known is None else result_options(known)
        options = {**self.sizes(prefix), **{name: getattr(known, name) for name in own}}
        try:
            weights, config = layout.to_canonical(arrays, **options)
            config = config if known is None else known
            result = self.target.layout.from_canonical(weights, config, copy=False)
        except AnymhaError as error:
            raise UsageError(
                f"{shown(self.reader.path)}, layer {quoted(prefix)}: {shown(error, 1000)}"
            ) from error
        return ConvertedLayer(prefix, arrays, weights, config, result, self.model(prefix))


def choose_layout(reader: Reader, groups: Sequence[LayerGroup], pattern: str) -> str:
    """The layout of all layers whose names begin with a pattern, where nothing else fits them.

    Raises:
        UsageError: there is no such layer, or several layouts may be meant.
    """
    path, tensors = reader.path, reader.tensors
    groups = [g for g in groups if any(matches(prefix, pattern) for prefix in g.prefixes)]
    _refuse_changed(path, groups, pattern)
    found = {group.pattern: group for group in groups if group.fits}
    names = {group.layout for group in found.values()}
    name = names.pop() if len(names) == 1 else None
    if name is not None:
        return name
    if not found:
        raise UsageError(
            f"{shown(path)} holds no attention layer of a known layout whose names begin with "
            f"{quoted(pattern)}. {_remarks(tensors)}See what it holds with: anymha inspect FILE."
        )
    fits = "; ".join(
        f"{quoted(group.pattern)}: {', '.join(fit.name for fit in group.fits)}"
        for group in found.values()
    )
    said = {group.stated for group in found.values() if group.stated and not group.layout}
    other = f" The {NAME} beside the file says {listed(said)}." if said else ""
    raise UsageError(
        f"{shown(path)}: name the layout (`layout=...`, `--from`), for names and shapes leave it "
        f"open. Of the layouts known here these fit: {fits}.{other}"
    )


def choose_layers(
    job: ConversionJob, groups: Sequence[LayerGroup], pattern: str
) -> dict[str, LayoutFit]:
    """Choose the layers of the source's layout whose names begin with a pattern.

    Raises:
        UsageError: there is none, or the layout does not fit one of them.
    """
    path, layout = job.reader.path, job.namings[0].layout
    chosen = [group for group in groups if any(matches(p, pattern) for p in group.prefixes)]
    _refuse_changed(path, chosen, pattern)
    layers: dict[str, LayoutFit] = {}
    known = []
    for group in groups:
        fit = next((fit for fit in group.fits if fit.name == layout.name), None)
        if fit is None and layout.name not in group.misfits:
            continue
        known.append(group.pattern)
        for prefix in group.prefixes:
            if matches(prefix, pattern) and fit is None:
                reason = group.misfits[layout.name]
                raise UsageError(
                    f"{shown(path)}, layer {quoted(prefix)}: {layout.name} does not fit: {reason}"
                )
            if matches(prefix, pattern) and fit is not None:
                layers[prefix] = fit
    if not known:
        marks = " and ".join(repr(job.namings[0].names[name]) for name in layout.required()[0])
        raise UsageError(
            f"{shown(path)} holds no layer of the layout {layout.name!r}, whose names end with "
            f"{marks}. {_remarks(job.reader.tensors)}See what it holds with: anymha inspect FILE."
        )
    if not layers:
        raise UsageError(
            f"{shown(path)} holds no layer whose names begin with {quoted(pattern)}. Its layers "
            f"begin with {listed(dict.fromkeys(map(quoted, known)))}."
        )
    return {prefix: layers[prefix] for prefix in sorted(layers, key=natural_key)}


def _remarks(tensors: Mapping[str, Tensor]) -> str:
    return "".join(f"{remark} " for remark in remarks_on(tensors))


def _refuse_changed(path: Path, groups: Sequence[LayerGroup], pattern: str) -> None:
    """Refuse layers that are quantised or have an adapter.

    Raises:
        UsageError: there is one.
    """
    for group in groups:
        for prefix in group.prefixes:
            if group.kind and matches(prefix, pattern):
                raise UsageError(f"{shown(path)}, layer {quoted(prefix)}: {refusal(group.kind)}")


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
    plan.layout = job.namings[0].layout.name
    examples: dict[Signature, ConvertedLayer] = {}
    configs = {}
    for prefix, fit in layers.items():
        if fit.unknown:
            plan.note(
                f"Not known to {fit.name}, and left out of its layers: {listed(fit.unknown)}. "
                "Make sure that they are no part of the attention."
            )
        for name in fit.masks:
            reason = learned(name, job.reader.read(prefix + name))
            if reason is not None:
                raise UsageError(f"{shown(job.reader.path)}, layer {quoted(prefix)}: {reason}.")
        layer = _layer_tensors(job, prefix, fit)
        signature = id(job.sizes(prefix)), *((n, t.shape, t.dtype.name) for n, t in layer.items())
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
            f"Two tensors of the new file would have the name {quoted(name)}. Choose another "
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

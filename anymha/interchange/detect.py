"""Detect the attention layers of a file, and the layouts that they may have.

Names and shapes decide. Several layouts may have the same ones and mean different things by them:
then all of them are listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from anymha.errors import AnymhaError, ArgumentError
from anymha.framework.dtypes import dtype_name
from anymha.framework.names import answers
from anymha.interchange.files.formats import FORMATS, Format, format_of, open_file
from anymha.interchange.files.reader import Tensor
from anymha.interchange.layout import Layout
from anymha.interchange.layouts import flat_arrays, get_layout, layouts
from anymha.interchange.leftovers import (
    changed_modules,
    changes_results,
    is_attention,
    is_buffer,
    is_own,
    may_be_mask,
    not_floats,
    of_mlp,
    refusal,
)
from anymha.interchange.limits import same_heads
from anymha.interchange.model_config import (
    family_of,
    layer_number,
    part_of,
    parts_of,
    read_config,
    stated_options,
    with_part,
)
from anymha.interchange.name_index import NameIndex
from anymha.interchange.naming import FileNaming, file_namings, natural_key
from anymha.interchange.packing import module_of
from anymha.interchange.weights import Weights
from anymha.options.config import AttentionConfig
from anymha.text import listed, quoted, shown

_NUMBER = re.compile(r"(?<![^./_])\d+(?![^./])")
_LETTERS = "ijklmnop"
_DEPTH = 4
"""The most parts of a projection's name."""
UNNAMED = ("fused.blocks", "fused.groups")
"""Layouts of no known library, which come last."""
MAX_AXIS = 2**24
"""No axis of an attention layer is longer; hostile shapes must not cost a search for divisors."""


@dataclass(frozen=True)
class LayoutFit:
    """A layout that a layer may have.

    Args:
        naming: The layout, and its names in the file.
        names: The file's names by the layout's, without the layer's prefix.
        shapes: Shapes by the layout's names.
        unknown: Names after the prefix that the layout does not know, and that are no buffers.
        masks: Names after the prefix that are buffers if their values are those of a causal mask.
        options: Sizes and options that the model's configuration states.
    """

    naming: FileNaming
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    unknown: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """The layout."""
        return self.naming.layout

    @property
    def name(self) -> str:
        """The layout's name."""
        return self.layout.name

    @property
    def modules(self) -> list[str]:
        """The names of the projections in the file, that of the output last."""
        pieces = [p for form in self.layout.forms for p in form.pieces if p.array in self.names]
        pieces.sort(key=lambda piece: piece.holds == ("output",))
        return list(dict.fromkeys(module_of(self.names[piece.array]) for piece in pieces))

    @property
    def config(self) -> AttentionConfig | None:
        """The config that shapes and configuration tell; None where they leave the heads open."""
        converted = self._converted
        return converted[1] if converted is not None else None

    @property
    def needs(self) -> tuple[str, ...]:
        """What the layer's forward pass needs besides attention, in words."""
        if self._converted is not None:
            return self._converted[0].needs
        needs = (need if isinstance(need, str) else need.words() for need in self.layout.needs)
        extras = (e.need for e in self.layout.extras if e.need and e.array in self.names)
        return (*needs, *extras)

    @property
    def _converted(self) -> tuple[Weights, AttentionConfig] | None:
        try:
            # An array of one number takes no memory, whatever its shape.
            zeros = {n: np.broadcast_to(np.float16(0), shape) for n, shape in self.shapes.items()}
            return self.layout.to_canonical(zeros, **self.options)
        except AnymhaError:
            return None


def mean_the_same(fits: Sequence[LayoutFit]) -> bool:
    """Whether layouts give the same weights and needs: then it does not matter which is chosen."""
    if not fits:
        return False
    first, *others = fits
    return all(
        (fit.layout.forms, fit.layout.extras, fit.layout.needs, fit.config)
        == (first.layout.forms, first.layout.extras, first.layout.needs, first.config)
        for fit in others
    )


@dataclass
class LayerGroup:
    """Layers of one kind, whose names differ in numbers alone.

    Args:
        pattern: What their names begin with, with letters for the numbers.
        prefixes: What the names of each begin with.
        fits: The layouts that they may have, the likeliest first.
        misfits: The layouts that have these names and do not fit, and the reasons.
        tensors: Shape and dtype of each array of the first layer, by its name there.
        kind: What the layers are where no layout can fit: quantised, or adapters of another layer.
        stated: The layout that the model's configuration names, which may be one that is not known
            here or does not fit; empty where there is no configuration.
    """

    pattern: str
    prefixes: list[str]
    fits: list[LayoutFit]
    misfits: dict[str, str]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    kind: str = ""
    stated: str = ""

    def __repr__(self) -> str:
        what = f", kind={self.kind!r}" if self.kind else ""
        fits = listed([fit.name for fit in self.fits])
        return f"LayerGroup({self.pattern!r}, {len(self.prefixes)} layers{what}, fits: {fits})"

    @property
    def layout(self) -> str | None:
        """The layout, where the model's configuration names it, or only one fits; else None.

        Of several that give the same weights it is the likeliest.
        """
        first = self.fits[0].name if self.fits else None
        if first is not None and first == self.stated:
            return first
        other_family = self.stated and str(first).startswith("transformers.")
        return first if mean_the_same(self.fits) and not other_family else None

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names after the prefix that no layout which fits knows."""
        unknown = [dict.fromkeys(fit.unknown) for fit in self.fits] or [{}]
        return tuple(name for name in unknown[0] if all(name in other for other in unknown))

    @property
    def config(self) -> AttentionConfig | None:
        """The config of the likeliest layout; None where there is none or heads are open."""
        return self.fits[0].config if self.fits else None


@answers(source="path file arrays state_dict")
def find_layers(
    source: str | os.PathLike[str] | Mapping[str, Any], *, max_bytes: int | None = None
) -> list[LayerGroup]:
    """Find the attention layers of a file or of a model's arrays, and the layouts that fit each.

    Names and shapes decide; no values are read. Where several layouts have the same names and
    shapes and may mean different things by them, all are listed.

    Args:
        source: A file or folder of weights, of any known format, with the `config.json` beside it
            where there is one; or arrays of any framework by name, also in nested dicts.
        max_bytes: The most bytes that a file's arrays may take together, whatever it claims;
            default 100 times the bytes of the file, and 64 MiB always.

    Returns:
        A group for each kind of layer: `pattern`, what their names begin with, with letters for
        numbers; `prefixes`, what the names of each begin with; `fits`, the layouts that they may
        have, the likeliest first, each with its `name`, its `names` (the names after the prefix by
        the layout's names), its `config` (None where the number of heads is open) and its `needs`;
        `layout`, the one that the configuration names, or where there is none, the only one that
        fits, else None;
        `misfits`, the reasons why others do not fit; `kind`, where no layout can fit: "quantised
        (...)" or "LoRA adapter".

    Raises:
        FileError: the file cannot be read, or its arrays take more than is allowed.
        ArgumentError: `source` is neither a path nor a mapping of arrays, or `max_bytes` is not a
            positive integer.

    Example:
        >>> import numpy as np
        >>> names = ("self.query", "self.key", "self.value", "output.dense")
        >>> arrays = {f"layer.{i}.{n}.weight": np.ones((8, 8)) for i in (0, 1) for n in names}
        >>> (group,) = find_layers(arrays)
        >>> group.pattern, group.prefixes, group.layout
        ('layer.{i}.', ['layer.0.', 'layer.1.'], 'transformers.bert')
    """
    if isinstance(source, Mapping):
        arrays = flat_arrays(source, ".")
        tensors = {name: _tensor(name, array) for name, array in arrays.items()}
        return find_layer_groups(tensors, FORMATS[0])
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentError(
            f"`source` must be a path or a mapping of arrays by name. Received: "
            f"{type(source).__qualname__}."
        )
    path = Path(source)
    with open_file(path, max_bytes) as reader:
        return find_layer_groups(
            reader.tensors, format_of(path), reader.config or read_config(path)
        )


def _tensor(name: str, array: Any) -> Tensor:
    try:
        dtype = dtype_name(array.dtype)
        return Tensor(tuple(int(size) for size in array.shape),
                      np.dtype(getattr(ml_dtypes, dtype, dtype)))  # fmt: skip
    except (AttributeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"`source` must hold arrays. Received: {type(array).__qualname__} as {quoted(name)}."
        ) from error


def find_layer_groups(
    tensors: Mapping[str, Tensor],
    file_format: Format,
    model_config: Mapping[str, Any] | None = None,
) -> list[LayerGroup]:
    """Find the attention layers of a file, grouped by names that differ in numbers alone.

    Args:
        tensors: Shape and dtype of each tensor of the file.
        file_format: The file's format.
        model_config: The model's configuration, as transformers has it.
    """
    model_config = model_config or {}
    parts = parts_of(model_config)
    index = NameIndex(tensors)
    changed = _changed_layers(tensors)
    candidates: dict[str, list[LayoutFit]] = {prefix: [] for prefix in changed}
    for name in sorted(layouts(), key=lambda name: (name in UNNAMED, name)):
        for naming in file_namings(get_layout(name), file_format):
            for prefix in naming.prefixes(index):
                candidates.setdefault(prefix, []).append(layout_fit(naming, tensors, prefix))
    claimed = {
        prefix + name: prefix
        for prefix in sorted(candidates, key=len)
        for fit in candidates[prefix]
        for name in fit.names.values()
    }

    @cache
    def config_of(part: str) -> Mapping[str, Any]:
        return with_part(model_config, part)

    @cache
    def options_of(part: str, name: str, number: int | None) -> dict[str, Any]:
        return stated_options(config_of(part), get_layout(name), number)

    groups: dict[object, LayerGroup] = {}
    judged: dict[object, LayerGroup] = {}  # most layers are alike
    for prefix in sorted(candidates, key=natural_key):
        part = part_of(parts, prefix)
        family = family_of(config_of(part))
        found = sorted(candidates[prefix], key=lambda fit: fit.name != family)
        number = layer_number(prefix) if model_config else None
        found = [replace(fit, options=options_of(part, fit.name, number)) for fit in found]
        names = [name for fit in found for name in fit.names.values()]
        names += _own_names(index, prefix, candidates, claimed)
        own = {name: tensors[prefix + name] for name in names}
        kinds = tuple((fit.name, fit.naming.separator, repr(fit.options)) for fit in found)
        alike = (part, changed.get(prefix), bool(prefix), is_attention(prefix), kinds,
                 tuple(own.items()))  # fmt: skip
        if alike not in judged:
            judged[alike] = _judge(found, own, changed.get(prefix, ""), prefix)
        group = judged[alike]
        key = (part, pattern_of(prefix), group.kind,
               tuple((fit.name, repr(fit.options)) for fit in group.fits),
               tuple(group.tensors.items()), tuple(fit.unknown for fit in group.fits))  # fmt: skip
        if key not in groups:
            groups[key] = replace(group, pattern=key[1], prefixes=[], stated=family)
        groups[key].prefixes.append(prefix)
    return list(groups.values())


def _judge(found: list[LayoutFit], own: Mapping[str, Tensor], kind: str, prefix: str) -> LayerGroup:
    """What a layer is, as a group without prefixes.

    Args:
        found: The layouts whose names it has.
        own: Its arrays by their names after the prefix.
        kind: What its projections are where they are no plain weights.
        prefix: What its names begin with.
    """
    fits = [replace(fit, **_unknown(fit, own, prefix)) for fit in found]
    kind = kind or _narrow(found, own)
    if kind:
        return LayerGroup("", [], [], {fit.name: refusal(kind) for fit in fits}, own, kind)
    best, misfits = select_fits(fits, prefix)
    shown = [name for fit in fits for name in fit.names.values()]
    shown += [name for fit in best or fits for name in fit.unknown]
    return LayerGroup("", [], best, misfits, {name: own[name] for name in shown})


def layout_fit(naming: FileNaming, tensors: Mapping[str, Tensor], prefix: str) -> LayoutFit:
    """The arrays of a layout that the layer with that prefix has."""
    names = naming.layer_names(tensors, prefix)
    shapes = {name: tensors[prefix + place].shape for name, place in names.items()}
    return LayoutFit(naming, names, shapes)


def _changed_layers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The prefixes of layers whose projections are quantised or have an adapter, and which."""
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    layers: dict[str, str] = {}
    for module, words in changed_modules(tensors, dtypes).items():
        starts = [0, *(match.end() for match in re.finditer(r"[./]", module))]
        for start in starts[-_DEPTH:]:
            if module[start:].replace("/", ".") in _projections():
                layers.setdefault(module[:start], words)
                break
    return layers


@cache
def _projections() -> frozenset[str]:
    """The names that layouts give to queries, keys and values."""
    pieces = (p for name in layouts() for form in get_layout(name).forms for p in form.pieces)
    kept = (p for p in pieces if p.holds not in (("output",), ("gate",)) and not p.optional)
    return frozenset(p.module.replace("/", ".") for p in kept)


def _narrow(fits: list[LayoutFit], own: Mapping[str, Tensor]) -> str:
    """What kernels of other dtypes than floats are; empty where all are floats."""
    kernels = {
        fit.names[name]
        for fit in fits
        for form in fit.layout.forms
        for name in form.required()
        if name in fit.names
    }
    return not_floats({name: own[name].dtype.name for name in kernels}) or ""


def _own_names(
    index: NameIndex, prefix: str, layers: Container[str], claimed: Mapping[str, str]
) -> list[str]:
    """The names after a prefix that belong to no other layer."""
    return [
        name
        for name in index.beginning(prefix)
        if claimed.get(prefix + name, prefix) == prefix
        and not any(prefix + name[: end.end()] in layers for end in re.finditer(r"[./]", name))
    ]


def _unknown(fit: LayoutFit, own: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[str, ...]]:
    """The names of a layer that a layout does not know, and those that may be masks."""
    known, modules = set(fit.names.values()), fit.modules
    rest = [name for name in own if name not in known and is_own(name, modules, prefix)]
    buffers = [name for name in rest if fit.layout.is_buffer(name, own[name].shape)]
    return {
        "unknown": tuple(name for name in rest if name not in buffers),
        "masks": tuple(name for name in buffers if may_be_mask(name, own[name].dtype)),
    }


def select_fits(
    candidates: list[LayoutFit], prefix: str = ""
) -> tuple[list[LayoutFit], dict[str, str]]:
    """Split candidates into the layouts that a layer may have, and the others with the reasons.

    A layout does not fit where it leaves out an array that another layout knows, or one that may
    change what the layer computes.

    Args:
        candidates: The layouts whose names the layer has.
        prefix: What the layer's names begin with.
    """
    misfits: dict[str, str] = {}
    fits = []
    for candidate in candidates:
        reason = (
            _oversized(candidate.shapes)
            or candidate.layout.fits(candidate.shapes)
            or of_mlp(candidate.names.values(), prefix)
        )
        if reason is None:
            fits.append(candidate)
        else:
            misfits[candidate.name] = reason
    best = []
    for fit in fits:
        known = _meant(fit)
        larger = next((other for other in fits if _meant(other) > known), None)
        reason = _left_over(fit, prefix)
        if larger is not None:
            left = ", ".join(name for name in larger.names.values() if name not in known)
            misfits[fit.name] = f"it has no {left}, as {larger.name!r} has."
        elif reason is not None:
            misfits[fit.name] = reason
        else:
            best.append(fit)
    if mean_the_same(best):  # the layer of one key head for each query head is the usual one
        best.sort(key=lambda fit: same_heads not in fit.layout.limits)
    names = {fit.name for fit in best}
    return best, {name: shown(why, 1000) for name, why in misfits.items() if name not in names}


def _meant(fit: LayoutFit) -> set[str]:
    """The file's names of a fit without buffers, which another layout may leave out."""
    return {
        place for name, place in fit.names.items() if not is_buffer(name, fit.shapes[name], True)
    }


def _left_over(fit: LayoutFit, prefix: str) -> str | None:
    """Why an array that the layout does not know speaks against it."""
    for name, reason in (fit.layout.refused or {}).items():
        if name in fit.unknown:
            return f"{fit.name} with `{name}` cannot be converted: {reason}"
    modules = fit.modules
    for name in fit.unknown:
        reason = changes_results(name, modules, prefix)
        if reason is not None:
            return f"{reason}, and {fit.name} has no place for it."
    return None


def _oversized(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for name, shape in shapes.items():
        if not all(0 < size <= MAX_AXIS for size in shape):
            return f"no attention layer has an array as large as `{name}` of shape {shape}."
    return None


def pattern_of(prefix: str) -> str:
    """The prefix with letters for its numbers: ``encoder.layer.{i}.attention.``."""
    letters = iter(_LETTERS)
    return _NUMBER.sub(lambda match: f"{{{next(letters, 'q')}}}", prefix)


def numbers_of(prefix: str) -> dict[str, str]:
    """The prefix's numbers by their letters."""
    return dict(zip(_LETTERS, _NUMBER.findall(prefix), strict=False))


def matches(prefix: str, pattern: str) -> bool:
    """Whether a layer's prefix begins with a pattern.

    Args:
        prefix: The prefix.
        pattern: A text; a letter in braces stands for a number, a star for any text. It ends where
            a part of the prefix ends.
    """
    parts = re.split(r"(\{[a-z]\}|\*)", pattern)
    text = "".join(
        r"\d+" if re.fullmatch(r"\{[a-z]\}", part) else ".*" if part == "*" else re.escape(part)
        for part in parts
    )
    end = "" if pattern.endswith((".", "/", "*")) or not pattern else r"(?=[./]|$)"
    return re.match(text + end, prefix) is not None

"""The layouts by name: those of anymha, one module per family, and those of others.

Other packages add layouts by the entry point group "anymha.layouts": its
name is the layout's, its value ``module:object``, an `anymha.interchange.layout.Layout`. They are
looked up only for a name that is not built in, and where all are listed. The names of the
built-in ones stay theirs.

The layout must be named, never guessed: two of them may have the same names and shapes and mean
different things.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from anymha.errors import ArgumentError, LayoutError, UnknownLayoutError
from anymha.framework.names import answers
from anymha.framework.registry import OTHER_NAMES, as_numpy, check_named, homes
from anymha.interchange.compared_options import result_options
from anymha.interchange.layout import Layout
from anymha.interchange.leftovers import MLA_REASON
from anymha.interchange.weights import Weights
from anymha.options.config import AttentionConfig
from anymha.text import quoted

ENTRY_POINTS = "anymha.layouts"
FAMILIES = (
    "own", "keras", "torch", "jax", "others", "encoders", "decoders", "rotary", "fused",
    "unnamed",
)  # fmt: skip
"""Modules of this package, each with a tuple `LAYOUTS`."""
SIZES = ("num_heads", "num_key_value_heads", "head_dim")
"""What `to_canonical` takes besides the arrays and the options that change a call's results."""
LATENT = ("transformers.deepseek_v2", "transformers.deepseek_v3", "transformers.minicpm3")
"""Families of multi-head latent attention, which are refused with the reason."""


def layouts() -> list[str]:
    """The names of all layouts.

    Example:
        >>> "transformers.gpt2" in layouts()
        True
    """
    return sorted({*_built_in(), *_entry_points()})


def get_layout(name: str, argument: str = "layout") -> Layout:
    """The layout of that name: its arrays, what its forward pass needs, and its limits.

    Args:
        name: Its name.
        argument: What errors call it.

    Raises:
        UnknownLayoutError: there is none.
        LayoutError: the family's attention cannot be converted.

    Example:
        >>> [need.option for need in get_layout("transformers.qwen3").needs]
        ['rotary', 'query_key_norm']
    """
    layout = _built_in().get(name)
    if layout is not None:
        return layout
    points = _entry_points()
    if name not in points and name in LATENT:
        raise LayoutError(f"{name}: {MLA_REASON}")
    if name not in points:
        raise UnknownLayoutError(unknown_name(argument, name, layouts()))
    return _plugged_in(points[name])


def unknown_name(argument: str, name: Any, known: Sequence[str]) -> str:
    """The message about a name that is not known: first what it may mean, then all there are."""
    lowered = {one.lower(): one for one in known}
    given = OTHER_NAMES.get(str(name).lower(), str(name).lower())
    first, dot, rest = given.partition(".")
    given = OTHER_NAMES.get(first, first) + dot + rest
    alike = [one for one in lowered if given in (one, one.rpartition(".")[2])]
    alike = alike or get_close_matches(given, lowered, 1)
    alike = alike or [one for one in lowered if one.startswith(f"{given}.")]
    meant = " or ".join(repr(lowered[one]) for one in alike) if len(alike) < 4 else ""
    meant = meant and f" Did you mean {meant}?"
    if given in homes() and "anymha" in known:
        meant += f" The layers of anymha, in {given} too, have the layout 'anymha'."
    return f"`{argument}`: none is called {name!r}.{meant} There are {', '.join(map(repr, known))}."


@answers(arrays="weights state_dict params")
def to_canonical(
    arrays: Mapping[str, Any], layout: str, **sizes: Any
) -> tuple[Weights, AttentionConfig]:
    """The canonical weights of one layer in a foreign layout, and the config that they fit.

    Args:
        arrays: The layer's arrays, of any framework, by their names in the layout, without the
            layer's prefix; nested dicts, as Flax's and Haiku's parameters, are taken too.
        layout: The layout's name; see `layouts`.
        **sizes: Sizes that the shapes do not show: `num_heads` (query heads H) or `head_dim` (the
            width d_k of each), and `num_key_value_heads` (K). And options of
            `anymha.AttentionConfig` that change a call's results, as `rotary`, `query_key_norm`,
            `scale` and `sliding_window`, with the values of the layer's own model. None or False
            for a step that the layout may need and this layer lacks, as ``clip=None``.

    Returns:
        The canonical weights, bit for bit, in a dict that has the attributes of
        `anymha.interchange.weights.Weights`: `needs`, what the layer's forward pass needs besides
        plain attention, in words, and `extras`, the arrays that the canonical form has no place
        for. And the config.

    Raises:
        UnknownLayoutError: no layout has this name.
        ArgumentError: `arrays` is no dict of arrays.
        WeightsError: names or shapes do not fit, or leave a size open.
        LayoutError: a part of the layer cannot be converted.

    Example:
        >>> import numpy as np
        >>> names = ("self.query", "self.key", "self.value", "output.dense")
        >>> arrays = {f"{name}.weight": np.ones((8, 8)) for name in names}
        >>> weights, config = to_canonical(arrays, "transformers.bert", num_heads=2)
        >>> weights["query.kernel"].shape, config.use_bias, weights.needs
        ((8, 2, 4), False, ())
    """
    source = get_layout(layout)
    check_named(arrays, "arrays")
    known = (*SIZES, *result_options())
    unknown = [name for name in sizes if name not in (*known, *source.need_options)]
    if unknown:
        raise ArgumentError(
            f"Sizes are {', '.join(known)}. Received: {', '.join(map(repr, unknown))}."
        )
    flat = {name: as_numpy(array) for name, array in flat_arrays(arrays, source.separator).items()}
    return source.to_canonical(flat, **sizes)


@answers(weights="arrays state_dict params")
def from_canonical(
    weights: Mapping[str, Any],
    layout: str,
    *,
    config: AttentionConfig | None = None,
    extras: Mapping[str, Any] | None = None,
    form: str | None = None,
) -> Weights:
    """The arrays of a foreign layout that hold these canonical weights.

    Args:
        weights: Canonical weights, of any framework.
        layout: The layout's name; see `layouts`.
        config: The layer's options; where the layout's layers lack one of them, or have another
            `scale`, the weights are refused. Default: the config that came with the weights.
        extras: Arrays of the layout besides the projections, by name, as norms of queries and
            keys. Default: those of the weights, where they are from this layout.
        form: The name of the layout's form, where it has several. Default: the form that the
            weights are from, else the first that can hold them.

    Returns:
        The arrays by name, bit for bit, each a copy and C-contiguous.

    Raises:
        UnknownLayoutError: no layout has this name.
        WeightsError: the weights are not canonical.
        LayoutError: the layout cannot hold these weights, or not without changing the results.

    Warns:
        BiasWarning: a bias of zeros was added or left out, as the layout demands.

    Example:
        >>> import anymha
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
        >>> arrays = from_canonical(anymha.get_weights(layer), "torch.MultiheadAttention")
        >>> {name: array.shape for name, array in arrays.items()}["in_proj_weight"]
        (24, 8)
    """
    return get_layout(layout).from_canonical(weights, config, extras=extras, form=form)


WRAPPED = ("get_value", "unbox")
"""The methods that give the array of a variable of `flax.nnx`, and of a box of `flax.linen`."""


def flat_arrays(arrays: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict, with the arrays that Flax's variables and boxes hold.

    Raises:
        ArgumentError: two of them have one name.
    """
    flat: dict[str, Any] = {}
    for name, value in arrays.items():
        path = prefix + (separator.join(name) if isinstance(name, tuple) else str(name))
        if isinstance(value, Mapping):
            inner = flat_arrays(value, separator, path + separator)
        else:
            unwrap = next(filter(None, (getattr(value, name, None) for name in WRAPPED)), None)
            inner = {path: value if unwrap is None else unwrap()}
        for twice in inner.keys() & flat.keys():
            raise ArgumentError(f"Two arrays have the name {quoted(twice)}.")
        flat |= inner
    return flat


@cache
def _built_in() -> dict[str, Layout]:
    modules = (importlib.import_module(f"{__name__}.{family}") for family in FAMILIES)
    return {layout.name: layout for module in modules for layout in module.LAYOUTS}


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {point.name: point for point in points if point.name not in _built_in()}


def _plugged_in(point: importlib.metadata.EntryPoint) -> Layout:
    try:
        layout = point.load()
    except (ImportError, AttributeError) as error:
        raise UnknownLayoutError(
            f"The layout {point.name!r} of {point.value} does not work: {error}. Install what it "
            "needs, or uninstall the package."
        ) from error
    if not isinstance(layout, Layout):
        raise UnknownLayoutError(
            f"The layout {point.name!r} of {point.value} must be an "
            f"`anymha.interchange.layout.Layout`. Received: {type(layout).__qualname__}."
        )
    return layout

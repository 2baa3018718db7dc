"""Weights in and out of live layers, ours and other libraries', through the canonical form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from anymha.errors import ArgumentError, LayoutError, WeightsError
from anymha.framework.names import answers
from anymha.framework.registry import backend_of, get_layer, named_arrays
from anymha.interchange import caches
from anymha.interchange.compared_options import check_same_results
from anymha.interchange.layouts import flat_arrays, from_canonical, get_layout, to_canonical
from anymha.interchange.layouts.own import from_torch_state
from anymha.interchange.libraries import check_target, make_layer, open_layer
from anymha.interchange.live_layer import LiveLayer
from anymha.interchange.rotary_order import (
    LAYOUT_OF,
    ORDER_OF,
    permuted,
    reordered,
    with_order,
)
from anymha.interchange.weights import Weights
from anymha.interchange.writing import (
    check_biases,
    check_weights,
    match_biases,
    split_features,
)
from anymha.layer.weights import nothing_drawn
from anymha.options.config import AttentionConfig

if TYPE_CHECKING:
    from anymha.interchange import homes

OWN = "anymha"
"""The layout of anymha's own layers."""


@answers(layer="model module")
def get_weights(layer: Any, **sizes: Any) -> Weights:
    """The layer's weights as NumPy arrays by canonical name, in the layer's dtype.

    Args:
        layer: A layer of anymha; or a live layer of another library: `torch.nn.MultiheadAttention`,
            Keras's `MultiHeadAttention` and `GroupQueryAttention`, `nnx.MultiHeadAttention`,
            Equinox's `MultiheadAttention`, an attention module of transformers, timm or
            x-transformers, or the parameters of Flax's linen or Haiku, as nested dicts.
        **sizes: Sizes and options that such a layer does not show, as `to_canonical` takes them:
            `num_heads` for Haiku.

    Returns:
        A dict with the attributes of `anymha.interchange.weights.Weights`: the layer's `config`,
        by which `set_weights` sees that another layer would compute something else; and of another
        library's layer what its forward pass `needs` besides plain attention, and its arrays that
        the canonical form has no place for.

    Raises:
        ArgumentError: `layer` is not such a layer.
        WeightsError: the layer has no weights yet, or does not show its sizes.
        LayoutError: a part of it cannot be converted.

    Example:
        >>> import anymha
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
        >>> {name: array.shape for name, array in anymha.get_weights(layer).items()}["query.kernel"]
        (8, 2, 4)
    """
    if not _is_ours(layer):
        return _read(open_layer(layer), sizes)
    _check_no_sizes(sizes)
    arrays = layer.canonical_weights()
    if not arrays:
        raise WeightsError(
            "The layer has no weights yet. Call it once, or pass `query_features` to its "
            "constructor."
        )
    values = {
        name: np.array(backend_of(array).ops.to_numpy(array), order="C")
        for name, array in arrays.items()
    }
    return Weights(values, layout=OWN, config=layer.config)


def _check_no_sizes(sizes: Mapping[str, Any]) -> None:
    """Refuse sizes of a layer of anymha."""
    if sizes:
        raise ArgumentError(
            f"A layer of anymha knows its sizes. Received: {', '.join(sizes)}. Leave it out."
        )


@answers(weights="state_dict params arrays")
def set_weights(layer: Any, weights: Mapping[str, Any], **sizes: Any) -> Any:
    """The layer with these weights: itself, or a new one where layers are frozen.

    Args:
        layer: A layer, as `get_weights` takes it.
        weights: Arrays by canonical name, one for each weight of the layer; nested dicts and the
            `nnx.State` of Flax's layer as well. For a layer of anymha also the `state_dict` of
            PyTorch's layer. Another library's layer gets zeros for biases that the weights do not
            have. Weights of `get_weights` and `to_canonical` bring the options of their layer,
            which are compared with this one's; ``dict(weights)`` sets the arrays alone.
        **sizes: Sizes that another library's layer does not show, as for `get_weights`.

    Returns:
        The layer itself; a new one for JAX's and Equinox's layers and for parameters as dicts.

    Raises:
        ArgumentError: `layer` is not such a layer.
        WeightsError: names or shapes do not fit; the layer is left as it was.
        LayoutError: the layer that the weights are from computes something else.

    Warns:
        BiasWarning: a bias of zeros was added or left out.

    Example:
        >>> import anymha
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
        >>> other = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=1)
        >>> other = anymha.set_weights(other, anymha.get_weights(layer))
        >>> bool((other.weights["query.kernel"] == layer.weights["query.kernel"]).all())
        True
    """
    source = weights if isinstance(weights, Weights) else None
    if source is None and isinstance(weights, Mapping):
        weights = flat_arrays(weights, ".")
    if _is_ours(layer):
        _check_no_sizes(sizes)
        values = named_arrays(weights)
        if source is not None and source.config is not None:
            values, config = _in_order_of(layer.config, source, values)
            check_same_results("the layer", layer.config, config, unknown=source.unknown)
        with nothing_drawn():  # where the layer has no weights yet
            return layer.with_canonical_weights(from_torch_state(layer.config, values))
    live = open_layer(layer)
    current = _read(live, sizes)
    values, _ = check_weights(weights)
    check_biases(values)
    config = None
    if source is not None and source.config is not None:
        values, config = _in_order_of(current.config, source, values)
    values, features = split_features(values)
    own, own_features = split_features(current)
    values = match_biases(live.layout, own, values) | features
    _check_features(live.layout, own_features, features)
    for name, value in values.items():
        if value.shape != current[name].shape:
            raise WeightsError(
                f"`{name}` must have shape {current[name].shape} in this layer of {live.layout}. "
                f"Received: shape {value.shape}."
            )
    if source is not None and config is not None:
        check_same_results(
            f"the layer of {live.layout}",
            current.config,
            config,
            unknown=(*source.unknown, *current.unknown),
        )
    values = reordered(values, source.rotary if source is not None else None, current.rotary)
    values = Weights(values, layout=live.layout, form=current.form, config=current.config)
    arrays = get_layout(live.layout).from_canonical(values, extras=_extras(live, current, source))
    return live.write({name: array for name, array in arrays.items() if name in live.arrays})


def _in_order_of(
    config: AttentionConfig, source: Weights, values: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], AttentionConfig]:
    """Weights and their config with the order of elements that a layer's rotary positions have."""
    rotary: Any = config.rotary
    order = "" if rotary is None else ORDER_OF[rotary.layout]
    unknown = source.rotary
    if rotary is not None and unknown is not None and unknown.order not in ("", order):
        own = dataclasses.replace(rotary, layout=LAYOUT_OF[unknown.order])
        return permuted(values, own, config.key_dim), source.config
    values, own_config = with_order(values, source.config, order)
    return values, own_config or config


def _check_features(
    layout: str, own: Mapping[str, np.ndarray], features: Mapping[str, np.ndarray]
) -> None:
    """Check that a layer has the weights of options that are to be set, and no other ones.

    Raises:
        WeightsError: it has other ones.
    """
    lacking = [name for name in own if name not in features]
    homeless = [name for name in features if name not in own]
    if lacking or homeless:
        raise WeightsError(
            f"The layer of {layout} has the weights {', '.join(own) or 'of no option'} besides "
            f"those of the projections. Missing: {', '.join(lacking) or 'none'}. Unknown: "
            f"{', '.join(homeless) or 'none'}."
        )


@overload
def convert(
    layer: Any, to: Literal["numpy"], *, weights_only: bool = False, **sizes: Any
) -> homes.NumpyLayer: ...
@overload
def convert(
    layer: Any, to: Literal["torch"], *, weights_only: bool = False, **sizes: Any
) -> homes.TorchLayer: ...
@overload
def convert(
    layer: Any, to: Literal["tensorflow"], *, weights_only: bool = False, **sizes: Any
) -> homes.TensorflowLayer: ...
@overload
def convert(
    layer: Any, to: Literal["jax"], *, weights_only: bool = False, **sizes: Any
) -> homes.JaxLayer: ...
@overload
def convert(
    layer: Any, to: Literal["keras"], *, weights_only: bool = False, **sizes: Any
) -> homes.KerasLayer: ...
@overload
def convert(
    layer: Any, to: Literal["flax"], *, weights_only: bool = False, **sizes: Any
) -> homes.FlaxLayer: ...
@overload
def convert(
    layer: Any, to: Literal["equinox"], *, weights_only: bool = False, **sizes: Any
) -> homes.EquinoxLayer: ...
@overload
def convert(layer: Any, to: str, *, weights_only: bool = False, **sizes: Any) -> Any: ...
@answers(to="backend framework")
def convert(layer: Any, to: str, *, weights_only: bool = False, **sizes: Any) -> Any:
    """The native layer of another framework, with the same configuration and the same weights.

    Args:
        layer: A layer, as `get_weights` takes it; or a `Cache` or a `Memory`, to go on with it in
            another framework.
        to: The name of a backend, for a layer of anymha; or a layout, for the layer of a library:
            "torch.MultiheadAttention", "keras.MultiHeadAttention", "keras.GroupQueryAttention",
            "flax.nnx.MultiHeadAttention", "equinox.MultiheadAttention"; the parameters of
            "flax.linen.MultiHeadDotProductAttention" and "haiku.MultiHeadAttention".
        weights_only: Convert also a layer whose forward pass needs more than attention, as rotary
            positions; the new layer then lacks it.
        **sizes: Sizes that another library's layer does not show, as for `get_weights`.

    Raises:
        ArgumentError: `layer` is not such a layer.
        WeightsError: the layer has no weights yet.
        LayoutError: the new layer would compute something else.
        BackendNotInstalledError: the framework is not installed.

    Example:
        >>> import anymha
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
        >>> type(convert(layer, to="numpy")).__module__
        'anymha_numpy.layer'
    """
    if caches.is_held(layer):
        if sizes or weights_only:
            raise ArgumentError(
                "A cache or a memory is converted as it is. Received: other arguments. Leave them "
                "out."
            )
        return caches.converted(layer, to)
    caches.check_is_single(layer)
    check_target(to)
    weights = get_weights(layer, **sizes)
    needs = weights.needs
    if needs and not weights_only:
        raise LayoutError(
            f"The {type(layer).__name__} computes more than attention: {'; '.join(needs)}. The new "
            "layer would lack it. Pass `weights_only=True` to convert the projections all the same."
        )
    options = weights.config.to_dict()
    names = {"query_features": "query", "value_features": "value", "key_features": "key"}
    options |= {option: weights[f"{name}.kernel"].shape[0] for option, name in names.items()}
    options["dtype"] = weights["query.kernel"].dtype.name
    config = AttentionConfig.from_dict(options)
    if "." in to:
        return make_layer(to, from_canonical(dict(weights), to, config=config), config)
    return new_layer(to, config, dict(weights))


def new_layer(backend: str, config: AttentionConfig, weights: Mapping[str, Any]) -> Any:
    """The native layer of a backend with these options and canonical weights.

    No other values are drawn first, and its name is one that is valid there.

    Raises:
        UnknownBackendError: no backend has this name.
        BackendNotInstalledError: its framework is not installed.
        WeightsError: names or shapes do not fit.
    """
    layer = get_layer(backend)
    if config.name is not None and hasattr(layer, "valid_name"):
        config = dataclasses.replace(config, name=layer.valid_name(config.name))
    with nothing_drawn():
        return set_weights(layer(**config.to_dict()), weights)


def _is_ours(layer: Any) -> bool:
    return hasattr(layer, "canonical_weights")


def _read(live: LiveLayer, sizes: Mapping[str, Any]) -> Weights:
    """The canonical weights of another library's layer, with its config."""
    if not live.arrays:
        raise WeightsError(
            f"The layer of {live.layout} has no weights yet. Call it once, or build it."
        )
    weights, config = to_canonical(live.arrays, live.layout, **{**live.sizes, **sizes})
    config = dataclasses.replace(config, **live.options)
    if math.isclose(config.scale_value, 1 / math.sqrt(config.key_dim), rel_tol=1e-6):
        config = dataclasses.replace(config, scale=None)
    weights.config = config
    weights.needs = (*weights.needs, *live.needs)
    return weights


def _extras(live: LiveLayer, current: Weights, source: Weights | None) -> dict[str, np.ndarray]:
    """The arrays other than the projections: the source's where it has the same layout."""
    if source is None:
        return current.extras
    if source.layout != live.layout:
        if source.lost:
            raise LayoutError(
                f"The layer of {live.layout} has no place for {', '.join(source.lost)}, which the "
                f"layer of {source.layout} has. Pass `dict(weights)` to set the projections alone."
            )
        return current.extras
    lacking = [name for name in source.lost if name not in current.extras]
    misshapen = [
        n
        for n, a in source.extras.items()
        if n in current.extras and a.shape != current.extras[n].shape
    ]
    if lacking or misshapen:
        raise WeightsError(
            f"The arrays besides the projections do not fit this layer of {live.layout}. It lacks: "
            f"{', '.join(lacking) or 'none'}. Of another shape: {', '.join(misshapen) or 'none'}."
        )
    return {**current.extras, **{n: a for n, a in source.extras.items() if n in current.extras}}

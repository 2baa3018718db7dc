"""What bad input gets: an error of anymha, also the builtin one, in full words, before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha import errors
from anymha.framework import registry
from anymha.framework.registry import Backend, get_backend
from tests.support import bits, native

SIZES: dict[str, Any] = {"num_heads": 2, "key_dim": 3, "query_features": 8}


def _raises(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    """The call raises exactly this error, an anymha one, with exactly this text."""
    with pytest.raises(error, match=f"^{re.escape(text)}$") as caught:
        call()
    assert type(caught.value) is error
    assert isinstance(caught.value, errors.AnymhaError)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.ShapeError, ValueError),
        (errors.DtypeError, TypeError),
        (errors.ArgumentError, TypeError),
        (errors.MixedBackendsError, TypeError),
        (errors.UnknownBackendError, ValueError),
        (errors.BackendNotInstalledError, ImportError),
        (errors.WeightsError, ValueError),
    ],
)
def test_errors_are_also_the_builtin_ones(error: type, builtin: type) -> None:
    assert issubclass(error, builtin)
    assert issubclass(error, anymha.AnymhaError)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if anything is computed."""

    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("the computation was entered")

    monkeypatch.setattr("anymha.layer.forward._execute", computed)
    monkeypatch.setattr("anymha.functional._attend", computed)


_SIZE = "must be an integer of at least 1. Received: "
_RATE = "`dropout` must be a number in [0, 1), the share that is dropped. Received: "
_DTYPE = "must be one of float16, bfloat16, float32, float64. Received: "
_AXES = "`attention_axes` must be an integer or a tuple of integers, each once. Received: "
_AXES_REMEDY = ". Pass None for all axes but the first and the last."
_SHAPE = "`output_shape` must be an integer of at least 1, or a tuple of such. Received: "
_BIAS = (
    "`use_bias` must be True, False, or names out of 'query', 'key', 'value', 'output'. Received: "
)
_SCALE = "`scale` must be a finite number, or None for 1/sqrt(key_dim). Received: "
_SEED = "`seed` must be an integer, or None to draw one. Received: "
OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"`{name}` {_SIZE}0.") for name in ("num_heads", "key_dim", "value_dim")),
    *(
        ({name: -2}, f"`{name}` {_SIZE}-2.")
        for name in ("num_key_value_heads", "query_features", "value_features", "key_features")
    ),
    ({"sliding_window": 0}, f"`sliding_window` {_SIZE}0."),
    ({"num_heads": 2.0}, f"`num_heads` {_SIZE}2.0."),
    ({"num_heads": True}, f"`num_heads` {_SIZE}True."),
    ({"key_dim": None}, f"`key_dim` {_SIZE}None."),
    (
        {"num_heads": 4, "num_key_value_heads": 3},
        "`num_heads` must be a multiple of `num_key_value_heads`. Received: num_heads=4, "
        "num_key_value_heads=3. Pass a divisor of `num_heads`.",
    ),
    *(
        ({"dropout": rate}, f"{_RATE}{rate!r}.")
        for rate in (1, 1.0, -0.1, float("nan"), float("inf"), "0.1", None, True)
    ),
    ({"dtype": "float8"}, f"`dtype` {_DTYPE}'float8'."),
    ({"dtype": np.int32}, f"`dtype` {_DTYPE}<class 'numpy.int32'>."),
    ({"dtype": None}, f"`dtype` {_DTYPE}None."),
    ({"compute_dtype": "int8"}, f"`compute_dtype` {_DTYPE}'int8'."),
    *(
        ({"attention_axes": axes}, f"{_AXES}{axes!r}{_AXES_REMEDY}")
        for axes in ((1, 1), (), 1.5, "1", (1, None), [2, 2], True)
    ),
    *(({"output_shape": shape}, f"{_SHAPE}{shape!r}.") for shape in (0, (2, 0), -1, (2, "3"), 2.5)),
    *(({"use_bias": bias}, f"{_BIAS}{bias!r}.") for bias in (None, "query", ("query", "keys"), 1)),
    *(({"scale": scale}, f"{_SCALE}{scale!r}.") for scale in (float("nan"), float("inf"), "half")),
    *(({"seed": seed}, f"{_SEED}{seed!r}.") for seed in (1.5, "1", True)),
    (
        {"dropout_rng": "fast"},
        "`dropout_rng` must be one of 'portable', 'native'. Received: 'fast'.",
    ),
    (
        {"query_features": None, "value_features": 4},
        "`value_features` and `key_features` need `query_features` beside them. Received: "
        "query_features=None, value_features=4, key_features=None. Pass `query_features` too, or "
        "none of them.",
    ),
]


@pytest.mark.parametrize(("options", "text"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_bad_option(options: dict[str, Any], text: str) -> None:
    _raises(errors.ConfigError, text, lambda: anymha.AttentionConfig(**{**SIZES, **options}))


def test_bad_option_of_a_layer(backend: Backend) -> None:
    _raises(
        errors.ConfigError,
        f"`num_heads` {_SIZE}0.",
        lambda: anymha.MultiHeadAttention(0, 3, backend=backend.name),
    )


def test_unknown_option_of_a_dict() -> None:
    with pytest.raises(errors.ConfigError, match=r"^Unknown options: heads, size\. Known are: act"):
        anymha.AttentionConfig.from_dict({"num_heads": 2, "key_dim": 3, "size": 1, "heads": 2})


def test_shapes_without_a_width() -> None:
    _raises(
        errors.ConfigError,
        "`query_features`, the width of the query input, is needed to know the shapes of the "
        "weights. Received: None. Pass it here or to the constructor.",
        lambda: anymha.AttentionConfig(2, 3).weight_shapes(),
    )


X = np.ones((2, 5, 8), np.float32)
Y = np.ones((2, 6, 8), np.float32)

_MASKS = {"attention_mask": (5, 6), "query_mask": (2, 5), "value_mask": (2, 6), "key_mask": (2, 6)}
_BROADCAST = "Give each axis that length, or 1."


def _not_boolean(name: str, dtype: str, shape: str) -> str:
    return (
        f"`{name}` must be boolean, True = may attend. Received: shape {shape}, dtype {dtype}. "
        "Pass an additive mask as `attention_bias` (`bias` in `dot_product_attention`), and a "
        f"0/1 mask as booleans, `{name} != 0`."
    )


CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    **{
        f"{dtype} {name}": (
            {"value": Y, name: np.ones(shape, dtype)},
            errors.DtypeError,
            _not_boolean(name, dtype, str(shape)),
        )
        for name, shape in _MASKS.items()
        for dtype in ("float32", "int32")
    },
    "attention mask of other lengths": (
        {"value": Y, "attention_mask": np.ones((6, 5), bool)},
        errors.ShapeError,
        "`attention_mask` must broadcast to shape (5, 6). Received: shape (6, 5), dtype bool. "
        + _BROADCAST,
    ),
    "attention mask of keys alone": (
        {"value": Y, "attention_mask": np.ones((2, 6), bool)},
        errors.ShapeError,
        "`attention_mask` must broadcast to shape (5, 6). Received: shape (2, 6), dtype bool. "
        "Pass a mask of keys, (B, S), as `value_mask`.",
    ),
    "attention mask of another batch": (
        {"value": Y, "attention_mask": np.ones((3, 5, 6), bool)},
        errors.ShapeError,
        "`attention_mask` must broadcast to shape (2, 5, 6). Received: shape (3, 5, 6), dtype "
        "bool. " + _BROADCAST,
    ),
    "attention mask of another number of heads": (
        {"value": Y, "attention_mask": np.ones((2, 3, 5, 6), bool)},
        errors.ShapeError,
        "`attention_mask` must broadcast to shape (2, 2, 5, 6). Received: shape (2, 3, 5, 6), "
        "dtype bool. " + _BROADCAST,
    ),
    "attention mask of rank 1": (
        {"value": Y, "attention_mask": np.ones(6, bool)},
        errors.ShapeError,
        "`attention_mask` must have shape (5, 6) or (2, 5, 6) or (2, 2, 5, 6): queries and keys; "
        "batch before them; heads between. Received: shape (6,), dtype bool. Add axes of length 1 "
        "to broadcast.",
    ),
    "query mask of the keys' length": (
        {"value": Y, "query_mask": np.ones((2, 6), bool)},
        errors.ShapeError,
        "`query_mask` must broadcast to shape (2, 5). Received: shape (2, 6), dtype bool. "
        + _BROADCAST,
    ),
    "value mask of rank 4": (
        {"value": Y, "value_mask": np.ones((2, 1, 1, 6), bool)},
        errors.ShapeError,
        "`value_mask` must have shape (2, 6). Received: shape (2, 1, 1, 6), dtype bool. Pass what "
        "has more axes as `attention_mask`.",
    ),
    "key mask of another batch": (
        {"value": Y, "key_mask": np.ones((3, 6), bool)},
        errors.ShapeError,
        "`key_mask` must broadcast to shape (2, 6). Received: shape (3, 6), dtype bool. "
        + _BROADCAST,
    ),
    "bias of other lengths": (
        {"value": Y, "attention_bias": np.ones((2, 2, 5, 5), np.float32)},
        errors.ShapeError,
        "`attention_bias` must broadcast to shape (2, 2, 5, 6). Received: shape (2, 2, 5, 5), "
        "dtype float32. " + _BROADCAST,
    ),
    "boolean bias": (
        {"value": Y, "attention_bias": np.ones((5, 6), bool)},
        errors.DtypeError,
        "`attention_bias` must be floating (float16, bfloat16, float32 or float64). Received: "
        "shape (5, 6), dtype bool. Cast it first.",
    ),
    "integer query": (
        {"query": X.astype(np.int32)},
        errors.DtypeError,
        "`query` must be floating (float16, bfloat16, float32 or float64). Received: shape "
        "(2, 5, 8), dtype int32. Cast it first.",
    ),
    "lengths of value and key": (
        {"value": Y, "key": X},
        errors.ShapeError,
        "`key` and `value` must have the same length. Received: `key` of shape (2, 5, 8), dtype "
        "float32, and `value` of shape (2, 6, 8), dtype float32. Each key needs its value.",
    ),
    "batch of value": (
        {"value": Y[:1]},
        errors.ShapeError,
        "`value` must have the lengths of `query` in the batch axes, 0. Received: `value` of "
        "shape (1, 6, 8), dtype float32, and `query` of shape (2, 5, 8), dtype float32. Repeat "
        "the shorter one.",
    ),
    "rank of value": (
        {"value": Y[0]},
        errors.ShapeError,
        "`value` must have as many axes as `query`. Received: `value` of shape (6, 8), dtype "
        "float32, and `query` of shape (2, 5, 8), dtype float32. Add or take away axes.",
    ),
    "width of query": (
        {"query": X[..., :7]},
        errors.ShapeError,
        "`query` must have 8 features in its last axis, as the layer's weights have. Received: "
        "shape (2, 5, 7), dtype float32. Pass such an array, or make a layer of "
        "`query_features=7`.",
    ),
    "width of key": (
        {"value": Y, "key": Y[..., :3]},
        errors.ShapeError,
        "`key` must have 8 features in its last axis, as the layer's weights have. Received: "
        "shape (2, 6, 3), dtype float32. Pass such an array, or make a layer of `key_features=3`.",
    ),
    "rank of query": (
        {"query": X[0]},
        errors.ShapeError,
        "`query` must have at least 3 axes, (batch, length, features). Received: 2 axes. Add the "
        "axis, or name the axes with `attention_axes`.",
    ),
    "empty list": (
        {"query": []},
        errors.ArgumentError,
        "A list in the first place must be [query], [query, value] or [query, value, key], with "
        "no `value` or `key` beside it. Received: 0 members, value=NoneType, key=NoneType.",
    ),
    "numbers for an array": (
        {"query": 1.0},
        errors.ArgumentError,
        "`query` must be an array of {name}, the framework of this call. Received: float. "
        "Convert it first: one call takes arrays of one framework.",
    ),
    "offset of a float": (
        {"query_offset": 1.5},
        errors.ArgumentError,
        "`query_offset` must be an int, or an integer array (B,) of {name}. Received: 1.5. Pass an "
        "int.",
    ),
    "offset for another batch": (
        {"query_offset": np.zeros(3, np.int32)},
        errors.ShapeError,
        "`query_offset` must broadcast to shape (2,). Received: shape (3,), dtype int32. "
        + _BROADCAST,
    ),
    "seed of a string": (
        {"training": True, "seed": "x"},
        errors.ArgumentError,
        "`seed` must be an int, or an integer array of {name}. Received: 'x'. Pass an int.",
    ),
    "seed of a float": (
        {"training": True, "seed": np.array(1.0, np.float32)},
        errors.DtypeError,
        "`seed` must be an integer. Received: shape (), dtype float32. Cast it first.",
    ),
}


def _call(backend: Backend, layer: Any, call: dict[str, Any]) -> Any:
    return layer(**native(backend.ops, {"query": X, **call}))


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("call", "error", "text"), CALLS.values(), ids=CALLS)
def test_bad_call_of_a_layer(
    backend: Backend, call: dict[str, Any], error: type[Exception], text: str
) -> None:
    layer = backend.layer(**SIZES, dropout=0.5, seed=1)
    before = anymha.get_weights(layer)
    text = text.replace("{name}", backend.name)
    _raises(error, text, lambda: _call(backend, layer, call))
    for name, array in anymha.get_weights(layer).items():
        assert bits(array).tolist() == bits(before[name]).tolist()


# Any width is good before there are weights; JAX's layer, a pytree, has them from the start.
FIRST = {name: call for name, call in CALLS.items() if not name.startswith("width")}


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("backend", ["numpy", "torch", "tensorflow"], indirect=True)
@pytest.mark.parametrize(("call", "error", "text"), FIRST.values(), ids=FIRST)
def test_bad_first_call_makes_no_weights(
    backend: Backend, call: dict[str, Any], error: type[Exception], text: str
) -> None:
    layer = backend.layer(2, 3, dropout=0.5)
    text = text.replace("{name}", backend.name)
    _raises(error, text, lambda: _call(backend, layer, call))
    assert not layer.canonical_weights()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("axes", [(3,), (2,), (-1,), (-4,), (1, -2)], ids=str)
def test_axes_out_of_range_or_repeated(backend: Backend, axes: tuple[int, ...]) -> None:
    layer = backend.layer(**SIZES, attention_axes=axes)
    text = (
        "`attention_axes` must name different axes of the inputs, not the last, which holds the "
        f"features. Received: {axes}, and inputs of 3 axes."
    )
    _raises(errors.ShapeError, text, lambda: _call(backend, layer, {}))


@pytest.mark.usefixtures("idle")
def test_masks_of_inputs_with_many_axes(backend: Backend) -> None:
    layer = backend.layer(**SIZES, attention_axes=(1, 2))
    x = backend.ops.from_numpy(np.ones((2, 3, 4, 8), np.float32))
    mask = backend.ops.from_numpy(np.ones((2, 12, 12), bool))
    text = (
        "`attention_mask` must have shape (3, 4, 3, 4) or (2, 3, 4, 3, 4) or (2, 2, 3, 4, 3, 4): "
        "queries and keys; batch before them; heads between. Received: shape (2, 12, 12), dtype "
        "bool. Add axes of length 1 to broadcast."
    )
    _raises(errors.ShapeError, text, lambda: layer(x, attention_mask=mask))


def _kind(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["query", "value", "attention_mask", "attention_bias"])
def test_array_of_another_framework(backend: Backend, installed: list[Backend], name: str) -> None:
    shape, dtype = ((5, 5), bool) if name == "attention_mask" else ((2, 5, 8), np.float32)
    if name == "attention_bias":
        shape = (5, 5)
    for other in installed:
        if other.name == backend.name:
            continue
        layer = backend.layer(**SIZES)
        foreign = other.ops.from_numpy(np.ones(shape, dtype))
        call = {**native(backend.ops, {"query": X}), name: foreign}
        text = (
            f"`{name}` must be an array of {backend.name}, the framework of this call. "
            f"Received: {_kind(foreign)}. Convert it first: one call takes arrays of one "
            "framework."
        )
        _raises(errors.MixedBackendsError, text, lambda call=call, layer=layer: layer(**call))


@pytest.mark.usefixtures("idle")
def test_functions_take_arrays_of_one_framework(installed: list[Backend]) -> None:
    if len(installed) < 2:
        pytest.skip("needs two frameworks")
    first, second = installed[:2]
    x = np.ones((1, 2, 2, 3), np.float32)
    query, value = first.ops.from_numpy(x), second.ops.from_numpy(x)
    text = (
        f"The arrays of one call must be of one framework. Received: `query` of {first.name}, "
        f"`key` of {first.name}, `value` of {second.name}. Convert them first."
    )
    _raises(
        errors.MixedBackendsError, text, lambda: anymha.dot_product_attention(query, query, value)
    )
    weights = anymha.get_weights(first.layer(**SIZES))
    given = native(second.ops, weights)
    with pytest.raises(errors.MixedBackendsError, match=r"`query` of .*`query\.kernel` of "):
        anymha.multi_head_attention(
            given, first.ops.from_numpy(X), config=anymha.AttentionConfig(**SIZES)
        )


def test_unknown_backend() -> None:
    with pytest.raises(
        errors.UnknownBackendError,
        match=r"^A backend is one of 'numpy', '.*\. Received: 'theano'\.$",
    ):
        anymha.MultiHeadAttention(2, 3, backend="theano")
    with pytest.raises(errors.UnknownBackendError, match=r"Received: 'PyTorch'\. Pass 'torch'\.$"):
        anymha.MultiHeadAttention(2, 3, backend="PyTorch")


@pytest.mark.parametrize("name", ["torch", "tensorflow", "jax"])
def test_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = registry.importlib.util.find_spec
    monkeypatch.setattr(
        registry.importlib.util,
        "find_spec",
        lambda module: None if module == name else find(module),
    )
    text = (
        f"The backend {name!r} needs {name}, which is not installed. "
        f"Install it with: pip install 'anymha[{name}]'."
    )
    _raises(
        errors.BackendNotInstalledError,
        text,
        lambda: anymha.MultiHeadAttention(2, 3, backend=name),
    )
    _raises(errors.BackendNotInstalledError, text, lambda: get_backend(name).ops)


def test_layer_that_cannot_grow_weights() -> None:
    if not get_backend("jax").installed:
        pytest.skip("jax is not installed")
    _raises(
        errors.ConfigError,
        "`query_features`, the width of the query input, is needed: a pytree cannot grow weights "
        "at a call. Received: None. Pass it to the constructor.",
        lambda: anymha.MultiHeadAttention(2, 3, backend="jax"),
    )


@pytest.mark.usefixtures("idle")
def test_dropout_of_jax_without_a_seed() -> None:
    backend = get_backend("jax")
    if not backend.installed:
        pytest.skip("jax is not installed")
    layer = backend.layer(**SIZES, dropout=0.5)
    _raises(
        errors.ArgumentError,
        "`seed` is needed for dropout in training: JAX has no generator of its own. Received: "
        "None. Pass an int or a key, e.g. seed=jax.random.key(0).",
        lambda: _call(backend, layer, {"training": True}),
    )


def _left_as_it_was(layer: Any, before: dict[str, np.ndarray]) -> None:
    after = anymha.get_weights(layer)
    assert list(after) == list(before)
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes()


def test_weights_of_other_names_or_shapes_leave_the_layer_as_it_was(backend: Backend) -> None:
    layer = backend.layer(**SIZES, use_bias=False, seed=1)
    before = anymha.get_weights(layer)
    other = {name: array + 1 for name, array in before.items()}
    names = "query.kernel, key.kernel, value.kernel, output.kernel"
    lacking = {name: array for name, array in other.items() if name != "output.kernel"}
    _raises(
        errors.WeightsError,
        f"Weights must have the names {names}. Missing: output.kernel. Unknown: none.",
        lambda: anymha.set_weights(layer, lacking),
    )
    _raises(
        errors.WeightsError,
        f"Weights must have the names {names}. Missing: none. Unknown: output.gain.",
        lambda: anymha.set_weights(layer, {**other, "output.gain": np.ones(1)}),
    )
    _raises(
        errors.WeightsError,
        "`output.kernel` must have shape (2, 3, 8). Received: shape (8, 2, 3).",
        lambda: anymha.set_weights(layer, {**other, "output.kernel": np.ones((8, 2, 3))}),
    )
    _left_as_it_was(layer, before)


@pytest.mark.usefixtures("idle")
def test_weights_given_to_the_function(backend: Backend) -> None:
    config = anymha.AttentionConfig(**SIZES, use_bias=False)
    weights = native(backend.ops, anymha.get_weights(backend.layer(**config.to_dict())))
    x = backend.ops.from_numpy(X)

    def refused(text: str, error: type[Exception] = errors.WeightsError, **changed: Any) -> None:
        given = {**weights, **changed}
        given = {name: array for name, array in given.items() if array is not None}
        _raises(error, text, lambda: anymha.multi_head_attention(given, x, config=config))

    kernels = "query.kernel, key.kernel, value.kernel, output.kernel"
    refused(
        f"`weights` must have {kernels}. Received: query.kernel, value.kernel, output.kernel. "
        "Add key.kernel.",
        **{"key.kernel": None},
    )
    refused(
        f"`weights` must have names out of {kernels}, those of the config. Received also: "
        "query.bias. Leave them out, or change the config.",
        **{"query.bias": backend.ops.from_numpy(np.ones((2, 3), np.float32))},
    )
    refused(
        "`value.kernel` must have shape (8, 2, 3). Received: shape (8, 2, 4), dtype float32. Pass "
        "such an array, or change the config.",
        **{"value.kernel": backend.ops.from_numpy(np.ones((8, 2, 4), np.float32))},
    )
    refused(
        "`value.kernel` must be floating (float16, bfloat16, float32 or float64). Received: shape "
        "(8, 2, 3), dtype int32. Cast it first.",
        errors.DtypeError,
        **{"value.kernel": backend.ops.from_numpy(np.ones((8, 2, 3), np.int32))},
    )


def test_what_is_no_layer() -> None:
    _raises(
        errors.ArgumentError,
        "`layer` must be a layer of anymha, a live layer of equinox.MultiheadAttention, "
        "flax.linen.MultiHeadDotProductAttention, flax.nnx.MultiHeadAttention, "
        "haiku.MultiHeadAttention, keras.GroupQueryAttention, keras.MultiHeadAttention, "
        "timm.vit, torch.MultiheadAttention, x_transformers.Attention, an attention module of "
        "transformers, or parameters of Flax's linen or Haiku. Received: builtins.int. Bring the "
        "arrays of another module under the names of a layout, and pass them to "
        "`anymha.to_canonical`.",
        lambda: anymha.get_weights(3),
    )


Q = np.ones((2, 5, 4, 3), np.float32)
K = np.ones((2, 6, 2, 3), np.float32)
_SHAPES = (
    "`query`, `key` and `value` must have shapes (B, T, H, d_k), (B, S, K, d_k) and "
    "(B, S, K, d_v), H a multiple of K. Received: "
)
_HEADS_REMEDY = " Move heads after the length if they stand before it."
_WINDOW = (
    "`window` must be (left, right), each None or an integer of at least 0, the keys visible on "
    "that side of the query's own position. Received: "
)
ATTENTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    **{
        f"{dtype} {name}": (
            {name: np.ones(shape, dtype)},
            errors.DtypeError,
            _not_boolean(name, dtype, str(shape)),
        )
        for name, shape in {"mask": (5, 6), "query_mask": (2, 5), "value_mask": (2, 6)}.items()
        for dtype in ("float32", "int32")
    },
    "mask of other lengths": (
        {"mask": np.ones((6, 5), bool)},
        errors.ShapeError,
        "`mask` must broadcast to shape (2, 4, 5, 6). Received: shape (6, 5), dtype bool. "
        + _BROADCAST,
    ),
    "bias of other heads": (
        {"bias": np.ones((2, 5, 6), np.float32)},
        errors.ShapeError,
        "`bias` must broadcast to shape (2, 4, 5, 6). Received: shape (2, 5, 6), dtype float32. "
        + _BROADCAST,
    ),
    "value mask of rank 1": (
        {"value_mask": np.ones(6, bool)},
        errors.ShapeError,
        "`value_mask` must have shape (2, 6). Received: shape (6,), dtype bool. Pass what has "
        "more axes as `mask`.",
    ),
    "lengths of key and value": (
        {"value": K[:, :5]},
        errors.ShapeError,
        f"{_SHAPES}(2, 5, 4, 3), (2, 6, 2, 3) and (2, 5, 2, 3).{_HEADS_REMEDY}",
    ),
    "heads": (
        {"key": Q[:, :, :3], "value": Q[:, :, :3]},
        errors.ShapeError,
        f"{_SHAPES}(2, 5, 4, 3), (2, 5, 3, 3) and (2, 5, 3, 3).{_HEADS_REMEDY}",
    ),
    "widths": (
        {"key": K[..., :2]},
        errors.ShapeError,
        f"{_SHAPES}(2, 5, 4, 3), (2, 6, 2, 2) and (2, 6, 2, 3).{_HEADS_REMEDY}",
    ),
    "rank": (
        {"query": Q[0]},
        errors.ShapeError,
        "`query` must have 4 axes, (batch, length, heads, width). Received: shape (5, 4, 3), dtype "
        "float32. Add or take away axes.",
    ),
    "dtypes": (
        {"value": K.astype(np.float16)},
        errors.DtypeError,
        "`query`, `key` and `value` must have one dtype. Received: query of float32, value of "
        "float16. Cast one.",
    ),
    **{
        f"window {window}": ({"window": window}, errors.ConfigError, f"{_WINDOW}{window!r}.")
        for window in (3, (1,), (1, -1), (1.0, 2), (True, 1))
    },
    **{
        f"softcap {cap}": (
            {"softcap": cap},
            errors.ConfigError,
            f"`softcap` must be a finite number above 0, or None for no cap. Received: {cap!r}.",
        )
        for cap in (0, -1.0, float("nan"), "x")
    },
    "scale": ({"scale": float("nan")}, errors.ConfigError, f"{_SCALE}nan."),
    "dropout 1": ({"dropout": 1.0}, errors.ConfigError, f"{_RATE}1.0."),
    "dropout nan": ({"dropout": float("nan")}, errors.ConfigError, f"{_RATE}nan."),
    "seed": (
        {"dropout": 0.5, "seed": 1.5},
        errors.ArgumentError,
        "`seed` must be an int, or an integer array of {name}. Received: 1.5. Pass an int.",
    ),
    "offset": (
        {"query_offset": np.zeros(3, np.int32)},
        errors.ShapeError,
        "`query_offset` must broadcast to shape (2,). Received: shape (3,), dtype int32. "
        + _BROADCAST,
    ),
}


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("call", "error", "text"), ATTENTION.values(), ids=ATTENTION)
def test_bad_call_of_dot_product_attention(
    backend: Backend, call: dict[str, Any], error: type[Exception], text: str
) -> None:
    given = native(backend.ops, {"query": Q, "key": K, "value": K, **call})
    _raises(
        error,
        text.replace("{name}", backend.name),
        lambda: anymha.dot_product_attention(**given),
    )


def test_what_is_no_array_of_any_framework() -> None:
    with pytest.raises(
        errors.ArgumentError,
        match=r"^`query`: Expected an array of numpy, torch, .*\. Received: builtins\.list\. Make",
    ):
        anymha.dot_product_attention([1.0], [1.0], [1.0])

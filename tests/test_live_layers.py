"""Live layers of other libraries: read, written and made, bit for bit, or a clear error."""

from __future__ import annotations

import importlib
import itertools
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.errors import (
    ArgumentError,
    BiasWarning,
    LayoutError,
    UnknownBackendError,
    WeightsError,
)
from anymha.framework.registry import backend_of
from anymha.interchange.weights import Weights
from tests.peer_layers import LIBRARIES, MODULES, need, peer

OURS = ("numpy", "torch", "tensorflow", "jax", "flax", "equinox")
SIZES = {"num_heads": 2}


def bits(weights: Any) -> dict[str, tuple[str, bytes]]:
    return {name: (array.dtype.name, array.tobytes()) for name, array in weights.items()}


def random(shapes: Any, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def numbers(tensor: Any) -> np.ndarray:
    """What Keras gives, in NumPy: its own way warns on torch."""
    return np.asarray(backend_of(tensor).ops.to_numpy(tensor))


def held(library: str, dtype: Any) -> bool:
    """Whether a library holds arrays of the dtype: Keras's JAX has no float64 by itself."""
    if library != "keras" or np.dtype(dtype) != np.float64:
        return True
    return need("keras").backend.backend() != "jax"


def ready(library: str) -> None:
    """Skip where a library is missing, or Keras's backend for this process."""
    need(MODULES.get(library, library))


def sizes_of(library: str) -> dict[str, int]:
    return SIZES if library == "haiku" else {}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("memory", [8, 6])
@pytest.mark.parametrize("library", LIBRARIES)
def test_our_layer_with_its_weights_gives_its_output(library: str, memory: int, bias: bool) -> None:
    theirs = peer(library, memory=memory, bias=bias)
    layer = anymha.convert(theirs.layer, to="numpy", **theirs.sizes)
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 4, 8)).astype(np.float32)
    value = rng.standard_normal((2, 5, memory)).astype(np.float32)
    wanted = theirs.call(query, value)
    np.testing.assert_allclose(layer(query, value), wanted, rtol=0, atol=5e-5 * abs(wanted).max())
    assert layer.config.use_bias is bias
    assert layer.config.dropout == (0.25 if library not in ("linen", "haiku") else 0)
    assert (layer.config.num_heads, layer.config.key_dim, layer.config.scale) == (2, 4, None)


@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_come_back_bit_for_bit(library: str) -> None:
    theirs = peer(library)
    first = anymha.get_weights(theirs.layer, **theirs.sizes)
    assert isinstance(first, Weights)
    assert first.layout == LIBRARIES[library]
    new = random({name: array.shape for name, array in first.items()}, seed=5)
    new["query.bias"].flat[:4] = [np.nan, np.inf, -0.0, 1e-40]
    layer = anymha.set_weights(theirs.layer, new, **theirs.sizes)
    assert type(layer) is type(theirs.layer)
    assert bits(anymha.get_weights(layer, **theirs.sizes)) == bits(new)
    frozen = library in ("linen", "haiku", "equinox")
    assert (layer is theirs.layer) == (not frozen)
    if frozen:
        assert bits(anymha.get_weights(theirs.layer, **theirs.sizes)) == bits(first)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("source", "target"), list(itertools.permutations([*LIBRARIES, "numpy"], 2))
)
def test_every_pair_of_libraries_keeps_every_bit(source: str, target: str, dtype: Any) -> None:
    for library in (source, target):
        ready(library)
        if not held(library, dtype):
            pytest.skip("Keras on JAX holds no float64")
    config = anymha.AttentionConfig(2, 4, query_features=8, dtype=dtype)
    weights = random(config.weight_shapes(), dtype)
    ours = anymha.set_weights(
        anymha.MultiHeadAttention(backend="numpy", **config.to_dict()), weights
    )
    first = anymha.convert(ours, to=LIBRARIES.get(source, source))
    assert bits(anymha.get_weights(first, **sizes_of(source))) == bits(weights)
    second = anymha.convert(first, to=LIBRARIES.get(target, target), **sizes_of(source))
    assert bits(anymha.get_weights(second, **sizes_of(target))) == bits(weights)
    back = anymha.convert(second, to=LIBRARIES.get(source, source), **sizes_of(target))
    assert bits(anymha.get_weights(back, **sizes_of(source))) == bits(weights)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("backend", OURS)
def test_layers_of_ours_and_theirs_become_one_another(backend: str, library: str) -> None:
    theirs = peer(library)
    for name in {"flax": ("flax", "jax"), "equinox": ("equinox", "jax")}.get(backend, (backend,)):
        need(name)
    ours = anymha.convert(theirs.layer, to=backend, **theirs.sizes)
    assert type(ours).__module__ == f"anymha_{backend}.layer"
    weights = anymha.get_weights(theirs.layer, **theirs.sizes)
    assert bits(anymha.get_weights(ours)) == bits(weights)
    again = anymha.convert(ours, to=LIBRARIES[library])
    assert bits(anymha.get_weights(again, **theirs.sizes)) == bits(weights)


@pytest.mark.parametrize("library", LIBRARIES)
def test_made_layers_compute_what_ours_compute(library: str) -> None:
    ready(library)
    ours = anymha.MultiHeadAttention(2, 4, query_features=8, seed=0, backend="numpy", dropout=0.5)
    made = anymha.convert(ours, to=LIBRARIES[library])
    theirs = peer(library)
    layer = anymha.set_weights(
        theirs.layer, anymha.get_weights(made, **theirs.sizes), **theirs.sizes
    )
    assert bits(anymha.get_weights(layer, **theirs.sizes)) == bits(anymha.get_weights(ours))
    assert anymha.get_weights(made, **theirs.sizes).config.attention_axes is None
    if library in ("torch", "keras", "nnx"):
        x = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
        np.testing.assert_allclose(theirs.call(x, x), ours(x), rtol=0, atol=1e-5)
        config = anymha.get_weights(made).config
        assert config.dropout == 0.5


@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_that_do_not_fit_leave_the_layer(library: str) -> None:
    theirs = peer(library)
    before = anymha.get_weights(theirs.layer, **theirs.sizes)
    new = random({name: array.shape for name, array in before.items()})
    small = anymha.AttentionConfig(2, 3, query_features=8).weight_shapes()
    for bad in (
        {name: array for name, array in new.items() if name != "value.kernel"},
        {**new, "more": np.zeros(3)},
        {**new, "key.bias": np.zeros(3)},
        random(small),
    ):
        with pytest.raises(WeightsError):
            anymha.set_weights(theirs.layer, bad, **theirs.sizes)
    assert bits(anymha.get_weights(theirs.layer, **theirs.sizes)) == bits(before)
    with pytest.raises(WeightsError) as error:
        anymha.set_weights(theirs.layer, random(small), **theirs.sizes)
    assert str(error.value) == (
        f"`query.kernel` must have shape (8, 2, 4) in this layer of {LIBRARIES[library]}. "
        "Received: shape (8, 2, 3)."
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_biases_are_matched_to_the_layer_and_told(library: str) -> None:
    theirs = peer(library)
    before = anymha.get_weights(theirs.layer, **theirs.sizes)
    new = {name: array for name, array in before.items() if name != "key.bias"}
    with pytest.warns(BiasWarning, match=r"key\.bias added as zeros"):
        layer = anymha.set_weights(theirs.layer, new, **theirs.sizes)
    assert not anymha.get_weights(layer, **theirs.sizes)["key.bias"].any()
    bare = peer(library, bias=False)
    with pytest.raises(LayoutError, match=r"has no `query\.bias` and no `key\.bias`"):
        anymha.set_weights(bare.layer, before, **bare.sizes)
    empty = {n: np.zeros_like(a) if n.endswith("bias") else a for n, a in before.items()}
    with pytest.warns(BiasWarning, match="of zeros left out"):
        layer = anymha.set_weights(bare.layer, empty, **bare.sizes)
    found = anymha.get_weights(layer, **bare.sizes)
    assert bits(found) == bits({n: a for n, a in before.items() if n.endswith("kernel")})


def test_scale_of_another_layer_is_not_taken_silently() -> None:
    weights, config = anymha.to_canonical(
        {f"{name}.weight": np.ones((8, 8), np.float32) for name in "qkvo"},
        "transformers.t5", num_heads=2,
    )  # fmt: skip
    plain = anymha.MultiHeadAttention(2, 4, query_features=8, use_bias=False, backend="numpy")
    with pytest.raises(LayoutError) as error:
        anymha.set_weights(plain, weights)
    assert str(error.value) == (
        "The weights are of a layer with scale=1.0; the layer has scale=0.5, and the results would "
        "differ. Make the layer with scale=1.0, or pass `dict(weights)` to set the arrays all the "
        "same."
    )
    anymha.set_weights(plain, dict(weights))
    layer = anymha.MultiHeadAttention(backend="numpy", **config.to_dict())
    assert bits(anymha.get_weights(anymha.set_weights(layer, weights))) == bits(weights)
    with pytest.raises(LayoutError, match="multiplies the logits"):
        anymha.convert(layer, to="equinox.MultiheadAttention")


def test_options_that_a_library_lacks_are_refused() -> None:
    need("torch")
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, sliding_window=3, backend="numpy")
    with pytest.raises(LayoutError) as error:
        anymha.convert(layer, to="torch.MultiheadAttention")
    assert str(error.value) == (
        "A layer of torch.MultiheadAttention has no option for sliding_window=3. Make a layer "
        "without, for example with `dataclasses.replace(config, sliding_window=None)`; or convert "
        "the arrays alone, with `anymha.from_canonical(dict(weights), ...)` and no config."
    )


def test_layers_that_are_parts_of_models_are_not_made() -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, use_bias=False, backend="numpy")
    with pytest.raises(LayoutError) as error:
        anymha.convert(layer, to="transformers.llama")
    assert str(error.value) == (
        "A layer of transformers.llama is part of a model: make the model and pass its layer to "
        "`anymha.set_weights`. `to` may be a backend or a layer that stands alone."
    )


MEANT = {
    "torch.nn.MultiheadAttention": "torch.MultiheadAttention",
    "torch.MultiHeadAttention": "torch.MultiheadAttention",
    "keras.layers.MultiHeadAttention": "keras.MultiHeadAttention",
    "eqx.nn.MultiheadAttention": "equinox.MultiheadAttention",
    "nnx.MultiHeadAttention": "flax.nnx.MultiHeadAttention",
    "flax.linen": "flax.linen.MultiHeadDotProductAttention",
    "haiku": "haiku.MultiHeadAttention",
    "hk": "haiku.MultiHeadAttention",
    "pytorch": "torch",
    "tf.keras": "keras",
    "linen": "flax",
}


@pytest.mark.parametrize("name", MEANT)
def test_names_of_other_libraries_are_answered_with_ours_first(name: str) -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
    with pytest.raises(UnknownBackendError) as error:
        anymha.convert(layer, to=name)
    told = f"`to`: none is called {name!r}. Did you mean {MEANT[name]!r}? There are 'numpy', "
    assert str(error.value).startswith(told)


def test_arrays_of_another_layout_are_answered_with_how_to_name_it() -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
    state = anymha.from_canonical(anymha.get_weights(layer), "torch.MultiheadAttention")
    with pytest.raises(WeightsError) as error:
        anymha.convert(dict(state), to="numpy")
    assert str(error.value).startswith(
        "Name the arrays' layout, one that `anymha.find_layers(arrays)` lists: `weights, config = "
        "anymha.to_canonical(arrays, layout=..., num_heads=...)`; then `anymha.set_weights("
        "anymha.MultiHeadAttention(**config.to_dict(), backend=...), weights)`. Received: in_proj"
    )
    ((fit, *_),) = [group.fits for group in anymha.find_layers(dict(state))]
    weights, config = anymha.to_canonical(dict(state), layout=fit.name, num_heads=2)
    made = anymha.MultiHeadAttention(**config.to_dict(), backend="numpy")
    assert bits(anymha.get_weights(anymha.set_weights(made, weights))) == bits(weights)


def test_torch_layers_with_rows_beside_the_inputs() -> None:
    torch = need("torch")
    with pytest.raises(LayoutError, match="`bias_k` cannot be converted"):
        anymha.get_weights(torch.nn.MultiheadAttention(8, 2, add_bias_kv=True))
    zero = torch.nn.MultiheadAttention(8, 2, add_zero_attn=True)
    weights = anymha.get_weights(zero)
    assert weights.needs == (
        "a key and a value of zeros after those of the inputs (`add_zero_attn`)",
    )
    with pytest.raises(LayoutError) as error:
        anymha.convert(zero, to="numpy")
    assert str(error.value) == (
        "The MultiheadAttention computes more than attention: a key and a value of zeros after "
        "those of the inputs (`add_zero_attn`). The new layer would lack it. Pass "
        "`weights_only=True` to convert the projections all the same."
    )
    layer = anymha.convert(zero, to="numpy", weights_only=True)
    assert bits(anymha.get_weights(layer)) == bits(weights)


def test_torch_layers_of_the_user_are_known_by_what_they_inherit_from() -> None:
    torch = need("torch")

    class Mine(torch.nn.MultiheadAttention):
        pass

    assert "query.kernel" in anymha.get_weights(Mine(8, 2))
    with pytest.raises(WeightsError, match="it is on the device 'meta'"):
        anymha.get_weights(Mine(8, 2, device="meta"))


def test_half_precision_of_a_library_is_rounded_once() -> None:
    torch = need("torch")
    layer = torch.nn.MultiheadAttention(8, 2, dtype=torch.bfloat16)
    shapes = {name: array.shape for name, array in anymha.get_weights(layer).items()}
    exact = {n: 1 + 2.0**-8 + 2.0**-11 + np.full(shape, 2.0**-40) for n, shape in shapes.items()}
    anymha.set_weights(layer, exact)
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in exact.items()}
    assert bits(anymha.get_weights(layer)) == bits(rounded)


def test_keras_layers_bring_their_options() -> None:
    keras = need("keras")
    layer = keras.layers.MultiHeadAttention(
        2, 3, value_dim=5, output_shape=(2, 3), attention_axes=(1, 2), dropout=0.5,
        kernel_regularizer=keras.regularizers.L2(0.125), bias_constraint="non_neg",
    )  # fmt: skip
    with pytest.raises(WeightsError, match="has no weights yet"):
        anymha.get_weights(layer)
    layer.build((None, None, None, 8), (None, None, None, 8))
    config = anymha.get_weights(layer).config
    assert (config.value_dim, config.output_shape, config.attention_axes) == (5, (2, 3), (1, 2))
    ours = anymha.convert(layer, to="numpy")
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32)
    wanted = numbers(layer(x, x))
    np.testing.assert_allclose(ours(x), wanted, rtol=0, atol=1e-5)
    again = anymha.convert(ours, to="keras.MultiHeadAttention")
    np.testing.assert_array_equal(numbers(again(x, x)), wanted)
    assert again.get_config()["kernel_regularizer"] == layer.get_config()["kernel_regularizer"]
    assert again.get_config()["bias_constraint"] == layer.get_config()["bias_constraint"]


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")  # JAX's own
def test_keras_on_jax_does_not_round_float64_silently() -> None:
    keras = need("keras")
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, dtype="float64", backend="numpy")
    if keras.backend.backend() == "jax":
        with pytest.raises(LayoutError, match="jax_enable_x64"):
            anymha.convert(layer, to="keras.MultiHeadAttention")
    else:
        made = anymha.convert(layer, to="keras.MultiHeadAttention")
        assert anymha.get_weights(made)["query.kernel"].dtype == np.float64


def test_keras_layers_of_grouped_heads() -> None:
    keras = need("keras")
    layer = keras.layers.GroupQueryAttention(3, 4, 2, dropout=0.5)
    layer.build((None, None, 8), (None, None, 8))
    for number, variable in enumerate(layer.weights):
        variable.assign(np.random.default_rng(number).standard_normal(variable.shape))
    ours = anymha.convert(layer, to="numpy")
    assert (ours.config.key_value_heads, ours.config.dropout) == (2, 0.5)
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    wanted = numbers(layer(x, x))
    np.testing.assert_allclose(ours(x), wanted, rtol=0, atol=1e-4)
    again = anymha.convert(ours, to="keras.GroupQueryAttention")
    np.testing.assert_array_equal(numbers(again(x, x)), wanted)


def test_nnx_norms_are_the_option() -> None:
    need("flax")
    nnx = importlib.import_module("flax.nnx")
    layer = nnx.MultiHeadAttention(2, 8, decode=False, normalize_qk=True, rngs=nnx.Rngs(0))
    weights = anymha.get_weights(layer)
    assert weights.config.query_key_norm == anymha.QueryKeyNorm("layer")
    assert weights.needs == ()
    other = nnx.MultiHeadAttention(2, 8, decode=False, normalize_qk=True, rngs=nnx.Rngs(1))
    new = random({name: array.shape for name, array in weights.items()}, seed=5)
    anymha.set_weights(other, new)
    assert bits(anymha.get_weights(other)) == bits(new)
    ours = anymha.convert(other, to="numpy")
    made = anymha.convert(ours, to="flax.nnx.MultiHeadAttention")
    assert bits(anymha.get_weights(made)) == bits(new)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    for layer in (other, made):
        np.testing.assert_allclose(ours(x), np.asarray(layer(x)), rtol=0, atol=1e-5)
    plain = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(2))
    told = r"of no option besides .* Unknown: query_norm\.scale, key_norm\.scale"
    with pytest.raises(WeightsError, match=told):
        anymha.set_weights(plain, weights)
    with pytest.raises(WeightsError, match=r"Missing: query_norm\.scale, key_norm\.scale"):
        anymha.set_weights(other, anymha.get_weights(plain))


def test_parameters_within_a_model_are_found_if_there_is_one_layer() -> None:
    def parameters() -> dict[str, Any]:
        kernel = np.ones((4, 2, 3), np.float32)
        out = np.ones((2, 3, 4), np.float32)
        inner = {name: {"kernel": kernel} for name in ("query", "key", "value")}
        return {**inner, "out": {"kernel": out}}

    model = {"params": {"block": {"attention": parameters(), "norm": {"scale": np.ones(4)}}}}
    weights = anymha.get_weights(model)
    assert weights["query.kernel"].shape == (4, 2, 3)
    new = anymha.set_weights(model, {name: 2 * array for name, array in weights.items()})
    assert new["params"]["block"]["norm"] == model["params"]["block"]["norm"]
    np.testing.assert_array_equal(new["params"]["block"]["attention"]["out"]["kernel"], 2)
    np.testing.assert_array_equal(model["params"]["block"]["attention"]["out"]["kernel"], 1)
    with pytest.raises(WeightsError, match="here are several, under 'a/', 'b/': pass those of"):
        anymha.get_weights({"a": parameters(), "b": parameters()})
    with pytest.raises(WeightsError, match=r"^Name the .* Received: norm/scale"):
        anymha.get_weights({"norm": {"scale": np.ones(4)}})


def test_modules_without_weights_say_what_to_pass() -> None:
    need("flax")
    linen = importlib.import_module("flax.linen")
    with pytest.raises(ArgumentError) as error:
        anymha.get_weights(linen.MultiHeadDotProductAttention(num_heads=2))
    assert str(error.value) == (
        "A flax.linen.attention.MultiHeadDotProductAttention holds no weights. Pass its "
        "parameters, `module.init(...)['params']`."
    )


def test_heads_of_haiku_are_asked_for() -> None:
    theirs = peer("haiku")
    with pytest.raises(WeightsError, match=r"haiku\.MultiHeadAttention needs `num_heads`"):
        anymha.get_weights(theirs.layer)


def test_our_layers_take_no_sizes() -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
    with pytest.raises(ArgumentError, match="knows its sizes"):
        anymha.get_weights(layer, num_heads=2)


def test_layers_of_others_become_our_keras_layer() -> None:
    need("keras")
    theirs = peer("torch")
    ours = anymha.convert(theirs.layer, to="keras")
    assert type(ours).__module__ == "anymha_keras.layer"
    assert bits(anymha.get_weights(ours)) == bits(anymha.get_weights(theirs.layer))


def test_readme_example_torch_to_keras_to_jax() -> None:
    torch, keras = need("torch"), need("keras")
    need("jax")
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    in_keras = anymha.convert(layer, to="keras.MultiHeadAttention")
    in_jax = anymha.convert(in_keras, to="jax")
    assert isinstance(in_keras, keras.layers.MultiHeadAttention)
    weights = anymha.get_weights(layer)
    assert bits(anymha.get_weights(in_jax)) == bits(weights)
    assert all(backend_of(a).name == "jax" for a in in_jax.canonical_weights().values())


TOOLS = {
    "weight norm": lambda nn, m, n: nn.utils.parametrizations.weight_norm(m, n),
    "orthogonal": lambda nn, m, n: nn.utils.parametrizations.orthogonal(m, n),
    "spectral norm": lambda nn, m, n: nn.utils.parametrizations.spectral_norm(m, n).eval(),
    "old spectral norm": lambda nn, m, n: nn.utils.spectral_norm(m, n).eval(),
    "old weight norm": lambda nn, m, n: nn.utils.weight_norm(m, n),
    "prune": lambda nn, m, n: nn.utils.prune.l1_unstructured(m, n, 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("part", ["out_proj.weight", "in_proj_weight"])
@pytest.mark.parametrize("tool", TOOLS)
def test_weights_that_tools_of_torch_make_are_the_effective_ones(tool: str, part: str) -> None:
    torch = need("torch")
    importlib.import_module("torch.nn.utils.prune")
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    plain = dict(anymha.get_weights(theirs))
    module, name = (theirs.out_proj, "weight") if "." in part else (theirs, part)
    TOOLS[tool](torch.nn, module, name)
    x = torch.randn(2, 5, 8)
    ours = anymha.convert(theirs, to="torch")
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-5, atol=1e-5)
    before = {n: t.clone() for n, t in theirs.state_dict().items()}
    wanted = {name: array + 1 for name, array in plain.items()}
    try:
        anymha.set_weights(theirs, wanted)
    except WeightsError as error:
        assert "Remove it first" in str(error)  # noqa: PT017
        assert all(torch.equal(t, before[n]) for n, t in theirs.state_dict().items())
    else:
        found = anymha.get_weights(theirs)
        assert all(np.allclose(found[n], wanted[n], atol=1e-5) for n in wanted)
        assert tool == "weight norm"


@pytest.mark.parametrize("kind", ["whole", "linears"])
def test_quantised_layers_of_torch_are_named_as_such(kind: str) -> None:
    torch = need("torch")
    nn = torch.nn
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    kinds = {nn.Linear, nn.MultiheadAttention} if kind == "whole" else {nn.Linear}
    if kind == "linears":
        need("transformers")
        bert = importlib.import_module("transformers.models.bert.modeling_bert")
        config = importlib.import_module("transformers").BertConfig(
            hidden_size=16, num_attention_heads=4
        )
        model = nn.Sequential(bert.BertAttention(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated quantisation
        quantised = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)[0]
    for call in (
        lambda: anymha.get_weights(quantised),
        lambda: anymha.convert(quantised, to="numpy", weights_only=True),
        lambda: anymha.set_weights(quantised, {}),
    ):
        with pytest.raises(LayoutError, match="quantised"):
            call()


def test_state_of_another_kind_beside_the_weights_means_nothing() -> None:
    torch = need("torch")

    class Layer(torch.nn.MultiheadAttention):
        def get_extra_state(self) -> Any:
            return {"step": 1}

    layer = Layer(8, 2)
    assert list(anymha.get_weights(layer)) == list(
        anymha.get_weights(torch.nn.MultiheadAttention(8, 2))
    )


def test_lora_of_a_keras_layer_is_part_of_its_kernels() -> None:
    keras = need("keras")
    theirs = keras.layers.MultiHeadAttention(2, 4)
    theirs.build((2, 5, 8), (2, 5, 8))
    before = anymha.get_weights(theirs)
    for dense in (theirs.query_dense, theirs.output_dense):
        dense.enable_lora(2)
        dense.lora_kernel_b.assign(np.ones(dense.lora_kernel_b.shape, "float32"))
    after = anymha.get_weights(theirs)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"query.kernel", "output.kernel"}
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
    ours = anymha.convert(theirs, to="numpy")
    np.testing.assert_allclose(ours(x), numbers(theirs(x, x)), atol=1e-5)
    with pytest.raises(WeightsError, match=r"query, attention_output cannot be set: LoRA"):
        anymha.set_weights(theirs, before)
    assert bits(anymha.get_weights(theirs)) == bits(after)


def test_state_of_a_flax_layer_is_read() -> None:
    need("flax")
    nnx: Any = importlib.import_module("flax.nnx")
    layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(layer, nnx.Param)
    weights, _ = anymha.to_canonical(state, layout="flax.nnx.MultiHeadAttention")
    assert bits(weights) == bits(anymha.get_weights(layer))
    linen: Any = importlib.import_module("flax.linen")
    boxed = {
        name: {part: linen.Partitioned(x[...], (None,)) for part, x in one.items()}
        for name, one in state.items()
    }
    again, _ = anymha.to_canonical(boxed, layout="flax.nnx.MultiHeadAttention")
    assert bits(again) == bits(weights)

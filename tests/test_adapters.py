"""How each kind of implementation is asked: what it tells, and that it is left as it was."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.cli.peers import FAMILIES
from anymha.errors import ArgumentError, LayoutError
from anymha.framework.registry import get_backend
from anymha.parity import compare
from anymha.parity.adapters import adapter_for, declare
from anymha.parity.oracle.truth import fold
from anymha.parity.stages.trace import as_numpy, make_request, name_of_dtype, problem_of
from tests.frameworks import skip_or_fail
from tests.peer_layers import need

pytestmark = pytest.mark.usefixtures("quick_programs")

RNG = np.random.default_rng(0)
QUERY = RNG.standard_normal((3, 5, 8)).astype("float32")
VALUE, KEY = RNG.standard_normal((2, 3, 6, 8)).astype("float32")
PADDED = np.arange(6) < np.array([6, 4, 3])[:, None]
SEEN = RNG.random((3, 5, 6)) < 0.6
SEEN[..., 0] = True
EMPTY = np.arange(6) < np.array([6, 4, 0])[:, None]
CALLS: dict[str, tuple[list[np.ndarray], dict[str, Any]]] = {
    "self": ([QUERY], {}),
    "cross": ([QUERY, VALUE], {}),
    "three": ([QUERY, VALUE, KEY], {}),
    "causal": ([QUERY], {"use_causal_mask": True}),
    "padded": ([QUERY, VALUE, KEY], {"value_mask": PADDED}),
    "masked": ([QUERY, VALUE], {"attention_mask": SEEN}),
}
PROJECTED = {"query", "key", "value", "context"}
LAYERS = {
    "torch": "torch.MultiheadAttention",
    "torch-time-first": "torch.MultiheadAttention",
    "keras": "keras.MultiHeadAttention",
    "keras-grouped": "keras.GroupQueryAttention",
    "nnx": "flax.nnx.MultiHeadAttention",
    "linen": "flax.linen.MultiHeadDotProductAttention",
    "equinox": "equinox.MultiheadAttention",
}
LIBRARIES = {"nnx": "flax", "linen": "flax"}
EMPTY_ROWS = "fully masked rows give"


def reference(dtype: str = "float32", dropout: float = 0.0) -> Any:
    """anymha's layer with random weights, biases too."""
    options: dict[str, Any] = dict.fromkeys(("query_features", "value_features"), 8)
    layer = anymha.MultiHeadAttention(
        2, 4, dropout=dropout, dtype=dtype, backend="numpy", key_features=8, **options
    )
    rng = np.random.default_rng(1)
    weights = anymha.get_weights(layer)
    new = {n: (0.5 * rng.standard_normal(w.shape)).astype(w.dtype) for n, w in weights.items()}
    return anymha.set_weights(layer, new)


def converted(layer: Any, kind: str) -> Any:
    """A library's layer with the weights of ours; skips the test where it is not installed."""
    need(LIBRARIES.get(kind, kind.partition("-")[0]))
    made = anymha.convert(layer, to=LAYERS[kind])
    if kind == "torch-time-first":
        made.batch_first = False
    if kind == "linen":
        linen = importlib.import_module("flax.linen")
        config = layer.config
        module = linen.MultiHeadDotProductAttention(
            num_heads=2, qkv_features=8, out_features=8, param_dtype=config.dtype,
            dropout_rate=config.dropout,
        )  # fmt: skip
        made = module.bind({"params": made})
    return made


def gradients_there(kind: str) -> bool:
    """Whether a layer has gradients: all but those on Keras's NumPy backend."""
    keras = kind.startswith("keras")
    return not keras or need("keras").backend.backend() != "numpy"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_library_s_layer_with_our_weights_agrees_in_each_stage_and_gradient(kind, call) -> None:
    layer = reference()
    inputs, others = CALLS[call]
    report = compare(layer, converted(layer, kind), inputs, **others)
    assert report.passed, report.to_text()
    told = {stage.name for stage in report.stages}
    if (kind, call) not in (("torch", "self"), ("torch", "causal")):  # it has a kernel for them
        assert told >= PROJECTED
    assert ("scores" in told) == (kind != "equinox")
    wanted = {*anymha.get_weights(layer), *("query", "value", "key")[: len(inputs)]}
    found = {name for name in told if name.startswith("gradient of ")}
    assert found == ({f"gradient of {n}" for n in wanted} if gradients_there(kind) else set())


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, d) for kind in ("torch", "keras") for d in ("float64", "float16", "bfloat16")),
        ("nnx", "float64"),
        *((kind, d) for kind in ("nnx", "equinox") for d in ("float16", "bfloat16")),
    ],
)
def test_layers_of_other_dtypes_agree_within_their_own_rounding(kind, dtype) -> None:
    layer = reference(dtype)
    if kind == "keras" and dtype == "float64" and need("keras").backend.backend() == "jax":
        pytest.skip("Keras on JAX holds no float64 without JAX's option")
    other = converted(layer, kind)
    dtypes = [w.dtype for w in anymha.get_weights(layer).values()]
    inputs = [array.astype(dtypes[0]) for array in (QUERY, VALUE)]
    report = compare(layer, other, inputs, value_mask=PADDED)
    assert name_of_dtype(report.traces[1].output) == dtype
    if dtype == "float64" and (kind == "nnx" or (kind == "keras" and not report.passed)):
        assert str(report.diagnosis).startswith("computed in float32")  # its softmax, always
    else:
        assert report.passed, report.to_text()


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_that_see_nothing_are_found_and_named(kind) -> None:
    layer = reference()
    report = compare(layer, converted(layer, kind), [QUERY, VALUE, KEY], value_mask=EMPTY)
    assert not report.passed
    what = "NaN" if kind.startswith("torch") else "the mean of the values"
    assert f"{EMPTY_ROWS} {what}" in str(report.diagnosis)


def test_torch_s_own_kernel_for_self_attention_gives_nan_in_rows_that_see_nothing() -> None:
    layer = reference()
    alone = np.ones((3, 5), bool)
    alone[2] = False
    report = compare(layer, converted(layer, "torch"), [QUERY], value_mask=alone)
    assert f"{EMPTY_ROWS} NaN" in str(report.diagnosis)
    assert np.isnan(report.traces[1].output[2]).all()
    assert np.isfinite(report.traces[1].output[:2]).all()


def test_what_a_mask_ignored_lets_in_is_known_for_functions_too() -> None:
    layer = reference()
    deaf = lambda query, value, value_mask: layer(query, value)  # noqa: E731
    report = compare(layer, deaf, [QUERY, VALUE], value_mask=PADDED)
    assert "ignored mask" in str(report.diagnosis)


@pytest.mark.usefixtures("no_pairs")
def test_nan_at_an_excluded_position_is_found_where_it_leaks() -> None:
    layer = reference()
    torn = VALUE.copy()
    torn[1, 5] = np.nan
    assert compare(layer, layer, [QUERY, torn], value_mask=PADDED).passed
    report = compare(layer, converted(layer, "equinox"), [QUERY, torn], value_mask=PADDED)
    assert report.first_divergence == "context"
    assert any("NaN" in fault for stage in report.stages for fault in stage.faults)


@pytest.mark.parametrize("kind", ["torch", "keras", "nnx", "linen", "equinox"])
def test_dropout_of_a_library_s_layer_is_seen(kind) -> None:
    other = converted(reference(dropout=0.5), kind)
    found = adapter_for(other).trace(make_request([QUERY, VALUE], {"training": True}), None)
    assert found.random
    assert not adapter_for(other).trace(make_request([QUERY, VALUE], {}), None).random


@pytest.mark.parametrize("kind", ["keras", "torch", "nnx", "linen", "equinox"])
def test_options_that_a_library_lacks_are_refused_with_their_names(kind) -> None:
    other = converted(reference(), kind)
    if kind != "torch":
        with pytest.raises(LayoutError, match=r"cannot be compared with `attention_bias`"):
            compare(reference(), other, [QUERY], attention_bias=np.zeros((5, 5), "float32"))
    if kind == "keras":
        with pytest.raises(LayoutError, match=r"`query_offset`"):
            compare(reference(), other, [QUERY], use_causal_mask=True, query_offset=2)
    else:
        with pytest.raises(LayoutError, match=r"more axes than \(batch, length, features\)"):
            adapter_for(other).trace(make_request([QUERY[None]], {}), None)


def test_torch_s_layer_takes_a_bias_with_a_mask() -> None:
    layer = reference()
    bias = np.random.default_rng(2).standard_normal((2, 5, 6)).astype("float32")
    report = compare(
        layer, converted(layer, "torch"), [QUERY, VALUE], attention_bias=bias, value_mask=PADDED
    )
    assert report.passed, report.to_text()


def test_torch_s_layer_is_left_as_it_was_even_when_it_fails() -> None:
    layer = converted(reference(dropout=0.5), "torch")
    torch = importlib.import_module("torch")
    layer.train()
    layer.out_proj.eval()
    layer.in_proj_bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    sums = torch.nn.functional.scaled_dot_product_attention
    drawn = torch.random.get_rng_state()

    def checked() -> None:
        assert layer.training
        assert not layer.out_proj.training
        assert not layer.in_proj_bias.requires_grad
        assert layer.in_proj_weight.requires_grad
        assert all(p.grad is None for p in layer.parameters())
        assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
        assert not any(part._forward_hooks for part in layer.modules())
        assert torch.nn.functional.scaled_dot_product_attention is sums
        assert torch.equal(torch.random.get_rng_state(), drawn)

    report = compare(reference(), layer, [QUERY, VALUE])
    assert report.passed, report.to_text()
    adapter_for(layer).trace(make_request([QUERY], {"training": True}), None)
    checked()

    def failing(*inputs: Any, **others: Any) -> Any:
        raise RuntimeError("stop")

    layer.forward = failing
    with pytest.raises(RuntimeError, match="stop"):
        compare(reference(), layer, [QUERY, VALUE])
    checked()


def test_keras_s_layer_is_left_as_it_was() -> None:
    keras = need("keras")
    layer = keras.layers.MultiHeadAttention(2, 4, dropout=0.5, activity_regularizer="l2")
    layer.build(*[(None, None, 8)] * 3)

    def numbers(variable: Any) -> np.ndarray:
        value = variable.value
        return as_numpy(value.detach() if hasattr(value, "detach") else value)

    layer(*map(keras.ops.convert_to_tensor, (QUERY, VALUE)))
    before = [np.array(numbers(variable)) for variable in layer.variables]
    losses = len(layer.losses)
    for training in (False, True):
        adapter_for(layer).trace(make_request([QUERY, VALUE], {"training": training}), None)
    for variable, value in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(numbers(variable), value)
    assert len(layer.losses) == losses
    assert not any("call" in part.__dict__ for part in layer._flatten_layers())


def test_nnx_s_layer_is_left_as_it_was() -> None:
    layer = converted(reference(dropout=0.5), "nnx")
    nnx, jax = importlib.import_module("flax.nnx"), importlib.import_module("jax")
    own = layer.attention_fn
    before = jax.tree.map(lambda leaf: leaf, nnx.state(layer))
    for training in (False, True):
        adapter_for(layer).trace(make_request([QUERY], {"training": training}), None)
    assert layer.attention_fn is own
    after = nnx.state(layer)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    same = [
        bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    ]
    assert same
    assert all(same)


def test_a_module_of_linen_without_variables_is_refused() -> None:
    need("flax")
    linen = importlib.import_module("flax.linen")
    with pytest.raises(ArgumentError, match=r"holds no weights.*`module\.bind\(variables\)`"):
        adapter_for(linen.MultiHeadDotProductAttention(num_heads=2))


def test_keras_attends_over_several_axes() -> None:
    keras = need("keras")
    layer = keras.layers.MultiHeadAttention(2, 4, attention_axes=(1, 2))
    layer.build(*[(None, None, None, 8)] * 3)
    x = np.random.default_rng(3).standard_normal((2, 3, 4, 8)).astype("float32")
    report = compare(anymha.convert(layer, to="numpy"), layer, [x])
    assert report.passed, report.to_text()
    assert {"scores", "output"} <= {stage.name for stage in report.stages}


def family(layout: str) -> Any:
    """A layer of a family of transformers, with random weights."""
    need("torch")
    need("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, while it is imported
        layer = FAMILIES[layout].make_layer(8, 2)
    return _random(layer).eval()


def _random(module: Any) -> Any:
    torch = need("torch")
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=drawn))
    return module


def ours(layer: Any) -> Any:
    """anymha's layer with the weights of a foreign one; it need not compute the same."""
    return anymha.convert(layer, to="numpy", weights_only=True)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_a_module_of_transformers_agrees_with_its_weights_in_our_layer(layout, kernel) -> None:
    layer = family(layout)
    for part in layer.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = kernel
    square = SEEN[:, :, :5]
    report = compare(ours(layer), layer, [QUERY], use_causal_mask=True, attention_mask=square)
    assert report.passed, report.to_text()
    told = {stage.name for stage in report.stages}
    assert told >= {*PROJECTED, "gradient of query", "gradient of query.kernel"}
    assert ("scores" in told) == (kernel == "eager")
    assert not any(part._forward_hooks for part in layer.modules())


@pytest.mark.parametrize("layout", ["transformers.bart", "transformers.whisper"])
def test_a_module_of_transformers_attends_to_other_states(layout) -> None:
    layer = family(layout)
    report = compare(ours(layer), layer, [QUERY, VALUE], value_mask=PADDED)
    assert report.passed, report.to_text()
    assert "gradient of value" in {stage.name for stage in report.stages}
    with pytest.raises(LayoutError, match="cannot be compared with `key`"):
        compare(ours(layer), layer, [QUERY, VALUE, KEY])
    alone = family("transformers.clip")
    with pytest.raises(LayoutError, match="cannot be compared with `value`"):
        compare(ours(alone), alone, [QUERY, VALUE])


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("llama.Llama", {"num_key_value_heads": 1}, "by halves"),
        ("mistral.Mistral", {"num_key_value_heads": 2, "head_dim": 4}, "by halves"),
        ("qwen2.Qwen2", {"num_key_value_heads": 1}, "by halves"),
        ("gptj.GPTJ", {"rotary_dim": 4, "n_positions": 16}, "by pairs"),
    ],
)
def test_rotary_positions_of_a_module_are_named(name, options, cause) -> None:
    need("torch")
    need("transformers")
    module, start = name.split(".")
    path = f"transformers.models.{module}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, while it is imported
        configs = importlib.import_module(f"{path}.configuration_{module}")
        models = importlib.import_module(f"{path}.modeling_{module}")
    config = getattr(configs, f"{start}Config")(
        hidden_size=8, num_attention_heads=2, attn_implementation="eager", **options
    )
    config._attn_implementation = "eager"
    layer = _random(getattr(models, f"{start}Attention")(config, layer_idx=0)).eval()
    assert compare(ours(layer), layer, [QUERY], use_causal_mask=True).passed
    weights = anymha.get_weights(layer)
    plain = dataclasses.replace(weights.config, rotary=None).to_dict()
    without = anymha.MultiHeadAttention(backend="numpy", **plain)
    without = anymha.set_weights(without, dict(weights))
    report = compare(without, layer, [QUERY], use_causal_mask=True)
    assert f"rotary positions, {cause}" in str(report.diagnosis)
    told = {stage.name for stage in report.stages}
    assert not {"query", "key"} & told  # what it attends with is not what it projects
    again = compare(layer, layer, [QUERY], use_causal_mask=True)
    assert again.passed, again.to_text()


def test_a_module_that_needs_more_of_its_model_is_refused() -> None:
    need("torch")
    need("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, while it is imported
        models = importlib.import_module("transformers.models.llama.modeling_llama")
        configs = importlib.import_module("transformers.models.llama.configuration_llama")
    config = configs.LlamaConfig(hidden_size=8, num_attention_heads=2)
    layer = models.LlamaAttention(config, layer_idx=0)
    reference = ours(layer)
    config.rope_parameters = None
    told = r"LlamaAttention .* needs more .*: position_embeddings\. .* as a function"
    with pytest.raises(LayoutError, match=told):
        compare(reference, layer, [QUERY])


def test_a_module_with_alibi_is_compared_where_it_is_causal() -> None:
    need("torch")
    need("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, while it is imported
        models = importlib.import_module("transformers.models.bloom.modeling_bloom")
        configs = importlib.import_module("transformers.models.bloom.configuration_bloom")
    layer = models.BloomAttention(configs.BloomConfig(hidden_size=8, n_head=2), layer_idx=0)
    layer = _random(layer).eval()
    assert compare(ours(layer), layer, [QUERY], use_causal_mask=True).passed
    with pytest.raises(LayoutError, match="Compare it with `use_causal_mask=True`"):
        compare(ours(layer), layer, [QUERY])


def test_a_bias_that_a_projection_drops_is_found_at_its_stage() -> None:
    layer = family("transformers.bart")
    torch = importlib.import_module("torch")

    class Dropping(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            return torch.nn.functional.linear(x, self.weight)

    layer.v_proj.__class__ = Dropping
    report = compare(ours(layer), layer, [QUERY])
    assert report.first_divergence == "value"
    assert "bias" in str(report.diagnosis)


def port() -> Any:
    """A port of the layer to torch by hand: projections as torch's, heads side by side."""
    torch = need("torch")

    class Port(torch.nn.Module):
        scale = 0.5

        def __init__(self) -> None:
            super().__init__()
            for name in ("q", "k", "v", "out"):
                setattr(self, f"{name}_proj", torch.nn.Linear(8, 8))
            self.dropout = torch.nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, query: Any, value: Any = None, attention_mask: Any = None) -> Any:
            self.calls += 1
            value = query if value is None else value
            pairs = ((self.q_proj, query), (self.k_proj, value), (self.v_proj, value))
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f, x in pairs)
            logits = self.scale * q @ k.mT
            if attention_mask is not None:
                logits = logits.masked_fill(~attention_mask[:, None], -torch.inf)
            return self.out_proj((self.dropout(logits.softmax(-1)) @ v).transpose(1, 2).flatten(2))

    return _random(Port()).eval()


def test_a_module_of_one_s_own_is_called_with_tensors_in_its_own_mode() -> None:
    module = port()
    torch = importlib.import_module("torch")
    layer = ours_of(module)
    inputs = {"query": QUERY.astype("float64"), "value": VALUE.astype("float64")}
    report = compare(layer, module, inputs, attention_mask=SEEN)
    assert report.passed, report.to_text()
    told = {stage.name for stage in report.stages}
    assert told == {"output", "gradient of query", "gradient of value"}
    assert module.calls == 0
    module.train()
    report = compare(layer, module, [QUERY])
    assert str(report.diagnosis) == "dropout left on"
    assert module.training
    assert compare(layer, module, [QUERY], training=False).passed
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(module.calls, torch.zeros(()))


def ours_of(module: Any) -> Any:
    """anymha's layer with a port's weights."""
    state = {name: array.numpy() for name, array in module.state_dict().items()}
    state.pop("calls")
    weights, config = anymha.to_canonical(state, "transformers.bart", num_heads=2)
    return anymha.set_weights(anymha.MultiHeadAttention(**config.to_dict(), backend="numpy"),
                              weights)  # fmt: skip


def test_a_module_whose_layout_is_declared_tells_its_projections_and_all_gradients() -> None:
    module = port()
    declared = declare(module, layout="transformers.bart", num_heads=2)
    report = compare(ours_of(module), declared, [QUERY, VALUE], attention_mask=SEEN)
    assert report.passed, report.to_text()
    told = {stage.name for stage in report.stages}
    assert told >= {*PROJECTED, "gradient of value.bias", "gradient of query"}
    assert not any(part._forward_hooks for part in module.modules())
    module.scale = 1.0
    report = compare(declared, ours_of(module), [QUERY, VALUE], attention_mask=SEEN)
    assert any("wrong scale" in note for note in report.notes)  # the reference is the port


def test_a_function_may_come_with_weights_of_a_library() -> None:
    haiku = need("haiku")
    jax = importlib.import_module("jax")

    def forward(q: Any, v: Any, mask: Any) -> Any:
        draw = haiku.initializers.RandomNormal()
        module = haiku.MultiHeadAttention(2, 4, w_init=draw, b_init=draw, model_size=8)
        return module(q, v, v, mask=mask)

    transformed = haiku.transform(forward)
    params = transformed.init(jax.random.key(0), QUERY, VALUE, None)

    def call(query: Any, value: Any, value_mask: Any) -> Any:
        return transformed.apply(params, None, query, value, value_mask[:, None, None])

    declared = declare(call, params, num_heads=2)
    given = {"query": jax.numpy.asarray(QUERY), "value": jax.numpy.asarray(VALUE)}
    report = compare(declared, anymha.convert(params, to="jax", num_heads=2), given,
                     value_mask=PADDED)  # fmt: skip
    assert report.passed, report.to_text()
    assert "masked_logits" in {stage.name for stage in report.stages}  # causes can be looked for


@functools.cache
def haiku_s() -> tuple[Any, Any]:
    """Haiku's layer as `haiku.transform` gives it, and parameters."""
    haiku, jax = need("haiku"), importlib.import_module("jax")

    def forward(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
        draw = haiku.initializers.RandomNormal(0.5)
        module = haiku.MultiHeadAttention(2, 4, w_init=draw, b_init=draw, model_size=8)
        return module(query, key, value, mask)

    transformed = haiku.transform(forward)
    return transformed, transformed.init(jax.random.key(0), QUERY, KEY, VALUE)


# Each call beside NumPy's layer, which is held against the others above; two beside each of them.
BESIDE = [
    *((call, "numpy") for call in CALLS),
    *(("self", "torch"), ("padded", "torch"), ("cross", "keras"), ("masked", "keras")),
    *(("three", "nnx"), ("causal", "nnx")),
]


@pytest.mark.parametrize(("call", "other"), BESIDE)
def test_haiku_s_layer_agrees_with_others_in_each_stage_and_gradient(call, other) -> None:
    transformed, params = haiku_s()
    inputs, others = CALLS[call]
    layer = anymha.convert(params, to="numpy", num_heads=2)
    layer = layer if other == "numpy" else converted(layer, other)
    report = compare(declare(transformed, params, num_heads=2), layer, inputs, **others)
    assert report.passed, report.to_text()
    told = {stage.name for stage in report.stages}
    whole = other == "torch" and call in ("self", "causal")  # a kernel that tells no stages
    assert told >= ({"output"} if whole else PROJECTED)
    if gradients_there(other):
        assert told >= {"gradient of query", "gradient of key.kernel", "gradient of output.bias"}


def test_a_mistake_beside_haiku_s_layer_is_named() -> None:
    transformed, params = haiku_s()
    layer = anymha.convert(params, to="numpy", num_heads=2)
    report = compare(
        declare(transformed, params, num_heads=2), lambda query, value, attention_mask:
        layer(query, value, attention_mask=~attention_mask), [QUERY, VALUE], attention_mask=SEEN
    )  # fmt: skip
    assert "inverted mask" in str(report.diagnosis)
    with pytest.raises(LayoutError, match="Haiku cannot be compared with `attention_bias`"):
        compare(layer, declare(transformed, params, num_heads=2), [QUERY, VALUE],
                attention_bias=np.zeros((5, 6), "float32"))  # fmt: skip


@pytest.mark.usefixtures("no_pairs")
def test_weights_that_are_declared_may_be_canonical() -> None:
    layer = reference()
    shifted = declare(lambda query: layer(query) + 1, anymha.get_weights(layer), "anymha")
    report = compare(layer, shifted, [QUERY])
    assert report.first_divergence == "output"
    with pytest.raises(ArgumentError, match="Received: neither"):
        declare(lambda query: query)


@pytest.mark.parametrize("told", ["layer", "weights"])
@pytest.mark.parametrize("compute_dtype", [None, "float64"])
def test_what_is_declared_with_a_layer_of_anymha_has_its_options(told, compute_dtype) -> None:
    options = {"query_features": 8, "alibi": True, "query_key_norm": "rms", "seed": 0}
    layer, other = (
        anymha.MultiHeadAttention(2, 4, **options, compute_dtype=dtype, backend="numpy")
        for dtype in (compute_dtype, None)
    )
    weights = (layer,) if told == "layer" else (anymha.get_weights(layer), "anymha")
    port = declare(lambda query: other(query), *weights)
    for one, two in ((layer, port), (port, layer)):
        report = compare(one, two, [QUERY])
        assert report.passed, report.to_text()  # and not to the bit: it is a port
        assert not any("computes more than attention" in note for note in report.notes)


@pytest.mark.parametrize("scale", ["weight", "one_plus_weight"])
def test_weights_of_an_option_that_is_not_declared_are_compared(scale) -> None:
    norm = anymha.QueryKeyNorm(scale=scale)
    layer = anymha.MultiHeadAttention(
        2, 4, query_features=8, query_key_norm=norm, rotary=True, seed=0, backend="numpy"
    )
    weights = {n: w + np.float32(0.25) for n, w in anymha.get_weights(layer).items()}
    anymha.set_weights(layer, weights)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    report = compare(layer, declare(lambda query: layer(query), weights, "anymha"), x)
    assert report.passed, report
    assert "pass `query_key_norm=" in " ".join(report.notes)
    weights["key_norm.scale"] = 2 * weights["key_norm.scale"]
    report = compare(layer, declare(lambda query: layer(query), weights, "anymha"), x)
    assert report.first_divergence == "weight key_norm.scale"


def model(path: Any, layer: Any, dropped: str = "") -> Any:
    """A file of ONNX with the weights of ours; without one of them."""
    onnx = need("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weights = {n: np.array(w) for n, w in anymha.get_weights(layer).items()}
    nodes, arrays = [], {"scale": np.float32(0.5), "heads": np.array([0, 0, 2, 4])}
    arrays |= {"flat": np.array([0, 0, 8]), "least": np.float32(-1e30)}

    def add(kind: str, *inputs: str, **options: Any) -> str:
        name = options.pop("name", f"n{len(nodes)}")
        nodes.append(helper.make_node(kind, inputs, [name], **options))
        return name

    heads = {}
    for part in ("query", "key", "value", "output"):
        kernel = weights[f"{part}.kernel"]
        arrays[f"{part}.w"] = kernel.reshape(8, 8)
        arrays[f"{part}.b"] = weights[f"{part}.bias"].reshape(8) * (part != dropped)
        if part != "output":
            flat = add("Add", add("MatMul", part, f"{part}.w"), f"{part}.b")
            order = [0, 2, 3, 1] if part == "key" else [0, 2, 1, 3]
            heads[part] = add("Transpose", add("Reshape", flat, "heads"), perm=order)
    logits = add("Mul", add("MatMul", heads["query"], heads["key"]), "scale")
    seen = add("Unsqueeze", "attention_mask", "axis")
    arrays["axis"] = np.array([1])
    scores = add("Softmax", add("Where", seen, logits, "least"), axis=-1, name="scores")
    context = add("Transpose", add("MatMul", scores, heads["value"]), perm=[0, 2, 1, 3])
    flat = add("Reshape", context, "flat")
    add("Add", add("MatMul", flat, "output.w"), "output.b", name="output")
    kinds = {"query": 1, "key": 1, "value": 1, "attention_mask": 9}  # float, bool
    graph = helper.make_graph(
        nodes, "attention",
        [helper.make_tensor_value_info(n, kind, [None] * 3) for n, kind in kinds.items()],
        [helper.make_tensor_value_info("output", 1, [None] * 3),
         helper.make_tensor_value_info("scores", 1, [None] * 4)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, path)
    return path


def test_a_model_of_onnx_is_run_by_the_names_of_its_inputs(tmp_path) -> None:
    runtime = need("onnxruntime")
    layer = reference()
    right = model(tmp_path / "right.onnx", layer)
    inputs = [array.astype("float64") for array in (QUERY, VALUE, KEY)]
    report = compare(layer, str(right), inputs, attention_mask=SEEN)
    assert {stage.name for stage in report.stages} == {"scores", "output"}
    faults = [fault for stage in report.stages for fault in stage.faults]
    assert report.passed or faults == ["dtype float32, not float64"]
    wrong = model(tmp_path / "wrong.onnx", layer, "value")
    session = runtime.InferenceSession(wrong, providers=["CPUExecutionProvider"])
    report = compare(layer, session, [QUERY, VALUE, KEY], attention_mask=SEEN)
    assert "bias" in str(report.diagnosis)
    assert report.diagnosis is not None
    assert report.diagnosis.causes[0].stage == "value"
    with pytest.raises(ArgumentError, match=r"It lacks: value_mask\. The call lacks: attention_m"):
        compare(layer, right, [QUERY, VALUE, KEY], value_mask=PADDED)
    with pytest.raises(ArgumentError, match=r"which is none"):
        adapter_for(tmp_path / "missing.onnx")


@pytest.mark.parametrize("backend", ["numpy", "torch", "tensorflow", "jax"])
def test_our_layers_tell_excluded_positions_as_the_others_do(backend) -> None:
    if not get_backend(backend).installed:
        skip_or_fail(backend, f"{backend} is not installed")
    layer = anymha.convert(reference(), to=backend)
    rows = np.arange(5) < np.array([5, 3, 2])[:, None]
    request = make_request([QUERY, VALUE, KEY], {"value_mask": PADDED, "query_mask": rows})
    found = adapter_for(layer).trace(request, None)
    assert found.config is not None
    assert found.weights is not None
    truth = fold(problem_of(found.config, found.weights, request)).recipe.stages
    for stage in ("query", "key", "value", "logits", "masked_logits"):
        np.testing.assert_allclose(found.stages[stage], truth[stage], atol=1e-5)


def test_what_is_no_implementation_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"a model of ONNX .* Received: builtins\.int"):
        adapter_for(3)


def test_a_live_layer_and_a_layout_are_refused_at_once() -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
    with pytest.raises(ArgumentError, match="Leave `layout` out"):
        declare(lambda query: layer(query), layer, "anymha")

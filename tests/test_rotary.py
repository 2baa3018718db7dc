"""The option `rotary` of the layer and `anymha.rotate`, in every framework and by every path."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha import AttentionConfig, Rotary
from anymha.attention.features.frequencies import attention_factor, frequencies
from anymha.errors import ConfigError, DtypeError, LayoutError, ShapeError
from anymha.framework.registry import Backend
from anymha.parity import compare
from anymha.parity.oracle.features import rotary as oracle
from anymha.parity.oracle.recipe import Recipe
from anymha.parity.stages.trace import INPUTS
from tests.peer_layers import need
from tests.support import native, normal

OPTIONS = {"num_heads": 4, "num_key_value_heads": 2, "key_dim": 6, "query_features": 8, "seed": 0}
PLACES = np.array([[3, 1, 4, 1, 5, 9], [0, 2, 4, 6, 8, 10]], np.int32)
KEY_PLACES = np.arange(6, 0, -1, dtype=np.int32)
PARTIAL = Rotary(dim=4, base=50.0, layout="interleaved", columns="last")
SHORT, LONG = [1.0, 1.5, 2.0, 2.5], [1.0, 4.0, 9.0, 16.0]
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn, mscale": {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7,
                     "mscale_all_dim": 1.0, "beta_fast": 16.0, "truncate": False},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "longrope": {"short_factor": SHORT, "long_factor": LONG,
                 "original_max_position_embeddings": 32},
    "proportional": {"partial_rotary_factor": 0.5},
}  # fmt: skip


def _scaled(name: str, base: float = 500_000.0, **fields: Any) -> Rotary:
    scaling = {"rope_type": name.partition(",")[0], **SCALINGS[name]}
    return Rotary(base=base, scaling=scaling, max_position_embeddings=64, **fields)


def _turned(x: np.ndarray, places: np.ndarray, rotary: Rotary, length: int = 0) -> np.ndarray:
    """Rotated in float64, as complex numbers."""
    r = rotary.dim or x.shape[-1]
    x = x.astype(np.float64)
    start = 0 if rotary.columns == "first" else x.shape[-1] - r
    fields = {**vars(rotary)}
    own = oracle.frequencies(fields, r, length)
    turn = np.exp(1j * np.atleast_2d(places)[..., None] * own)[:, :, None]
    turn = turn * oracle.attention_factor(fields)
    half, part = rotary.layout == "half", x[..., start : start + r]
    pairs = part.reshape(*part.shape[:-1], *((2, r // 2) if half else (r // 2, 2)))
    one, two = np.moveaxis(pairs, -2 if half else -1, 0)
    both = (one + 1j * two) * turn
    pairs = np.stack([both.real, both.imag], -2 if half else -1)
    return np.concatenate([x[..., :start], pairs.reshape(part.shape), x[..., start + r :]], axis=-1)


def _by_hand(
    weights: dict[str, np.ndarray], x: np.ndarray, rotary: Rotary, places: Any, key_places: Any
) -> np.ndarray:
    """Causal self-attention of rotated heads, in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    q, k, v = (
        np.einsum("btd,dhk->bthk", x, w[f"{n}.kernel"]) + w[f"{n}.bias"]
        for n in ("query", "key", "value")
    )
    length = x.shape[1]
    q, k = _turned(q, places, rotary, length), _turned(k, key_places, rotary, length)
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(6)
    logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.einsum("bhts,bshv,hvo->bto", scores, v, w["output.kernel"]) + w["output.bias"]


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize(
    ("budget", "rotary", "given"),
    [
        (None, PARTIAL, True),
        (64, PARTIAL, True),
        (None, Rotary(base=50.0), False),
        (64, Rotary(base=50.0), False),
    ],
)
def test_heads_are_turned_whole_and_by_tiles(
    backend: Backend, budget: int | None, rotary: Rotary, given: bool
) -> None:
    layer = anymha.MultiHeadAttention(
        **OPTIONS, rotary=rotary, backend=backend.name, bias_initializer="ones",
        memory_budget=budget,
    )  # fmt: skip
    x = normal((2, 6, 8), "x")
    arrays = native(backend.ops, {"x": x, "positions": PLACES, "key_positions": KEY_PLACES})
    call = {n: arrays[n] for n in ("positions", "key_positions") if given}
    got = backend.ops.to_numpy(layer(arrays["x"], use_causal_mask=True, **call))
    weights = anymha.get_weights(layer)
    places = (PLACES, KEY_PLACES) if given else (np.arange(6), np.arange(6))
    np.testing.assert_allclose(got, _by_hand(weights, x, rotary, *places), atol=1e-5)
    other = _by_hand(weights, x, replace(rotary, base=100.0), *places)
    assert np.max(np.abs(got - other)) > 1e-3


@pytest.mark.parametrize("offset", [3, np.array([0, 5], np.int32)], ids=["int", "array"])
def test_queries_stand_at_index_and_offset(backend: Backend, offset: Any) -> None:
    layer = anymha.MultiHeadAttention(**OPTIONS, rotary=True, backend=backend.name)
    arrays = native(backend.ops, {"x": normal((2, 6, 8), "x"), "places": np.zeros((2, 6), np.int32)
                                  + np.arange(6, dtype=np.int32) + np.reshape(offset, (-1, 1)),
                                  "offset": offset})  # fmt: skip
    moved = layer(arrays["x"], query_offset=arrays["offset"])
    given = layer(arrays["x"], positions=backend.ops.from_numpy(
        np.asarray(backend.ops.to_numpy(arrays["places"]), np.int32)))  # fmt: skip
    np.testing.assert_allclose(
        backend.ops.to_numpy(moved), backend.ops.to_numpy(given), rtol=0, atol=1e-6
    )


def test_positions_fold_with_the_attention_axes(backend: Backend) -> None:
    layer = anymha.MultiHeadAttention(
        **OPTIONS, rotary=Rotary(base=50.0), backend=backend.name, attention_axes=(1, 2)
    )
    x, places = normal((2, 2, 3, 8), "x"), PLACES.reshape(2, 2, 3)
    arrays = native(backend.ops, {"x": x, "flat": x.reshape(2, 6, 8), "places": places,
                                  "row": PLACES, "keys": KEY_PLACES.reshape(2, 3),
                                  "key_row": KEY_PLACES})  # fmt: skip
    got = layer(arrays["x"], positions=arrays["places"], key_positions=arrays["keys"])
    options = {**OPTIONS, "rotary": Rotary(base=50.0)}
    plain = anymha.MultiHeadAttention(**options, backend=backend.name)
    plain = anymha.set_weights(plain, anymha.get_weights(layer))
    wanted = plain(arrays["flat"], positions=arrays["row"], key_positions=arrays["key_row"])
    np.testing.assert_allclose(
        backend.ops.to_numpy(got).reshape(2, 6, 8), backend.ops.to_numpy(wanted), atol=1e-6
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    torch = need("torch")
    for base, dim, length in ((500_000.0, 8, 16), (10_000.0, 8, 100_000)):
        rotary = _scaled(name, base)
        kind = rotary.scaled["rope_type"]
        if kind == "default":
            exponents = torch.arange(0, dim, 2).float() / dim
            wanted, factor = 1.0 / (base**exponents), 1.0
        else:
            parameters = {"rope_theta": base, **rotary.scaled}
            config = SimpleNamespace(
                rope_parameters={n: list(v) if isinstance(v, tuple) else v
                                 for n, v in parameters.items()},
                head_dim=dim, hidden_size=dim, num_attention_heads=1,
                max_position_embeddings=64, standardize_rope_params=lambda: None,
            )  # fmt: skip
            config.rope_parameters.setdefault("factor", None if kind == "longrope" else 1.0)
            wanted, factor = rope.ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
        got = np.asarray(frequencies(base, dim, rotary.scaled, 64, "float32", length), np.float32)
        np.testing.assert_array_max_ulp(got, wanted.numpy(), maxulp=1)
        assert attention_factor(rotary.scaled, 64) == pytest.approx(factor, rel=1e-15)
        exact = frequencies(base, dim, rotary.scaled, 64, "float64", length)
        np.testing.assert_allclose(exact, oracle.frequencies(vars(rotary), dim, length), rtol=1e-12)


@pytest.mark.parametrize("name", ["half", "interleaved", "partial"])
def test_rotate_is_that_of_transformers(backend: Backend, name: str) -> None:
    torch = need("torch")
    modules = {"half": "llama.modeling_llama", "interleaved": "gptj.modeling_gptj",
               "partial": "glm.modeling_glm"}  # fmt: skip
    module = pytest.importorskip(f"transformers.models.{modules[name]}")
    x, places = normal((2, 6, 3, 8), "x").astype(np.float32), PLACES * 1000
    r = 4 if name == "partial" else 8
    angles = places[..., None] * 10_000.0 ** (-np.arange(0, r, 2, dtype=np.float32) / r)
    angles = torch.from_numpy(angles.astype(np.float32))
    heads = torch.from_numpy(x)
    if name == "interleaved":
        wanted = module.apply_rotary_pos_emb(heads, angles.sin(), angles.cos())
    else:
        whole = torch.cat([angles, angles], -1)
        cos, sin = whole.cos(), whole.sin()
        wanted = module.apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)[0]
    layout = "half" if name == "half" else "interleaved"
    rotary = Rotary(dim=r, layout=layout)
    arrays = native(backend.ops, {"x": x, "places": places.astype(np.int32)})
    got = backend.ops.to_numpy(anymha.rotate(arrays["x"], arrays["places"], rotary))
    # GLM pairs columns as GPT-J does
    np.testing.assert_allclose(got, wanted.numpy(), atol=3e-3)
    np.testing.assert_allclose(got, _turned(x, places, rotary), atol=3e-3)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotate_by_every_scaling(backend: Backend, name: str) -> None:
    x, places = normal((2, 6, 3, 8), "x").astype(np.float32), np.arange(90, 96, dtype=np.int32)
    arrays = native(backend.ops, {"x": x, "places": places, "double": x.astype(np.float64)})
    for length in (6, 96):
        rotary = _scaled(name, 50.0, columns="last")
        wanted = _turned(x, places, rotary, length)
        got = anymha.rotate(arrays["x"], arrays["places"], rotary, length=length)
        np.testing.assert_allclose(backend.ops.to_numpy(got), wanted, atol=1e-4)
    double = anymha.rotate(arrays["double"], arrays["places"], rotary, length=96)
    np.testing.assert_allclose(backend.ops.to_numpy(double), wanted, atol=1e-12)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_lengths_that_a_traced_program_does_not_know(name: str) -> None:
    tf = need("tensorflow")
    rotary = _scaled(name, 50.0)
    options = {**OPTIONS, "key_dim": 8, "rotary": rotary, "backend": "tensorflow"}
    layer = anymha.MultiHeadAttention(**options)
    traced = tf.function(
        lambda x: layer(x), input_signature=[tf.TensorSpec((1, None, 8), tf.float32)]
    )
    for length in (20, 100):
        x = tf.constant(normal((1, length, 8), "x").astype(np.float32))
        np.testing.assert_allclose(traced(x), layer(x), atol=2e-5)


def test_half_precision_turns_by_angles_in_float32(backend: Backend) -> None:
    x, places = (
        normal((1, 4, 2, 8), "x").astype(np.float32),
        np.array([1000, 10_001, 70_003, 100_000], np.int32),
    )
    arrays = native(backend.ops, {"x": x, "places": places})
    half = backend.ops.astype(arrays["x"], backend.ops.dtype("bfloat16"))
    got = backend.ops.to_numpy(anymha.rotate(half, arrays["places"], Rotary()))
    assert got.dtype.name == "bfloat16"
    exact = _turned(backend.ops.to_numpy(half).astype(np.float64), places, Rotary())
    np.testing.assert_allclose(got.astype(np.float64), exact, atol=0.03)


def test_gradients_are_those_of_finite_differences() -> None:
    layer = anymha.MultiHeadAttention(**OPTIONS, rotary=PARTIAL, dtype="float64", backend="numpy")
    x, g = normal((2, 6, 8), "x").astype(np.float64), normal((2, 6, 8), "g").astype(np.float64)
    call = {"positions": PLACES, "key_positions": KEY_PLACES, "use_causal_mask": True}
    _, pullback = layer.vjp(x, **call)
    gradients = pullback(g)
    weights, step = anymha.get_weights(layer), 1e-6
    for name in ("query.kernel", "key.kernel", "key.bias", "value.kernel"):
        place = (1,) * (weights[name].ndim - 1) + (3,)
        values = []
        for sign in (1, -1):
            moved = weights[name].copy()
            moved[place] += sign * step
            other = anymha.set_weights(layer, {**weights, name: moved})
            values.append(float((other(x, **call) * g).sum()))
            layer = anymha.set_weights(layer, weights)
        slope = (values[0] - values[1]) / (2 * step)
        assert gradients[name][place] == pytest.approx(slope, rel=1e-6, abs=1e-8)
    # In columns that are not turned the key's bias adds one number to all logits of a row.
    assert not gradients["key.bias"][:, :2].any()
    assert gradients["key.bias"][:, 2:].all()


def test_a_fused_kernel_is_still_taken() -> None:
    torch = need("torch")
    layer = anymha.MultiHeadAttention(**OPTIONS, rotary=True, backend="torch")
    x = torch.from_numpy(normal((2, 6, 8), "x"))
    assert anymha.explain(layer, x).startswith("fused")
    places = torch.arange(6)
    assert anymha.explain(layer, x, positions=places, key_positions=places).startswith("fused")


def test_layers_with_other_rotary_positions_are_told_apart() -> None:
    turned, plain, other = (
        anymha.MultiHeadAttention(**OPTIONS, rotary=rotary, backend="numpy")
        for rotary in (PARTIAL, None, replace(PARTIAL, base=9.0))
    )
    x = normal((2, 6, 8), "x") * 3
    for candidate in (plain, other):
        report = compare(turned, candidate, x)
        assert not report.passed
        assert "rotary" in str(report.diagnosis)
    assert compare(turned, turned, x, positions=PLACES, key_positions=KEY_PLACES).passed
    with pytest.raises(LayoutError, match="rotary"):
        anymha.set_weights(plain, anymha.get_weights(turned))
    with pytest.raises(LayoutError, match="rotary"):
        anymha.convert(turned, to="keras.GroupQueryAttention")


@pytest.mark.parametrize("name", SCALINGS)
def test_the_option_is_saved_and_loaded(tmp_path, name: str) -> None:
    options = {**OPTIONS, "key_dim": 8}
    layer = anymha.MultiHeadAttention(**options, rotary=_scaled(name), backend="numpy")
    anymha.save(tmp_path / "layer.safetensors", layer)
    loaded = anymha.load(tmp_path / "layer.safetensors", backend="numpy").config
    assert loaded.rotary == layer.config.rotary
    assert hash(loaded.rotary) == hash(layer.config.rotary)
    as_json = json.loads(json.dumps(layer.config.to_dict()))
    assert AttentionConfig.from_dict(as_json) == layer.config
    assert AttentionConfig(2, 8, rotary=as_json["rotary"]).rotary == layer.config.rotary


def test_the_option_is_in_keras_config() -> None:
    need("keras")
    layers = importlib.import_module("anymha_keras")
    layer = layers.MultiHeadAttention(2, 4, rotary=Rotary(dim=2), query_features=8)
    assert layers.MultiHeadAttention.from_config(layer.get_config()).config.rotary == Rotary(dim=2)


def test_forms_of_the_option() -> None:
    assert AttentionConfig(2, 4, rotary=True).rotary == Rotary()
    assert AttentionConfig(2, 4, rotary=False).rotary is None
    assert AttentionConfig(2, 4, rotary={"dim": 2, "base": 9}).rotary == Rotary(dim=2, base=9.0)
    old = {"type": "linear", "factor": 2, "rope_theta": 10_000.0}
    new = {"rope_type": "linear", "factor": 2.0}
    assert Rotary(scaling=old) == Rotary(scaling=new)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": 3}, "even number of columns"),
        ({"dim": 0}, "`dim` of `rotary` must be a whole number"),
        ({"dim": 8}, "`dim` of `rotary` must be at most the width of the heads, 6"),
        ({"base": 1.0}, "`base` of `rotary` must be a finite number above 1"),
        ({"base": "10000"}, "`base` of `rotary` must be a finite number"),
        ({"layout": "pairs"}, "`layout` of `rotary` must be one of 'half', 'interleaved'"),
        ({"columns": "middle"}, "`columns` of `rotary` must be one of 'first', 'last'"),
        ({"width": 4}, "`rotary`: `Rotary` takes no `width`. Received: width=4. Pass `dim`."),
        ({"scaling": 2.0}, "`scaling` of `rotary` must be a dict"),
        ({"scaling": {"factor": 2.0}}, "'rope_type' of 'default', 'linear'"),
        ({"scaling": {"rope_type": "linear"}}, "must have factor"),
        ({"scaling": {"rope_type": "linear", "factor": 0}}, "`factor` of `rotary`"),
        ({"scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}, "Leave out 'beta'"),
        ({"scaling": {"rope_type": "dynamic", "factor": 2}}, "needs `max_position_embeddings`"),
        ({"scaling": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}}, "`base=500000.0`"),
        (
            {"scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0],
                         "factor": 2.0, "original_max_position_embeddings": 8}},
            "a number for each rotated pair of columns, 3. Received: 1",
        ),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        AttentionConfig(2, 6, rotary=fields)
    assert words in str(error.value)


def test_an_option_that_is_no_rotary_is_refused() -> None:
    for value in ("half", 10_000.0, [4]):
        with pytest.raises(ConfigError, match=r"`rotary` must be an `anymha\.Rotary`"):
            AttentionConfig(2, 4, rotary=value)
    with pytest.raises(ConfigError, match="even number of columns"):
        AttentionConfig(2, 5, rotary=True)


def test_wrong_positions_are_refused(backend: Backend) -> None:
    layer = anymha.MultiHeadAttention(**OPTIONS, rotary=True, backend=backend.name)
    arrays = native(backend.ops, {"x": normal((2, 6, 8), "x"), "real": np.ones(6, np.float32),
                                  "short": np.arange(5, dtype=np.int32),
                                  "many": np.zeros((2, 6, 1), np.int32)})  # fmt: skip
    for name in ("positions", "key_positions"):
        with pytest.raises(DtypeError, match=f"`{name}` must be signed integers"):
            layer(arrays["x"], **{name: arrays["real"]})
        for wrong in ("short", "many"):
            with pytest.raises(ShapeError, match=f"`{name}` must"):
                layer(arrays["x"], **{name: arrays[wrong]})
    heads = backend.ops.reshape(arrays["x"], (2, 6, 2, 4))
    with pytest.raises(ShapeError, match="`positions` must"):
        anymha.rotate(heads, arrays["short"], Rotary())
    with pytest.raises(DtypeError, match="`positions` must be signed integers"):
        anymha.rotate(heads, arrays["real"], Rotary())
    with pytest.raises(ShapeError, match="`x` must have 4 axes"):
        anymha.rotate(arrays["x"], backend.ops.from_numpy(PLACES), Rotary())


def test_weights_of_the_other_layout_are_permuted_or_refused() -> None:
    options = {**OPTIONS, "use_bias": False}
    layer = anymha.MultiHeadAttention(**options, rotary=True, backend="numpy")
    weights = anymha.get_weights(layer)
    arrays = anymha.from_canonical(weights, layout="transformers.llama", config=layer.config)
    sizes = {"num_heads": 4, "num_key_value_heads": 2}
    back, config = anymha.to_canonical(arrays, "transformers.llama", rotary=True, **sizes)
    assert config.rotary == Rotary()
    np.testing.assert_array_equal(back["query.kernel"], weights["query.kernel"])
    pairs = Rotary(layout="interleaved")
    with pytest.raises(LayoutError, match="`rotary` of its weights must have layout="):
        anymha.to_canonical(arrays, "transformers.llama", rotary=pairs, **sizes)
    meta = anymha.from_canonical(weights, "meta.llama", config=layer.config)
    assert meta.config.rotary == pairs
    back, _ = anymha.to_canonical(meta, "meta.llama", rotary=pairs, **sizes)
    order = [*range(0, OPTIONS["key_dim"], 2), *range(1, OPTIONS["key_dim"], 2)]
    for name in ("query.kernel", "key.kernel"):
        np.testing.assert_array_equal(back[name][..., order], weights[name])
    np.testing.assert_array_equal(back["value.kernel"], weights["value.kernel"])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("rounded", [("frequencies",), ("angles",), ("cosines and sines",),
                                     ("frequencies", "angles", "cosines and sines")])  # fmt: skip
def test_comparison_names_what_is_in_half_precision(rounded: tuple[str, ...], dtype: Any) -> None:
    layer = anymha.MultiHeadAttention(**OPTIONS, rotary=True, backend="numpy", dtype="float64")
    weights = anymha.get_weights(layer)

    def narrow(name: str, x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(np.float64) if name in rounded else x

    def port(query: np.ndarray) -> np.ndarray:
        own = narrow("frequencies", 10_000.0 ** (-np.arange(0, 6, 2) / 6))
        angles = narrow("angles", np.arange(query.shape[1])[:, None] * own)[:, None]
        cos, sin = (np.tile(narrow("cosines and sines", f(angles)), 2) for f in (np.cos, np.sin))

        def heads(name: str) -> np.ndarray:
            kernel, bias = weights[f"{name}.kernel"], weights[f"{name}.bias"]
            x = np.einsum("btd,dhk->bthk", query, kernel) + bias
            if name == "value":
                return np.repeat(x, 2, axis=2)
            x = x * cos + np.concatenate([-x[..., 3:], x[..., :3]], -1) * sin
            return x if name == "query" else np.repeat(x, 2, axis=2)

        context = anymha.dot_product_attention(*map(heads, ("query", "key", "value")))
        return np.einsum("bthk,hkd->btd", context, weights["output.kernel"])

    report = compare(layer, port, normal((2, 9, 8), "x"))
    assert f"rotary angles in half precision ({' and '.join(rounded)}" in str(report.diagnosis)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_gradients_of_angles_of_the_other_layout_are_turned_back(layout: str) -> None:
    rng = np.random.default_rng(3)
    weights = {f"{name}.kernel": rng.standard_normal((6, 2, 8)) for name in INPUTS}
    weights["output.kernel"] = rng.standard_normal((2, 8, 6))
    recipe = Recipe(weights, {name: rng.standard_normal((2, 5, 6)) for name in INPUTS}, 0.4)
    section = oracle.RotarySection({"layout": layout}, mixed=True)
    x, y = rng.standard_normal((2, 2, 5, 2, 8))
    turned = section.forward("query", x, recipe, {})
    back = section.backward("query", y, x, recipe, {}, True)
    assert np.sum(turned * y) == pytest.approx(np.sum(x * back), rel=1e-12)
    plain = oracle.RotarySection({"layout": layout}).forward("query", x, recipe, {})
    assert np.max(np.abs(turned - plain)) > 0.1

"""Foreign layouts of weights: to the canonical form and back, bit for bit, or a clear error."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from dataclasses import replace
from itertools import permutations
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anymha
from anymha.errors import (
    ArgumentError,
    BiasWarning,
    ConfigError,
    LayoutError,
    UnknownLayoutError,
    WeightsError,
)
from anymha.framework.registry import get_backend
from anymha.interchange import layouts as module
from anymha.interchange.compared_options import result_options
from anymha.interchange.layout import Layout
from anymha.interchange.layouts import from_canonical, get_layout, layouts, to_canonical
from anymha.interchange.layouts.encoders import LAYOUTS as ENCODERS
from anymha.interchange.model_needs import need_of
from anymha.interchange.packing import LARGE, contiguous_copy
from anymha.interchange.weights import Weights
from anymha.layer.forward import multi_head_attention
from anymha.options.config import AttentionConfig
from tests.file_samples import same as same_bits
from tests.layout_samples import SAMPLES, Sample, Size, by_name, label

BERT = "transformers.bert"
NAMES = {"query": "self.query", "key": "self.key", "value": "self.value", "output": "output.dense"}
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
NAMED = [
    "anymha",
    *("keras.MultiHeadAttention", "keras.GroupQueryAttention", "torch.MultiheadAttention"),
    *("flax.nnx.MultiHeadAttention", "flax.linen.MultiHeadDotProductAttention"),
    *("equinox.MultiheadAttention", "haiku.MultiHeadAttention", "x_transformers.Attention"),
    *("timm.vit", "onnxruntime.MultiHeadAttention"),
    *("transformers.bert", "transformers.gpt2", "transformers.vit", "transformers.clip"),
    *("transformers.t5", "transformers.whisper", "transformers.llama", "transformers.mistral"),
    *("transformers.qwen2", "transformers.qwen3", "transformers.qwen3_next"),
    *("transformers.afmoe", "transformers.hrm_text"),
    *("transformers.gemma", "transformers.gemma2", "transformers.gemma3"),
    *("transformers.gpt_neox", "transformers.bloom", "transformers.falcon", "transformers.phi3"),
    *("transformers.gpt_bigcode", "transformers.codegen", "transformers.gptj"),
    *("transformers.gpt_oss", "transformers.opt", "transformers.bart"),
    *("transformers.albert", "transformers.distilbert", "transformers.mpnet"),
    *("transformers.deberta", "transformers.deberta_v2", "transformers.wav2vec2_bert"),
    *("transformers.blip", "transformers.gpt_neo", "transformers.mpt", "transformers.modernbert"),
    *("transformers.nomic_bert", "transformers.dbrx", "transformers.phi"),
    *("transformers.olmo2", "transformers.cohere", "transformers.cohere2", "transformers.glm"),
    *("transformers.llama4", "transformers.smollm3", "transformers.granite"),
    *("transformers.starcoder2", "transformers.exaone4", "transformers.glm4_moe"),
    "transformers.hunyuan_v1_dense",
    *("transformers.flax_bert", "nanogpt.CausalSelfAttention", "internlm.internlm2"),
    *("gpt_fast.Attention", "megatron.SelfAttention", "meta.llama", "vit_pytorch.Attention"),
    *("diffusers.Attention", "flash_attn.MHA", "openai.whisper", "gemma.Attention"),
    *("gguf.llama", "gguf.qwen2", "fused.blocks", "fused.groups"),
]


def draw_arrays(
    sizes: dict[str, int], biased: tuple[str, ...] = tuple(NAMES), dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """The arrays of a BERT layer with those sizes."""
    rng = np.random.default_rng(0)
    h, k, d, v = (sizes[name] for name in ("heads", "shared", "key_dim", "value_dim"))
    widths = {
        "query": (h * d, sizes["query"]),
        "key": (k * d, sizes["key"]),
        "value": (k * v, sizes["value"]),
        "output": (sizes["output"], h * v),
    }
    arrays = {}
    for projection, shape in widths.items():
        name = NAMES[projection]
        arrays[f"{name}.weight"] = rng.standard_normal(shape).astype(dtype)
        if projection in biased:
            arrays[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(dtype)
    return arrays


SIZES = {
    "heads": 4, "shared": 2, "key_dim": 3, "value_dim": 5, "query": 7, "key": 6, "value": 8,
    "output": 9,
}  # fmt: skip
drawn = st.builds(
    Size,
    **{name: st.integers(1, 4) for name in "KdvDSUO"},
    H=st.just(0),
).flatmap(lambda s: st.integers(1, 3).map(lambda groups: _grouped(s, groups)))


def _grouped(size: Size, groups: int) -> Size:
    return Size(**{**vars(size), "H": size.K * groups})


def same(one: Any, other: Any) -> None:
    """The same names and the same bits."""
    assert set(one) == set(other)
    for name, array in one.items():
        assert other[name].dtype == array.dtype, name
        assert other[name].shape == array.shape, name
        assert other[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize("sample", SAMPLES, ids=label)
@settings(max_examples=25)
@given(size=drawn, dtype=st.sampled_from(DTYPES), data=st.data())
def test_round_trip_keeps_every_bit(sample: Sample, size: Size, dtype: Any, data: Any) -> None:
    arrays = sample.arrays(size, lambda group: data.draw(st.booleans(), label=str(group)), dtype)
    weights, config = to_canonical(arrays, sample.layout, **sample.told(size))
    true = sample.size(size)
    assert {name: w.shape for name, w in weights.items()} == config.weight_shapes()
    assert (config.num_heads, config.key_value_heads, config.key_dim) == (true.H, true.K, true.d)
    assert (config.value_dim, config.dtype) == (true.v, np.dtype(dtype).name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = from_canonical(weights, sample.layout, config=config)
        same(back, arrays)
        assert all(array.flags.c_contiguous for array in back.values())
        if not weights.extras:  # the same of a plain dict, which remembers no form
            form = sample.form or None
            same(from_canonical(dict(weights), sample.layout, config=config, form=form), arrays)


@pytest.mark.parametrize("sample", SAMPLES, ids=label)
@settings(max_examples=10)
@given(size=drawn, data=st.data())
def test_way_from_the_canonical_form_and_back_keeps_every_bit(
    sample: Sample, size: Size, data: Any
) -> None:
    arrays = sample.arrays(size, lambda group: data.draw(st.booleans()))
    first, config = to_canonical(arrays, sample.layout, **sample.told(size))
    rng = np.random.default_rng(1)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in config.weight_shapes().items()
    }
    back = from_canonical(
        weights, sample.layout, config=config, extras=first.extras, form=first.form
    )
    again, config_again = to_canonical(back, sample.layout, **sample.told(size))
    same(again, weights)
    assert config_again == config


@pytest.mark.parametrize("sample", SAMPLES, ids=label)
def test_every_layer_fits_its_own_layout_and_says_why_not_another(sample: Sample) -> None:
    shapes = {name: array.shape for name, array in sample.arrays(Size()).items()}
    layout = get_layout(sample.layout)
    assert layout.fits(shapes) is None
    assert set(shapes) <= set(layout.names())
    assert layout.prefixes([f"model.3.{name}" for name in shapes]) == ["model.3."]
    short = dict(list(shapes.items())[1:])
    assert "Missing: " in str(layout.fits(short))
    grown = {**shapes, "unheard.of": (3,)}
    assert str(layout.fits(grown)).endswith("Unknown: unheard.of.")
    for name, shape in shapes.items():
        if name in (extra.array for extra in layout.extras):
            continue
        bent = {**shapes, name: (*shape[:-1], 1 + shape[-1])}
        # One more input of a kernel is another layer; everything else must be noticed.
        assert layout.fits(bent) or len(shape) > 1


def test_every_layout_that_is_promised_is_there_and_sampled() -> None:
    assert set(NAMED) == {sample.layout for sample in SAMPLES}
    assert set(NAMED) <= set(layouts())


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.asks], ids=label)
def test_heads_that_the_shapes_do_not_tell_are_asked_for(sample: Sample) -> None:
    with pytest.raises(WeightsError) as error:
        to_canonical(sample.arrays(Size()), sample.layout)
    assert message(error) == (
        f"{sample.layout} needs `num_heads`, the number of query heads (or `head_dim`, the width "
        "of each): its shapes do not show it. It is in the model's configuration."
    )
    weights, _ = to_canonical(sample.arrays(Size()), sample.layout, head_dim=3)
    assert weights["query.kernel"].shape[1:] == (sample.size(Size()).H, 3)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if not s.asks], ids=label)
def test_heads_that_contradict_the_shapes_are_refused(sample: Sample) -> None:
    right = sample.size(Size()).H
    to_canonical(sample.arrays(Size()), sample.layout, num_heads=right)
    with pytest.raises((WeightsError, ConfigError)):
        to_canonical(sample.arrays(Size()), sample.layout, num_heads=right + 1)


def test_result_is_a_copy() -> None:
    arrays = draw_arrays(SIZES)
    weights, _ = to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    back = from_canonical(weights, BERT)
    for array in arrays.values():
        assert not any(np.shares_memory(array, other) for other in weights.values())
    for array in back.values():
        assert not any(np.shares_memory(array, other) for other in weights.values())


def test_canonical_weights_mean_what_the_linear_layers_mean() -> None:
    sizes = {**SIZES, "key": 7, "value": 7}
    arrays = draw_arrays(sizes, dtype=np.float64)
    weights, config = to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    x = np.random.default_rng(1).standard_normal((2, 6, 7))

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ arrays[f"{NAMES[name]}.weight"].T + arrays[f"{NAMES[name]}.bias"]

    q = linear("query", x).reshape(2, 6, 4, 3)
    k = linear("key", x).reshape(2, 6, 2, 3).repeat(2, axis=2)
    v = linear("value", x).reshape(2, 6, 2, 5).repeat(2, axis=2)
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(3)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    context = np.einsum("bhts,bshd->bthd", scores, v).reshape(2, 6, 20)
    got = multi_head_attention(get_backend("numpy").ops, config, weights, x)
    np.testing.assert_allclose(got, linear("output", context), rtol=0, atol=1e-12)


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


ALL = ", ".join(f"{name}.{part}" for name in NAMES.values() for part in ("weight", "bias"))


def test_missing_and_unknown_names_are_told_together() -> None:
    arrays = draw_arrays(SIZES)
    arrays["self.out.weight"] = arrays.pop("output.dense.weight")
    with pytest.raises(WeightsError) as error:
        to_canonical(arrays, BERT, num_heads=4)
    assert message(error) == (
        f"The layout has the names {ALL}. Missing: output.dense.weight. Unknown: self.out.weight."
    )


def test_canonical_names_that_are_missing_or_unknown_are_told() -> None:
    weights, _ = to_canonical(draw_arrays(SIZES), BERT, num_heads=4, num_key_value_heads=2)
    weights["values.kernel"] = weights.pop("value.kernel")
    with pytest.raises(WeightsError) as error:
        from_canonical(weights, BERT)
    assert message(error) == (
        "Canonical weights are query.kernel, key.kernel, value.kernel, output.kernel and their "
        "biases, and those of options: query_norm.scale, query_norm.bias, key_norm.scale, "
        "key_norm.bias, sinks. Missing: value.kernel. Unknown: values.kernel."
    )


@pytest.mark.parametrize("heads", [5, 0, -2])
def test_heads_that_do_not_divide_are_told(heads: int) -> None:
    with pytest.raises(WeightsError) as error:
        to_canonical(draw_arrays(SIZES), BERT, num_heads=heads)
    assert message(error) == (
        f"`self.query.weight` must be a matrix whose rows are {heads} heads of equal size. "
        "Received: shape (12, 7)."
    )


def test_output_that_the_heads_do_not_divide_is_told() -> None:
    arrays = draw_arrays(SIZES)
    arrays["output.dense.weight"] = np.ones((9, 22), np.float32)
    with pytest.raises(WeightsError) as error:
        to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    assert message(error) == (
        "`output.dense.weight` must be a matrix whose columns are 4 heads of equal size. "
        "Received: shape (9, 22)."
    )


@pytest.mark.parametrize("shape", [(12,), (12, 7, 1), ()])
def test_weight_that_is_no_matrix_is_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError) as error:
        to_canonical({**draw_arrays(SIZES), "self.query.weight": np.ones(shape)}, BERT, num_heads=4)
    assert message(error).endswith(f"Received: shape {shape}.")


@pytest.mark.parametrize("name", NAMES.values())
def test_bias_of_another_length_is_told(name: str) -> None:
    arrays = draw_arrays(SIZES)
    rows, columns = arrays[f"{name}.weight"].shape
    arrays[f"{name}.bias"] = np.ones((rows + 1,))
    with pytest.raises(WeightsError) as error:
        to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    assert message(error) == (
        f"`{name}.bias` must have shape ({rows},), as `{name}.weight` has shape "
        f"({rows}, {columns}). Received: shape ({rows + 1},)."
    )


def test_layers_that_do_not_fit_one_another_are_told() -> None:
    arrays = {**draw_arrays(SIZES), "self.key.weight": np.ones((8, 6), np.float32)}
    arrays["self.key.bias"] = np.ones(8, np.float32)
    with pytest.raises(WeightsError) as error:
        to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    assert message(error) == (
        "The layers do not fit one another: `key.kernel` has shape (6, 2, 4), "
        "the others need (6, 2, 3)."
    )


def test_heads_that_do_not_fit_key_heads_are_told() -> None:
    sizes = {**SIZES, "shared": 3}
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        to_canonical(draw_arrays(sizes), BERT, num_heads=4, num_key_value_heads=3)


def test_output_of_more_axes_is_told() -> None:
    weights, _ = to_canonical(draw_arrays(SIZES), BERT, num_heads=4, num_key_value_heads=2)
    weights["output.kernel"] = weights["output.kernel"].reshape(4, 5, 3, 3)
    with pytest.raises(WeightsError) as error:
        from_canonical(weights, BERT)
    assert message(error) == (
        "transformers.bert cannot hold these weights: its outputs are vectors. Received: "
        "`output.kernel` of shape (4, 5, 3, 3). Use 'keras.MultiHeadAttention', whose outputs may "
        "have more axes."
    )


def test_layout_that_is_not_known_is_told() -> None:
    for call in (
        lambda: to_canonical({}, "bert", num_heads=1),
        lambda: from_canonical({}, "bert"),
        lambda: get_layout("bert"),
    ):
        with pytest.raises(UnknownLayoutError) as error:
            call()
        listed = ", ".join(repr(name) for name in layouts())
        meant = "Did you mean 'transformers.bert'?"
        assert message(error) == f"`layout`: none is called 'bert'. {meant} There are {listed}."
    assert BERT in layouts()


# What a fused array means, by hand: rows are numbered, and each says whose it is.
PACKINGS = {
    # per head: query, key, value
    ("transformers.gpt_neox", 2, 2): ["q0", "k0", "v0", "q1", "k1", "v1"],
    ("transformers.bloom", 2, 2): ["q0", "k0", "v0", "q1", "k1", "v1"],
    ("transformers.falcon", 2, 2): ["q0", "k0", "v0", "q1", "k1", "v1"],
    # all queries, one key, one value
    ("transformers.falcon", 3, 1): ["q0", "q1", "q2", "k0", "v0"],
    ("transformers.gpt_bigcode", 3, 1): ["q0", "q1", "q2", "k0", "v0"],
    # for each key head its queries
    ("transformers.falcon", 4, 2): ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"],
    # all queries, all keys, all values
    ("transformers.phi3", 4, 2): ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"],
    ("timm.vit", 2, 2): ["q0", "q1", "k0", "k1", "v0", "v1"],
    ("torch.MultiheadAttention", 2, 2): ["q0", "q1", "k0", "k1", "v0", "v1"],
    ("transformers.gpt2", 2, 2): ["q0", "q1", "k0", "k1", "v0", "v1"],
    # four blocks of query, value, key
    ("transformers.codegen", 8, 8): [
        f"{name}{2 * block + head}" for block in range(4) for name in "qvk" for head in range(2)
    ],
}


@pytest.mark.parametrize(("layout", "heads", "shared"), PACKINGS)
def test_rows_of_a_fused_kernel_go_where_they_belong(layout: str, heads: int, shared: int) -> None:
    order = PACKINGS[layout, heads, shared]
    width = heads * 3
    sample = by_name(layout)
    (name,) = (n for n, s in sample.shapes(Size(H=heads, K=shared, D=width)).items()
               if len(s) == 2 and max(s) == 3 * len(order))  # fmt: skip
    arrays = sample.arrays(
        Size(H=heads // sample.multiple, K=shared, D=width, S=width, U=width, O=width), False
    )
    rows = np.arange(3 * len(order) * width, dtype=np.float32).reshape(-1, width)
    arrays[name] = rows.T.copy() if layout == "transformers.gpt2" else rows
    weights, _ = to_canonical(arrays, layout, num_heads=heads)
    for place, whose in enumerate(order):
        projection = {"q": "query", "k": "key", "v": "value"}[whose[0]]
        head = weights[f"{projection}.kernel"][:, int(whose[1:])]  # (D, d)
        np.testing.assert_array_equal(head.T, rows[3 * place : 3 * place + 3], err_msg=whose)


def test_query_heads_of_x_transformers_are_dealt_out_one_by_one() -> None:
    arrays = by_name("x_transformers.Attention").arrays(Size(H=4, K=2, d=1, D=1))
    arrays["to_q.weight"] = np.arange(4, dtype=np.float32).reshape(4, 1)
    weights, _ = to_canonical(arrays, "x_transformers.Attention", num_heads=4)
    # Heads 0 and 2 belong to key head 0, heads 1 and 3 to key head 1.
    np.testing.assert_array_equal(weights["query.kernel"][0, :, 0], [0, 2, 1, 3])
    back = weights["output.kernel"].transpose(2, 0, 1)  # (O, H, d_v)
    theirs = arrays["to_out.weight"].reshape(9, 4, 5)
    np.testing.assert_array_equal(back, theirs[:, [0, 2, 1, 3]])


def test_key_heads_are_told_by_the_shapes() -> None:
    for layout in ("transformers.llama", "transformers.falcon", "x_transformers.Attention"):
        size = Size(H=6, K=2)
        arrays = by_name(layout).arrays(size)
        _, config = to_canonical(arrays, layout, num_heads=6)
        assert config.key_value_heads == 2
        _, config = to_canonical(arrays, layout, num_heads=6, num_key_value_heads=2)
        assert config.key_value_heads == 2


def test_scale_and_window_go_into_the_config() -> None:
    arrays = by_name("transformers.t5").arrays(Size())
    _, config = to_canonical(arrays, "transformers.t5", num_heads=4)
    assert config.scale == 1.0
    arrays = by_name("transformers.gemma3").arrays(Size())
    weights, config = to_canonical(
        arrays, "transformers.gemma3", scale=168**-0.5, sliding_window=512
    )
    assert (config.scale, config.sliding_window) == (168**-0.5, 512)
    same(from_canonical(weights, "transformers.gemma3"), arrays)


def test_scale_that_the_target_does_not_have_is_refused() -> None:
    weights, config = to_canonical(
        by_name("transformers.t5").arrays(Size(d=4, D=8)), "transformers.t5", num_heads=4
    )
    for one in (weights, {**weights}):
        with pytest.raises(LayoutError) as error:
            from_canonical(one, "equinox.MultiheadAttention", config=config)
        assert message(error) == (
            "A layer of equinox.MultiheadAttention multiplies the logits by 0.5; the config has "
            "`scale` 1, and the results would change. Multiply `query.kernel` and `query.bias` "
            "by 2 first, and pass a config with `scale` 0.5."
        )
    with pytest.raises(LayoutError, match=r"multiplies the logits by 0\.5"):
        from_canonical(weights, "equinox.MultiheadAttention")  # the config came with the weights
    plain = AttentionConfig(4, 4)
    with pytest.raises(LayoutError, match="multiplies the logits by 1; the config has"):
        from_canonical(weights, "transformers.t5", config=plain)


def test_layout_whose_layers_all_have_an_option_takes_no_layer_without() -> None:
    weights, config = to_canonical(
        by_name("transformers.bloom").arrays(Size()), "transformers.bloom", num_heads=4
    )
    assert (weights.needs, config.alibi) == ((), True)
    slopes = replace(config, alibi=[2.0 ** (-2 * h) for h in (1, 2, 3, 4)])
    same(
        from_canonical(weights, "transformers.bloom", config=slopes),
        from_canonical(weights, "transformers.bloom"),
    )
    with pytest.raises(LayoutError) as error:
        from_canonical(weights, "transformers.bloom", config=replace(config, alibi=False))
    assert message(error) == (
        "Every layer of transformers.bloom has alibi=True, and the results would change. Received: "
        "alibi=False. Use another layout, or convert the arrays alone, with `dict(weights)` and no "
        "config."
    )
    with pytest.raises(LayoutError, match="has no option for alibi=True"):
        from_canonical(weights, BERT)


NEEDS = {
    "transformers.llama": ["rotary"],
    "transformers.gptj": ["element 2i of a head turns with element 2i \\+ 1", "rotary_dim"],
    "transformers.qwen3": ["Rotary\\(base=..., layout='half'\\)", "RMS norms .* times the weight"],
    "transformers.gemma2": ["rotary", "c \\* tanh", "query_pre_attn_scalar"],
    "transformers.gemma3": [
        "times 1 \\+ the weight.*QueryKeyNorm\\(scale='one_plus_weight', eps=...\\)",
        "query_pre_attn_scalar",
    ],
    "transformers.t5": ["bias of relative positions"],
    "transformers.falcon": ["alibi", "before the logits are scaled"],
    "transformers.llama4": ["after they are rotated", "for each position"],
}


@pytest.mark.parametrize("layout", NEEDS)
def test_what_else_the_forward_pass_needs_is_told(layout: str) -> None:
    sample = by_name(layout)
    weights, _ = to_canonical(sample.arrays(Size()), layout, **sample.told(Size()))
    for need in NEEDS[layout]:
        assert any(re.search(need, told) for told in weights.needs), weights.needs
    assert all(need in repr(weights) for need in weights.needs)
    assert from_canonical(weights, layout).needs == weights.needs


@pytest.mark.parametrize(
    "name", ["bert", "vit", "clip", "opt", "bart", "whisper", "gpt2", "gpt_bigcode"]
)
def test_families_whose_attention_is_plain_need_nothing(name: str) -> None:
    sample = by_name(f"transformers.{name}")
    weights, _ = to_canonical(sample.arrays(Size()), sample.layout, num_heads=4)
    assert weights.needs == weights.lost == ()


def test_arrays_that_another_layout_has_no_place_for_are_not_dropped_silently() -> None:
    weights, config = to_canonical(
        by_name("transformers.qwen3").arrays(Size()), "transformers.qwen3"
    )
    with pytest.raises(LayoutError) as error:
        from_canonical(weights, "transformers.llama", config=config)
    assert message(error) == (
        "transformers.llama has no place for q_norm.weight, k_norm.weight, which the layer of "
        "transformers.qwen3 has besides the projections. Pass `dict(weights)` to convert the "
        "projections alone."
    )
    assert "q_proj.weight" in from_canonical(dict(weights), "transformers.llama", config=config)
    with pytest.raises(LayoutError) as error:
        from_canonical(dict(weights), "transformers.qwen3", config=config)
    assert message(error) == (
        "transformers.qwen3 has q_norm.weight, k_norm.weight, rotary_emb.inv_freq besides the "
        "projections. Missing: q_norm.weight, k_norm.weight. Unknown: none. Pass them by name as "
        "`extras`."
    )


GATED = ["transformers.qwen3_next", "transformers.afmoe", "transformers.hrm_text"]


def test_rows_of_queries_and_gates_lie_head_by_head() -> None:
    size = by_name("transformers.qwen3_next").size(Size())
    arrays = by_name("transformers.qwen3_next").arrays(size)
    weights, config = to_canonical(arrays, "transformers.qwen3_next")
    assert (config.gate, config.num_heads) == ("elementwise", size.H)
    for head in range(size.H):
        start = 2 * head * size.d
        for name, first in (("query", start), ("gate", start + size.d)):
            rows = slice(first, first + size.d)
            kernel = weights[f"{name}.kernel"][:, head].T
            np.testing.assert_array_equal(kernel, arrays["q_proj.weight"][rows])
            np.testing.assert_array_equal(
                weights[f"{name}.bias"][head], arrays["q_proj.bias"][rows]
            )


def test_bias_of_a_query_whose_gate_has_none_gets_zeros_beside_it() -> None:
    arrays = by_name("transformers.qwen3_next").arrays(Size())
    weights, config = to_canonical(arrays, "transformers.qwen3_next")
    bias = weights.pop("gate.bias")
    fewer = replace(config, use_bias=("query", "key", "value", "output"))
    with pytest.warns(BiasWarning, match=r"gate\.bias added as zeros"):
        back = from_canonical(
            dict(weights), "transformers.qwen3_next", config=fewer, extras=weights.extras
        )
    found = to_canonical(back, "transformers.qwen3_next")[0]
    np.testing.assert_array_equal(found["gate.bias"], np.zeros_like(bias))
    np.testing.assert_array_equal(found["query.bias"], weights["query.bias"])


@pytest.mark.parametrize("layout", GATED)
def test_layer_without_a_gate_or_with_one_of_each_head_is_refused(layout: str) -> None:
    sample = by_name(layout)
    size = sample.size(Size())
    weights, config = to_canonical(sample.arrays(size, False), layout, **sample.told(size))
    with pytest.raises(LayoutError, match=r"has no `gate\.kernel`"):
        from_canonical(dict(weights), "transformers.llama")
    gate, plain = weights["gate.kernel"], dict(weights)
    del plain["gate.kernel"]
    extras = weights.extras
    with pytest.raises(LayoutError, match=r"its layers have a gate\. Received: no `gate\.kernel`"):
        from_canonical(plain, layout, extras=extras)
    with pytest.raises(LayoutError, match=r"Every layer of .* has gate='elementwise'"):
        from_canonical(dict(weights), layout, config=replace(config, gate=None), extras=extras)
    with pytest.raises(LayoutError, match="one for each head"):
        from_canonical(plain | {"gate.kernel": gate[..., 0]}, layout, extras=extras)


@pytest.mark.parametrize("layout", GATED)
def test_gate_of_other_heads_is_refused(layout: str) -> None:
    sample = by_name(layout)
    size = sample.size(Size())
    arrays = sample.arrays(size, False)
    name = "q_proj.weight" if layout.endswith("next") else "gate_proj.weight"
    for shape in ((size.H * 11, size.D), (size.H, size.D), (len(arrays[name]),)):
        bent = arrays | {name: np.ones(shape, np.float32)}
        with pytest.raises(WeightsError, match=f"`{name}` must be a matrix whose rows are"):
            to_canonical(bent, layout, **sample.told(size))
    if name != "q_proj.weight":
        bent = arrays | {name: np.ones((len(arrays[name]), 99), np.float32)}
        with pytest.raises(WeightsError, match="with the inputs of the queries"):
            to_canonical(bent, layout, **sample.told(size))


@pytest.mark.parametrize("layout", GATED)
def test_layers_with_a_gate_are_those_of_no_other_family(layout: str) -> None:
    arrays = by_name(layout).arrays(Size(), False)
    (group,) = anymha.find_layers({f"model.layers.0.self_attn.{n}": a for n, a in arrays.items()})
    assert group.layout == layout


def test_gate_of_another_module_than_attention_is_none_of_its_projections() -> None:
    adapter = {f"lora_{name}.weight": np.ones((2, 2), np.float32) for name in "AB"}
    arrays = {f"model.layers.0.mlp.gate_proj.{name}": array for name, array in adapter.items()}
    assert anymha.find_layers(arrays) == []


def test_buffers_are_given_back_but_bind_nothing() -> None:
    arrays = by_name("transformers.gpt2").arrays(Size())
    arrays["bias"] = np.tril(np.ones((1, 1, 4, 4), bool))  # not floats, and not to be
    weights, _ = to_canonical(arrays, "transformers.gpt2", num_heads=4)
    assert set(weights.extras) == {"bias", "masked_bias"}
    same(from_canonical(weights, "transformers.gpt2"), arrays)
    assert set(from_canonical(weights, "transformers.gpt_neox")) == {
        "query_key_value.weight", "query_key_value.bias", "dense.weight", "dense.bias",
    }  # fmt: skip


def canonical(**changes: Any) -> dict[str, np.ndarray]:
    """Random canonical weights, square unless told otherwise."""
    options = {"num_heads": 2, "key_dim": 4, "query_features": 8, **changes}
    shapes = AttentionConfig(**options).weight_shapes()
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


REFUSED = {
    "torch, value heads of another width": (
        "torch.MultiheadAttention", {"value_dim": 3},
        "torch.MultiheadAttention cannot hold these weights: its value heads are as wide as its "
        "key heads. Received: key heads of width 4, value heads of width 3. Use a layout with both "
        "widths, as 'keras.MultiHeadAttention' or 'equinox.MultiheadAttention'.",
    ),
    "torch, grouped heads": (
        "torch.MultiheadAttention", {"num_key_value_heads": 1},
        "torch.MultiheadAttention cannot hold these weights: it has one key head for each query "
        "head. Received: 2 query heads, 1 key and value heads. Use a layout with grouped heads, as "
        "'keras.GroupQueryAttention' or 'transformers.llama'.",
    ),
    "torch, heads of another width together": (
        "torch.MultiheadAttention", {"key_dim": 3},
        "torch.MultiheadAttention cannot hold these weights: its `embed_dim` is the width of its "
        "queries, of all heads together and of its outputs. Received: queries of width 8, 2 heads "
        "of width 3, outputs of shape (8,). Use a layout with these widths, as "
        "'equinox.MultiheadAttention'.",
    ),
    "linen, grouped heads": (
        "flax.linen.MultiHeadDotProductAttention", {"num_key_value_heads": 1},
        "it has one key head for each query head",
    ),
    "linen, outputs of two axes": (
        "flax.linen.MultiHeadDotProductAttention", {"output_shape": (2, 3)},
        "flax.linen.MultiHeadDotProductAttention cannot hold these weights: its outputs are "
        "vectors. Received: `output.kernel` of shape (2, 4, 2, 3). Use 'keras.MultiHeadAttention', "
        "whose outputs may have more axes.",
    ),
    "nnx, key and value of two widths": (
        "flax.nnx.MultiHeadAttention", {"value_features": 5, "key_features": 6},
        "it makes key, value of inputs of one width. Received: widths 6, 5.",
    ),
    "nnx, value heads of another width": (
        "flax.nnx.MultiHeadAttention", {"value_dim": 3}, "its value heads are as wide",
    ),
    "keras, grouped heads": (
        "keras.MultiHeadAttention", {"num_key_value_heads": 1}, "'keras.GroupQueryAttention'",
    ),
    "keras grouped, another output": (
        "keras.GroupQueryAttention", {"output_shape": 5}, "its outputs are as wide as its queries",
    ),
    "equinox, grouped heads": (
        "equinox.MultiheadAttention", {"num_key_value_heads": 1}, "one key head for each",
    ),
    "gpt2, keys of another input": (
        "transformers.phi3", {"value_features": 5, "use_bias": False},
        "it makes query, key, value of inputs of one width",
    ),
    "codegen, two heads": (
        "transformers.codegen", {"use_bias": False},
        "its heads lie in 4 equal blocks. Received: 2 heads",
    ),
    "phi3, value heads of another width": (
        "transformers.phi3", {"value_dim": 3, "use_bias": False}, "its value heads are as wide",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "options", "text"), REFUSED.values(), ids=REFUSED)
def test_what_a_layout_cannot_hold_is_refused_with_the_reason(
    layout: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(LayoutError) as error:
        from_canonical(canonical(**options), layout)
    assert text in message(error)


def test_outputs_of_more_axes_stay_whole_in_keras() -> None:
    weights = canonical(output_shape=(2, 3))
    arrays = from_canonical(weights, "keras.MultiHeadAttention")
    assert arrays["attention_output/kernel"].shape == (2, 4, 2, 3)
    assert arrays["attention_output/bias"].shape == (2, 3)
    same(to_canonical(arrays, "keras.MultiHeadAttention")[0], weights)


PARTIAL = {
    "torch.MultiheadAttention": "in_proj_bias",
    "keras.MultiHeadAttention": "key/bias",
    "flax.nnx.MultiHeadAttention": "key/bias",
    "haiku.MultiHeadAttention": "key/b",
    "timm.vit": "qkv.bias",
    "transformers.gpt2": "c_attn.bias",
}


@pytest.mark.parametrize("layout", PARTIAL)
def test_absent_bias_becomes_zeros_where_biases_come_together_and_is_told(layout: str) -> None:
    weights = canonical(use_bias=("query", "value", "output"))
    with pytest.warns(BiasWarning) as caught:
        arrays = from_canonical(weights, layout)
    assert str(caught[0].message) == (
        f"{layout} has other biases than these weights: key.bias added as zeros. The results are "
        "the same, but the way back does not know which biases were absent."
    )
    back, _ = to_canonical(arrays, layout, num_heads=2)
    assert not back.pop("key.bias").any()
    same(back, weights)
    assert PARTIAL[layout] in arrays


def test_absent_bias_stays_absent_where_biases_stand_alone() -> None:
    weights = canonical(use_bias=("query", "value", "output"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layout in ("transformers.whisper", "equinox.MultiheadAttention", "transformers.bert"):
            arrays = from_canonical(weights, layout)
            assert len(arrays) == 7
            same(to_canonical(arrays, layout, num_heads=2)[0], weights)


def test_bias_that_has_no_place_is_refused_unless_it_is_zero() -> None:
    weights = canonical()
    with pytest.raises(LayoutError) as error:
        from_canonical(weights, "transformers.whisper")
    assert message(error) == (
        "transformers.whisper has no `key.bias`; the weights do, and without it the results would "
        "change. Use a layout that holds it."
    )
    weights["key.bias"] = np.zeros_like(weights["key.bias"])
    with pytest.warns(BiasWarning, match=r"key\.bias of zeros left out"):
        arrays = from_canonical(weights, "transformers.whisper")
    assert "k_proj.bias" not in arrays
    weights["key.bias"][0, 0] = np.nan
    with pytest.raises(LayoutError, match=r"no `key\.bias`"):
        from_canonical(weights, "transformers.whisper")


def test_latent_attention_is_refused_with_the_reason() -> None:
    arrays = {
        f"{name}.weight": np.ones((4, 4), np.float32)
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    with pytest.raises(LayoutError) as error:
        to_canonical(arrays, "transformers.llama", num_heads=2)
    assert message(error) == (
        "Multi-head latent attention (DeepSeek's `kv_a_proj_with_mqa`) cannot be converted: its "
        "keys and values pass through a shared low-rank projection and a norm, and its heads mix "
        "rotated and plain parts, for which the canonical form has no place."
    )


def test_families_of_latent_attention_are_refused_by_name() -> None:
    with pytest.raises(
        LayoutError, match=r"transformers\.deepseek_v3: Multi-head latent attention"
    ):
        to_canonical({}, "transformers.deepseek_v3")


shapes_drawn = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@pytest.mark.parametrize("sample", SAMPLES, ids=label)
@settings(max_examples=25)
@given(data=st.data())
def test_arrays_of_any_shapes_are_converted_or_refused(sample: Sample, data: Any) -> None:
    arrays = sample.arrays(Size(), lambda group: data.draw(st.booleans()))
    for name in data.draw(st.lists(st.sampled_from(list(arrays)), max_size=3)):
        arrays[name] = np.zeros(data.draw(shapes_drawn), np.float32)
    sizes = {
        name: data.draw(st.none() | st.integers(-1, 13))
        for name in ("num_heads", "num_key_value_heads", "head_dim")
    }
    fits = get_layout(sample.layout).fits({name: array.shape for name, array in arrays.items()})
    try:
        weights, config = to_canonical(arrays, sample.layout, **sizes)
    except (WeightsError, ConfigError):
        return
    assert fits is None
    same(from_canonical(weights, sample.layout, config=config), arrays)


@given(data=st.data())
@pytest.mark.parametrize("layout", NAMED)
@settings(max_examples=15)
def test_canonical_weights_of_any_shapes_are_converted_or_refused(layout: str, data: Any) -> None:
    options = {
        "num_heads": data.draw(st.sampled_from([1, 2, 4])),
        "key_dim": data.draw(st.integers(1, 3)),
        "value_dim": data.draw(st.none() | st.integers(1, 3)),
        "output_shape": data.draw(st.none() | st.just((2, 3))),
        "query_features": data.draw(st.integers(1, 6)),
        "key_features": data.draw(st.none() | st.integers(1, 6)),
        "use_bias": data.draw(st.booleans()),
    }
    weights = canonical(**options)
    for name in data.draw(st.lists(st.sampled_from(list(weights)), max_size=2)):
        weights[name] = np.ones(data.draw(shapes_drawn), np.float32)
    heads, width = options["num_heads"], options["key_dim"]
    shapes = {"head": (width,), "width": (heads * width,)}
    need = need_of(get_layout(layout).needs, "query_key_norm")
    norm = shapes.get(getattr(getattr(need, "norm", None), "over", ""))
    required = [extra.array for extra in get_layout(layout).extras if extra.required]
    extras = {name: np.ones(heads if name == "sinks" else norm) for name in required}
    try:
        arrays = from_canonical(weights, layout, extras=extras)
    except (WeightsError, ConfigError):
        return
    heads = weights["query.kernel"].shape[1]
    back, _ = to_canonical(
        arrays, layout, num_heads=heads, head_dim=weights["query.kernel"].shape[2]
    )
    back.pop("sinks", None)
    same(back, weights)


def test_arrays_of_grouped_heads_are_no_layer_of_a_library_without_them() -> None:
    arrays = by_name("keras.GroupQueryAttention").arrays(Size(), False)
    with pytest.raises(LayoutError) as error:
        to_canonical(arrays, "keras.MultiHeadAttention")
    assert message(error) == (
        "No layer of keras.MultiHeadAttention has these arrays: it has one key head for each query "
        "head. Received: 4 query heads, 2 key and value heads. Use a layout with grouped heads, as "
        "'keras.GroupQueryAttention' or 'transformers.llama'."
    )
    for grouped, single in (("keras.GroupQueryAttention", "keras.MultiHeadAttention"),
                            ("transformers.llama", "transformers.vit")):  # fmt: skip
        arrays = by_name(grouped).arrays(Size(S=7, U=7, v=3), False)
        shapes = {name: array.shape for name, array in arrays.items()}
        assert get_layout(grouped).fits(shapes) is None
        assert get_layout(single).fits(shapes) is not None


def test_grouped_heads_are_written_in_gemma_s_form_of_them() -> None:
    for shared, form in ((2, "grouped"), (4, "alike")):
        arrays = by_name("transformers.llama").arrays(
            Size(H=4, K=shared, d=2, v=2, D=8, S=8, U=8, O=8), False
        )
        weights, _ = to_canonical(arrays, "transformers.llama", num_heads=4)
        written = from_canonical(dict(weights), "gemma.Attention")
        assert written.form == form
        same(to_canonical(written, "gemma.Attention")[0], weights)
    with pytest.raises(LayoutError, match="one key head for each query head"):
        from_canonical(
            to_canonical(
                by_name("transformers.llama").arrays(
                    Size(H=4, K=2, d=2, v=2, D=8, S=8, U=8, O=8), False
                ),
                "transformers.llama",
                num_heads=4,
            )[0],
            "gemma.Attention",
            form="alike",
        )


def test_norm_as_wide_as_all_heads_does_not_tell_their_number() -> None:
    arrays = by_name("transformers.llama").arrays(
        Size(H=4, K=4, d=2, v=2, D=8, S=8, U=8, O=8), False
    )
    arrays |= {f"{name}_norm.weight": np.ones(8, np.float32) for name in "qk"}
    with pytest.raises(WeightsError, match="needs `num_heads`"):
        to_canonical(arrays, "transformers.qwen3")
    with pytest.raises(WeightsError, match=r"Axis 0 of `q_norm\.weight` must be `head_dim`"):
        to_canonical(arrays, "transformers.qwen3", num_heads=4)
    assert to_canonical(arrays, "transformers.qwen3", num_heads=1)[1].num_heads == 1
    (group,) = anymha.find_layers({f"m.0.self_attn.{n}": a for n, a in arrays.items()})
    assert group.config is None, "the heads are open"


def test_norms_and_sinks_of_other_heads_are_refused() -> None:
    arrays = by_name("transformers.qwen3").arrays(Size())
    with pytest.raises(WeightsError) as error:
        to_canonical({**arrays, "k_norm.weight": np.ones(4)}, "transformers.qwen3", head_dim=3)
    assert message(error) == (
        "Axis 0 of `k_norm.weight` must be `head_dim`, which is 3 by the projections. Received: "
        "shape (4,)."
    )
    weights, _ = to_canonical(arrays, "transformers.qwen3")
    with pytest.raises(WeightsError, match=r"Axis 0 of `sinks` must be `num_heads`, which is 4"):
        from_canonical(dict(weights), "transformers.gpt_oss", extras={"sinks": np.ones(5)})


def test_numbers_of_heads_are_integers() -> None:
    with pytest.raises(ArgumentError, match=r"`num_heads` must be an integer\. Received: '4'"):
        to_canonical(draw_arrays(SIZES), BERT, num_heads="4")


def test_results_can_be_copied_and_pickled() -> None:
    weights, _ = to_canonical(by_name("transformers.qwen3").arrays(Size()), "transformers.qwen3")
    for other in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        same(other, weights)
        same(other.extras, weights.extras)
        assert (other.needs, other.layout, other.config) == (
            weights.needs, weights.layout, weights.config,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["bias_k", "bias_v"])
def test_torch_rows_beside_the_inputs_are_refused_with_the_reason(name: str) -> None:
    arrays = {**by_name("torch.MultiheadAttention").arrays(Size()), name: np.ones((1, 1, 12))}
    with pytest.raises(LayoutError) as error:
        to_canonical(arrays, "torch.MultiheadAttention", num_heads=4)
    assert message(error) == (
        f"torch.MultiheadAttention with `{name}` cannot be converted: it is one more key and one "
        "more value after those of the inputs, which no weight of the canonical form can be. Make "
        "the layer with `add_bias_kv=False`."
    )


def test_quantised_arrays_are_refused() -> None:
    arrays = {**draw_arrays(SIZES), "self.key.weight": np.ones((6, 6), np.int8)}
    with pytest.raises(LayoutError) as error:
        to_canonical(arrays, BERT, num_heads=4)
    assert message(error) == (
        "`self.key.weight` must be of float16, bfloat16, float32, float64. Received: int8. Convert "
        "a layer that is not quantised, or turn its values into floats first."
    )


def test_sizes_that_are_not_known_are_told() -> None:
    with pytest.raises(ArgumentError) as error:
        to_canonical(draw_arrays(SIZES), BERT, heads=4)
    assert message(error) == (
        f"Sizes are num_heads, num_key_value_heads, head_dim, {', '.join(result_options())}. "
        "Received: 'heads'."
    )


def test_fused_rows_that_no_heads_fit_are_told() -> None:
    arrays = by_name("transformers.phi3").arrays(Size())
    arrays["qkv_proj.weight"] = np.ones((25, 7), np.float32)
    with pytest.raises(WeightsError) as error:
        to_canonical(arrays, "transformers.phi3", num_heads=4)
    assert message(error) == (
        "`qkv_proj.weight` must be a matrix whose rows are 4 query heads and 2 * K key and value "
        "heads of width 3. Received: shape (25, 7). Check `num_heads` and `num_key_value_heads`."
    )


def test_nested_dicts_and_arrays_of_any_framework_are_taken(installed: Any) -> None:
    sample = by_name("flax.linen.MultiHeadDotProductAttention")
    arrays = sample.arrays(Size())
    wanted, _ = to_canonical(arrays, sample.layout)
    for backend in installed:
        nested: dict[str, dict[str, Any]] = {}
        for name, array in arrays.items():
            module_name, _, part = name.partition("/")
            nested.setdefault(module_name, {})[part] = backend.ops.from_numpy(array)
        weights, _ = to_canonical(nested, sample.layout)
        same(weights, wanted)
        there = {name: backend.ops.from_numpy(array) for name, array in weights.items()}
        same(from_canonical(there, sample.layout, extras=wanted.extras), arrays)


def test_forms_can_be_named() -> None:
    weights = canonical()
    packed = from_canonical(weights, "torch.MultiheadAttention")
    assert "in_proj_weight" in packed
    assert packed.form == "packed"
    separate = from_canonical(weights, "torch.MultiheadAttention", form="separate")
    assert "q_proj_weight" in separate
    with pytest.raises(LayoutError) as error:
        from_canonical(weights, "torch.MultiheadAttention", form="spread")
    assert message(error) == (
        "`form` of torch.MultiheadAttention must be one of 'packed', 'separate'. Received: "
        "'spread'."
    )


class Point:
    """An entry point of a test."""

    def __init__(self, name: str, found: Any) -> None:
        self.name, self.value, self.found = name, "some_package:LAYOUT", found

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_layouts_of_others_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Layout("mine.bert", ENCODERS[0].forms)
    points = [
        Point("mine.bert", theirs),
        Point(BERT, theirs),  # the built-in one stays
        Point("bad.import", ImportError("no module named 'torches'")),
        Point("bad.kind", {"a": "dict"}),
    ]
    asked = []

    def entry_points(group: str) -> list[Point]:
        asked.append(group)
        return points

    monkeypatch.setattr(module.importlib.metadata, "entry_points", entry_points)
    assert get_layout(BERT) is ENCODERS[0]
    assert asked == []  # not looked up for a built-in name
    weights, _ = to_canonical(draw_arrays(SIZES), "mine.bert", num_heads=4)
    assert isinstance(weights, Weights)
    same(from_canonical(weights, "mine.bert"), draw_arrays(SIZES))
    assert "mine.bert" in layouts()
    assert layouts().count(BERT) == 1
    with pytest.raises(UnknownLayoutError, match=r"no module named 'torches'\. Install what it"):
        get_layout("bad.import")
    with pytest.raises(
        UnknownLayoutError, match=r"must be an `anymha\.interchange\.layout\.Layout`"
    ):
        get_layout("bad.kind")


def test_a_misspelt_layout_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownLayoutError, match=r"Did you mean 'torch\.MultiheadAttention'\?"):
        to_canonical({}, layout="torch.MultiHeadAttention")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(640, 640), (24, 27, 700), (5, 4, 16, 900), (70, 3, 4000)])
def test_copies_in_tiles_are_exact(shape: tuple[int, ...], dtype: str) -> None:
    """Large arrays whose axes are exchanged are copied in tiles, for the memory's sake."""
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    assert array.size > LARGE
    for axes in permutations(range(len(shape))):
        turned = array.transpose(axes)
        for view in (turned, turned[::-1], turned[..., ::2]):
            made = contiguous_copy(view)
            assert same_bits(made, np.array(view, order="C"))
            assert made.flags.c_contiguous
            assert not np.shares_memory(made, array)

"""Layouts of libraries that are not installed: their published formulas beside our weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import LayoutError, WeightsError
from anymha.interchange.layouts import from_canonical, to_canonical
from tests.layout_samples import Size, by_name

Arrays = dict[str, np.ndarray]
Heads = tuple[np.ndarray, np.ndarray, np.ndarray]

B, T, H, K, D_HEAD = 2, 5, 4, 2, 6
WIDTH = H * D_HEAD
GROUPED = Size(H=H, K=K, d=D_HEAD, v=D_HEAD, D=WIDTH, S=WIDTH, U=WIDTH, O=WIDTH)


def linear(arrays: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    """torch's `F.linear`."""
    return x @ arrays[f"{name}.weight"].T + arrays.get(f"{name}.bias", 0)


def split(x: np.ndarray, heads: int) -> np.ndarray:
    """``view(B, T, heads, -1).transpose(1, 2)``."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Scaled dot-product attention of (B, H, T, d) and (B, K, T, d), as ``repeat_interleave``."""
    each = query.shape[1] // key.shape[1]
    key, value = key.repeat(each, 1), value.repeat(each, 1)
    logits = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    context = scores / scores.sum(-1, keepdims=True) @ value
    return context.transpose(0, 2, 1, 3).reshape(B, T, -1)


def chunks(name: str) -> Callable[[Arrays, np.ndarray], Heads]:
    """``q, k, v = f(x).chunk(3, -1)``, or ``split`` where heads are grouped."""

    def heads(a: Arrays, x: np.ndarray) -> Heads:
        fused = linear(a, name, x)
        shared = (fused.shape[-1] - WIDTH) // 2
        q, k, v = np.split(fused, [WIDTH, WIDTH + shared], -1)
        return split(q, H), split(k, shared // D_HEAD), split(v, shared // D_HEAD)

    return heads


def grouped(name: str) -> Callable[[Arrays, np.ndarray], Heads]:
    """``rearrange(f(x), "b t (h gs d) -> b t h gs d")``: the last two of each group key, value."""

    def heads(a: Arrays, x: np.ndarray) -> Heads:
        fused = linear(a, name, x).reshape(B, T, K, H // K + 2, D_HEAD)
        q = fused[..., : H // K, :].reshape(B, T, H, D_HEAD)
        return tuple(  # pyright: ignore[reportReturnType]
            part.transpose(0, 2, 1, 3) for part in (q, fused[..., -2, :], fused[..., -1, :])
        )

    return heads


def apart(*names: str) -> Callable[[Arrays, np.ndarray], Heads]:
    def heads(a: Arrays, x: np.ndarray) -> Heads:
        projected = [linear(a, name, x) for name in names]
        q, k, v = (split(one, one.shape[-1] // D_HEAD) for one in projected)
        return q, k, v

    return heads


def flax_bert(a: Arrays, x: np.ndarray) -> Heads:
    """``nn.Dense``: x @ kernel + bias."""
    q, k, v = (split(x @ a[f"self/{n}/kernel"] + a[f"self/{n}/bias"], H)
               for n in ("query", "key", "value"))  # fmt: skip
    return q, k, v


def gemma_alike(a: Arrays, x: np.ndarray) -> Heads:
    """``einsum("BTD,SNDH->SBTNH", x, w)``."""
    q, k, v = np.einsum("btd,sndh->sbnth", x, a["qkv_einsum/w"])
    return q, k, v


def gemma_grouped(a: Arrays, x: np.ndarray) -> Heads:
    """``einsum("BTD,NDH->BTNH", x, w)`` and ``einsum("BSD,CKDH->CBSKH", x, w)``."""
    k, v = np.einsum("bsd,ckdh->cbksh", x, a["kv_einsum/w"])
    return np.einsum("btd,ndh->bnth", x, a["q_einsum/w"]), k, v


def deberta(a: Arrays, x: np.ndarray) -> Heads:
    """``transpose_for_scores(in_proj(x)).chunk(3, -1)``, and biases of queries and values."""
    q, k, v = np.split(split(linear(a, "self.in_proj", x), H), 3, -1)
    return q + split(a["self.q_bias"][None, None], H), k, v + split(a["self.v_bias"][None, None], H)


def matrix(name: str) -> Callable[[Arrays, np.ndarray], np.ndarray]:
    return lambda a, x: linear(a, name, x)


def gemma_output(a: Arrays, x: np.ndarray) -> np.ndarray:
    return np.einsum("btnh,nhd->btd", x.reshape(B, T, H, -1), a["attn_vec_einsum/w"])


def flax_output(a: Arrays, x: np.ndarray) -> np.ndarray:
    return x @ a["output/dense/kernel"] + a["output/dense/bias"]


Formula = tuple[Callable[[Arrays, np.ndarray], Heads], Callable[[Arrays, np.ndarray], np.ndarray]]
FORMULAS: dict[tuple[str, str], Formula] = {
    ("openai.whisper", ""): (apart("query", "key", "value"), matrix("out")),
    ("diffusers.Attention", ""): (apart("to_q", "to_k", "to_v"), matrix("to_out.0")),
    ("meta.llama", ""): (apart("wq", "wk", "wv"), matrix("wo")),
    ("vit_pytorch.Attention", ""): (chunks("to_qkv"), matrix("to_out.0")),
    ("flash_attn.MHA", "self"): (chunks("Wqkv"), matrix("out_proj")),
    ("nanogpt.CausalSelfAttention", ""): (chunks("c_attn"), matrix("c_proj")),
    ("gpt_fast.Attention", ""): (chunks("wqkv"), matrix("wo")),
    ("transformers.nomic_bert", "published"): (chunks("Wqkv"), matrix("out_proj")),
    ("transformers.dbrx", ""): (chunks("Wqkv"), matrix("out_proj")),
    ("transformers.blip", ""): (chunks("qkv"), matrix("projection")),
    ("internlm.internlm2", ""): (grouped("wqkv"), matrix("wo")),
    ("megatron.SelfAttention", ""): (grouped("linear_qkv"), matrix("linear_proj")),
    ("gguf.llama", "separate"): (apart("attn_q", "attn_k", "attn_v"), matrix("attn_output")),
    ("gguf.qwen2", "fused"): (chunks("attn_qkv"), matrix("attn_output")),
    ("fused.blocks", "qkv, proj"): (chunks("qkv"), matrix("proj")),
    ("fused.groups", "qkv, proj"): (grouped("qkv"), matrix("proj")),
    ("transformers.flax_bert", ""): (flax_bert, flax_output),
    ("transformers.deberta", ""): (deberta, matrix("output.dense")),
    ("gemma.Attention", "alike"): (gemma_alike, gemma_output),
    ("gemma.Attention", "grouped"): (gemma_grouped, gemma_output),
}
"""Queries, keys and values of the published code, without what `needs` says, and its output."""


@pytest.mark.parametrize(("layout", "form"), FORMULAS)
def test_converted_layer_gives_the_published_formula_s_output(layout: str, form: str) -> None:
    sample = by_name(layout, form)
    arrays = sample.arrays(GROUPED, dtype=np.float64)
    for extra in sample.optional(sample.size(GROUPED)):
        del arrays[extra]  # a step of its own
    weights, config = to_canonical(arrays, layout, **sample.told(GROUPED))
    x = np.random.default_rng(1).standard_normal((B, T, WIDTH))
    heads, output = FORMULAS[layout, form]
    theirs = output(arrays, attend(*heads(arrays, x)))
    options = {**config.to_dict(), "scale": None}
    layer = anymha.MultiHeadAttention(backend="numpy", **options)
    anymha.set_weights(layer, dict(weights))
    np.testing.assert_allclose(layer(x), theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


def test_interleaved_columns_are_not_those_in_halves() -> None:
    """Meta's files and transformers' have the same Llama with rows in another order."""
    needs = {
        layout: to_canonical(by_name(layout).arrays(Size()), layout, num_heads=4)[0].needs
        for layout in ("meta.llama", "transformers.llama")
    }
    assert "element 2i of a head turns with element 2i + 1" in needs["meta.llama"][0]
    assert "element i of a head turns with element i + half" in needs["transformers.llama"][0]
    arrays = by_name("meta.llama").arrays(Size(d=4, S=7, U=7, v=4))
    weights, _ = to_canonical(arrays, "meta.llama", num_heads=4)
    back = from_canonical(weights, "transformers.llama")
    assert back.needs == needs["transformers.llama"]
    # transformers' own script for Meta's files: convert_llama_weights_to_hf.py, `permute`.
    for theirs, ours, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
        rows = arrays[f"{theirs}.weight"].reshape(heads, 2, 2, 7).swapaxes(1, 2).reshape(-1, 7)
        np.testing.assert_array_equal(back[f"{ours}.weight"], rows)
    for theirs, ours in (("wv", "v_proj"), ("wo", "o_proj")):
        np.testing.assert_array_equal(back[f"{ours}.weight"], arrays[f"{theirs}.weight"])
    again, _ = to_canonical(back, "transformers.llama", num_heads=4)
    home = from_canonical(again, "meta.llama")
    assert all(home[name].tobytes() == array.tobytes() for name, array in arrays.items())


def test_a_part_of_each_head_in_another_order_is_refused() -> None:
    arrays = by_name("transformers.gptj").arrays(Size())
    weights, _ = to_canonical(arrays, "transformers.gptj", num_heads=4)
    with pytest.raises(LayoutError, match="the rotated part of a head is not known"):
        from_canonical(weights, "transformers.llama")
    assert "q_proj.weight" in from_canonical(dict(weights), "transformers.llama")


@pytest.mark.parametrize("name", ["pos_proj", "pos_q_proj", "head_logits_proj"])
def test_deberta_s_further_projections_are_refused_in_words(name: str) -> None:
    arrays = by_name("transformers.deberta").arrays(Size())
    arrays[f"self.{name}.weight"] = np.ones((12, 12), np.float32)
    with pytest.raises(LayoutError, match=r"relative positions|mixes the heads"):
        to_canonical(arrays, "transformers.deberta", num_heads=4)


@pytest.mark.parametrize("layout", ["gemma.Attention", "transformers.mpt"])
def test_steps_that_a_layer_lacks_can_be_stated(layout: str) -> None:
    sample = by_name(layout)
    arrays = sample.arrays(Size())
    weights, _ = to_canonical(arrays, layout, **sample.told(Size()))
    option = "rotary" if layout.startswith("gemma") else "clip"
    word = "rotary" if option == "rotary" else "clipped"
    fewer, _ = to_canonical(arrays, layout, **sample.told(Size()), **{option: None})
    assert any(word in need for need in weights.needs)
    assert not any(word in need for need in fewer.needs)


WRONG: dict[str, tuple[str, tuple[int, ...], str]] = {
    "an axis too few": ("q_einsum/w", (4, 7), r"must have shape \(heads, inputs, width\)"),
    "three for two": ("kv_einsum/w", (3, 2, 6, 3), r"must have shape \(2, heads, inputs, width\)"),
    "other heads": ("attn_vec_einsum/w", (5, 3, 9), "The layers do not fit one another"),
    "another width": ("kv_einsum/w", (2, 2, 6, 4), "The layers do not fit one another"),
}


@pytest.mark.parametrize(("name", "shape", "text"), WRONG.values(), ids=WRONG)
def test_einsum_kernels_of_other_shapes_are_refused(
    name: str, shape: tuple[int, ...], text: str
) -> None:
    arrays: dict[str, Any] = by_name("gemma.Attention", "grouped").arrays(Size())
    arrays[name] = np.ones(shape, np.float32)
    with pytest.raises(WeightsError, match=text):
        to_canonical(arrays, "gemma.Attention")


def test_gate_of_timm_multiplies_what_the_heads_give() -> None:
    rng, (rows, columns) = np.random.default_rng(2), (3 * WIDTH, WIDTH)
    shapes = {
        "qkv.weight": (rows, columns),
        "gate.weight": (columns, columns),
        "gate.bias": (columns,),
        "proj.weight": (columns, columns),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x = rng.standard_normal((B, T, WIDTH))
    context = attend(*chunks("qkv")(arrays, x)) / (1 + np.exp(-linear(arrays, "gate", x)))
    weights, config = to_canonical(arrays, "timm.vit", num_heads=H)
    assert (weights.needs, config.gate) == ((), "elementwise")
    layer = anymha.MultiHeadAttention(backend="numpy", **config.to_dict())
    found = anymha.set_weights(layer, weights)(x)
    np.testing.assert_allclose(found, linear(arrays, "proj", context), rtol=0, atol=1e-10)
    back = from_canonical(weights, "timm.vit", config=config)
    assert {n: a.tobytes() for n, a in back.items()} == {n: a.tobytes() for n, a in arrays.items()}

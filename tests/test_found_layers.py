"""Attention layers found in files, and the layouts that fit: all that do, and none by guess."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anymha.interchange.detect import LayerGroup, find_layer_groups, matches, numbers_of, pattern_of
from anymha.interchange.files.formats import FORMATS, Format, format_of, open_file
from anymha.interchange.files.reader import Tensor

DATA = Path(__file__).parent / "data"
PLAIN, HDF5 = FORMATS[0], format_of(Path("a.weights.h5"))
D, H = 8, 2


def found(shapes: dict[str, tuple[int, ...]], one: Format = PLAIN) -> list[LayerGroup]:
    dtype = np.dtype(np.float32)
    return find_layer_groups({name: Tensor(shape, dtype) for name, shape in shapes.items()}, one)


def names(group: LayerGroup) -> list[str]:
    return [one.name for one in group.fits]


def linear(prefix: str, *layers: str, **others: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {f"{prefix}{layer}.weight": (D, D) for layer in layers}
    return shapes | {f"{prefix}{name.replace('__', '.')}": shape for name, shape in others.items()}


def test_layers_of_a_real_file_are_one_group() -> None:
    path = DATA / "minilm_attention.safetensors"
    with open_file(path) as reader:
        (group,) = find_layer_groups(reader.tensors, format_of(path))
    assert group.pattern == "encoder.layer.{i}.attention."
    assert group.prefixes == ["encoder.layer.0.attention.", "encoder.layer.5.attention."]
    assert names(group) == ["transformers.bert"]
    assert group.config is None, "the number of heads is not in the shapes"


def test_families_with_the_same_names_are_all_given() -> None:
    shapes = linear("model.layers.3.self_attn.", "q_proj", "k_proj", "v_proj", "o_proj")
    (group,) = found(shapes)
    assert {"transformers.llama", "transformers.mistral", "transformers.qwen2"} <= set(names(group))
    assert "transformers.qwen3" not in names(group)


def test_layout_that_leaves_an_array_over_does_not_fit() -> None:
    shapes = linear(
        "model.layers.0.self_attn.", "q_proj", "k_proj", "v_proj", "o_proj",
        q_norm__weight=(D // H,), k_norm__weight=(D // H,),
    )  # fmt: skip
    (group,) = found(shapes)
    assert "transformers.qwen3" in names(group)
    assert "transformers.llama" not in names(group)
    told = group.misfits["transformers.llama"]
    assert told.startswith("it has no q_norm.weight, k_norm.weight, as 'transformers.")
    assert group.config is not None
    assert group.config.num_heads == H, "the norms tell the width of a head"


def test_packings_of_a_fused_kernel_are_all_given() -> None:
    shapes = {
        "h.0.attention.query_key_value.weight": (3 * D, D),
        "h.0.attention.query_key_value.bias": (3 * D,),
        "h.0.attention.dense.weight": (D, D),
        "h.0.attention.dense.bias": (D,),
    }
    (group,) = found(shapes)
    assert {"transformers.gpt_neox", "transformers.bloom"} <= set(names(group))
    shapes = {"h.0.attn.c_attn.weight": (3 * D, D), "h.0.attn.c_proj.weight": (D, D)}
    (group,) = found(shapes)
    assert names(group) == [
        *("nanogpt.CausalSelfAttention", "transformers.gpt_bigcode", "fused.blocks", "fused.groups")
    ], "of GPT-2 the kernel is (D, 3D)"
    assert "transformers.gpt2" in group.misfits


def test_shapes_that_fit_no_layout_are_told() -> None:
    shapes = linear("a.", "self.query", "self.key", "self.value", "output.dense")
    (group,) = found({**shapes, "a.self.key.weight": (D + 1, D)})
    assert names(group) == []
    assert "`key.kernel` has shape (8, 1, 9), the others need" in group.misfits["transformers.bert"]
    assert group.config is None


def test_layers_of_other_shapes_are_other_groups() -> None:
    shapes = linear("a.0.", "to_q", "to_k", "to_v", "to_out")
    shapes |= {name.replace(".0.", ".1."): (2 * D, 2 * D) for name in shapes}
    assert [group.prefixes for group in found(shapes)] == [["a.0."], ["a.1."]]
    assert [group.pattern for group in found(shapes)] == ["a.{i}."] * 2


def test_layer_without_prefix_is_found() -> None:
    shapes = {"in_proj_weight": (3 * D, D), "out_proj.weight": (D, D)}
    (group,) = found(shapes)
    assert (group.prefixes, names(group)) == ([""], ["torch.MultiheadAttention"])


def test_part_of_a_name_is_no_name() -> None:
    assert found(linear("a.x", "to_q", "to_k", "to_v", "to_out")) == []


def keras(*marks: str) -> dict[str, tuple[int, ...]]:
    kernel = {"query": (D, H, 4), "key": (D, H, 4), "value": (D, H, 4), "output": (H, 4, D)}
    return {f"layers/attention/{m}{n}_dense/vars/0": s for m in marks for n, s in kernel.items()}


def test_variables_of_keras_by_number_are_found() -> None:
    """By its name in HDF5 a layer of grouped heads is told from one of equal heads."""
    (group,) = found(keras(""), HDF5)
    assert (group.prefixes, names(group)) == (["layers/attention/"], ["keras.MultiHeadAttention"])
    assert group.config is not None
    assert (group.config.num_heads, group.config.key_dim) == (H, 4)
    (group,) = found(keras("_"), HDF5)
    assert names(group) == ["keras.GroupQueryAttention"]
    assert found(keras("")) == []


@pytest.mark.parametrize("separator", ["/", "."])
def test_names_of_nested_dicts_are_joined_by_either_sign(separator: str) -> None:
    shapes = {"query": (D, H, 4), "key": (D, H, 4), "value": (D, H, 4), "out": (H, 4, D)}
    parts = {("block_0", name, "kernel"): shape for name, shape in shapes.items()}
    (group,) = found({separator.join(key): shape for key, shape in parts.items()})
    assert {"flax.nnx.MultiHeadAttention", "flax.linen.MultiHeadDotProductAttention"} == set(
        names(group)
    )
    assert group.prefixes == [f"block_0{separator}"]


def test_shapes_that_no_memory_holds_take_no_time() -> None:
    shapes = linear("a.", "to_q", "to_k", "to_v", "to_out")
    (group,) = found(dict.fromkeys(shapes, (2**62, 0)))
    assert names(group) == []
    assert "no attention layer has an array as large" in group.misfits["x_transformers.Attention"]


def test_numbers_in_names_are_letters_in_patterns() -> None:
    assert pattern_of("h.10.block.2.attn.") == "h.{i}.block.{j}.attn."
    assert numbers_of("h.10.block.2.attn.") == {"i": "10", "j": "2"}
    assert pattern_of("multi_head_attention_1/") == "multi_head_attention_{i}/"
    assert pattern_of("conv2d.q8.") == "conv2d.q8."


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("", True),
        ("h.", True),
        ("h.1", False),
        ("h.10", True),
        ("h.{i}.attn", True),
        ("h.{i}.attn.", True),
        ("h.{i}.at", False),
        ("*attn", True),
        ("h.*", True),
        ("*.mlp", False),
        ("h.(10)", False),
    ],
)
def test_patterns_choose_layers(pattern: str, fits: bool) -> None:
    assert matches("h.10.attn.", pattern) is fits

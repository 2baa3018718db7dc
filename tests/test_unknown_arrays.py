"""Arrays that a layout does not know: used, known not to matter, named, or the layer is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.cli.main import main
from anymha.errors import LayoutError, UsageError, WeightsError
from anymha.interchange.convert_model import convert_file
from anymha.interchange.layouts import get_layout
from tests.file_samples import Arrays, write
from tests.layout_samples import SAMPLES, Sample, Size, label

D, H = 8, 2
BERT = ("self.query", "self.key", "self.value", "output.dense")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
PREFIX = "m.0.attention."


def floats(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(dtype)


def four(*names: str, bias: bool = False) -> Arrays:
    arrays = {f"{name}.weight": floats(D, D) for name in names}
    return arrays | ({f"{name}.bias": floats(D) for name in names} if bias else {})


def behind(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + name: array for name, array in arrays.items()}


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


MASK = np.tril(np.ones((1, 1, 4, 4), np.float32))
GPT2 = {"c_attn.weight": floats(D, 3 * D), "c_proj.weight": floats(D, D)}
LINEAR_GPT2 = {"c_attn.weight": floats(3 * D, D), "c_proj.weight": floats(D, D)}
T5 = four("q", "k", "v", "o")

REFUSED: dict[str, tuple[str, Arrays, Arrays, str]] = {
    "MPNet as T5": ("transformers.t5", T5, {"q.bias": floats(D), "v.bias": floats(D)}, "q.bias"),
    "a bias of the output": ("transformers.mistral", four(*LLAMA), {"o_proj.bias": floats(D)},
                             "o_proj.bias"),
    "a scale of a projection": ("transformers.bert", four(*BERT),
                                {"self.query.logit_scale": floats(1)}, "self.query.logit_scale"),
    "a scale beside": ("transformers.llama", four(*LLAMA), {"logit_scale": floats(H)},
                       "logit_scale"),
    "a bias beside": ("timm.vit", {"qkv.weight": floats(3 * D, D), "proj.weight": floats(D, D)},
                      {"q_bias": floats(D), "v_bias": floats(D)}, "q_bias"),
    "a table of biases": ("transformers.bert", four(*BERT, bias=True),
                          {"self.relative_position_bias_table": floats(9, H)},
                          "self.relative_position_bias_table"),
    "a module of biases": ("transformers.vit", four("attention.query", "attention.key",
                                                    "attention.value", "output.dense"),
                           {"attention.relative_position_bias.table": floats(9, H)},
                           "relative_position_bias"),
    "norms of queries": ("transformers.llama", four(*LLAMA),
                         {"q_layernorm.weight": floats(D // H)}, "q_layernorm.weight"),
    "sinks": ("transformers.bert", four(*BERT), {"self.sinks": floats(H)}, "self.sinks"),
    "a bias that is no mask": ("transformers.gpt2", GPT2, {"bias": floats(3 * D)}, "`bias`"),
    "rotary positions": ("transformers.bert", four(*BERT),
                         {"self.rotary_embeddings.inv_freq": floats(2)}, "inv_freq"),
    "DeBERTa's positions": ("transformers.deberta_v2", four(
        "self.query_proj", "self.key_proj", "self.value_proj", "output.dense",
    ), {"self.pos_key_proj.weight": floats(D, D)}, "self.pos_key_proj.weight"),
    "a second sequence": ("diffusers.Attention", four("to_q", "to_k", "to_v", "to_out.0"),
                          {"add_q_proj.weight": floats(D, D)}, "add_q_proj.weight"),
    "rows beside the inputs": (
        "torch.MultiheadAttention",
        {"in_proj_weight": floats(3 * D, D), "out_proj.weight": floats(D, D)},
        {"bias_k": floats(1, 1, D), "bias_v": floats(1, 1, D)}, "bias_k",
    ),
    "a weight norm": ("transformers.clip", four("q_proj", "k_proj", "v_proj", "out_proj"),
                      {"out_proj.weight_g": floats(D, 1)}, "out_proj.weight_g"),
}  # fmt: skip


STEPS: dict[str, tuple[str, str, Arrays, Arrays]] = {
    "SegFormer's reduction": ("transformers.bert", PREFIX, four(*BERT), {
        "self.sr.weight": floats(D, D, 2, 2)}),
    "SegFormer's norm": ("transformers.bert", PREFIX, four(*BERT), {
        "self.layer_norm.weight": floats(D)}),
    "a norm before the output": ("transformers.llama", "m.0.self_attn.", four(*LLAMA), {
        "attn_sub_norm.weight": floats(D)}),
    "a gate of the attention": ("transformers.llama", "m.0.self_attn.", four(*LLAMA), {
        "gate_out.weight": floats(D, D)}),
    "differential attention": ("transformers.llama", "m.0.attn.", four(*LLAMA), {
        "lambda_q1": floats(4)}),
    "a norm under a short name": ("transformers.llama", "m.0.attn.", four(*LLAMA), {
        "subln.weight": floats(D)}),
    "norms in one word": ("transformers.llama", "m.0.", four(*LLAMA), {
        "qnorm.weight": floats(D // H), "knorm.weight": floats(D // H)}),
    "a convolution": ("transformers.llama", "m.0.attention.", four(*LLAMA), {
        "conv.weight": floats(D, D, 3)}),
    "a module in a module": ("transformers.llama", "m.0.attention.", four(*LLAMA), {
        "mix.0.linear.weight": floats(D, D)}),
    "a norm of a layer without a prefix": ("transformers.bert", "", four(*BERT), {
        "self.q_norm.weight": floats(D // H), "self.k_norm.weight": floats(D // H)}),
    "a step of a layer without a prefix": ("transformers.bert", "", four(*BERT), {
        "self.mix.0.linear.weight": floats(D, D)}),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "prefix", "known", "more"), STEPS.values(), ids=STEPS)
def test_array_within_the_attention_is_refused_whatever_its_name(
    layout: str, prefix: str, known: Arrays, more: Arrays, tmp_path: Path
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.npz"
    write(source, behind(prefix, known | more))
    (group,) = anymha.find_layers(source)
    assert next(iter(more)) in group.misfits[layout]
    for named in (layout, None):
        with pytest.raises(UsageError):
            convert_file(source, target, named, "anymha", num_heads=H)
    write(source, behind(prefix, known))
    convert_file(source, target, layout, "anymha", num_heads=H)


def test_dropout_and_the_norm_behind_the_output_are_no_steps() -> None:
    known = four("attention.query", "attention.key", "attention.value", "output.dense")
    more = {"output.LayerNorm.weight": floats(D), "attention.dropout.seed": floats(2)}
    (group,) = anymha.find_layers(behind(PREFIX, known | more))
    assert group.layout == "transformers.vit"
    assert set(group.unknown) == set(more), "but named"


def test_array_beside_a_layer_without_a_prefix_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", four(*LLAMA) | {"extra.weight": floats(D)})
    done = convert_file(source, tmp_path / "b.npz", "transformers.llama", "anymha", num_heads=H)
    assert "left out of its layers: extra.weight." in done.notes[0]


@pytest.mark.parametrize(("layout", "known", "more", "text"), REFUSED.values(), ids=REFUSED)
def test_array_that_changes_results_is_refused_everywhere(
    layout: str, known: Arrays, more: Arrays, text: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arrays = {**known, **more}
    anymha.to_canonical(known, layout, num_heads=H)
    with pytest.raises(WeightsError, match=text.replace(".", r"\.")):
        anymha.to_canonical(arrays, layout, num_heads=H)
    (group,) = anymha.find_layers(behind(PREFIX, arrays))
    assert layout not in [fit.name for fit in group.fits]
    assert text in group.misfits[layout]
    source, target = write(tmp_path / "a.safetensors", behind(PREFIX, arrays)), tmp_path / "b.npz"
    with pytest.raises(UsageError) as error:
        convert_file(source, target, layout, "anymha", num_heads=H)
    assert text in str(error.value)
    assert f"{layout} does not fit" in str(error.value)
    assert not target.exists()
    assert next(iter(more)) in inspected(source, capsys), "listed among the layer's arrays"
    # Without them the layer is converted.
    write(source, behind(PREFIX, known))
    convert_file(source, tmp_path / "c.npz", layout, "anymha", num_heads=H)


HARMLESS: dict[str, tuple[str, Arrays, Arrays]] = {
    "GPT-2's mask": ("transformers.gpt2", GPT2, {"bias": MASK, "masked_bias": floats()}),
    "a mask of bytes": ("transformers.gpt2", GPT2, {"bias": MASK.astype(np.uint8)}),
    "a mask to add": ("transformers.opt", four("q_proj", "k_proj", "v_proj", "out_proj"), {
        "attn_mask": np.where(MASK[0] > 0, 0, -np.inf).astype(np.float32)}),
    "nanoGPT's mask": ("nanogpt.CausalSelfAttention", LINEAR_GPT2, {"bias": MASK}),
    "a mask under its name": ("timm.vit", {"qkv.weight": floats(3 * D, D),
                                           "proj.weight": floats(D, D)}, {"mask": MASK[0, 0]}),
    "rotary tables": ("transformers.llama", four(*LLAMA), {
        "rotary_emb.inv_freq": floats(2), "rotary_emb.cos_cached": floats(1, 1, 4, 4)}),
    "Meta's tables": ("meta.llama", four("wq", "wk", "wv", "wo"),
                      {"inner_attention.rope.freqs": floats(2)}),
    "counts": ("transformers.bert", four(*BERT), {"self.norm.num_batches_tracked": np.array(3)}),
    "states of generators": ("flax.nnx.MultiHeadAttention", {
        "query/kernel": floats(D, H, 4), "key/kernel": floats(D, H, 4),
        "value/kernel": floats(D, H, 4), "out/kernel": floats(H, 4, D),
    }, {"rngs/default/count/value": np.array(0, np.uint32)}),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "known", "more"), HARMLESS.values(), ids=HARMLESS)
def test_buffer_is_kept_and_refuses_nothing(
    layout: str, known: Arrays, more: Arrays, tmp_path: Path
) -> None:
    arrays = {**known, **more}
    weights, config = anymha.to_canonical(arrays, layout, num_heads=H)
    back = anymha.from_canonical(weights, layout, config=config)
    assert {name: array.tobytes() for name, array in back.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    prefix = PREFIX.replace(".", "/") if "/" in next(iter(known)) else PREFIX
    (group,) = anymha.find_layers(behind(prefix, arrays))
    assert layout in [fit.name for fit in group.fits]
    source = write(tmp_path / "a.safetensors", behind(prefix, arrays))
    done = convert_file(source, tmp_path / "b.npz", layout, "anymha", num_heads=H)
    assert list(done.layers) == [prefix]
    assert not any("Not known" in note for note in done.notes)


OPT = four("q_proj", "k_proj", "v_proj", "out_proj")
LEARNED: dict[str, tuple[str, Arrays, Arrays]] = {
    "a bias of logits as a mask of OPT": ("transformers.opt", OPT, {"attn_mask": floats(1, 4, 4)}),
    "a bias of logits as OPT's bias": ("transformers.opt", OPT, {"bias": floats(1, 1, 4, 4)}),
    "GPT-2's bias": ("transformers.gpt2", GPT2, {"bias": floats(1, 1, 4, 4)}),
    "a mask of what comes after": ("transformers.gpt2", GPT2, {"bias": 1 - MASK}),
    "a table": ("transformers.opt", OPT, {"rel_pos.bias": floats(4, 4)}),
    "a table of a kind of mask": ("transformers.opt", OPT, {"mix.bias": MASK}),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "known", "more"), LEARNED.values(), ids=LEARNED)
def test_learned_bias_of_a_mask_s_name_and_shape_is_refused(
    layout: str, known: Arrays, more: Arrays, tmp_path: Path
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.npz"
    write(source, behind("m.0.attn.", known | more))
    with pytest.raises(UsageError, match=next(iter(more))):
        convert_file(source, target, layout, "anymha", num_heads=H)
    assert not target.exists()
    with pytest.raises(WeightsError, match=next(iter(more))):
        anymha.to_canonical(known | more, layout, num_heads=H)


def test_norm_after_the_attention_is_no_reason_to_refuse(tmp_path: Path) -> None:
    norm = {"output.LayerNorm.weight": floats(D), "output.LayerNorm.bias": floats(D)}
    arrays = behind(PREFIX, four(*BERT, bias=True) | norm)
    (group,) = anymha.find_layers(arrays)
    assert (group.layout, group.unknown) == ("transformers.bert", ())
    done = convert_file(
        write(tmp_path / "a.safetensors", arrays), tmp_path / "b.npz", None, "anymha", num_heads=H
    )
    assert (done.layout, done.notes) == (
        "transformers.bert",
        ["b.npz has no place for the configuration: `anymha.load` will not read it. Write a "
         ".safetensors file."],
    )  # fmt: skip


def test_array_that_may_mean_nothing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = behind(PREFIX, four(*BERT) | {"adaptor.dense.weight": floats(D, D)})
    source = write(tmp_path / "a.safetensors", arrays)
    text = inspected(source, capsys)
    assert (
        "Not known to this layout, and left out by `anymha convert`: adaptor.dense.weight." in text
    )
    done = convert_file(source, tmp_path / "b.npz", "transformers.bert", "anymha", num_heads=H)
    assert done.notes[0] == (
        "Not known to transformers.bert, and left out of its layers: adaptor.dense.weight. Make "
        "sure that they are no part of the attention."
    )
    with pytest.raises(WeightsError, match=r"Unknown: adaptor\.dense\.weight"):
        anymha.to_canonical(
            {name.removeprefix(PREFIX): array for name, array in arrays.items()},
            "transformers.bert",
            num_heads=H,
        )


def test_names_without_a_prefix_and_other_layers_are_not_the_layer_s() -> None:
    others = {"decoder.attn.relative_bias.weight": floats(3), "mlp.fc1.weight": floats(D, D),
              "norm.bias": floats(D)}  # fmt: skip
    (group,) = anymha.find_layers(four(*LLAMA) | others)
    assert "transformers.llama" in [fit.name for fit in group.fits]
    # The bias of one layer is no unknown array of another, whose prefix its name begins with.
    own = {"query.kernel": floats(D, H, 4), "key.kernel": floats(D, H, 4),
           "value.kernel": floats(D, H, 4), "output.kernel": floats(H, 4, D),
           "query.bias": floats(H, 4)}  # fmt: skip
    groups = anymha.find_layers(own | behind("query.", own))
    assert [(group.prefixes, group.layout) for group in groups] == [
        ([""], "anymha"), (["query."], "anymha"),
    ]  # fmt: skip


FUSED = {
    ("c_attn", "c_proj"): ("nanogpt.CausalSelfAttention", "transformers.gpt_bigcode"),
    ("qkv", "proj"): ("timm.vit", "fused.groups"),
    ("qkv", "projection"): ("transformers.blip", "fused.groups"),
    ("query_key_value", "dense"): ("fused.blocks", "transformers.gpt_neox"),
    ("qkv_proj", "o_proj"): ("transformers.phi3", "fused.groups"),
    ("qkv_proj", "out_proj"): ("fused.blocks", "fused.groups"),
    ("Wqkv", "out_proj"): ("transformers.mpt", "fused.groups"),
    ("Wqkv", "Wo"): ("transformers.modernbert", "fused.groups"),
    ("wqkv", "wo"): ("gpt_fast.Attention", "internlm.internlm2"),
    ("linear_qkv", "linear_proj"): ("fused.blocks", "megatron.SelfAttention"),
    ("to_qkv", "to_out.0"): ("vit_pytorch.Attention", "fused.groups"),
    ("in_proj", "out_proj"): ("fused.blocks", "fused.groups"),
}
"""Names of a fused kernel and an output: a layout with blocks of rows, and one by heads."""


@pytest.mark.parametrize(("kernel", "output"), FUSED)
@pytest.mark.parametrize("buffer", [False, True], ids=["", "with a mask"])
def test_names_of_a_fused_kernel_leave_the_order_of_its_rows_open(
    kernel: str, output: str, buffer: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {f"{kernel}.weight": floats(3 * D, D), f"{output}.weight": floats(D, D)}
    arrays |= {"bias": MASK} if buffer else {}
    (group,) = anymha.find_layers(behind(PREFIX, arrays))
    assert set(FUSED[kernel, output]) <= {fit.name for fit in group.fits}
    assert group.layout is None
    one, other = (
        anymha.to_canonical(arrays, layout, num_heads=H)[0] for layout in FUSED[kernel, output]
    )
    assert not np.array_equal(one["query.kernel"], other["query.kernel"]), "they mean two things"
    source = write(tmp_path / "a.safetensors", behind(PREFIX, arrays))
    text = inspected(source, capsys)
    assert "(of the layouts known here)" in text
    assert "name the one that the model has" in text
    with pytest.raises(UsageError, match="names and shapes leave it open"):
        convert_file(source, tmp_path / "b.npz", None, "anymha", num_heads=H)


def test_a_single_layout_is_no_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.safetensors", behind(PREFIX, four(*BERT)))
    assert (
        "Layout: transformers.bert (all its names and shapes fit, and no other of the layouts "
        "known here does)."
    ) in inspected(source, capsys)
    arguments = ["convert", source, tmp_path / "b.npz", "--to", "anymha", "--num-heads", H]
    assert main([*map(str, arguments), "--verify"]) == 0
    assert (
        "This proves the conversion, not the choice of layout: whether the layers are of "
        "transformers.bert, the model's own outputs must tell."
    ) in capsys.readouterr().out


def eights(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int8)


def packed(*names: str, **parts: np.ndarray) -> Arrays:
    """The parts of each projection."""
    parts = {part.replace("__", "."): array for part, array in parts.items()}
    return {f"{name}.{part}": array for name in names for part, array in parts.items()}


INT32 = np.ones((2, D), np.int32)
CHANGED: dict[str, tuple[str, Arrays, str]] = {
    "bitsandbytes int8": ("transformers.bert", packed(*BERT, weight=eights(D, D), SCB=floats(D)),
                          "quantised (bitsandbytes int8)"),
    "bitsandbytes 4 bit": ("transformers.llama", packed(
        *LLAMA, weight=np.ones((D * D // 2, 1), np.uint8), weight__absmax=floats(1),
        weight__quant_map=floats(16), weight__quant_state__bitsandbytes__nf4=eights(9),
    ), "quantised (bitsandbytes 4 bit)"),
    "GPTQ": ("transformers.llama", packed(
        *LLAMA, qweight=INT32, qzeros=INT32, scales=floats(1, D), g_idx=INT32[0],
    ), "quantised (GPTQ)"),
    "AWQ": ("transformers.llama", packed(*LLAMA, qweight=INT32, qzeros=INT32, scales=floats(1, D)),
            "quantised (GPTQ or AWQ)"),
    "fp8": ("transformers.llama", packed(
        *LLAMA, weight=floats(D, D, dtype=ml_dtypes.float8_e4m3fn), weight_scale_inv=floats(1, 1),
    ), "quantised (fp8, float8_e4m3fn, with scales)"),
    "int8 with scales": ("transformers.llama", packed(
        *LLAMA, weight=eights(D, D), weight_scale=floats(D, 1),
    ), "quantised (int8 with scales)"),
    "compressed-tensors": ("transformers.llama", packed(
        *LLAMA, weight_packed=INT32, weight_scale=floats(D, 1), weight_shape=INT32[0, :2],
    ), "quantised (compressed-tensors)"),
    "int8 alone": ("transformers.llama", packed(*LLAMA, weight=eights(D, D)), "quantised (int8)"),
    "ONNX": ("transformers.bert", packed(
        *BERT, weight_quantized=eights(D, D), weight_scale=floats(1), weight_zero_point=eights(1),
    ), "quantised (ONNX int8)"),
    "LoRA on two": ("transformers.llama", packed(
        "q_proj", "v_proj", lora_A__weight=floats(2, D), lora_B__weight=floats(D, 2),
    ), "LoRA adapter"),
    "LoRA not merged": ("transformers.llama", packed(
        *LLAMA, base_layer__weight=floats(D, D), lora_A__default__weight=floats(2, D),
        lora_B__default__weight=floats(D, 2),
    ), "LoRA adapter"),
    "LoRA beside": ("transformers.llama", four(*LLAMA) | packed(
        "q_proj", lora_A__weight=floats(2, D), lora_B__weight=floats(D, 2),
    ), "LoRA adapter"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "arrays", "words"), CHANGED.values(), ids=CHANGED)
def test_quantised_layers_and_adapters_are_named(
    layout: str, arrays: Arrays, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (group,) = anymha.find_layers(behind(PREFIX, arrays) | behind("m.1.attention.", arrays))
    assert (group.kind, group.fits) == (words, [])
    assert group.prefixes == [PREFIX, "m.1.attention."]
    source = write(tmp_path / "a.safetensors", behind(PREFIX, arrays))
    text = inspected(source, capsys)
    assert words in text
    assert "Layout" not in text
    assert "anymha convert" not in text, "no command that is then refused"
    for name in (layout, None):
        with pytest.raises(UsageError) as error:
            convert_file(source, tmp_path / "b.npz", name, "anymha", num_heads=H)
        assert f"layer {PREFIX!r}: it is no plain layer: {words}." in str(error.value)
    with pytest.raises(LayoutError) as refused:
        anymha.to_canonical(arrays, layout, num_heads=H)
    assert words in str(refused.value) or "must be of float16" in str(refused.value)


def test_plain_layers_beside_quantised_ones_are_converted_by_their_prefix(tmp_path: Path) -> None:
    quantised = packed(*BERT, weight=eights(D, D), SCB=floats(D))
    arrays = behind("a.0.", quantised) | behind("b.0.", four(*BERT))
    source = write(tmp_path / "a.safetensors", arrays)
    done = convert_file(source, tmp_path / "b.npz", None, "anymha", prefix="b.", num_heads=H)
    assert list(done.layers) == ["b.0."]
    with pytest.raises(UsageError, match="bitsandbytes"):
        convert_file(source, tmp_path / "c.npz", "transformers.bert", "anymha", num_heads=H)


def test_file_whose_matrices_have_no_names_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {f"onnx::MatMul_{number}": floats(D, D) for number in (3, 7)}
    source = write(tmp_path / "a.safetensors", plain)
    text = "The exporter renamed 2 matrices (onnx::MatMul_3, ...)"
    assert text in inspected(source, capsys)
    for layout in ("transformers.bert", None):
        with pytest.raises(UsageError) as error:
            convert_file(source, tmp_path / "b.npz", layout, "anymha", num_heads=H)
        assert text in str(error.value)
    quantised = {f"onnx::MatMul_{n}_{part}": eights(D, D) for n in (3, 7)
                 for part in ("quantized", "scale", "zero_point")}  # fmt: skip
    write(source, quantised)
    assert "as 'onnx::MatMul_3': quantised (ONNX int8)." in inspected(source, capsys)


def test_latent_attention_in_a_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    source = write(tmp_path / "a.safetensors", behind(PREFIX, four(*names)))
    assert "Multi-head latent attention (DeepSeek's" in inspected(source, capsys)
    with pytest.raises(UsageError, match="Multi-head latent attention"):
        convert_file(source, tmp_path / "b.npz", None, "anymha", num_heads=H)


def test_mlp_in_the_same_block_is_no_part_of_the_attention() -> None:
    mlp = {f"{name}.weight": floats(D, D) for name in ("gate_proj", "ffn_gate", "mlp.gate")}
    (group,) = anymha.find_layers(behind("m.0.", four(*LLAMA) | mlp))
    assert "transformers.llama" in [fit.name for fit in group.fits]
    assert set(group.unknown) == set(mlp), "but named"


def test_gate_in_the_module_of_the_attention_is_not_left_out(tmp_path: Path) -> None:
    arrays = four(*LLAMA) | {"gate_proj.weight": floats(D, D)}
    for prefix in ("m.0.self_attn.", ""):
        (group,) = anymha.find_layers(behind(prefix, arrays))
        assert group.layout == "transformers.hrm_text"
    source, target = write(tmp_path / "a.safetensors", behind("m.0.self_attn.", arrays)), "b.npz"
    with pytest.raises(UsageError, match=r"gate_proj\.weight"):
        convert_file(source, tmp_path / target, "transformers.llama", "anymha", num_heads=H)
    (group,) = anymha.find_layers(behind("m.0.block.", arrays))
    assert "transformers.llama" in [fit.name for fit in group.fits]
    assert "is an MLP's" in group.misfits["transformers.hrm_text"]


def test_layout_whose_names_have_no_parts_is_found_once() -> None:
    shapes = {"query": (D, D), "key": (D, D), "value": (D, D), "output": (D, D)}
    (group,) = anymha.find_layers({f"{n}_weight": floats(*shape) for n, shape in shapes.items()})
    assert group.layout == "onnxruntime.MultiHeadAttention"


def test_name_that_two_layers_may_claim_is_no_fault() -> None:
    outer = four("q", "k", "v", "o", bias=True)
    inner = behind("q.", GPT2)  # whose buffer would be `q.bias`
    groups = {group.prefixes[0]: group for group in anymha.find_layers(outer | inner)}
    assert groups[""].layout == "transformers.mpnet"
    assert "`bias` of shape (8,) is no causal mask" in groups["q."].misfits["transformers.gpt2"]


def test_names_without_end_take_no_memory_or_time() -> None:
    deep = "a." * 200_000
    arrays = behind(deep, four(*BERT)) | behind("x" * 3_000_000 + ".", four(*BERT))
    assert anymha.find_layers(arrays) == []


@pytest.mark.parametrize("sample", SAMPLES, ids=label)
def test_array_of_any_projection_of_any_layout_is_refused(sample: Sample) -> None:
    """With each projection in turn, a bias that the layout lacks, or an array that none knows."""
    arrays = sample.arrays(Size(H=2, K=2, d=4, v=4, D=8, S=8, U=8, O=8), False)
    layout = get_layout(sample.layout)
    prefix = PREFIX.replace(".", layout.separator)
    kernels = [piece for form in layout.forms for piece in form.pieces
               if piece.part == "kernel" and piece.array in arrays]  # fmt: skip
    leaves = ("bias", "input_gain", "zero_point")
    wrong = {f"{kernel.module}{layout.separator}{leaves[number % 3]}": kernel.module
             for number, kernel in enumerate(kernels)}  # fmt: skip
    wrong = {name: module for name, module in wrong.items() if name not in layout.names()}
    for name in wrong:
        with pytest.raises(WeightsError, match=re.escape(name)):
            anymha.to_canonical({**arrays, name: floats(5)}, layout.name, num_heads=2)
    for name in list(wrong)[-1:]:
        for group in anymha.find_layers(behind(prefix, {**arrays, name: floats(5)})):
            assert layout.name not in [fit.name for fit in group.fits], name

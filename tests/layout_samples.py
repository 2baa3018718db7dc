"""The names and shapes of each layout, written out as its library has them, for random layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]
QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Size:
    """Heads H, key heads K, their widths d and v, of inputs D, S (keys), U (values), outputs O."""

    H: int = 4
    K: int = 2
    d: int = 3
    v: int = 5
    D: int = 7
    S: int = 6
    U: int = 8
    O: int = 9  # noqa: E741


def heads(output: str) -> Callable[[Size], Shapes]:
    return lambda s: {
        "query/kernel": (s.D, s.H, s.d), "query/bias": (s.H, s.d),
        "key/kernel": (s.S, s.K, s.d), "key/bias": (s.K, s.d),
        "value/kernel": (s.U, s.K, s.v), "value/bias": (s.K, s.v),
        f"{output}/kernel": (s.H, s.v, s.O), f"{output}/bias": (s.O,),
    }  # fmt: skip


def linear(q: str, k: str, v: str, o: str) -> Callable[[Size], Shapes]:
    return lambda s: {
        f"{q}.weight": (s.H * s.d, s.D), f"{q}.bias": (s.H * s.d,),
        f"{k}.weight": (s.K * s.d, s.S), f"{k}.bias": (s.K * s.d,),
        f"{v}.weight": (s.K * s.v, s.U), f"{v}.bias": (s.K * s.v,),
        f"{o}.weight": (s.O, s.H * s.v), f"{o}.bias": (s.O,),
    }  # fmt: skip


def fused(qkv: str, o: str) -> Callable[[Size], Shapes]:
    return lambda s: {
        f"{qkv}.weight": ((s.H + 2 * s.K) * s.d, s.D), f"{qkv}.bias": ((s.H + 2 * s.K) * s.d,),
        f"{o}.weight": (s.O, s.H * s.d), f"{o}.bias": (s.O,),
    }  # fmt: skip


def no(*biases: str) -> Callable[[Callable[[Size], Shapes]], Callable[[Size], Shapes]]:
    """Without these biases."""
    gone = {f"{name}.bias" for name in biases}
    return lambda shapes: lambda s: {n: shape for n, shape in shapes(s).items() if n not in gone}


Q_PROJ = ("q_proj", "k_proj", "v_proj")
O_PROJ = (*Q_PROJ, "o_proj")
OUT_PROJ = (*Q_PROJ, "out_proj")


@dataclass(frozen=True)
class Sample:
    """A layout's layers.

    Args:
        layout: Its name.
        shapes: Names and shapes of a layer of a size.
        groups: Names of biases that are there together; others are there on their own.
        same: Sizes that are equal, as pairs: its first is given the value of its second.
        extras: Further arrays.
        optional: Further arrays that may be missing.
        asks: Whether `num_heads` must be told.
        form: The form's name.
        multiple: What the number of heads is a multiple of.
    """

    layout: str
    shapes: Callable[[Size], Shapes]
    groups: tuple[tuple[str, ...], ...] = ()
    same: str = ""
    extras: Callable[[Size], Shapes] = lambda s: {}
    optional: Callable[[Size], Shapes] = lambda s: {}
    asks: bool = True
    form: str = ""
    multiple: int = 1

    def size(self, size: Size) -> Size:
        values = {name: getattr(size, name) for name in "HKdvDSUO"}
        values["H"] *= self.multiple
        for pair in self.same.split():
            left, _, right = pair.partition("=")
            values[left] = values["H"] * values["d"] if right == "Hd" else values[right]
        return Size(**values)

    def arrays(self, size: Size, biased: Any = True, dtype: Any = np.float32) -> dict[str, Any]:
        """Random arrays, with all biases, with none, or with those that a function chooses."""
        size = self.size(size)
        shapes = self.shapes(size)
        biases = [name for name in shapes if name.endswith(("bias", "/b"))]
        alone = [name for name in biases if not any(name in group for group in self.groups)]
        chosen = {
            name
            for group in (*self.groups, *((name,) for name in alone))
            if (biased(group) if callable(biased) else biased)
            for name in group
        }
        gone = set(biases) - chosen
        shapes |= self.extras(size)
        shapes |= {
            n: shape
            for n, shape in self.optional(size).items()
            if (biased((n,)) if callable(biased) else biased)
        }
        rng = np.random.default_rng(0)
        return {
            name: (
                np.tril(np.ones(shape))
                if name in ("bias", "causal_mask") and len(shape) == 4
                else rng.standard_normal(shape)
            ).astype(dtype)
            for name, shape in shapes.items()
            if name not in gone
        }

    def told(self, size: Size) -> dict[str, int]:
        """What must be told beside the arrays."""
        heads = self.size(size).H
        # A norm as wide as the one head may be of all heads together.
        return {"num_heads": heads} if self.asks or heads == 1 else {}


ALL = "query/bias key/bias value/bias"
KERAS = (*ALL.split(), "attention_output/bias")
FLAX = (*ALL.split(), "out/bias")
SQUARE = "K=H v=d D=Hd O=D"
NORMS: Callable[[Size], Shapes] = lambda s: {"q_norm.weight": (s.d,), "k_norm.weight": (s.d,)}  # noqa: E731
INVERSE: Callable[[Size], Shapes] = lambda s: {"rotary_emb.inv_freq": (s.d,)}  # noqa: E731
ONE = "S=D U=D"
PER_HEAD = f"{ONE} K=H v=d"
GROUPED = f"{ONE} v=d"


def family(name: str, shapes: Callable[[Size], Shapes], **options: Any) -> Sample:
    return Sample(f"transformers.{name}", shapes, **options)


def conv(cross: bool) -> Callable[[Size], Shapes]:
    def shapes(s: Size) -> Shapes:
        inner = s.H * s.d
        output = {"c_proj.weight": (inner, s.O), "c_proj.bias": (s.O,)}
        if cross:
            return {
                "q_attn.weight": (s.D, inner), "q_attn.bias": (inner,),
                "c_attn.weight": (s.S, 2 * inner), "c_attn.bias": (2 * inner,), **output,
            }  # fmt: skip
        return {"c_attn.weight": (s.D, 3 * inner), "c_attn.bias": (3 * inner,), **output}

    return shapes


def einsum(grouped: bool) -> Callable[[Size], Shapes]:
    """Gemma's kernels, each head a matrix."""
    kernels: Callable[[Size], Shapes] = lambda s: (  # noqa: E731
        {"q_einsum/w": (s.H, s.D, s.d), "kv_einsum/w": (2, s.K, s.S, s.d)}
        if grouped
        else {"qkv_einsum/w": (3, s.H, s.D, s.d)}
    )
    return lambda s: {**kernels(s), "attn_vec_einsum/w": (s.H, s.d, s.O)}


def matrices(*names: str) -> Callable[[Size], Shapes]:
    """Flax's linear layers, (inputs, outputs)."""
    plain = linear(*names)
    turned = {".weight": "/kernel", ".bias": "/bias"}
    return lambda s: {
        name.replace(end, turned[end]).replace(".", "/"): shape[::-1]
        for name, shape in plain(s).items()
        for end in turned
        if name.endswith(end)
    }


def buffers(s: Size) -> Shapes:
    return {"bias": (1, 1, 4, 4), "masked_bias": ()}


SAMPLES = (
    Sample(
        "anymha",
        lambda s: {name.replace("/", "."): shape for name, shape in heads("output")(s).items()},
        asks=False,
    ),
    Sample("keras.MultiHeadAttention", heads("attention_output"), (KERAS,), "K=H", asks=False),
    Sample(
        "keras.GroupQueryAttention",
        lambda s: {
            **heads("attention_output")(s), "gate/kernel": (s.D, s.H, s.d), "gate/bias": (s.H, s.d),
        },
        ((*KERAS, "gate/bias"),), "v=d O=D", asks=False,
    ),
    Sample(
        "torch.MultiheadAttention",
        lambda s: {
            "in_proj_weight": (3 * s.D, s.D), "in_proj_bias": (3 * s.D,),
            "out_proj.weight": (s.D, s.D), "out_proj.bias": (s.D,),
        },
        (("in_proj_bias", "out_proj.bias"),), f"{SQUARE} S=D U=D", form="packed",
    ),
    Sample(
        "torch.MultiheadAttention",
        lambda s: {
            "q_proj_weight": (s.D, s.D), "k_proj_weight": (s.D, s.S), "v_proj_weight": (s.D, s.U),
            "in_proj_bias": (3 * s.D,), "out_proj.weight": (s.D, s.D), "out_proj.bias": (s.D,),
        },
        (("in_proj_bias", "out_proj.bias"),), SQUARE, form="separate",
    ),
    Sample(
        "flax.nnx.MultiHeadAttention", heads("out"), (FLAX,), "v=d U=S", asks=False,
        optional=lambda s: {"query_ln/scale": (s.d,), "key_ln/scale": (s.d,)},
    ),
    Sample(
        "flax.linen.MultiHeadDotProductAttention", heads("out"), (FLAX,), "K=H v=d", asks=False,
        optional=lambda s: {"query_ln/scale": (s.d,), "key_ln/scale": (s.d,)},
    ),
    Sample(
        "equinox.MultiheadAttention",
        linear("query_proj", "key_proj", "value_proj", "output_proj"), same="K=H",
    ),
    Sample(
        "haiku.MultiHeadAttention",
        lambda s: {
            "query/w": (s.D, s.H * s.d), "query/b": (s.H * s.d,),
            "key/w": (s.S, s.H * s.d), "key/b": (s.H * s.d,),
            "value/w": (s.U, s.H * s.v), "value/b": (s.H * s.v,),
            "linear/w": (s.H * s.v, s.O), "linear/b": (s.O,),
        },
        (("query/b", "key/b", "value/b", "linear/b"),), "K=H",
    ),
    Sample(
        "x_transformers.Attention",
        no("to_q", "to_k", "to_v", "to_out")(linear("to_q", "to_k", "to_v", "to_out")),
    ),
    Sample("timm.vit", fused("qkv", "proj"), same=PER_HEAD),
    Sample(
        "timm.vit",
        lambda s: fused("qkv", "proj")(s) | {
            "gate.weight": (s.H * s.d, s.D), "gate.bias": (s.H * s.d,),
        },
        same=PER_HEAD, asks=False,
        extras=lambda s: {f"{n}_norm.{p}": (s.d,) for n in "qk" for p in ("weight", "bias")},
    ),
    Sample(
        "onnxruntime.MultiHeadAttention",
        lambda s: {
            "query_weight": (s.D, s.H * s.d), "key_weight": (s.S, s.H * s.d),
            "value_weight": (s.U, s.H * s.v), "bias": (2 * s.H * s.d + s.H * s.v,),
            "output_weight": (s.H * s.v, s.O), "output_bias": (s.O,),
        },
        same="K=H",
    ),
    family(
        "bert", linear("self.query", "self.key", "self.value", "output.dense"),
        optional=lambda s: {"output.LayerNorm.weight": (s.O,), "output.LayerNorm.bias": (s.O,)},
    ),
    family("vit", linear(*O_PROJ), same="K=H", form="module"),
    family(
        "vit",
        linear("attention.query", "attention.key", "attention.value", "output.dense"),
        same="K=H", form="published",
    ),
    family("clip", linear(*OUT_PROJ), same="K=H"),
    family("opt", linear(*OUT_PROJ), same="K=H"),
    family("bart", linear(*OUT_PROJ), same="K=H"),
    family("whisper", no("k_proj")(linear(*OUT_PROJ)), same="K=H"),
    family("t5", no("q", "k", "v", "o")(linear("q", "k", "v", "o")), same="K=H"),
    family(
        "t5", no("q", "k", "v", "o")(linear("q", "k", "v", "o")), same="K=H", asks=False,
        extras=lambda s: {"relative_attention_bias.weight": (8, s.H)},
    ),
    family("gpt2", conv(False), same=PER_HEAD, optional=buffers, form="self"),
    family("gpt2", conv(True), same="U=S K=H v=d", form="cross"),
    family("gpt_bigcode", fused("c_attn", "c_proj"), same=GROUPED, optional=buffers),
    family("llama", linear(*O_PROJ), optional=INVERSE),
    family("mistral", no(*O_PROJ)(linear(*O_PROJ))),
    family("qwen2", no("o_proj")(linear(*O_PROJ))),
    family("qwen3", linear(*O_PROJ), extras=NORMS, asks=False),
    family(
        "qwen3_next",
        lambda s: linear(*O_PROJ)(s) | {
            "q_proj.weight": (2 * s.H * s.d, s.D), "q_proj.bias": (2 * s.H * s.d,),
        },
        same="v=d", extras=NORMS, asks=False,
    ),
    family(
        "afmoe", lambda s: linear(*O_PROJ)(s) | {"gate_proj.weight": (s.H * s.v, s.D)},
        extras=NORMS, asks=False,
    ),
    family(
        "hrm_text", lambda s: linear(*O_PROJ)(s) | {
            "gate_proj.weight": (s.H * s.v, s.D), "gate_proj.bias": (s.H * s.v,),
        },
        same="K=H",
    ),
    family("gemma", linear(*O_PROJ)),
    family("gemma2", linear(*O_PROJ)),
    family("gemma3", linear(*O_PROJ), extras=NORMS, asks=False),
    family("gpt_oss", linear(*O_PROJ), extras=lambda s: {"sinks": (s.H,)}, asks=False),
    family("granite", linear(*O_PROJ)),
    family("starcoder2", linear(*O_PROJ)),
    family("exaone4", linear(*O_PROJ), extras=NORMS, asks=False),
    family("glm4_moe", linear(*O_PROJ)),
    family(
        "hunyuan_v1_dense", linear(*O_PROJ), asks=False,
        extras=lambda s: {"query_layernorm.weight": (s.d,), "key_layernorm.weight": (s.d,)},
    ),
    family("smollm3", linear(*O_PROJ)),
    family(
        "olmo2", linear(*O_PROJ),
        extras=lambda s: {"q_norm.weight": (s.H * s.d,), "k_norm.weight": (s.K * s.d,)},
    ),
    family(
        "cohere", linear(*O_PROJ),
        optional=lambda s: {"q_norm.weight": (s.H, s.d), "k_norm.weight": (s.K, s.d)},
    ),
    family("cohere2", linear(*O_PROJ)),
    family("glm", no("o_proj")(linear(*O_PROJ))),
    family("llama4", linear(*O_PROJ)),
    family("gptj", no(*OUT_PROJ)(linear(*OUT_PROJ)), same="K=H", optional=buffers),
    family("gpt_neox", fused("query_key_value", "dense"), same=PER_HEAD, optional=INVERSE),
    family("bloom", fused("query_key_value", "dense"), same=PER_HEAD),
    family("falcon", fused("query_key_value", "dense"), same=GROUPED),
    family("phi3", no("qkv_proj", "o_proj")(fused("qkv_proj", "o_proj")), same=GROUPED),
    family(
        "codegen", no("qkv_proj", "out_proj")(fused("qkv_proj", "out_proj")), same=PER_HEAD,
        multiple=4,
    ),
    family(
        "albert", linear("query", "key", "value", "dense"), same="K=H",
        optional=lambda s: {"LayerNorm.weight": (s.O,), "LayerNorm.bias": (s.O,)},
    ),
    family("distilbert", linear("q_lin", "k_lin", "v_lin", "out_lin"), same="K=H"),
    family("mpnet", linear("q", "k", "v", "o"), same="K=H"),
    family(
        "deberta",
        lambda s: {
            "self.in_proj.weight": (3 * s.H * s.d, s.D), "self.q_bias": (s.H * s.d,),
            "self.v_bias": (s.H * s.d,),
            "output.dense.weight": (s.O, s.H * s.d), "output.dense.bias": (s.O,),
        },
        same=PER_HEAD,
    ),
    family(
        "deberta_v2",
        linear("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"), same="K=H",
        optional=lambda s: {"output.LayerNorm.weight": (s.O,), "output.LayerNorm.bias": (s.O,)},
    ),
    family("wav2vec2_bert", linear("linear_q", "linear_k", "linear_v", "linear_out"), same="K=H"),
    family(
        "wav2vec2_bert", linear("linear_q", "linear_k", "linear_v", "linear_out"), same="K=H",
        asks=False,
        extras=lambda s: {
            "pos_bias_u": (s.H, s.d), "pos_bias_v": (s.H, s.d), "linear_pos.weight": (s.D, s.D),
        },
    ),
    family("blip", fused("qkv", "projection"), same=PER_HEAD),
    Sample(
        "nanogpt.CausalSelfAttention", fused("c_attn", "c_proj"), same=PER_HEAD,
        optional=lambda s: {"bias": (1, 1, 4, 4)},
    ),
    family(
        "gpt_neo", no(*Q_PROJ)(linear(*OUT_PROJ)), same="K=H", optional=buffers
    ),
    family("mpt", fused("Wqkv", "out_proj"), same=PER_HEAD),
    family("modernbert", fused("Wqkv", "Wo"), same=PER_HEAD),
    family("nomic_bert", linear(*O_PROJ), same="K=H", form="module"),
    family("nomic_bert", fused("Wqkv", "out_proj"), same=PER_HEAD, form="published"),
    family("dbrx", no("Wqkv", "out_proj")(fused("Wqkv", "out_proj")), same=GROUPED),
    family("phi", linear(*Q_PROJ, "dense")),
    family(
        "phi", linear(*Q_PROJ, "dense"), asks=False,
        extras=lambda s: {f"{n}_layernorm.{p}": (s.d,) for n in "qk" for p in ("weight", "bias")},
    ),
    Sample("internlm.internlm2", fused("wqkv", "wo"), same=GROUPED),
    Sample("gpt_fast.Attention", no("wqkv", "wo")(fused("wqkv", "wo")), same=GROUPED),
    Sample(
        "megatron.SelfAttention", fused("linear_qkv", "linear_proj"), same=GROUPED,
        optional=lambda s: {
            "linear_qkv.layer_norm_weight": (s.D,), "linear_qkv.layer_norm_bias": (s.D,),
        },
    ),
    Sample("meta.llama", no("wq", "wk", "wv", "wo")(linear("wq", "wk", "wv", "wo"))),
    Sample(
        "vit_pytorch.Attention", no("to_qkv")(fused("to_qkv", "to_out.0")), same=PER_HEAD,
        optional=lambda s: {"norm.weight": (s.D,), "norm.bias": (s.D,)},
    ),
    Sample("diffusers.Attention", linear("to_q", "to_k", "to_v", "to_out.0")),
    Sample("flash_attn.MHA", fused("Wqkv", "out_proj"), same=GROUPED, form="self"),
    Sample(
        "flash_attn.MHA",
        lambda s: {
            "Wq.weight": (s.H * s.d, s.D), "Wq.bias": (s.H * s.d,),
            "Wkv.weight": (2 * s.K * s.d, s.S), "Wkv.bias": (2 * s.K * s.d,),
            "out_proj.weight": (s.O, s.H * s.d), "out_proj.bias": (s.O,),
        },
        same="U=S v=d", form="cross",
    ),
    Sample("openai.whisper", no("key")(linear("query", "key", "value", "out")), same="K=H"),
    family(
        "flax_bert", matrices("self.query", "self.key", "self.value", "output.dense"), same="K=H",
        optional=lambda s: {"output/LayerNorm/scale": (s.O,), "output/LayerNorm/bias": (s.O,)},
    ),
    Sample("gemma.Attention", einsum(grouped=False), same=PER_HEAD, asks=False, form="alike"),
    Sample(
        "gemma.Attention", einsum(grouped=True), same="U=S v=d", asks=False, form="grouped",
        optional=lambda s: {"_query_norm/scale": (s.d,), "_key_norm/scale": (s.d,)},
    ),
    *(
        Sample(name, shapes("attn_output"), same=GROUPED, form=form)
        for name in ("gguf.llama", "gguf.qwen2")
        for form, shapes in (
            ("separate", lambda output: linear("attn_q", "attn_k", "attn_v", output)),
            ("fused", lambda output: fused("attn_qkv", output)),
        )
    ),
    *(
        Sample(name, fused(*form), same=same, form=", ".join(form))
        for name in ("fused.blocks", "fused.groups")
        for form, same in (
            (("qkv", "proj"), GROUPED), (("query_key_value", "dense"), GROUPED),
            (("in_proj", "out_proj"), PER_HEAD),
        )
    ),
)  # fmt: skip
"""Each layout, each of its forms."""


def label(sample: Sample) -> str:
    """The sample's name in a test's id."""
    more = sample.form or ("" if sample.asks else "tells heads")
    return f"{sample.layout} {more}".strip()


def by_name(layout: str, form: str | None = None) -> Sample:
    """The sample of a layout, and of a form of it."""
    return next(s for s in SAMPLES if s.layout == layout and form in (None, s.form))


def mapped(arrays: Mapping[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """Each array through a function."""
    return {name: function(array) for name, array in arrays.items()}

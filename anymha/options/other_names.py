"""The names that options of the layer have in other libraries, and what to pass here instead."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from anymha.errors import AnymhaError, ArgumentError, UnknownOptionError
from anymha.framework.names import answer, backticked

_WIDTH = "as `query_features`, the width of the query input, with `key_dim` = {} / num_heads."
_BIASES = "Pass `use_bias`: True, False, or the names of the projections that have a bias."
_DROPOUT = "Pass `dropout`, the share of the probabilities that training drops."
_HEADS = "Pass `num_heads`, the number of query heads."
_KEY_VALUE_HEADS = "Pass `num_key_value_heads`, a divisor of `num_heads`."
_KEY_DIM = "Pass `key_dim`, the width of each query and key head."
_OUTPUT = "Pass `output_shape`; the default is the width of the query input."
_KERNEL = "Pass `kernel_initializer`."
_ROTARY = "Pass `rotary=anymha.Rotary({0}=...)`."
_NORM = "Pass `query_key_norm`, an `anymha.QueryKeyNorm`."
_EPSILON = "Pass `query_key_norm=anymha.QueryKeyNorm(eps=...)`, if queries and keys have a norm."
_SINKS = "Pass `sinks=True`."
_ALIBI = "Pass `alibi=True`, or a slope for each query head."
_SCALE = "Pass `scale`, the factor of the logits; the default is 1/sqrt(key_dim)."
_SOFTCAP = "Pass `softcap`."
_WINDOW = "Pass `sliding_window`, the keys to a side that a query sees, its own counted."
_FLOAT32 = (
    "Leave it out: the softmax and all sums are in float32 at least. `compute_dtype` is the dtype "
    "of all that the layer computes."
)
_CAUSAL = "Leave it out, and pass `use_causal_mask=True` to the call."
_CACHE = "Leave it out. Pass `cache`, from `layer.make_cache(batch_size, max_length)`, to the call."
_MASK = "Pass `attention_mask`, True = may attend, to the call; or `value_mask`, for padding."
_BIAS_OF_POSITIONS = (
    "Leave it out: compute the bias of positions, and pass it to the call as `attention_bias`."
)
_LENGTH = (
    "Leave it out: the layer takes any length. A cache has one: "
    "`layer.make_cache(batch_size, max_length)`."
)
_DROP_OUTPUT = (
    "Leave it out: `dropout` is that of the probabilities. Drop the output after the call."
)
_OUTSIDE = "Leave it out: the layer has no such part. Compute it before or after the call."
_ABSENT = (
    "The layer cannot do that: there is no such option. Leave it out only if it is switched off."
)
_NO_EFFECT = "Leave it out: nothing that the layer computes depends on it."
_BASE = _ROTARY.format("base")
_ROTARY_ANY = "Pass `rotary=True`, or an `anymha.Rotary`."
_FUSED = "Leave it out: the layer takes a fused kernel where there is one that computes the same."
_EXTRA_KEY = "Leave it out: the layer adds no learned key or value; append one to the inputs."

PEERS: Mapping[str, str] = {
    # torch.nn.MultiheadAttention
    "embed_dim": "Pass it " + _WIDTH.format("embed_dim"),
    "kdim": "Pass `key_features`, the width of the key input.",
    "vdim": "Pass `value_features`, the width of the value input.",
    "bias": _BIASES,
    "batch_first": "Leave it out: inputs are batch first, (B, T, D), as with batch_first=True.",
    "add_bias_kv": _EXTRA_KEY,
    "add_zero_attn": _EXTRA_KEY,
    "device": "Only PyTorch's layer has it. In JAX place arrays with `jax.device_put`, in "
    "TensorFlow make the layer under `tf.device`.",
    # flax.linen and flax.nnx
    "in_features": "Pass `query_features`, the width of the query input.",
    "in_kv_features": "Pass `value_features`, and `key_features` where it differs.",
    "qkv_features": "Pass `key_dim` = qkv_features / num_heads, the width of each head.",
    "out_features": _OUTPUT,
    "dropout_rate": _DROPOUT,
    "broadcast_dropout": "Leave it out: dropout draws for each element, as with "
    "broadcast_dropout=False.",
    "deterministic": "Only Flax's layer has it. Pass `training` to the call: training=False is "
    "deterministic=True.",
    "decode": _CACHE,
    "rngs": "Only Flax's layer has it. Pass `seed`, an int.",
    "param_dtype": "Pass `dtype`, the dtype of the weights; Flax's `dtype` is `compute_dtype`.",
    "kernel_init": _KERNEL,
    "bias_init": "Pass `bias_initializer`.",
    "out_kernel_init": "Pass `kernel_initializer`, which is that of all four projections.",
    "out_bias_init": "Pass `bias_initializer`, which is that of all four projections.",
    "precision": "Leave it out, or pass `compute_dtype`, the dtype in which the layer computes.",
    "normalize_qk": 'Pass `query_key_norm="layer"`.',
    "num_kv_heads": _KEY_VALUE_HEADS,
    # equinox.nn.MultiheadAttention
    "query_size": "Pass `query_features`; Equinox's default for the width of a head is `key_dim` "
    "= query_size / num_heads.",
    "key_size": "Pass `key_features`, the width of the key input, as in Equinox; or `key_dim`, the "
    "width of each head, as Haiku's key_size.",
    "value_size": "Pass `value_features`, the width of the value input, as in Equinox; or "
    "`value_dim`, the width of each value head, as Haiku's value_size.",
    "output_size": _OUTPUT,
    "qk_size": _KEY_DIM,
    "vo_size": "Pass `value_dim`, the width of each value head.",
    "dropout_p": _DROPOUT,
    "inference": "Only Equinox's layer has it. Pass `training` to the call: training=False is "
    "inference=True.",
    "use_query_bias": _BIASES,
    "use_key_bias": _BIASES,
    "use_value_bias": _BIASES,
    "use_output_bias": _BIASES,
    "key": "Only JAX's and Equinox's layers have it. Pass `seed`, an int.",
    # haiku.MultiHeadAttention
    "model_size": _OUTPUT,
    "w_init": _KERNEL,
    "w_init_scale": "Pass `kernel_initializer`, an initialiser with that scale.",
    "b_init": "Pass `bias_initializer`.",
    "with_bias": _BIASES,
    # transformers
    "hidden_size": "Pass it " + _WIDTH.format("hidden_size"),
    "d_model": "Pass it " + _WIDTH.format("d_model"),
    "n_embd": "Pass it " + _WIDTH.format("n_embd"),
    "num_attention_heads": _HEADS,
    "n_head": _HEADS,
    "n_heads": _HEADS,
    "head_dim": _KEY_DIM,
    "attention_dropout": _DROPOUT,
    "attn_dropout": _DROPOUT,
    "attn_pdrop": _DROPOUT,
    "attention_probs_dropout_prob": _DROPOUT,
    "attn_logit_softcapping": _SOFTCAP,
    "rope_theta": _BASE,
    "rope_scaling": _ROTARY.format("scaling"),
    "rope_parameters": _ROTARY.format("base=..., scaling"),
    "rotary_dim": _ROTARY.format("dim"),
    "partial_rotary_factor": _ROTARY.format("dim"),
    "max_position_embeddings": _ROTARY.format("max_position_embeddings"),
    "is_decoder": _CAUSAL,
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "nhead"), _HEADS),
    **dict.fromkeys(("d_k", "d_q", "d_kv", "d_head", "head_size", "attention_head_size"), _KEY_DIM),
    **dict.fromkeys(("n_kv_heads", "n_kv_head", "n_head_kv", "num_heads_kv"), _KEY_VALUE_HEADS),
    "num_key_value_groups": "Pass `num_key_value_heads` = num_heads / num_key_value_groups.",
    "multi_query": "Pass `num_key_value_heads=1`.",
    "d_v": "Pass `value_dim`, the width of each value head.",
    "attention_bias": "Pass `use_bias`, if it is True or False, as in Llama's config. A bias of "
    "the logits is `attention_bias` of the call.",
    "attn_bias": "Pass `use_bias`, if it is True or False. A bias of the logits is "
    "`attention_bias` of the call.",
    "use_cache": _CACHE,
    **dict.fromkeys(("attention_sinks", "use_sinks"), _SINKS),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _EPSILON),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "qk_layer_norm"), _NORM),
    "query_pre_attn_scalar": "Pass `scale` = query_pre_attn_scalar ** -0.5.",
    **dict.fromkeys(("attention_multiplier", "softmax_scale", "sm_scale"), _SCALE),
    "scale_attn_weights": "Leave it out for True; pass `scale=1.0` for False.",
    "scale_attn_by_inverse_layer_idx": "Pass `scale` = 1/sqrt(key_dim) / (layer_idx + 1).",
    "reorder_and_upcast_attn": _FLOAT32,
    "use_sliding_window": _WINDOW,
    **dict.fromkeys(("rope", "rotary_emb", "rotary_pos_emb", "use_rope"), _ROTARY_ANY),
    **dict.fromkeys(("rope_base", "rotary_base", "rotary_emb_base", "rope_max_wavelength"), _BASE),
    **dict.fromkeys(("rotary_pct", "rotary_emb_dim", "rope_dim"), _ROTARY.format("dim")),
    "rotary_emb_interleaved": 'Pass `rotary=anymha.Rotary(layout="interleaved")`.',
    **dict.fromkeys(("alibi_pos_bias", "use_alibi", "alibi_slopes"), _ALIBI),
    **dict.fromkeys(
        (
            "position_bias",
            "rel_pos_bias",
            "has_relative_attention_bias",
            "position_embedding_type",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
        ),
        _BIAS_OF_POSITIONS,
    ),
    **dict.fromkeys(
        (
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "max_seq_length",
            "max_length",
            "block_size",
            "cache_size",
            "seq_len",
            "context_length",
        ),
        _LENGTH,
    ),
    **dict.fromkeys(
        (
            "proj_drop",
            "proj_dropout",
            "resid_pdrop",
            "resid_dropout",
            "residual_dropout",
            "hidden_dropout_prob",
        ),
        _DROP_OUTPUT,
    ),
    **dict.fromkeys(
        ("add_cross_attention", "is_cross_attention", "cross_attn"),
        "Leave it out, and pass `value` to the call, with its width as `value_features` here.",
    ),
    **dict.fromkeys(
        ("config", "layer_idx", "layer_id"),
        "Leave it out: the options are passed one by one, `num_heads` and so on.",
    ),
    **dict.fromkeys(
        (
            "clip_qkv",
            "talking_heads",
            "pre_talking_heads",
            "post_talking_heads",
            "head_scale",
            "num_mem_kv",
            "add_zero_kv",
            "sparse_topk",
            "rotary_xpos",
            "scale_norm",
            "added_kv_proj_dim",
            "spatial_norm_dim",
        ),
        _ABSENT,
    ),
    **dict.fromkeys(
        (
            "norm_layer",
            "norm_first",
            "norm_num_groups",
            "residual_connection",
            "rescale_output_factor",
            "activation",
            "dim_feedforward",
            "cross_attention_norm",
            "group_norm",
        ),
        _OUTSIDE,
    ),
    "initializer_range": "Pass `kernel_initializer`, an initialiser with that deviation.",
    # diffusers
    "query_dim": "Pass `query_features`, the width of the query input.",
    **dict.fromkeys(
        ("cross_attention_dim", "dim_context", "context_dim"),
        "Pass `value_features`, the width of the value input.",
    ),
    **dict.fromkeys(("out_dim", "output_dim", "dim_output"), _OUTPUT),
    **dict.fromkeys(
        (
            "out_bias",
            "proj_bias",
            "qkv_proj_bias",
            "out_proj_bias",
            "use_qkv_bias",
            "add_bias",
            "attention_in_bias",
        ),
        _BIASES,
    ),
    **dict.fromkeys(
        ("upcast_attention", "upcast_softmax", "softmax_in_fp32", "attention_softmax_in_fp32"),
        _FLOAT32,
    ),
    "scale_qk": "Leave it out for True; pass `scale=1.0` for False.",
    # the width of the model, in words of several libraries
    **{
        name: "Pass it " + _WIDTH.format(name)
        for name in (
            "model_dim",
            "dim_model",
            "hidden_dim",
            "hidden_features",
            "emb_dim",
            "n_embed",
            "embedding_dim",
            "in_dim",
            "input_dim",
            "in_channels",
            "width",
            "features",
        )
    },
    # x-transformers, timm
    "dim": "Pass it " + _WIDTH.format("dim"),
    "heads": _HEADS,
    "dim_head": _KEY_DIM,
    "value_dim_head": "Pass `value_dim`, the width of each value head.",
    "dim_out": _OUTPUT,
    "kv_heads": _KEY_VALUE_HEADS,
    "one_kv_head": "Pass `num_key_value_heads=1`.",
    "qkv_bias": 'Pass `use_bias=("query", "key", "value")`, and "output" where that has one.',
    "attn_drop": _DROPOUT,
    **dict.fromkeys(
        (
            "flash",
            "fused_attn",
            "use_flash_attn",
            "use_flash_attention",
            "use_sdpa",
            "attn_implementation",
            "_attn_implementation",
        ),
        _FUSED,
    ),
    **dict.fromkeys(
        (
            "logit_softclamp_value",
            "softclamp_logits",
            "logits_soft_cap",
            "logit_soft_cap",
            "attn_logit_softcap",
            "attention_softcap",
        ),
        _SOFTCAP,
    ),
    # Keras and TensorFlow Addons
    "flash_attention": _FUSED,
    "use_gate": "Pass `gate='elementwise'`.",
    "num_query_heads": _HEADS,
    "use_projection_bias": _BIASES,
    "trainable": "Only Keras's layer has it.",
    "autocast": "Only Keras's layer has it.",
    # everywhere
    **dict.fromkeys(("causal", "is_causal"), _CAUSAL),
    **dict.fromkeys(("mask", "attn_mask", "causal_mask"), _MASK),
    "key_padding_mask": "Pass `value_mask=~key_padding_mask` to the call: torch's mask is True "
    "where a key is ignored.",
    **dict.fromkeys(
        ("window_size", "window", "attention_window", "local_window_size", "sliding_window_size"),
        _WINDOW,
    ),
    **dict.fromkeys(("checkpointing", "gradient_checkpointing", "pretraining_tp"), _NO_EFFECT),
}
"""By the name in another library, what to do here, a sentence."""

_REMEDY = "Pass e.g. MultiHeadAttention(num_heads=8, key_dim=64)."

Config = TypeVar("Config")


def answered_names(config: type[Config]) -> type[Config]:
    """Answer wrong and missing names in a config's constructor with the right ones."""
    init = config.__init__

    @functools.wraps(init)
    def answering(self: Any, *args: Any, **options: Any) -> None:
        try:
            init(self, *args, **options)
        except TypeError as error:
            answered = None if isinstance(error, AnymhaError) else _answered(config, args, options)
            if answered is None:
                raise
            raise answered from None

    config.__init__ = answering
    return config


def _answered(config: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """The error that says which option is wrong or missing; None where the names are right."""
    known = {field.name: field for field in fields(config)}
    unknown = [name for name in options if name not in known]
    if unknown:
        return unknown_options(unknown, known)
    needed = [name for name, field in known.items() if field.default is MISSING]
    missing = [name for name in needed[len(args) :] if name not in options]
    if missing:
        given = [name for name in needed if name in options]  # a home may have added others
        received = ", ".join([*map(repr, args), *given]) or "neither"
        return ArgumentError(
            f"{backticked(missing)} must be passed: `num_heads` is the number of query heads, "
            f"`key_dim` the width of each. Received: {received}. {_REMEDY}"
        )
    return None


def unknown_options(
    unknown: Iterable[str], known: Iterable[str], of_call: Container[str] = ()
) -> UnknownOptionError:
    """The error for options that are not in `known`; `of_call` are the arguments of the call."""
    names, right = list(unknown), list(known)
    told = [
        f"Pass `{name}` to the layer's call."
        if name in of_call and name not in PEERS
        else answer(name, right, PEERS)
        for name in names
    ]
    plural = "s" if len(names) > 1 else ""
    return UnknownOptionError(
        f"MultiHeadAttention has no option{plural} {backticked(names)}. "
        f"{' '.join(dict.fromkeys(told))}"
    )

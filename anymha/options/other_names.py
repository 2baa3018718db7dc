"""The names that options of the layer have in other libraries, and what to pass here instead."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from anymha.errors import AnymhaError, ArgumentError, UnknownOptionError
from anymha.framework.names import answer, backticked, by_name

PEERS: Mapping[str, str] = by_name({
    "Pass it as `query_features`, the width of the query input, with `key_dim` = {0} / num_heads.":
        "embed_dim hidden_size d_model n_embd n_embed dim model_dim dim_model hidden_dim emb_dim "
        "hidden_features embedding_dim in_dim input_dim in_channels width features",
    "Pass `query_features`, the width of the query input.": "in_features query_dim",
    "Pass `query_features`; Equinox's default for the width of a head is `key_dim` = query_size / "
    "num_heads.": "query_size",
    "Pass `key_features`, the width of the key input.": "kdim",
    "Pass `value_features`, the width of the value input.":
        "vdim cross_attention_dim dim_context context_dim kv_dim encoder_hidden_size",
    "Pass `value_features`, and `key_features` where it differs.": "in_kv_features",
    "Pass `key_features`, the width of the key input, as in Equinox; or `key_dim`, the width of "
    "each head, as Haiku's key_size.": "key_size",
    "Pass `value_features`, the width of the value input, as in Equinox; or `value_dim`, the width "
    "of each value head, as Haiku's value_size.": "value_size",
    "Leave it out, and pass `value` to the call, with its width as `value_features` here.":
        "add_cross_attention is_cross_attention cross_attn",
    "Pass `num_heads`, the number of query heads.":
        "num_attention_heads n_head n_heads heads nhead num_query_heads encoder_attention_heads "
        "decoder_attention_heads",
    "Pass `num_key_value_heads`, a divisor of `num_heads`.":
        "num_kv_heads kv_heads n_kv_heads n_kv_head n_head_kv num_heads_kv",
    "Pass `num_key_value_heads` = num_heads / num_key_value_groups.": "num_key_value_groups",
    "Pass `num_key_value_heads=1`.": "one_kv_head multi_query",
    "Pass `key_dim`, the width of each query and key head.":
        "head_dim dim_head head_size qk_size d_k d_q d_kv d_head attention_head_size attn_head_dim",
    "Pass `key_dim` = qkv_features / num_heads, the width of each head.": "qkv_features",
    "Pass `value_dim`, the width of each value head.": "vo_size value_dim_head d_v",
    "Pass `output_shape`; the default is the width of the query input.":
        "out_features output_size model_size dim_out out_dim output_dim dim_output",
    "Pass `use_bias`: True, False, or the names of the projections that have a bias.":
        "bias use_query_bias use_key_bias use_value_bias use_output_bias with_bias out_bias "
        "use_projection_bias proj_bias qkv_proj_bias out_proj_bias use_qkv_bias add_bias",
    "Pass `use_bias`, if it is True or False, as in Llama's config. A bias of the logits is "
    "`attention_bias` of the call.": "attention_bias attn_bias",
    'Pass `use_bias=("query", "key", "value")`, and "output" where that has one.': "qkv_bias",
    "Pass `dropout`, the share of the probabilities that training drops.":
        "dropout_rate dropout_p attention_dropout attn_dropout attn_pdrop attn_drop "
        "attention_probs_dropout_prob attn_drop_rate dropout_prob",
    "Leave it out: `dropout` is that of the probabilities. Drop the output after the call.":
        "proj_drop proj_dropout resid_pdrop resid_dropout residual_dropout hidden_dropout_prob",
    "Leave it out: dropout draws for each element, as with broadcast_dropout=False.":
        "broadcast_dropout",
    "Pass `kernel_initializer`, that of all projections.": "kernel_init out_kernel_init w_init",
    "Pass `bias_initializer`, that of all projections.": "bias_init out_bias_init b_init",
    "Pass `kernel_initializer`, an initialiser with that scale.": "w_init_scale initializer_range",
    "Pass `dtype`, the dtype of the weights; Flax's `dtype` is `compute_dtype`.": "param_dtype",
    "Leave it out, or pass `compute_dtype`, the dtype in which the layer computes.": "precision",
    "Leave it out: the softmax and all sums are in float32 at least. `compute_dtype` is the dtype "
    "of all that the layer computes.":
        "upcast_attention upcast_softmax reorder_and_upcast_attn softmax_in_fp32 "
        "attention_softmax_in_fp32",
    'Pass `query_key_norm="layer"`.': "normalize_qk",
    "Pass `query_key_norm`, an `anymha.QueryKeyNorm`.":
        "qk_norm use_qk_norm qk_layernorm qk_layer_norm",
    "Pass `query_key_norm=anymha.QueryKeyNorm(eps=...)`, if queries and keys have a norm.":
        "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps",
    "Pass `scale`, the factor of the logits; the default is 1/sqrt(key_dim).":
        "softmax_scale sm_scale attention_multiplier",
    "Pass `scale` = query_pre_attn_scalar ** -0.5.": "query_pre_attn_scalar",
    "Leave it out for True; pass `scale=1.0` for False.": "scale_attn_weights scale_qk",
    "Pass `scale` = 1/sqrt(key_dim) / (layer_idx + 1).": "scale_attn_by_inverse_layer_idx",
    "Pass `softcap`.":
        "attn_logit_softcapping logit_softclamp_value softclamp_logits logits_soft_cap "
        "logit_soft_cap attn_logit_softcap",
    "Pass `rotary=anymha.Rotary(base=...)`.":
        "rope_theta rope_base rotary_base rotary_emb_base rope_max_wavelength",
    "Pass `rotary=anymha.Rotary(scaling=...)`.": "rope_scaling",
    "Pass `rotary=anymha.Rotary(base=..., scaling=...)`.": "rope_parameters",
    "Pass `rotary=anymha.Rotary(dim=...)`.":
        "rotary_dim partial_rotary_factor rotary_pct rotary_emb_dim rope_dim",
    "Pass `rotary=anymha.Rotary(max_position_embeddings=...)`.": "max_position_embeddings",
    'Pass `rotary=anymha.Rotary(layout="interleaved")`.': "rotary_emb_interleaved",
    "Pass `rotary=True`, or an `anymha.Rotary`.":
        "rope rotary_emb rotary_pos_emb use_rope rotary_embedding",
    "Pass `alibi=True`, or a slope for each query head.": "alibi_pos_bias use_alibi alibi_slopes",
    "Pass `sinks=True`.": "attention_sinks use_sinks",
    "Pass `gate='elementwise'`.": "use_gate",
    "Pass `sliding_window`, the keys to a side that a query sees, its own counted.":
        "window_size window attention_window local_window_size sliding_window_size "
        "use_sliding_window",
    "Leave it out, and pass `use_causal_mask=True` to the call.": "causal is_causal is_decoder",
    "Pass `attention_mask`, True = may attend, to the call; or `value_mask`, for padding.":
        "mask attn_mask causal_mask",
    "Pass `value_mask=~{0}` to the call: torch's mask is True where a key is ignored.":
        "key_padding_mask",
    "Leave it out. Pass `cache`, from `layer.make_cache(batch_size, max_length)`, to the call.":
        "decode use_cache kv_cache",
    "Leave it out: compute the bias of positions, and pass it to the call as `attention_bias`.":
        "position_bias rel_pos_bias has_relative_attention_bias position_embedding_type "
        "relative_attention_num_buckets relative_attention_max_distance",
    "Leave it out: the layer takes any length. A cache has one: `layer.make_cache(batch_size, "
    "max_length)`.":
        "n_positions n_ctx max_seq_len max_seq_length max_length block_size cache_size seq_len "
        "context_length",
    "Leave it out: inputs are batch first, (B, T, D), as with batch_first=True.": "batch_first",
    "Leave it out: the layer adds no learned key or value; append one to the inputs.":
        "add_bias_kv add_zero_attn add_zero_kv num_mem_kv",
    "Leave it out: the layer takes a fused kernel where there is one that computes the same.":
        "flash flash_attention fused_attn use_flash_attn use_flash_attention use_sdpa "
        "attn_implementation",
    "Leave it out: the layer has no such part. Compute it before or after the call.":
        "norm_layer norm_first norm_num_groups residual_connection rescale_output_factor "
        "activation dim_feedforward cross_attention_norm",
    "Leave it out: nothing that the layer computes depends on it.":
        "checkpointing gradient_checkpointing pretraining_tp layer_idx layer_id",
    "Leave it out only if it is switched off: the layer cannot do that.":
        "clip_qkv talking_heads pre_talking_heads post_talking_heads head_scale sparse_topk "
        "rotary_xpos scale_norm added_kv_proj_dim spatial_norm_dim",
    "Pass the options one by one, `num_heads` and so on.": "config",
    "Only PyTorch's layer has it. In JAX place arrays with `jax.device_put`, in TensorFlow make "
    "the layer under `tf.device`.": "device",
    "Only Flax's layer has it. Pass `training` to the call: training=False is deterministic=True.":
        "deterministic",
    "Only Equinox's layer has it. Pass `training` to the call: training=False is inference=True.":
        "inference",
    "Only Flax's layer has it. Pass `seed`, an int.": "rngs",
    "Only JAX's and Equinox's layers have it. Pass `seed`, an int.": "key",
    "Only Keras's layer has it.": "trainable autocast",
})  # fmt: skip
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

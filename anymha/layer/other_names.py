"""The names that arguments of the call have in other libraries, and what to pass here instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from anymha.errors import ArgumentError
from anymha.framework.names import answer, by_name
from anymha.layer.arguments import CALL_ARGUMENTS
from anymha.options.config import AttentionConfig

_INVERTED = (
    "Pass `value_mask=~{0}`: torch's mask is True where a key is ignored, `value_mask` is True "
    "where it is kept."
)
_SEGMENTS = "Pass `segment_ids`, (B, T) integers, the sequence that each position is of."

PEERS: Mapping[str, str] = by_name({
    "Pass `query`, the first argument.":
        "q inputs_q hidden_states x queries src tgt",
    "Pass `value`, the second argument.": "v values",
    "Pass `value`, the second argument: the order is query, value, key.": "inputs_v",
    "Pass `key`, the third argument.": "k inputs_k keys",
    "Pass `key`, the third argument: the order is query, value, key.": "key_",
    "Pass `value`; `key` is by default the same.":
        "inputs_kv encoder_hidden_states key_value_states context key_value kv x_kv",
    "Pass the inputs `query`, `value` and `key`: the layer projects them itself.": "qkv",
    "Pass `query`, or a list [query, value] or [query, value, key] in the first place.": "inputs",
    _INVERTED:
        "key_padding_mask src_key_padding_mask tgt_key_padding_mask memory_key_padding_mask",
    "Pass a boolean one as `attention_mask=~{0}`: torch's MultiheadAttention has True where a "
    "query may not attend, `attention_mask` has True where it may, as torch's "
    "scaled_dot_product_attention. Pass a floating one as `attention_bias`.":
        "attn_mask src_mask tgt_mask memory_mask",
    "Pass `attention_mask`, (T, S), (B, T, S) or (B, H, T, S), True = may attend; or "
    "`value_mask`, (B, S), True = keep.": "mask",
    "Pass booleans as `attention_mask`, True = may attend; or `use_causal_mask`, `segment_ids`, "
    "or the constructor's `sliding_window`.": "block_mask",
    "Pass `value_mask`, (B, S), True = keep.": "encoder_attention_mask context_mask",
    "Pass `value_mask`, (B, S), True = keep; invert a mask that is True where a key is ignored.":
        "padding_mask",
    "Pass `use_causal_mask`.": "is_causal causal causal_mask src_is_causal",
    "Pass `attention_bias`, added to the logits.":
        "attn_bias position_bias rel_pos rel_pos_bias shared_rel_pos_bias",
    "Pass `attention_bias`, added to the logits; biases of the projections are the constructor's "
    "`use_bias`.": "bias",
    "Pass what it adds as `attention_bias`; or make the layer with `softcap` or `alibi`.":
        "score_mod",
    "Pass `return_attention_scores`: it is False by default, torch's need_weights is True, and "
    "here the scores are per head.": "need_weights",
    "Pass `return_attention_scores=True`.":
        "sow_weights output_attentions return_intermediates return_attn_coef return_scores "
        "return_weights return_attention return_attn_probs",
    "Leave it out: the scores are per head, as with average_attn_weights=False; take their mean "
    "over the heads, axis 1, for True.": "average_attn_weights",
    "The layer does not return it: `anymha.dot_product_attention(..., return_lse=True)` does.":
        "return_lse return_softmax_lse return_residual",
    "Pass `training`: training=True is {0}=False, training=False is {0}=True.":
        "deterministic inference",
    "Pass `training`.": "is_training",
    "Pass `seed`, an int or a key; `dropout_rng` is an option of the constructor.": "dropout_rng",
    "Pass `seed`, an int or the framework's own key.": "rngs",
    "Pass `cache`, from `layer.make_cache(batch_size, max_length)`: the call appends to it, and "
    "gives the new one back, last.":
        "decode past_key_value past_key_values layer_past use_cache return_cache cache_position "
        "kv_cache past_kv cache_seqlens start_pos input_pos inference_params",
    "Make the layer with `rotary`; pass `positions` and `key_positions` if they are no indices.":
        "position_ids position_embeddings rotary_pos_emb freqs_cis rope cos sin rotary_cos "
        "rotary_sin image_rotary_emb query_positions pos",
    _SEGMENTS:
        "cu_seqlens cu_seqlens_q cu_seqlens_k cu_seq_lens_q cu_seq_lens_k seq_idx document_ids "
        "query_segment_ids q_segment_ids",
    "Pass `key_segment_ids`, (B, S) integers, the sequence that each key is of.":
        "kv_segment_ids key_value_segment_ids",
    "Make the layer with `sliding_window`.": "window window_size",
    "Make the layer with `scale`.": "softmax_scale",
    "Make the layer with `alibi`, a slope for each query head.": "alibi_slopes",
    "Make the layer with `dropout`; it acts with `training=True`.": "dropout_p",
    "Make the layer with `num_key_value_heads`.": "enable_gqa",
    "Leave it out: the layer does not call it.": "process_heads",
    "Leave it out: the layer does not mask heads.": "head_mask layer_head_mask",
    "Leave it out: the layer takes it from the shapes.":
        "max_seqlen max_seqlen_q max_seqlen_k query_length",
})  # fmt: skip
"""By the name in another library, what to do here, a sentence."""

FUNCTION_PEERS: Mapping[str, str] = by_name({
    "Pass a boolean one as `mask`, True = may attend as there, and a floating one as `bias`; heads "
    "stand after the length here, before it there.": "attn_mask",
    "Pass `query`.": "q",
    "Pass `key`.": "k",
    "Pass `value`.": "v",
    "Pass `dropout`.": "dropout_p dropout_rate p",
    "Leave it out: dropout draws for each element.": "broadcast_dropout",
    "Leave it out: dropout acts wherever it is not 0; pass `dropout=0.0` for deterministic=True.":
        "deterministic",
    "Leave it out: dropout acts wherever it is not 0.": "training",
    "Pass `seed`, an int or a key.": "dropout_rng",
    "Leave it out: fewer key heads than query heads are seen in the shapes.": "enable_gqa",
    "Leave it out: the heads are the third axis of the arrays.": "num_heads",
    "Leave it out: a fused kernel is taken where one computes the same.": "implementation",
    "Pass `query_mask`, (B, T) booleans, True = keep.": "query_seq_lengths",
    "Pass `value_mask`, (B, S) booleans, True = keep.": "key_value_seq_lengths",
    "Pass `value_mask`: a key and its value are kept together.": "key_mask",
    _INVERTED: "key_padding_mask",
    "Pass `window`, (left, right).": "local_window_size window_size",
    "Pass `window=(w - 1, w - 1)` for sliding_window=w, which counts the query's own position.":
        "sliding_window",
    "Pass `mask`, which broadcasts to (B, H, T, S).": "attention_mask block_mask",
    "Pass `bias`, which broadcasts to (B, H, T, S).": "attention_bias attn_bias score_mod",
    "Pass `is_causal`.": "use_causal_mask causal",
    "Pass `scale`.": "softmax_scale sm_scale",
    "Pass `return_scores`.": "return_attention_scores return_attn_probs return_weights",
    "Pass `return_scores`: it is False by default, torch's need_weights is True.": "need_weights",
    "Pass `return_lse`.": "return_residual return_softmax_lse",
    _SEGMENTS: "cu_seqlens query_segment_ids q_segment_ids",
    "Pass `key_segment_ids`.": "kv_segment_ids key_value_segment_ids",
    "Pass `alibi_slopes`, (H,), one for each query head.": "alibi",
})  # fmt: skip
"""The same for `dot_product_attention`."""

_CALL = tuple(argument.name for argument in CALL_ARGUMENTS)


def unexpected(name: str, known: Iterable[str] = _CALL) -> ArgumentError:
    """The error for a keyword argument that is not in `known`, those of the call."""
    right = list(known)
    if name not in PEERS and name in AttentionConfig.__dataclass_fields__:
        told = f"It is an option of the constructor: MultiHeadAttention(..., {name}=...)."
    else:
        told = answer(name, right, PEERS)
    return ArgumentError(f"The call has no argument `{name}`. {told}")

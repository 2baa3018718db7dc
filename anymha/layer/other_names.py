"""The names that arguments of the call have in other libraries, and what to pass here instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from anymha.errors import ArgumentError
from anymha.framework.names import answer
from anymha.layer.arguments import CALL_ARGUMENTS
from anymha.options.config import AttentionConfig

_QUERY = "Pass `query`, the first argument."
_KEY_VALUE = "Pass `value`; `key` is by default the same."
_SCORES = "Pass `return_attention_scores=True`."
_CACHE = (
    "Pass `cache`, from `layer.make_cache(batch_size, max_length)`: the call appends to it, and "
    "gives the new one back, last."
)
_ROTARY = (
    "Make the layer with `rotary`; pass `positions` and `key_positions` if they are no indices."
)
_SEGMENTS = "Pass `segment_ids`, (B, T) integers, the sequence that each position is of."
_TRAINING = "Pass `training`: training=False is {0}=True, training=True is {0}=False."
_SEED = "Pass `seed`, an int or the framework's own key."
_CAUSAL = "Pass `use_causal_mask`."
_VALUE_MASK = "Pass `value_mask`, (B, S), True = keep."
_KEY = "Pass `key`, the third argument."
_VALUE = "Pass `value`, the second argument."
_INVERTED = (
    "Pass `value_mask=~{0}`: torch's mask is True where a key is ignored, `value_mask` is "
    "True where it is kept."
)
_ATTENTION_MASK = (
    "Pass a boolean one as `attention_mask=~{0}`: torch's modules have True where a query may not "
    "attend, `attention_mask` has True where it may. Pass a floating one as `attention_bias`."
)
_BIAS = "Pass `attention_bias`, added to the logits."
_BLOCK_MASK = (
    "Pass booleans as `attention_mask`, True = may attend; or `use_causal_mask`, `segment_ids`, or "
    "the constructor's `sliding_window`."
)
_LSE = "The layer does not return it: `anymha.dot_product_attention(..., return_lse=True)` does."
_INFERRED = "Leave it out: the layer takes it from the shapes."

PEERS: Mapping[str, str] = {
    # torch.nn.MultiheadAttention
    **{
        name: _INVERTED.format(name)
        for name in (
            "key_padding_mask",
            "src_key_padding_mask",
            "tgt_key_padding_mask",
            "memory_key_padding_mask",
        )
    },
    **{name: _ATTENTION_MASK.format(name) for name in ("src_mask", "tgt_mask", "memory_mask")},
    **dict.fromkeys(("src", "tgt"), _QUERY),
    "attn_mask": "Pass a boolean one as `attention_mask=~attn_mask`: torch's MultiheadAttention "
    "has True where a query may not attend, `attention_mask` has True where it may, as torch's "
    "scaled_dot_product_attention. Pass a floating one as `attention_bias`.",
    "need_weights": "Pass `return_attention_scores`: it is False by default, torch's need_weights "
    "is True, and here the scores are per head.",
    "average_attn_weights": "Leave it out: the scores are per head, as with "
    "average_attn_weights=False; take their mean over the heads, axis 1, for True.",
    **dict.fromkeys(("is_causal", "causal", "causal_mask", "src_is_causal"), _CAUSAL),
    "dropout_p": "Make the layer with `dropout`; it acts with `training=True`.",
    "enable_gqa": "Make the layer with `num_key_value_heads`.",
    "block_mask": _BLOCK_MASK,
    "score_mod": "Pass what it adds as `attention_bias`; or make the layer with `softcap`, `alibi` "
    "or `rotary`.",
    # flax.linen and flax.nnx
    "inputs_q": _QUERY,
    "inputs_k": _KEY,
    "inputs_v": "Pass `value`, the second argument: the order is query, value, key.",
    "inputs_kv": _KEY_VALUE,
    "mask": "Pass `attention_mask`, (T, S), (B, T, S) or (B, H, T, S), True = may attend; or "
    "`value_mask`, (B, S), True = keep.",
    "deterministic": _TRAINING.format("deterministic"),
    "decode": _CACHE,
    "dropout_rng": "Pass `seed`, an int or a key; `dropout_rng` is an option of the constructor.",
    "rngs": _SEED,
    "sow_weights": _SCORES,
    # equinox.nn.MultiheadAttention
    "key_": "Pass `key`, the third argument: the order is query, value, key.",
    "inference": _TRAINING.format("inference"),
    "process_heads": "Leave it out: the layer does not call it.",
    # transformers
    "hidden_states": _QUERY,
    "encoder_hidden_states": _KEY_VALUE,
    **dict.fromkeys(("key_value_states", "key_value", "kv", "x_kv"), _KEY_VALUE),
    "encoder_attention_mask": _VALUE_MASK,
    "output_attentions": _SCORES,
    **dict.fromkeys(
        (
            "past_key_value",
            "past_key_values",
            "layer_past",
            "use_cache",
            "return_cache",
            "cache_position",
            "kv_cache",
            "past_kv",
            "cache_seqlens",
            "start_pos",
            "input_pos",
            "inference_params",
        ),
        _CACHE,
    ),
    **dict.fromkeys(
        (
            "position_ids",
            "position_embeddings",
            "freqs_cis",
            "rotary_pos_emb",
            "rope",
            "cos",
            "sin",
            "rotary_cos",
            "rotary_sin",
            "image_rotary_emb",
            "query_positions",
            "pos",
        ),
        _ROTARY,
    ),
    **dict.fromkeys(
        (
            "cu_seqlens",
            "cu_seqlens_q",
            "cu_seqlens_k",
            "cu_seq_lens_q",
            "cu_seq_lens_k",
            "seq_idx",
            "document_ids",
            "query_segment_ids",
            "q_segment_ids",
        ),
        _SEGMENTS,
    ),
    **dict.fromkeys(
        ("kv_segment_ids", "key_value_segment_ids"),
        "Pass `key_segment_ids`, (B, S) integers, the sequence that each key is of.",
    ),
    **dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k", "query_length"), _INFERRED),
    **dict.fromkeys(
        ("head_mask", "layer_head_mask"), "Leave it out: the layer does not mask heads."
    ),
    # x-transformers
    "x": _QUERY,
    "context": _KEY_VALUE,
    "context_mask": _VALUE_MASK,
    **dict.fromkeys(("attn_bias", "position_bias", "rel_pos", "rel_pos_bias"), _BIAS),
    "return_intermediates": _SCORES,
    # Keras, TensorFlow Addons, Haiku
    "inputs": "Pass `query`, or a list [query, value] or [query, value, key] in the first place.",
    **dict.fromkeys(("queries", "q"), _QUERY),
    **dict.fromkeys(("values", "v"), _VALUE),
    **dict.fromkeys(("keys", "k"), _KEY),
    "qkv": "Pass the inputs `query`, `value` and `key`: the layer projects them itself.",
    "padding_mask": "Pass `value_mask`, (B, S), True = keep; invert a mask that is True where a "
    "key is ignored.",
    "return_attn_coef": _SCORES,
    "is_training": "Pass `training`.",
    **dict.fromkeys(
        ("return_scores", "return_weights", "return_attention", "return_attn_probs"), _SCORES
    ),
    **dict.fromkeys(("return_lse", "return_softmax_lse", "return_residual"), _LSE),
    "bias": "Pass `attention_bias`, added to the logits; biases of the projections are the "
    "constructor's `use_bias`.",
    **dict.fromkeys(("window", "window_size"), "Make the layer with `sliding_window`."),
    "softmax_scale": "Make the layer with `scale`.",
    "alibi_slopes": "Make the layer with `alibi`, a slope for each query head.",
}
"""By the name in another library, what to do here, a sentence."""

FUNCTION_PEERS: Mapping[str, str] = {
    # torch.nn.functional.scaled_dot_product_attention
    "attn_mask": "Pass a boolean one as `mask`, True = may attend as there, and a floating one as "
    "`bias`; heads stand after the length here, before it there.",
    **dict.fromkeys(("dropout_p", "p"), "Pass `dropout`."),
    **{
        short: f"Pass `{name}`."
        for short, name in zip("qkv", ("query", "key", "value"), strict=True)
    },
    **dict.fromkeys(("softmax_scale", "sm_scale"), "Pass `scale`."),
    "window_size": "Pass `window`, (left, right), None for an open side.",
    "block_mask": "Pass booleans as `mask`, which broadcasts to (B, H, T, S), True = may attend.",
    "score_mod": "Pass what it adds as `bias`; or `softcap`, or `alibi_slopes`.",
    "attn_bias": "Pass `bias`, which broadcasts to (B, H, T, S).",
    **dict.fromkeys(("return_attn_probs", "return_weights"), "Pass `return_scores`."),
    "return_softmax_lse": "Pass `return_lse`.",
    **dict.fromkeys(("query_segment_ids", "q_segment_ids"), "Pass `segment_ids`."),
    **dict.fromkeys(("kv_segment_ids", "key_value_segment_ids"), "Pass `key_segment_ids`."),
    "enable_gqa": "Leave it out: fewer key heads than query heads are seen in the shapes.",
    # jax.nn.dot_product_attention, flax
    "query_seq_lengths": "Pass `query_mask`, (B, T) booleans, True = keep.",
    "key_value_seq_lengths": "Pass `value_mask`, (B, S) booleans, True = keep.",
    "local_window_size": "Pass `window`, (left, right).",
    "return_residual": "Pass `return_lse`.",
    "implementation": "Leave it out: a fused kernel is taken where one computes the same.",
    "dropout_rate": "Pass `dropout`.",
    "dropout_rng": "Pass `seed`, an int or a key.",
    "broadcast_dropout": "Leave it out: dropout draws for each element.",
    "deterministic": "Leave it out: dropout acts wherever it is not 0; pass `dropout=0.0` for "
    "deterministic=True.",
    # the layer's call
    "attention_mask": "Pass `mask`, which broadcasts to (B, H, T, S).",
    "attention_bias": "Pass `bias`, which broadcasts to (B, H, T, S).",
    "key_mask": "Pass `value_mask`: a key and its value are kept together.",
    "key_padding_mask": _INVERTED.format("key_padding_mask"),
    "use_causal_mask": "Pass `is_causal`.",
    "causal": "Pass `is_causal`.",
    "sliding_window": "Pass `window=(w - 1, w - 1)` for sliding_window=w, which counts the query's "
    "own position.",
    "return_attention_scores": "Pass `return_scores`.",
    "need_weights": "Pass `return_scores`: it is False by default, torch's need_weights is True.",
    "training": "Leave it out: dropout acts wherever it is not 0.",
    "cu_seqlens": _SEGMENTS,
    "alibi": "Pass `alibi_slopes`, (H,), one for each query head.",
    "num_heads": "Leave it out: the heads are the third axis of the arrays.",
}
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

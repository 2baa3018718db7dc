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

PEERS: Mapping[str, str] = {
    # torch.nn.MultiheadAttention
    "key_padding_mask": "Pass `value_mask=~key_padding_mask`: torch's mask is True where a key is "
    "ignored, `value_mask` is True where it is kept.",
    "src_key_padding_mask": "Pass `value_mask=~src_key_padding_mask`: torch's mask is True where a "
    "key is ignored, `value_mask` is True where it is kept.",
    "attn_mask": "Pass a boolean one as `attention_mask=~attn_mask`: torch's MultiheadAttention "
    "has True where a query may not attend, `attention_mask` has True where it may, as torch's "
    "scaled_dot_product_attention. Pass a floating one as `attention_bias`.",
    "need_weights": "Pass `return_attention_scores`: it is False by default, torch's need_weights "
    "is True, and here the scores are per head.",
    "average_attn_weights": "Leave it out: the scores are per head, as with "
    "average_attn_weights=False; take their mean over the heads, axis 1, for True.",
    "is_causal": _CAUSAL,
    # flax.linen and flax.nnx
    "inputs_q": _QUERY,
    "inputs_k": "Pass `key`, the third argument.",
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
    "key_value_states": _KEY_VALUE,
    "encoder_attention_mask": _VALUE_MASK,
    "output_attentions": _SCORES,
    "past_key_value": _CACHE,
    "past_key_values": _CACHE,
    "layer_past": _CACHE,
    "use_cache": _CACHE,
    "cache_position": _CACHE,
    "position_ids": _ROTARY,
    "position_embeddings": _ROTARY,
    "cu_seqlens": _SEGMENTS,
    "cu_seq_lens_q": _SEGMENTS,
    "seq_idx": _SEGMENTS,
    "document_ids": _SEGMENTS,
    "head_mask": "Leave it out: the layer does not mask heads.",
    # x-transformers
    "x": _QUERY,
    "context": _KEY_VALUE,
    "context_mask": _VALUE_MASK,
    "attn_bias": "Pass `attention_bias`, added to the logits.",
    "rotary_pos_emb": _ROTARY,
    "return_intermediates": _SCORES,
    # Keras, TensorFlow Addons, Haiku
    "inputs": "Pass `query`, or a list [query, value] or [query, value, key] in the first place.",
    "queries": _QUERY,
    "values": "Pass `value`, the second argument.",
    "keys": "Pass `key`, the third argument.",
    "padding_mask": "Pass `value_mask`, (B, S), True = keep; invert a mask that is True where a "
    "key is ignored.",
    "return_attn_coef": _SCORES,
    "is_training": "Pass `training`.",
    "causal": _CAUSAL,
    "return_scores": _SCORES,
    "return_weights": _SCORES,
    "return_attention": _SCORES,
    "bias": "Pass `attention_bias`, added to the logits; biases of the projections are the "
    "constructor's `use_bias`.",
    "window": "Make the layer with `sliding_window`.",
}
"""By the name in another library, what to do here, a sentence."""

FUNCTION_PEERS: Mapping[str, str] = {
    # torch.nn.functional.scaled_dot_product_attention
    "attn_mask": "Pass a boolean one as `mask`, True = may attend as there, and a floating one as "
    "`bias`; heads stand after the length here, before it there.",
    "dropout_p": "Pass `dropout`.",
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
    "key_padding_mask": "Pass `value_mask=~key_padding_mask`: torch's mask is True where a key is "
    "ignored, `value_mask` is True where it is kept.",
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

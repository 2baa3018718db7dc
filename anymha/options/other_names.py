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
    "decode": "Leave it out. Pass `cache`, from `layer.make_cache(batch_size, max_length)`, to "
    "the call.",
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
    "attn_logit_softcapping": "Pass `softcap`.",
    "rope_theta": _ROTARY.format("base"),
    "rope_scaling": _ROTARY.format("scaling"),
    "rope_parameters": _ROTARY.format("base=..., scaling"),
    "rotary_dim": _ROTARY.format("dim"),
    "partial_rotary_factor": _ROTARY.format("dim"),
    "max_position_embeddings": _ROTARY.format("max_position_embeddings"),
    "is_decoder": "Leave it out, and pass `use_causal_mask=True` to the call.",
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
    "flash": _FUSED,
    # Keras and TensorFlow Addons
    "flash_attention": _FUSED,
    "use_gate": "Pass `gate='elementwise'`.",
    "num_query_heads": _HEADS,
    "head_size": _KEY_DIM,
    "use_projection_bias": _BIASES,
    "trainable": "Only Keras's layer has it.",
    "autocast": "Only Keras's layer has it.",
    # everywhere
    "causal": "Leave it out, and pass `use_causal_mask=True` to the call.",
    "is_causal": "Leave it out, and pass `use_causal_mask=True` to the call.",
    "window_size": "Pass `sliding_window`, the keys to a side that a query sees, its own counted.",
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
        f"Pass `{name}` to the layer's call." if name in of_call else answer(name, right, PEERS)
        for name in names
    ]
    plural = "s" if len(names) > 1 else ""
    return UnknownOptionError(
        f"MultiHeadAttention has no option{plural} {backticked(names)}. "
        f"{' '.join(dict.fromkeys(told))}"
    )

"""PyTorch's attention layer in NumPy, from its own weights: a port in the making."""

import numpy as np


def attention(state, num_heads, query, key, value, padding=None, causal=False):
    """What `torch.nn.MultiheadAttention` computes, every step by name.

    Args:
        state: The layer's `state_dict`, as arrays.
        num_heads: The number of heads.
        query: (B, T, D).
        key: (B, S, D).
        value: (B, S, D).
        padding: As `key_padding_mask`, (B, S): True = padding, which nobody sees.
        causal: Whether query i sees only keys up to i.
    """
    features = query.shape[-1]
    kernels = split(state["in_proj_weight"], num_heads)
    biases = split(state["in_proj_bias"], num_heads)
    projected = [
        (x @ kernel.T + bias).reshape(*x.shape[:2], num_heads, features // num_heads)
        for x, kernel, bias in zip((query, key, value), kernels, biases, strict=True)
    ]
    q, k, v = projected
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.float32(np.sqrt(features // num_heads))
    masked = logits
    if causal:
        masked = np.where(np.tri(*logits.shape[2:], dtype=bool), masked, -np.inf)
    if padding is not None:
        masked = np.where(padding[:, None, None, :], masked, -np.inf)
    weights = np.exp(masked - masked.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    context = np.einsum("bhts,bshd->bthd", probabilities, v)
    output = context.reshape(query.shape) @ state["out_proj.weight"].T + state["out_proj.bias"]
    return {
        "query": q,
        "key": k,
        "value": v,
        "logits": logits,
        "masked_logits": masked,
        "probabilities": probabilities,
        "context": context,
        "output": output,
    }


def split(packed, num_heads):
    """The part of the query, of the key and of the value, of a weight that holds all three."""
    parts = packed.reshape(num_heads, 3, -1, *packed.shape[1:]).swapaxes(0, 1)
    return [part.reshape(-1, *packed.shape[1:]) for part in parts]

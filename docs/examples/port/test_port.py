"""The port against the layer that it ports."""

import anymha
import numpy as np
import pytest

import port

HEADS, FEATURES = 4, 16
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype("float32")


STATE = {
    "in_proj_weight": normal(3 * FEATURES, FEATURES) / 4,
    "in_proj_bias": normal(3 * FEATURES) / 4,
    "out_proj.weight": normal(FEATURES, FEATURES) / 4,
    "out_proj.bias": normal(FEATURES) / 4,
}
TEXT, OTHER = normal(2, 6, FEATURES), normal(2, 9, FEATURES)
TOKENS = np.arange(9) < [[7], [5]]  # of the nine places of `OTHER`, the rest is padding


def ours():
    """The layer of anymha, in NumPy, with PyTorch's weights."""
    weights, config = anymha.to_canonical(STATE, layout="torch.MultiheadAttention", num_heads=HEADS)
    return anymha.set_weights(
        anymha.MultiHeadAttention(backend="numpy", **config.to_dict()), weights
    )


def theirs():
    """The layer that is ported."""
    import torch

    layer = torch.nn.MultiheadAttention(FEATURES, HEADS, batch_first=True).eval()
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in STATE.items()})
    return layer


needs_torch = pytest.mark.parity(needs="torch")
references = pytest.mark.parametrize(
    "reference", [ours, pytest.param(theirs, marks=needs_torch)], ids=["anymha", "torch"]
)


def ported(query, value=None, key=None, value_mask=None, use_causal_mask=False):
    """The port, called as anymha calls a layer: in a mask, True = may attend."""
    value = query if value is None else value
    key = value if key is None else key
    padding = None if value_mask is None else ~value_mask
    return port.attention(STATE, HEADS, query, key, value, padding, use_causal_mask)


@references
def test_self_attention(parity, reference):
    parity.check(reference(), ported, TEXT)


@references
def test_causal_attention(parity, reference):
    parity.check(reference(), ported, TEXT, use_causal_mask=True)


@references
def test_padded_cross_attention(parity, reference):
    parity.check(reference(), ported, [TEXT, OTHER], value_mask=TOKENS)

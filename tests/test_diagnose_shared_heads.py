"""Gradients of keys and values that several heads share: what a backward pass makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare, declare
from tests.frameworks import required

HEADS, SHARED, WIDTH = 6, 3, 8
GROUP, FEATURES = HEADS // SHARED, HEADS * WIDTH
X = np.random.default_rng(5).standard_normal((2, 5, FEATURES)).astype(np.float32)
LAYER = anymha.MultiHeadAttention(
    HEADS, WIDTH, query_features=FEATURES, num_key_value_heads=SHARED, use_bias=False,
    backend="numpy", seed=2,
)  # fmt: skip
Change = Callable[[Any], Any]


def port_of(changes: dict[str, Change]) -> Any:
    """The layer as a module of torch; gradients of each query head's own copy are changed."""
    torch = required("torch")

    class Port(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.o_proj = (
                torch.nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(2)
            )
            self.k_proj, self.v_proj = (
                torch.nn.Linear(FEATURES, SHARED * WIDTH, bias=False) for _ in range(2)
            )

        def forward(self, x: Any) -> Any:
            q, k, v = (p(x).view(*x.shape[:2], -1, WIDTH).transpose(1, 2)
                       for p in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
            k, v = (a.repeat_interleave(GROUP, 1) for a in (k, v))
            for name, array in {"query": q, "key": k, "value": v}.items():
                if name in changes and array.requires_grad:
                    array.register_hook(changes[name])
            y = torch.softmax(q @ k.mT / WIDTH**0.5, -1) @ v
            return self.o_proj(y.transpose(1, 2).reshape(x.shape))

    port = Port()
    state = anymha.from_canonical(anymha.get_weights(LAYER), layout="transformers.llama")
    port.load_state_dict({n: torch.tensor(np.array(a)) for n, a in state.items()})
    return declare(port, layout="transformers.llama", num_heads=HEADS, num_key_value_heads=SHARED)


def of_first(gradient: Any) -> Any:
    gradient = gradient.clone()
    gradient[:, 1::GROUP] = 0.0
    return gradient


def of_last(gradient: Any) -> Any:
    gradient = gradient.clone()
    gradient[:, ::GROUP] = 0.0
    return gradient


def tiled(gradient: Any) -> Any:
    """Heads in an order in which the sums of groups are those of every third head."""
    return gradient[:, [0, 3, 1, 4, 2, 5]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": lambda g: g / GROUP, "value": lambda g: g / GROUP},
         "those of the key and value are multiplied by 0.5, the mean of the 2 heads that share "
         "one, not their sum"),
        ({"value": lambda g: g / GROUP},
         "that of the value is multiplied by 0.5, the mean of the 2 heads that share one"),
        ({"query": lambda g: 0.4 * g, "key": lambda g: 3 * g},
         "that of the query is multiplied by 0.4, that of the key is multiplied by 3"),
        ({"key": of_first, "value": of_first},
         "those of the key and value: that of the first of the heads that share one alone"),
        ({"value": of_last}, "that of the value: that of the last of the heads that share one"),
        ({"key": tiled}, "that of the key: the sum over heads of other groups"),
    ],
)  # fmt: skip
def test_gradients_of_shared_heads_are_named(changes, words) -> None:
    report = compare(LAYER, port_of(changes), X)
    assert str(report.first_divergence).startswith("gradient of ")
    assert words in str(report.diagnosis)


def test_a_backward_pass_that_adds_them_up_agrees() -> None:
    assert compare(LAYER, port_of({}), X).passed

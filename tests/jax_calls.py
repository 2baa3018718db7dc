"""Calls by which the layers of Flax and Equinox are held against the layer of JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

MASKS = {"attention_mask": np.tri(5, dtype=bool), "value_mask": np.arange(10).reshape(2, 5) > 2}
CALLS: dict[str, dict[str, Any]] = {
    "self": {},
    "causal": {"use_causal_mask": True, "query_offset": 1},
    "scores": {"return_attention_scores": True},
    "masks": MASKS,
    "dropout": {"training": True, "seed": 7},
    "all": {**MASKS, "use_causal_mask": True, "query_offset": 1, "return_attention_scores": True,
            "training": True, "seed": 7},
}  # fmt: skip


def in_each_mode(modes: Mapping[str, Mapping[str, Any]]) -> Any:
    """The options of a mode and a call: each call in float32, all at once in the other modes."""
    alone = [pytest.param({}, call, id=f"float32-{name}") for name, call in CALLS.items()]
    together = [
        pytest.param(mode, CALLS["all"], id=f"{name}-all") for name, mode in modes.items() if mode
    ]
    return pytest.mark.parametrize(("mode", "call"), alone + together)

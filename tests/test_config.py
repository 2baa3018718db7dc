"""The options: their defaults, their one form, the shapes that they give, and the way to JSON."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import Backend
from anymha.options.config import AttentionConfig


def test_defaults() -> None:
    config = AttentionConfig(4, 8)
    assert config.value_dim == 8
    assert config.num_key_value_heads == config.key_value_heads == 4
    assert config.dropout == 0.0
    assert config.use_bias is True
    assert config.biased == ("query", "key", "value", "output")
    assert config.dropout_rng == "portable"
    assert config.dtype == "float32"
    assert config.compute_dtype is None
    assert config.scale_value == 1 / math.sqrt(8)
    assert AttentionConfig(4, 8, scale=0.3).scale_value == 0.3


def test_shapes_in_the_canonical_order() -> None:
    config = AttentionConfig(
        4, 3, value_dim=5, num_key_value_heads=2, output_shape=(6, 7), query_features=8,
        value_features=9, key_features=10,
    )  # fmt: skip
    assert list(config.weight_shapes().items()) == [
        ("query.kernel", (8, 4, 3)),
        ("query.bias", (4, 3)),
        ("key.kernel", (10, 2, 3)),
        ("key.bias", (2, 3)),
        ("value.kernel", (9, 2, 5)),
        ("value.bias", (2, 5)),
        ("output.kernel", (4, 5, 6, 7)),
        ("output.bias", (6, 7)),
    ]


@pytest.mark.parametrize(
    ("given", "widths"),
    [
        ((8,), {"query": 8, "value": 8, "key": 8}),
        ((8, 9), {"query": 8, "value": 9, "key": 9}),
        ((8, 9, 10), {"query": 8, "value": 9, "key": 10}),
        ((8, None, 10), {"query": 8, "value": 8, "key": 10}),
    ],
    ids=str,
)
def test_widths_default_to_those_before(given: tuple[Any, ...], widths: dict[str, int]) -> None:
    shapes = AttentionConfig(2, 3).weight_shapes(*given)
    assert {name: shapes[f"{name}.kernel"][0] for name in widths} == widths
    assert shapes["output.kernel"] == (2, 3, 8)
    names = ("query_features", "value_features", "key_features")
    options = dict(zip(names, given, strict=False))
    assert AttentionConfig(2, 3, **options).weight_shapes() == shapes


@pytest.mark.parametrize(
    ("option", "given", "held"),
    [
        ("output_shape", 5, (5,)),
        ("output_shape", [5, 6], (5, 6)),
        ("output_shape", (), ()),
        ("attention_axes", 1, (1,)),
        ("attention_axes", [-2, 0], (-2, 0)),
        ("use_bias", ("output", "query"), ("query", "output")),
        ("use_bias", ["query", "key", "value", "output"], True),
        ("use_bias", (), False),
        ("num_heads", np.int64(4), 4),
        ("dropout", np.float64(0.25), 0.25),
        ("dropout", 0, 0.0),
        ("scale", np.float64(0.5), 0.5),
        ("seed", np.int32(-3), -3),
        ("dtype", np.float64, "float64"),
        ("dtype", np.dtype("float16"), "float16"),
        ("compute_dtype", "bfloat16", "bfloat16"),
    ],
    ids=str,
)
def test_option_is_held_in_one_form(option: str, given: Any, held: Any) -> None:
    config = AttentionConfig(**{"num_heads": 4, "key_dim": 8, option: given})
    value = getattr(config, option)
    assert value == held
    assert type(value) is type(held)
    assert config == AttentionConfig(**{"num_heads": 4, "key_dim": 8, option: held})


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_may_be_any_frameworks_own(backend: Backend, name: str) -> None:
    own = backend.ops.dtype(name)
    assert AttentionConfig(4, 8, dtype=own, compute_dtype=own) == AttentionConfig(
        4, 8, dtype=name, compute_dtype=name
    )
    layer = backend.layer(2, 3, query_features=4, dtype=own)
    assert {array.dtype.name for array in anymha.get_weights(layer).values()} == {name}


def test_scalar_types_of_jax_are_dtypes() -> None:
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    numpy_of_jax = importlib.import_module("jax.numpy")
    assert AttentionConfig(4, 8, dtype=numpy_of_jax.bfloat16).dtype == "bfloat16"


CONFIGS: list[dict[str, Any]] = [
    {},
    {"output_shape": (3, 4), "attention_axes": (-2, 1), "use_bias": ("query", "value")},
    {"output_shape": (), "dropout": 0.1, "scale": 0.7, "dropout_rng": "native", "seed": 2**70},
    {"dtype": "bfloat16", "compute_dtype": "float32", "name": "attention", "sliding_window": 3},
    {"query_features": 5, "value_features": 6, "key_features": 7, "num_key_value_heads": 2},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_config_goes_to_json_and_back(options: dict[str, Any]) -> None:
    config = AttentionConfig(4, 8, **options)
    back = AttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)


def test_config_is_frozen() -> None:
    config: Any = AttentionConfig(4, 8)
    with pytest.raises(AttributeError):
        config.num_heads = 5


def test_layer_holds_its_config_and_takes_it_back(backend: Backend) -> None:
    layer = backend.layer(4, 8, value_dim=3, query_features=5, use_bias=("query",), seed=1)
    assert layer.config == AttentionConfig(
        4, 8, value_dim=3, query_features=5, use_bias=("query",), seed=1
    )
    again = anymha.get_weights(backend.layer(**layer.config.to_dict()))
    for name, array in anymha.get_weights(layer).items():
        assert array.tobytes() == again[name].tobytes()
        assert array.shape == layer.config.weight_shapes()[name]

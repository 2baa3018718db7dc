"""Live layers of other libraries, with random weights, and how each is called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anymha.framework.registry import backend_of
from tests.frameworks import skip_or_fail

LIBRARIES = {
    "torch": "torch.MultiheadAttention",
    "keras": "keras.MultiHeadAttention",
    "nnx": "flax.nnx.MultiHeadAttention",
    "linen": "flax.linen.MultiHeadDotProductAttention",
    "equinox": "equinox.MultiheadAttention",
    "haiku": "haiku.MultiHeadAttention",
}
MODULES = {"nnx": "flax", "linen": "flax"}


@dataclass(frozen=True)
class Peer:
    """A library's layer.

    Args:
        layer: The live layer, or its parameters.
        call: Its output for a query and a value (B, T, D) in NumPy.
        sizes: What must be told beside it.
    """

    layer: Any
    call: Callable[[np.ndarray, np.ndarray], np.ndarray]
    sizes: dict[str, int]


EXAMPLE = Path(__file__).parents[1] / "docs/examples/layouts"


@contextmanager
def family_examples() -> Iterator[Any]:
    """The example's module of families of transformers; skips the test where they are missing."""
    for name in ("torch", "transformers"):
        need(name)
    spec = importlib.util.spec_from_file_location("families", EXAMPLE / "families.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["families"]


def need(name: str) -> Any:
    """A library's module; skips the test where it cannot be imported."""
    if importlib.util.find_spec(name) is None:
        skip_or_fail(name, f"{name} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, while they are imported
        return importlib.import_module(name)


def peer(name: str, heads: int = 2, width: int = 8, memory: int = 8, bias: bool = True) -> Peer:
    """A layer of a library: inputs of widths `width` and `memory`, heads of width / heads."""
    return {
        "torch": _torch, "keras": _keras, "nnx": _nnx, "linen": _linen, "equinox": _equinox,
        "haiku": _haiku,
    }[name](heads, width, memory, bias)  # fmt: skip


def _random(shape: Any) -> np.ndarray:
    return np.random.default_rng(abs(hash(tuple(shape)))).standard_normal(shape).astype(np.float32)


def _torch(heads: int, width: int, memory: int, bias: bool) -> Peer:
    torch = need("torch")
    layer = torch.nn.MultiheadAttention(
        width, heads, bias=bias, kdim=memory, vdim=memory, batch_first=True, dropout=0.25
    ).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.from_numpy(_random(parameter.shape)))

    def call(query: np.ndarray, value: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(value)
        return layer(torch.from_numpy(query), v, v, need_weights=False)[0].detach().numpy()

    return Peer(layer, call, {})


def _keras(heads: int, width: int, memory: int, bias: bool) -> Peer:
    keras = need("keras")
    layer = keras.layers.MultiHeadAttention(heads, width // heads, use_bias=bias, dropout=0.25)
    layer.build((None, None, width), (None, None, memory), (None, None, memory))
    for variable in layer.weights:
        variable.assign(_random(variable.shape))

    def call(query: np.ndarray, value: np.ndarray) -> np.ndarray:
        found = layer(query, value)  # Keras's own way to NumPy warns on torch
        return np.asarray(backend_of(found).ops.to_numpy(found))

    return Peer(layer, call, {})


def _nnx(heads: int, width: int, memory: int, bias: bool) -> Peer:
    need("flax")
    nnx = importlib.import_module("flax.nnx")
    layer = nnx.MultiHeadAttention(
        heads, width, width, width, in_kv_features=memory, use_bias=bias, decode=False,
        dropout_rate=0.25, deterministic=True, rngs=nnx.Rngs(0),
    )  # fmt: skip
    for part in ("query", "key", "value", "out"):
        for name in ("kernel", "bias"):
            param = getattr(getattr(layer, part), name)
            if param is not None:
                param[...] = _random(param.shape)
    return Peer(layer, lambda q, v: np.asarray(layer(q, v)), {})


def _linen(heads: int, width: int, memory: int, bias: bool) -> Peer:
    need("flax")
    jax, linen = importlib.import_module("jax"), importlib.import_module("flax.linen")
    module = linen.MultiHeadDotProductAttention(
        num_heads=heads, use_bias=bias, deterministic=True, out_features=width, qkv_features=width
    )
    start = module.init(jax.random.key(0), np.ones((1, 2, width)), np.ones((1, 3, memory)))
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(_random(leaf.shape)), start)
    return Peer(params, lambda q, v: np.asarray(module.apply(params, q, v)), {})


def _equinox(heads: int, width: int, memory: int, bias: bool) -> Peer:
    equinox = need("equinox")
    jax = importlib.import_module("jax")
    names = [f"use_{name}_bias" for name in ("query", "key", "value", "output")]
    layer = equinox.nn.MultiheadAttention(
        heads, width, memory, memory, **dict.fromkeys(names, bias), dropout_p=0.25, inference=True,
        key=jax.random.key(0),
    )  # fmt: skip
    return Peer(
        layer, lambda q, v: np.stack([layer(*one) for one in zip(q, v, v, strict=True)]), {}
    )


def _haiku(heads: int, width: int, memory: int, bias: bool) -> Peer:
    haiku = need("haiku")
    jax = importlib.import_module("jax")

    def forward(q: Any, v: Any) -> Any:
        module = haiku.MultiHeadAttention(
            heads, width // heads, model_size=width, with_bias=bias,
            w_init=haiku.initializers.RandomNormal(), b_init=haiku.initializers.RandomNormal(),
        )  # fmt: skip
        return module(q, v, v)

    transformed = haiku.transform(forward)
    params = transformed.init(
        jax.random.key(0), np.ones((1, 2, width), "f"), np.ones((1, 3, memory), "f")
    )
    return Peer(
        params,
        lambda q, v: np.asarray(transformed.apply(params, None, q, v)),
        {"num_heads": heads},
    )

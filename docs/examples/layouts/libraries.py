"""A small layer of each library, its output, and ours from its converted weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

import anymha
from anymha.interchange.layouts import from_canonical

H, K, D, T = 4, 2, 32, 6  # heads, key heads, width, length
HEAD = D // H

Pair = tuple[Any, np.ndarray, np.ndarray]


def random_inputs(dtype: Any = np.float32) -> np.ndarray:
    """Inputs (2, T, D)."""
    return np.random.default_rng(0).standard_normal((2, T, D)).astype(dtype)


def random_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Other weights of the same shapes, and biases that are not zero."""
    rng = np.random.default_rng(1)
    return {
        name: (0.3 * rng.standard_normal(array.shape)).astype(array.dtype)
        for name, array in weights.items()
    }


def compared(layer: Any, call: Callable[[Any, np.ndarray], Any], **sizes: Any) -> Pair:
    """The layer with random weights: its output, and that of the converted layer."""
    layer = anymha.set_weights(layer, random_weights(anymha.get_weights(layer, **sizes)), **sizes)
    converted = anymha.convert(layer, to="numpy", **sizes)
    x = random_inputs(converted.config.dtype)
    return layer, np.asarray(call(layer, x)), converted(x)


def torch_packed(memory: int = D) -> Pair:
    """PyTorch's layer in float64; with another width of keys and values it has three kernels."""
    torch = importlib.import_module("torch")
    layer = torch.nn.MultiheadAttention(
        D, H, kdim=memory, vdim=memory, batch_first=True, dtype=torch.float64
    )

    def call(layer: Any, x: np.ndarray) -> Any:
        q, v = torch.from_numpy(x), torch.from_numpy(x[..., :memory].copy())
        return layer(q, v, v)[0].detach()

    if memory == D:
        return compared(layer, call)
    anymha.set_weights(layer, random_weights(anymha.get_weights(layer)))
    x = random_inputs(np.float64)
    return layer, call(layer, x).numpy(), anymha.convert(layer, to="numpy")(x, x[..., :memory])


def keras(grouped: bool = False) -> Pair:
    """Keras's layers, in float32: Keras rounds the scale to it anyway."""
    keras = importlib.import_module("keras")
    if grouped:
        layer = keras.layers.GroupQueryAttention(HEAD, H, K)
    else:
        layer = keras.layers.MultiHeadAttention(H, HEAD)
    layer.build((None, None, D), (None, None, D))
    return compared(layer, lambda layer, x: keras.ops.convert_to_numpy(layer(x, x)))


def nnx(**options: Any) -> Pair:
    """Flax's nnx."""
    nnx = importlib.import_module("flax.nnx")
    layer = nnx.MultiHeadAttention(H, D, decode=False, rngs=nnx.Rngs(0), **options)
    return compared(layer, lambda layer, x: layer(x))


def linen() -> Pair:
    """Flax's linen."""
    linen, jax = importlib.import_module("flax.linen"), importlib.import_module("jax")
    module = linen.MultiHeadDotProductAttention(num_heads=H)
    params = module.init(jax.random.key(0), random_inputs())
    return compared(params, lambda params, x: module.apply(params, x))


def equinox() -> Pair:
    """Equinox."""
    equinox, jax = importlib.import_module("equinox"), importlib.import_module("jax")
    biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
    layer = equinox.nn.MultiheadAttention(H, D, **biases, key=jax.random.key(0))
    return compared(layer, lambda layer, x: np.stack([layer(row, row, row) for row in x]))


def haiku() -> Pair:
    """Haiku."""
    hk, jax = importlib.import_module("haiku"), importlib.import_module("jax")

    def apply(x: Any) -> Any:
        return hk.MultiHeadAttention(H, HEAD, w_init=hk.initializers.RandomNormal())(x, x, x)

    function = hk.without_apply_rng(hk.transform(apply))
    params = function.init(jax.random.key(0), random_inputs())
    return compared(params, function.apply, num_heads=H)


def x_transformers(kv_heads: int = H) -> Pair:
    """x-transformers, all heads alike or grouped."""
    torch = importlib.import_module("torch")
    module = importlib.import_module("x_transformers.x_transformers")
    layer = module.Attention(D, heads=H, kv_heads=kv_heads, dim_head=HEAD).double().eval()
    return compared(layer, lambda layer, x: layer(torch.from_numpy(x)).detach())


def timm() -> Pair:
    """A block's attention of timm's vision transformer."""
    torch = importlib.import_module("torch")
    module = importlib.import_module("timm.layers.attention")
    layer = module.Attention(D, num_heads=H, qkv_bias=True).double().eval()
    return compared(layer, lambda layer, x: layer(torch.from_numpy(x)).detach())


def onnxruntime() -> Pair:
    """ONNX Runtime's operator between the products that hold the kernels."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    ours = anymha.MultiHeadAttention(H, HEAD, query_features=D, backend="numpy", seed=0)
    weights = random_weights(anymha.get_weights(ours))
    arrays = from_canonical(weights, "onnxruntime.MultiHeadAttention", config=ours.config)
    make = onnx.helper.make_node
    nodes = [
        *(make("MatMul", ["x", f"{n}_weight"], [n]) for n in ("query", "key", "value")),
        make(
            "MultiHeadAttention", ["query", "key", "value", "bias"], ["context"],
            domain="com.microsoft", num_heads=H,
        ),
        make("MatMul", ["context", "output_weight"], ["product"]),
        make("Add", ["product", "output_bias"], ["y"]),
    ]  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "attention",
        [info("x", onnx.TensorProto.FLOAT, [2, T, D])],
        [info("y", onnx.TensorProto.FLOAT, [2, T, D])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString())
    x = random_inputs()
    converted = anymha.set_weights(ours, weights)
    return session, session.run(None, {"x": x})[0], converted(x)


LIBRARIES: dict[str, tuple[str, str, Callable[[], Pair]]] = {
    "keras.MultiHeadAttention": ("keras.MultiHeadAttention", "keras", keras),
    "keras.GroupQueryAttention": (
        "keras.GroupQueryAttention", "keras", lambda: keras(grouped=True),
    ),
    "torch, one kernel": ("torch.MultiheadAttention", "torch", torch_packed),
    "torch, three kernels": (
        "torch.MultiheadAttention", "torch", lambda: torch_packed(memory=20),
    ),
    "nnx": ("flax.nnx.MultiHeadAttention", "flax", nnx),
    "nnx, grouped": ("flax.nnx.MultiHeadAttention", "flax", lambda: nnx(num_kv_heads=K)),
    "nnx, with norms": ("flax.nnx.MultiHeadAttention", "flax", lambda: nnx(normalize_qk=True)),
    "linen": ("flax.linen.MultiHeadDotProductAttention", "flax", linen),
    "equinox": ("equinox.MultiheadAttention", "equinox", equinox),
    "haiku": ("haiku.MultiHeadAttention", "haiku", haiku),
    "x-transformers": ("x_transformers.Attention", "x_transformers", x_transformers),
    "x-transformers, grouped": (
        "x_transformers.Attention", "x_transformers", lambda: x_transformers(K),
    ),
    "timm": ("timm.vit", "timm", timm),
    "onnxruntime": ("onnxruntime.MultiHeadAttention", "onnxruntime", onnxruntime),
}  # fmt: skip
"""For each case its layout, the library that it needs, and what computes both outputs."""

"""PyTorch: our layer, torch's own, one of linear layers and the fused kernel, and Keras's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.framework.registry import get_layer
from benchmarks.cases import Arrays, Problem
from benchmarks.entries import (
    EXACT,
    NATIVE,
    OURS,
    Entry,
    Machine,
    Ready,
    absent,
    from_linear,
    installed,
    modern,
    our_call,
    pack,
    to_linear,
    unpack,
)
from benchmarks.frameworks import keras

LIBRARIES = {"keras": "keras"}


def machine(device: str) -> Machine:
    """What torch says about where it runs."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device == "cpu":
        return Machine(facts, absent=absent(LIBRARIES))
    facts["device"] = torch.cuda.get_device_name()

    def peak_memory(call: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    return Machine(facts, peak_memory, absent(LIBRARIES))


@dataclass(frozen=True)
class _Layer:
    """A layer that torch can differentiate.

    Args:
        run: Gives the output, or output and scores, from the input and whether dropout acts.
        parameters: What it is differentiated by, beside the input.
        canonical: Turns their gradients into those of the canonical weights.
    """

    run: Callable[[Any, bool], Any]
    parameters: Sequence[Any]
    canonical: Callable[[Sequence[np.ndarray]], Arrays]


def entries(problem: Problem, device: str) -> list[Entry]:
    """The layers of a case."""
    case = problem.case

    def entry(layer: str, make: Callable[..., _Layer], option: str = "", **options: Any) -> Entry:
        return Entry(
            layer, "", option, lambda: _ready(problem, device, make(problem, device, **options))
        )

    found = [entry(OURS, _ours)]
    if case.dropout:
        found.append(entry(OURS, _ours, NATIVE, dropout_rng="native"))
    if case.exact:
        found.append(entry(OURS, _ours, EXACT, compute_dtype="float64"))
    if case.peers:
        by_hand = "softmax" if case.scores or case.modern else "SDPA"
        if not case.modern:
            found.append(entry("torch.nn.MultiheadAttention", _module))
        found.append(entry(f"Linear + {by_hand}", _by_hand))
        if installed("keras") and not case.modern:
            found.append(entry("keras", _keras))
    return found


def _ready(problem: Problem, device: str, layer: _Layer) -> Ready:
    import torch

    case = problem.case
    x = _tensor(problem.x, device, case.dtype).requires_grad_(case.training)
    cotangent = _tensor(problem.cotangent, device, case.dtype)

    def forward() -> Any:
        with torch.no_grad():
            result = layer.run(x, False)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    def train(dropping: bool = bool(case.dropout)) -> Any:
        output = layer.run(x, dropping)
        gradients = torch.autograd.grad(output, [x, *layer.parameters], cotangent)
        if device == "cuda":
            torch.cuda.synchronize()
        return output.detach(), gradients

    def values(result: Any) -> Arrays:
        if case.training:
            output, (d_x, *rest) = result
            gradients = layer.canonical([_array(one) for one in rest])
            return {"output": _array(output), "x": _array(d_x), **gradients}
        if case.scores:
            return {"output": _array(result[0]), "scores": _array(result[1])}
        return {"output": _array(result)}

    if case.training:
        return Ready(train, values, lambda: train(False))
    return Ready(forward, values, forward)


def _tensor(array: np.ndarray, device: str, dtype: str | None = None) -> Any:
    import torch

    found = torch.from_numpy(array).to(device)
    return found if dtype is None else found.to(getattr(torch, dtype))


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _fill(module: Any, arrays: Mapping[str, np.ndarray], problem: Problem, device: str) -> Any:
    """The module with these parameters, on the device and in the case's dtype."""
    import torch

    state = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    module.load_state_dict(state)
    return module.to(device, getattr(torch, problem.case.dtype))


def _ours(problem: Problem, device: str, **options: Any) -> _Layer:
    layer = get_layer("torch")(**problem.layer_options, **options, device=device)
    layer.with_canonical_weights(problem.weights)
    shapes = {name: tuple(weight.shape) for name, weight in layer.canonical_weights().items()}
    call = our_call(problem, lambda array: _tensor(array, device))

    def run(x: Any, training: bool) -> Any:
        return layer(x, **call, training=training, seed=7 if training else None)

    def parameter(name: str) -> Any:
        projection, _, part = name.partition(".")
        linear = layer.get_submodule(projection)
        return linear.weight if part == "kernel" else linear.bias

    def canonical(arrays: Sequence[np.ndarray]) -> Arrays:
        named = zip(shapes, arrays, strict=True)
        turned = {n: a.T if n.endswith("kernel") else a for n, a in named}
        return {name: array.reshape(shapes[name]) for name, array in turned.items()}

    parameters = [parameter(name) for name in shapes] if problem.case.training else []
    return _Layer(run, parameters, canonical)


def _module(problem: Problem, device: str) -> _Layer:
    """`torch.nn.MultiheadAttention`, whose masks are True where nobody looks."""
    import torch

    case = problem.case
    layer = torch.nn.MultiheadAttention(
        case.features, case.heads, dropout=case.dropout, batch_first=True
    )
    own = {
        "packed.kernel": "in_proj_weight", "packed.bias": "in_proj_bias",
        "output.kernel": "out_proj.weight", "output.bias": "out_proj.bias",
    }  # fmt: skip
    packed = pack(to_linear(problem.weights))
    layer = _fill(layer, {own[name]: a for name, a in packed.items()}, problem, device)
    call: dict[str, Any] = {"need_weights": case.scores, "average_attn_weights": False}
    if case.mask == "causal":
        hidden = torch.ones(case.length, case.length, dtype=torch.bool).triu(1)
        call |= {"attn_mask": hidden.to(device), "is_causal": True}
    if problem.attention_mask is not None:
        hidden = np.repeat(~problem.attention_mask, case.heads, axis=0)
        call["attn_mask"] = _tensor(hidden, device)
    if problem.padding is not None:
        call["key_padding_mask"] = _tensor(~problem.padding, device)

    def run(x: Any, training: bool) -> Any:
        if layer.training != training:
            layer.train(training)
        output, scores = layer(x, x, x, **call)
        return (output, scores) if case.scores else output

    return _packed(run, layer, own, problem)


def _by_hand(problem: Problem, device: str) -> _Layer:
    """Two linear layers around the fused kernel, or around a softmax where scores are asked for."""
    import torch
    from torch.nn import functional

    case = problem.case
    b, t, h, d = case.batch, case.length, case.heads, case.key_dim
    into, out = torch.nn.Linear(h * d, 3 * h * d), torch.nn.Linear(h * d, h * d)
    layers = torch.nn.ModuleDict({"packed": into, "output": out})
    packed = pack(to_linear(problem.weights))
    own = {name: name.replace("kernel", "weight") for name in packed}
    _fill(layers, {own[name]: array for name, array in packed.items()}, problem, device)
    mask = None
    if case.mask != "causal" or case.scores or case.modern:
        seen = problem.allowed(np.arange(t))
        mask = None if seen is None else _tensor(seen, device)[:, None]

    today = modern(
        problem,
        lambda array: _tensor(array, device),
        lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        lambda parts: torch.cat([*parts], -1),
    )

    def run(x: Any, training: bool) -> Any:
        q, k, v = into(x).view(b, t, 3, h, d).permute(2, 0, 3, 1, 4)
        if today is not None and mask is not None:
            q, k = today.heads(q, k)
            logits = ((q / math.sqrt(d)) @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
            logits = torch.cat([logits, today.sinks.expand(b, h, t, 1)], -1)
            context = torch.softmax(logits, -1)[..., :-1] @ v
            return out(context.transpose(1, 2).reshape(b, t, h * d))
        if case.scores:
            logits = (q / math.sqrt(d)) @ k.transpose(-1, -2)
            if mask is not None:
                logits = logits.masked_fill(~mask, -torch.inf)
            scores = torch.softmax(logits, -1)
            return out((scores @ v).transpose(1, 2).reshape(b, t, h * d)), scores
        context = functional.scaled_dot_product_attention(
            q, k, v, mask, case.dropout if training else 0.0, is_causal=case.mask == "causal"
        )
        return out(context.transpose(1, 2).reshape(b, t, h * d))

    return _packed(run, layers, own, problem)


def _packed(run: Any, module: Any, own: Mapping[str, str], problem: Problem) -> _Layer:
    """A layer whose projections of query, key and value are one, by the names in `own`."""
    parameters = dict(module.named_parameters())
    return _Layer(
        run,
        [parameters[name] for name in own.values()],
        lambda arrays: from_linear(unpack(dict(zip(own, arrays, strict=True))), problem.weights),
    )


def _keras(problem: Problem, device: str) -> _Layer:
    layer = keras.make_layer(problem)
    calls = {
        training: keras.call_options(problem, lambda a: _tensor(a, device), training)
        for training in (False, True)
    }
    return _Layer(
        lambda x, training: layer(x, x, **calls[training]),
        [variable.value for variable in layer.trainable_weights],
        lambda arrays: keras.gradients(layer, arrays),
    )

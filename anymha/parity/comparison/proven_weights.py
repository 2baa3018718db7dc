"""The weights of a module that nobody has named, read by the names of its layers.

Names alone prove nothing: weights are read as each layout that fits, with each number of heads, and
are proven where attention of them is what the module gives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from anymha.attention.features.rotary import LAYOUTS, Rotary
from anymha.errors import AnymhaError
from anymha.interchange.detect import find_layers
from anymha.options.config import AttentionConfig
from anymha.parity.adapters.foreign import LayerDescription, describe_arrays
from anymha.parity.adapters.function import Function
from anymha.parity.adapters.module_state import has_state, state_of
from anymha.parity.adapters.torch_layers import TorchModule
from anymha.parity.diagnose.diagnosis import Search
from anymha.parity.oracle.truth import fold
from anymha.parity.stages.trace import Adapter, Request, Trace, make_request, problem_of

FOUR = "transformers.llama"
"""A layout of four linear layers, each with or without a bias, that may share key heads."""

ROLES = {"q": ("q", "query", "queries"), "k": ("k", "key", "keys"), "v": ("v", "value", "values"),
         "o": ("o", "out", "output", "")}  # fmt: skip
"""What is left of the name of a linear layer, without the words below, by the layer's letter."""

SECONDS = 3.0
"""So long readings are tried."""

BASES = (10000.0, 500000.0, 1000000.0)
ROTARY = (None, *(Rotary(base=base, layout=layout) for base in BASES
                  for layout in LAYOUTS))  # fmt: skip
"""What a module may do beside attention, which its weights do not tell."""

COMMON = ("projection", "project", "proj", "linear", "lin", "dense", "layer", "weights", "weight",
          "matrix", "mat", "to", "fc", "w", "_", ".", "0")  # fmt: skip
"""What names of linear layers have in common."""


class Naming(NamedTuple):
    """How the arrays of a module's state are read."""

    layout: str
    names: Mapping[str, str] | None  # The state's names by the layout's; None: they are the same
    sizes: Mapping[str, int]
    turned: bool = False  # Whether matrices are (in, out), where the layout has (out, in)


@dataclass(frozen=True)
class Reading:
    """A module whose weights are known by the names of its layers."""

    adapter: Any
    naming: Naming
    is_proven: bool = True

    @property
    def note(self) -> str:
        """How its weights were found, in words."""
        config = self.adapter.description.config
        rotary, turned = config.rotary, ""
        if rotary is not None:
            turned = f" and rotary positions (base={rotary.base:g}, layout={rotary.layout!r})"
        why = "attention of them gives its output" if self.is_proven else "as many as it says"
        return (
            f"The weights of {self.adapter.name} are read by the names of its layers, with "
            f"{config.num_heads} heads of {config.key_dim}{turned}: {why}."
        )

    def alike(self, other: Adapter) -> Adapter:
        """Another adapter with its weights read alike, if it is a module of the same names."""
        module = _module(other)
        if module is None or _shapes(module) != _shapes(_module(self.adapter)):
            return other
        return _read(other, self.naming) or other


def proven(
    adapter: Adapter, request: Request, trace: Trace, config: AttentionConfig | None = None
) -> Reading | None:
    """The module of an adapter with its weights; None where no reading is proven.

    Args:
        adapter: One whose weights are not known.
        request: A call.
        trace: Its results in it.
        config: The options that it has, as the reference; None for those that are tried.
    """
    if _module(adapter) is None or trace.output.ndim != 3:
        return None
    calls = [(request, trace)]
    if config is None:
        calls += _without_masks(adapter, request)
        bare, given = calls[-1]
        if "value" not in bare.inputs:  # a module may be causal without being asked
            causal = {**bare.call, "use_causal_mask": True}
            calls.append((dataclasses.replace(bare, call=causal), given))
    until = time.thread_time() + SECONDS
    for naming in _namings(adapter, config):
        read = _read(adapter, naming, config)
        if read is not None and any(_proves(read.description, *call) for call in calls):
            return Reading(read, naming)
        if time.thread_time() > until:
            break
    return None


def by_names(adapter: Adapter) -> Reading | None:
    """The module of an adapter with its weights, proven by a call of ours if it is plain attention.

    One that is not may be a port with a mistake: its weights are read if it says how many heads it
    has. None where nothing can be read.
    """
    if _module(adapter) is None:
        return None
    first: Reading | None = None
    for naming in _namings(adapter):
        read = _read(adapter, naming)
        if read is None:
            continue
        if first is None:
            width = read.description.weights["query.kernel"].shape[0]
            x = np.random.default_rng(0).standard_normal((2, 7, width)).astype(np.float32)
            request = make_request({"query": x}, {})
            with contextlib.suppress(Exception):  # it may need more
                found = proven(adapter, request, adapter.trace(request, None))
                if found is not None:
                    return found
            first = Reading(read, naming, is_proven=False)
    said: Any = adapter
    return first if said.parameters.heads else None


def _without_masks(adapter: Adapter, request: Request) -> Iterator[tuple[Request, Trace]]:
    """The call without masks, of which libraries make different things, and the results."""
    if not request.masks and request.bias is None and not request.call.get("use_causal_mask"):
        return
    call = {n: value for n, value in request.call.items() if n != "use_causal_mask"}
    bare = dataclasses.replace(request, masks={}, bias=None, call=call)
    with contextlib.suppress(Exception):  # it may need a mask
        yield bare, adapter.trace(bare, None)


def _namings(adapter: Any, config: AttentionConfig | None = None) -> Iterator[Naming]:
    """How a module's state may be read, with each number of heads that it may have."""
    state = state_of(_module(adapter))
    heads = adapter.parameters.heads if config is None else config.num_heads
    try:
        groups = find_layers(state)
    except AnymhaError:
        groups = []
    namings: list[Naming] = []
    for group in groups:
        if len(group.prefixes) == 1:
            (prefix,) = group.prefixes
            namings += [
                Naming(fit.name, {theirs: prefix + own for theirs, own in fit.names.items()}
                       if prefix else None, {}) for fit in group.fits
            ]  # fmt: skip
    four = _four(state)
    if four is not None:
        bare = not any(name.endswith(".weight") for name in four.values())
        namings += [
            Naming(FOUR, four, {}, turned) for turned in ((True, False) if bare else (False,))
        ]
    widths = {min(x.shape) for x in state.values() if x.ndim == 2}
    counts = [heads] if heads else [
        n for n in range(1, 65) if any(width % n == 0 and width // n > 1 for width in widths)
    ]  # fmt: skip
    turned = ROTARY if config is None else ROTARY[:1]
    for rotary, naming, count in itertools.product(turned, namings, counts):
        sizes: dict[str, Any] = {"num_heads": count}
        if rotary is not None:
            sizes["rotary"] = rotary
        if naming.layout == FOUR and naming.names is not None:
            sizes |= _shared(state, naming, count)
        yield naming._replace(sizes=sizes)


def _shared(state: Mapping[str, Any], naming: Naming, heads: int) -> dict[str, int]:
    """The number of key heads of four layers, where they are fewer than the queries'."""
    names: Any = naming.names
    queries, keys = (
        state[names[f"{letter}_proj.weight"]].shape[1 if naming.turned else 0] for letter in "qk"
    )
    shared = keys * heads // queries
    return {"num_key_value_heads": shared} if 0 < shared < heads else {}


def _four(state: Mapping[str, Any]) -> dict[str, str] | None:
    """The names of four matrices, and maybe their biases, by those of `FOUR`."""
    found: dict[str, str] = {}
    for name, array in state.items():
        layer, _, part = name.rpartition(".")
        if part not in ("weight", "bias"):  # as `W_q`, `b_q`
            layer, part = name, "weight" if array.ndim == 2 else "bias"
        rest = layer.rpartition(".")[2].lower()
        for word in (*COMMON, *(("bias", "b") if part == "bias" and layer == name else ())):
            rest = rest.replace(word, "")
        letter = next((role for role, words in ROLES.items() if rest in words), None)
        if letter is None or f"{letter}_proj.{part}" in found:
            return None
        found[f"{letter}_proj.{part}"] = name
    return found if {f"{letter}_proj.weight" for letter in ROLES} <= found.keys() else None


def _read(adapter: Any, naming: Naming, config: AttentionConfig | None = None) -> Any:
    """The adapter with the weights of its module; None where these do not fit the options."""
    module, names = _module(adapter), naming.names
    state = state_of(module)
    arrays = state if names is None else {theirs: state[own] for theirs, own in names.items()}
    if naming.turned:
        arrays = {name: x.T if x.ndim == 2 else x for name, x in arrays.items()}
    try:
        description = describe_arrays(arrays, naming.layout, naming.sizes)
    except AnymhaError:
        return None
    description = dataclasses.replace(description, needs=())  # of the library, whose it is not
    if config is not None:
        own = description.config
        if (own.num_heads, own.key_value_heads, own.key_dim) != (
            config.num_heads, config.key_value_heads, config.key_dim
        ):  # fmt: skip
            return None
        description = dataclasses.replace(description, config=config)
    if type(adapter) is Function:
        return Function(module, description)
    return TorchModule(module, description, names is None and has_state(module))


def _proves(description: LayerDescription, request: Request, trace: Trace) -> bool:
    """Whether attention of these weights is the output that a trace has."""
    for name, array in zip(("query", "value", "key"), request.three, strict=True):
        if description.weights[f"{name}.kernel"].shape[0] != array.shape[-1]:
            return False
    try:
        folded = fold(problem_of(description.config, description.weights, request))
    except AnymhaError:
        return False
    if folded.output_shape != trace.output.shape:
        return False
    flow = {"output": folded.flat(trace.output).astype(np.float64)}
    with np.errstate(all="ignore"):
        return Search(folded.recipe, trace, flow).fits()


def _module(adapter: Any) -> Any:
    """The module of an adapter, or what it calls; None of another kind of adapter."""
    if type(adapter) is TorchModule:
        return adapter.module
    return adapter.function if type(adapter) is Function else None


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in state_of(module).items()}

"""The weights of a module that nobody has named, read by the names of its layers.

Those of a function are of the module, or of the mapping of arrays, that it uses.

Names alone prove nothing: weights are read as each layout that fits, with each number of heads, and
are proven where attention of them is what the module gives. What cannot be read is left unknown: no
module may cost a comparison its result.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
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
from anymha.parity.stages.trace import Adapter, Request, Trace, problem_of

FOUR = "transformers.llama"
"""A layout of four linear layers, each with or without a bias, that may share key heads."""

LAST = "o_proj.weight"
"""The matrix of the last layer there, which is left out where the context is the output."""

ROLES = {"q": ("q", "query", "queries"), "k": ("k", "key", "keys"), "v": ("v", "value", "values"),
         "o": ("o", "out", "output", "")}  # fmt: skip
"""What is left of the name of a linear layer, without the words below, by the layer's letter."""

COMMON = ("projection", "project", "proj", "linear", "lin", "dense", "layer", "weights", "weight",
          "matrix", "mat", "to", "fc", "w", "_", ".", "0")  # fmt: skip
"""What names of linear layers have in common."""

BASES = (10000.0, 500000.0, 1000000.0)
ROTARY = (None, *(Rotary(base=base, layout=layout) for base in BASES for layout in LAYOUTS))
"""What a module may do beside attention, which its weights do not tell."""

SECONDS = 3.0
"""So long readings are tried."""

MOST = 1 << 25
"""Of more numbers nothing is read."""

UNPROVEN = ", as it says; that its output is attention of them is not proven"

USUAL = 64
"""The width of a head that is tried first."""


class Naming(NamedTuple):
    """How the arrays of a module's state are read."""

    layout: str
    names: Mapping[str, str] | None  # The state's names by the layout's; None: they are the same
    sizes: Mapping[str, Any]
    turned: bool = False  # Whether matrices are (in, out), where the layout has (out, in)


@dataclass(frozen=True)
class Reading:
    """A module whose weights are known by the names of its layers."""

    adapter: Any
    naming: Naming
    why: str = ": attention of them gives its output"

    @property
    def note(self) -> str:
        """How its weights were found, in words."""
        config = self.adapter.description.config
        rotary, turned = config.rotary, ""
        if rotary is not None:
            turned = f" and rotary positions (base={rotary.base:g}, layout={rotary.layout!r})"
        heads = f"{config.num_heads} heads" if config.num_heads > 1 else "1 head"
        return (
            f"The weights of {self.adapter.name} are read by the names of its layers, with "
            f"{heads} of {config.key_dim}{turned}{self.why}."
        )

    def alike(self, other: Adapter) -> Adapter:
        """Another adapter with its weights read alike, if it is a module of the same names."""
        try:
            state, own = _state(other), _state(self.adapter)
            if {n: x.shape for n, x in state.items()} != {n: x.shape for n, x in own.items()}:
                return other
            return _read(other, state, self.naming) or other
        except Exception:  # whatever a module of the user's raises
            return other


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
    try:
        if config is not None:
            return _first_proven(adapter, [(request, trace)], config)
        ours = _call_of_ours(adapter, request)
        if ours is not None:
            return _first_proven(adapter, ours)
        found = [*_all_proven(adapter, _with_causal(request, trace))]
    except Exception:  # whatever a module of the user's raises
        return None
    # A call of one position, say, does not tell how many heads there are.
    counts = {reading.adapter.description.config.num_heads for reading in found}
    return found[0] if len(counts) == 1 else None


def by_names(adapter: Adapter) -> Reading | None:
    """The module of an adapter with its weights, proven by a call of ours if it is plain attention.

    One that is not may be a port with a mistake: its weights are read if it says how many heads it
    has, and its names mean one thing alone, or one known mistake explains its output in one meaning
    alone. None where nothing can be read so.
    """
    try:
        ours = _call_of_ours(adapter, None)
        found = None if ours is None else _first_proven(adapter, ours)
        return found or _likeliest(adapter, _readings(adapter))
    except Exception:  # whatever a module of the user's raises
        return None


def _first_proven(
    adapter: Adapter, calls: Sequence[tuple[Request, Trace]], config: AttentionConfig | None = None
) -> Reading | None:
    return next(_all_proven(adapter, calls, config), None)


def _all_proven(
    adapter: Adapter, calls: Sequence[tuple[Request, Trace]], config: AttentionConfig | None = None
) -> Iterator[Reading]:
    """The readings whose attention is what one of the calls gave, as far as there is time."""
    until, state = time.perf_counter() + SECONDS, _state(adapter)
    for naming in _namings(adapter, state, config):
        read = _read(adapter, state, naming, config)
        if read is not None and any(_proves(read.description, *call) for call in calls):
            yield Reading(read, naming)
        if time.perf_counter() > until:
            return


def _readings(adapter: Any) -> list[Reading]:
    """The readings with as many heads as the module says, each of other weights."""
    state, heads = _state(adapter), adapter.parameters.heads
    found: list[Reading] = []
    whole = heads and (_four(state) is None or LAST in (_four(state) or {}))
    for naming in _namings(adapter, state) if whole else ():
        if naming.sizes != {**naming.sizes, "num_heads": heads} or "rotary" in naming.sizes:
            break
        read = _read(adapter, state, naming)
        if read is None:
            continue
        weights = read.description.weights
        known = (one.adapter.description.weights for one in found)
        if not any(all(np.array_equal(x, one[name]) for name, x in weights.items())
                   for one in known):  # fmt: skip
            found.append(Reading(read, naming, UNPROVEN))
    return found


def _likeliest(adapter: Any, readings: list[Reading]) -> Reading | None:
    """The one reading; of several the one with which a known mistake explains the output.

    None where it does with none of several, or with two.
    """
    if len(readings) > 1:
        calls = _call_of_ours(adapter, None) or []
        why = ", as in {0}: of the layouts that fit, one mistake explains its output in this alone"
        readings = [dataclasses.replace(one, why=why.format(one.naming.layout)) for one in readings
                    if any(_proves(one.adapter.description, *call, mistaken=True)
                           for call in calls)]  # fmt: skip
    return readings[0] if len(readings) == 1 else None


def _call_of_ours(adapter: Any, like: Request | None) -> list[tuple[Request, Trace]] | None:
    """A call that tells how many heads there are, and its results; None where there are none."""
    state = _state(adapter)
    for naming in _namings(adapter, state):
        read = _read(adapter, state, naming)
        if read is None:
            continue
        rng, inputs = np.random.default_rng(0), dict[str, np.ndarray]()
        for name in ("query", "value", "key")[: 1 if adapter.parameters.needs == 1 else 3]:
            width = read.description.weights[f"{name}.kernel"].shape[0]
            inputs[name] = rng.standard_normal((2, 7, width)).astype(np.float32)
        request = Request(inputs, originals={} if like is None else like.originals)
        request = request.with_inputs(inputs)
        try:
            trace = adapter.trace(request, None)
        except Exception:  # it may need more
            return None
        return None if trace.random or trace.output.ndim != 3 else _with_causal(request, trace)
    return None


def _with_causal(request: Request, trace: Trace) -> list[tuple[Request, Trace]]:
    """The call, and the causal one: a module may be causal without being asked."""
    calls = [(request, trace)]
    if "value" not in request.inputs:
        causal = {**request.call, "use_causal_mask": True}
        calls.append((dataclasses.replace(request, call=causal), trace))
    return calls


def _namings(
    adapter: Any, state: Mapping[str, Any], config: AttentionConfig | None = None
) -> Iterator[Naming]:
    """How a module's state may be read; first with as many heads as it says, without rotation."""
    said = adapter.parameters.heads if config is None else config.num_heads
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
    width = max([min(x.shape) for x in state.values() if x.ndim == 2], default=0)
    counts = [n for n in range(1, 65) if width % n == 0 and width > n != said]
    counts.sort(key=lambda count: abs(np.log(width / count / USUAL)))
    counts = [said] * bool(said) + counts * (config is None)
    for rotary in ROTARY if config is None else ROTARY[:1]:
        turns = {} if rotary is None else {"rotary": rotary}
        for count, naming in itertools.product(counts, namings):
            sizes: dict[str, Any] = {"num_heads": count, **turns}
            if naming.layout == FOUR and naming.names is not None:
                sizes |= _shared(state, naming, count)
            yield naming._replace(sizes=sizes)


def _shared(state: Mapping[str, Any], naming: Naming, heads: int) -> dict[str, int]:
    """The number of key heads of four layers, where they are fewer than the queries'."""
    names: Any = naming.names
    queries, keys = (
        state[names[f"{letter}_proj.weight"]].shape[1 if naming.turned else 0] for letter in "qk"
    )
    shared = keys * heads // max(queries, 1)
    return {"num_key_value_heads": shared} if 0 < shared < heads else {}


def _four(state: Mapping[str, Any]) -> dict[str, str] | None:
    """The names of four matrices, or the first three, and maybe their biases, by `FOUR`'s names."""
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
    needed = {f"{letter}_proj.weight" for letter in ROLES} - {LAST}
    return found if needed <= found.keys() and (LAST in found or len(found) in (3, 6)) else None


def _read(
    adapter: Any, state: Mapping[str, Any], naming: Naming, config: AttentionConfig | None = None
) -> Any:
    """The adapter with the weights of its module; None where these do not fit the options."""
    names = naming.names
    arrays = state if names is None else {theirs: state[own] for theirs, own in names.items()}
    if naming.turned:
        arrays = {name: x.T if x.ndim == 2 else x for name, x in arrays.items()}
    if naming.layout == FOUR and names is not None and LAST not in names:
        values = arrays["v_proj.weight"]
        width = values.shape[0] * naming.sizes["num_heads"] // naming.sizes.get(
            "num_key_value_heads", naming.sizes["num_heads"])  # fmt: skip
        arrays = {**arrays, LAST: np.eye(width, dtype=np.float32)}
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
    module = _module(adapter)
    if type(adapter) is Function:
        return Function(module, description)
    return TorchModule(module, description, names is None and has_state(module))


def _proves(
    description: LayerDescription, request: Request, trace: Trace, mistaken: bool = False
) -> bool:
    """Whether attention of these weights is the output of a trace; `mistaken`: with one mistake."""
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
        search = Search(folded.recipe, trace, flow)
        return search.diagnose(pairs=False).explained if mistaken else search.fits()


def _module(adapter: Any) -> Any:
    """The module of an adapter, or what it calls; None of another kind of adapter."""
    if type(adapter) is TorchModule:
        return adapter.module
    return adapter.function if type(adapter) is Function else None


def _state(adapter: Any) -> dict[str, Any]:
    """The arrays of a module; none of one that has too many numbers."""
    module = _module(adapter)
    state = {} if module is None else state_of(module)
    state = {name: x for name, x in state.items() if hasattr(x, "ndim") and hasattr(x, "shape")}
    return {} if sum(int(np.prod(x.shape)) for x in state.values()) > MOST else state

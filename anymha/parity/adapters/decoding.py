"""Functions and layers that decode step by step, with a cache; and what they are compared with.

A `Stepwise` implementation reads the sequences of a call piece by piece. The other one is called
once, causally, with each row's own sequence alone where rows have padding: see `Whole`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.errors import ArgumentError, LayoutError
from anymha.framework.names import answers
from anymha.framework.registry import backend_of
from anymha.interchange.layers import get_weights
from anymha.options.config import AttentionConfig
from anymha.parity.adapters.arguments import exits_as_errors, name_of
from anymha.parity.adapters.foreign import LayerDescription, make_trace
from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.recipe import Arrays
from anymha.parity.oracle.truth import Folded
from anymha.parity.stages.trace import Adapter, Request, Trace, as_numpy, fresh

DRAFT = 2
"""How many positions are read and taken back after each call, where `truncate` is tried."""

ROWS = ("query", "key", "value", "context", "output")
"""The stages with a position in their axis 1; the others have queries and keys after the heads."""

Cache = Any
Step = Callable[..., Any]


@dataclass(frozen=True)
class Decoding:
    """A function that decodes step by step; made by `decoding`."""

    step: Step
    make_cache: Callable[..., Cache] | None
    steps: tuple[int, ...] | None
    join: Callable[[list[Cache]], Cache] | None
    truncate: Callable[[Cache, Any], Cache] | None
    reorder: Callable[[Cache, Any], Cache] | None
    layer: Any = None  # The layer of anymha that it calls

    def pieces(self, length: int) -> tuple[int, ...]:
        """The lengths of the pieces in which so many positions are read."""
        steps, left = [], length
        for step in self.steps or (max(length // 2, 1), 1, 3, 1):
            steps.append(min(step, left))
            left -= steps[-1]
        return tuple(filter(None, (*steps, *[1] * left)))


@answers(make_cache="cache init_cache")
def decoding(
    step: Any,
    make_cache: Callable[..., Cache] | None = None,
    *,
    steps: Sequence[int] | None = None,
    join: Callable[[list[Cache]], Cache] | bool | None = None,
    truncate: Callable[[Cache, Any], Cache] | bool | None = None,
    reorder: Callable[[Cache, Any], Cache] | bool | None = None,
) -> Decoding:
    """Let `compare` read a call's sequences step by step, with a cache.

    What `compare` takes is the whole sequences, x (B, T, D); they are read in pieces, and the
    outputs of all pieces are compared with those of one causal call over each row's sequence. With
    `value_mask` (B, T) in the call, positions where it is False are padding, in front, at the end
    or between, which the cache does not hold; their outputs are not compared.

    Args:
        step: A function ``step(x, cache) -> (output, cache)`` of the next positions x (B, t, D), in
            the framework of the arrays that `compare` is given. Where it has parameters of these
            names it gets them too: one with `mask` or `valid` in its name the piece of
            `value_mask`, (B, t); one with `padding` its opposite; `positions` or `position_ids` the
            positions (B, t); `segment_ids` those of the call. Or a layer of anymha.
        make_cache: A function that makes an empty cache; it is called with as many of `batch_size`
            and `max_length` as it takes by place. Default: the first call gets None for a cache.
        steps: Lengths of the pieces. What they leave of the sequence is read one by one. Default:
            half of it, then 1, 3, 1, and the rest one by one.
        join: A function of a list of caches, of one row each: then each row of the first piece is
            read alone, and the caches are joined. True for a layer of anymha.
        truncate: A function of a cache and its lengths (B,) before: then two positions more are
            read after each piece, and taken back. True for a layer of anymha.
        reorder: A function of a cache and indices (B,): then the rows of the batch stand in
            another order after the first piece. True for a layer of anymha.

    Returns:
        An object that `compare` and `assert_parity` take as an implementation.

    Raises:
        ArgumentError: an argument is of no kind that it can be.

    Example:
        >>> import anymha, numpy as np
        >>> from anymha.parity import compare, decoding
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
        >>> x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype("float32")
        >>> def again(x, cache):  # a cache of the inputs, which is slow and right
        ...     held = x if cache is None else np.concatenate([cache, x], axis=1)
        ...     return layer(held, use_causal_mask=True)[:, -x.shape[1]:], held
        >>> compare(layer, decoding(again), x).passed
        True
    """
    layer = step if hasattr(step, "canonical_weights") and hasattr(step, "make_cache") else None
    made: dict[str, Any] = {"join": join, "truncate": truncate, "reorder": reorder}
    if layer is not None:
        step, make_cache = _layer_step(layer), make_cache or _layer_cache(layer, bool(truncate))
        made = {n: _OF_OURS[n] if f is True else f or None for n, f in made.items()}
    if not callable(step):
        raise ArgumentError(
            "`step` must be a function `step(x, cache) -> (output, cache)`, or a layer of anymha "
            f"that has `make_cache`. Received: {type(step).__module__}.{type(step).__qualname__}."
        )
    for name, function in {"make_cache": make_cache, **made}.items():
        if function is not None and not callable(function):
            hint = " Give the function, True is for layers of anymha." * (function is True)
            hint = hint or " A cache itself would be written into by the first comparison." * (
                name == "make_cache"
            )
            raise ArgumentError(
                f"`{name}` must be a function, or None. Received: {function!r:.80}.{hint}"
            )
    if steps is not None and not all(isinstance(n, (int, np.integer)) and n > 0 for n in steps):
        raise ArgumentError(f"`steps` must be positive integers. Received: {steps!r:.80}.")
    pieces = None if steps is None else tuple(int(n) for n in steps)
    return Decoding(step, make_cache, pieces, **made, layer=layer)


def _layer_step(layer: Any) -> Step:
    def step(x: Any, cache: Cache, value_mask: Any = None, **call: Any) -> Any:
        return layer(x, cache=cache, value_mask=value_mask, **call)

    step.__qualname__ = f"{type(layer).__qualname__} with a cache"
    return step


def _layer_cache(layer: Any, rewinds: bool) -> Callable[[int, int], Cache]:
    window = layer.config.sliding_window

    def make_cache(batch_size: int, max_length: int) -> Cache:
        more = {"rewind": DRAFT} if rewinds and window is not None else {}
        return layer.make_cache(batch_size, max_length, **more)

    return make_cache


def _join_caches(caches: list[Cache]) -> Cache:
    return importlib.import_module("anymha").join_caches(caches)


_OF_OURS = {
    "join": _join_caches,
    "truncate": lambda cache, lengths: cache.truncate(lengths),
    "reorder": lambda cache, indices: cache.reorder(indices),
}
"""What `True` stands for, of a layer of anymha."""


class Stepwise:
    """An implementation that reads sequences piece by piece, with a cache."""

    def __init__(self, decoding: Decoding, description: LayerDescription | None = None) -> None:
        self.decoding = decoding
        self.name = name_of(decoding.step)
        layer, self.ops = decoding.layer, None
        if layer is not None:
            arrays = get_weights(layer)  # raises, with the remedy, where there are none yet
            self.ops = backend_of(next(iter(layer.canonical_weights().values()))).ops
            if description is None:
                description = LayerDescription(dict(arrays), layer.config, "anymha", {})
        self.description = description
        parameters = list(_parameters(decoding.step))
        self.anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = {p.name: p.default is p.empty for p in named[2:]}

    def less(self) -> Iterator[tuple[str, Stepwise]]:
        """It without each of the functions that it has beside the step, by their names."""
        for name in ("truncate", "reorder", "join"):
            if getattr(self.decoding, name) is not None:
                other = dataclasses.replace(self.decoding, **{name: None})
                yield name, Stepwise(other, self.description)

    def bare(self) -> Stepwise | None:
        """It without any of them; None where it has none."""
        if not any(True for _ in self.less()):
            return None
        none = dict.fromkeys(("truncate", "reorder", "join"))
        return Stepwise(dataclasses.replace(self.decoding, **none), self.description)

    @property
    def mask(self) -> str | None:
        """Its parameter for the padding of a piece."""
        words = ("mask", "valid", "padding")
        return next((name for name in self.names if any(word in name for word in words)), None)

    def lacking(self, request: Request) -> str:
        """Why it cannot be given the call, in words; empty where it can."""
        if set(request.inputs) != {"query"}:
            return "takes one input alone"
        if request.inputs["query"].ndim != 3:
            return "takes inputs (batch, length, features) alone"
        call = request.call
        others = [n for n in request.masks if n not in ("value_mask", "query_mask")]
        others += ["attention_bias"] * (request.bias is not None)
        others += [n for n in ("query_offset", "training", "seed") if call.get(n)]
        others += [n for n in ("positions", "segment_ids") if n in call and not self._takes(n)]
        valid = request.masks.get("value_mask")
        for name, twin in (("query_mask", valid), ("key_positions", call.get("positions")),
                           ("key_segment_ids", call.get("segment_ids"))):  # fmt: skip
            given = request.masks.get(name, call.get(name))
            if given is not None and (twin is None or not np.array_equal(given, twin)):
                others.append(name)
        if valid is not None and not valid.all() and not self._takes("value_mask"):
            others.append("value_mask")
        if others:
            return f"does not take {', '.join(f'`{name}`' for name in others)}"
        known = ("positions", "position_ids", "segment_ids", self.mask)
        needs = [name for name, needed in self.names.items() if needed and name not in known]
        if needs:
            return f"needs {', '.join(f'`{name}`' for name in needs)}, which no call has"
        if not call.get("use_causal_mask", True):
            return "decodes causally, and the call says `use_causal_mask=False`"
        return ""

    def check(self, request: Request) -> None:
        """Raise an error where the call is none that it can be given."""
        reason, length = self.lacking(request), request.inputs["query"].shape[1]
        if reason:
            raise LayoutError(f"{self.name} {reason}.")
        steps = self.decoding.steps or ()
        if sum(steps) > length:
            raise ArgumentError(
                f"`steps` may be {length} positions together, the length of the sequences. "
                f"Received: {steps}, {sum(steps)} positions."
            )

    def facts(self, request: Request) -> Decoded:
        """How it reads the sequences of a call."""
        batch, length = request.inputs["query"].shape[:2]
        pieces = self.decoding.pieces(length)
        turned = None if self.decoding.reorder is None else np.roll(np.arange(batch), -1)
        calls = np.repeat(np.arange(len(pieces)), pieces)
        drafted = DRAFT * (self.decoding.truncate is not None)
        joined = self.decoding.join is not None
        return Decoded(valid_of(request), calls, joined, turned, drafted)

    @exits_as_errors
    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        pieces = self.decoding.pieces(request.inputs["query"].shape[1])
        notes = (f"it reads pieces of {_shown(pieces)} positions",)
        return make_trace(
            self.name, request, lambda: {"output": self._read(request, pieces)}, self.description,
            "it decodes step by step", notes, self._ops(request).name,
        )  # fmt: skip

    def _ops(self, request: Request) -> Any:
        """The framework of its arrays: its layer's, or the caller's."""
        return self.ops or backend_of(request.originals["query"]).ops

    def _takes(self, name: str) -> bool:
        own = {"value_mask": self.mask, "positions": self._positions}.get(name, name)
        return self.anything or own in self.names

    @property
    def _positions(self) -> str | None:
        return next((n for n in ("positions", "position_ids") if n in self.names), None)

    def _read(self, request: Request, pieces: tuple[int, ...]) -> np.ndarray:
        """The outputs of all pieces, one after the other."""
        rows, made = _Rows.of(request, self.ops), self.decoding
        batch, length = rows.valid.shape
        first, outputs = pieces[0], []
        most = length + DRAFT * len(pieces) * (made.truncate is not None)
        if made.join is None:
            cache = self._empty(batch, most)
            output, cache = self._step(rows.part(0, first), cache)
        else:
            output, cache = self._joined(rows, first, most)
        outputs.append(output)
        order = np.arange(batch)
        if made.reorder is not None and len(pieces) > 1:
            order = np.roll(order, -1)
            cache = made.reorder(cache, rows.ops.from_numpy(order.astype(np.int32)))
            rows = rows.taken(order)
        begin = first
        for count in pieces[1:]:
            cache = self._drafted(rows, begin, cache)
            output, cache = self._step(rows.part(begin, begin + count), cache)
            outputs.append(output[np.argsort(order)])
            begin += count
        return np.concatenate(outputs, axis=1)

    def _joined(self, rows: _Rows, first: int, most: int) -> tuple[np.ndarray, Cache]:
        """The first piece, each row alone without the padding at its ends; and the joined cache."""
        caches, outputs = [], []
        for row in range(len(rows.valid)):
            held = np.flatnonzero(rows.valid[row, :first])
            begin, end = (held[0], held[-1] + 1) if held.size else (0, first)
            part = rows.part(int(begin), int(end), slice(row, row + 1))
            output, cache = self._step(part, self._empty(1, most))
            caches.append(cache)
            whole = np.zeros((1, first, *output.shape[2:]), output.dtype)
            whole[:, begin:end] = output
            outputs.append(whole)
        return np.concatenate(outputs), self.decoding.join(caches)  # type: ignore[misc]

    def _drafted(self, rows: _Rows, begin: int, cache: Cache) -> Cache:
        """The cache after positions that were read and taken back."""
        truncate = self.decoding.truncate
        if truncate is None:
            return cache
        lengths = rows.valid[:, :begin].sum(1).astype(np.int32)
        _, cache = self._step(rows.part(0, min(DRAFT, begin)), cache)
        return truncate(cache, rows.ops.from_numpy(lengths))

    def _empty(self, batch_size: int, max_length: int) -> Cache:
        make = self.decoding.make_cache
        if make is None:
            return None
        taken = [p for p in _parameters(make) if p.kind in (p.POSITIONAL_ONLY,
                 p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]  # fmt: skip
        needed = [p for p in taken if p.default is p.empty]
        many = any(p.kind is p.VAR_POSITIONAL for p in taken)
        sizes = [p for p in taken if p in needed or "batch" in p.name or "length" in p.name]
        return make(*(batch_size, max_length)[: 2 if many else len(sizes)])

    def _step(self, part: _Rows, cache: Cache) -> tuple[np.ndarray, Cache]:
        """One call, with the arguments that the function has a name for."""
        ops, arguments = part.ops, dict[str, Any]()
        if self.mask is not None and (part.ragged or self.names[self.mask]):
            valid = ~part.valid if "padding" in self.mask else part.valid
            arguments[self.mask] = ops.from_numpy(valid)
        if self._positions is not None and (part.given or self.names[self._positions]):
            arguments[self._positions] = ops.from_numpy(part.positions.astype(np.int32))
        elif part.given:
            arguments["positions"] = ops.from_numpy(part.positions.astype(np.int32))
        if part.segments is not None:
            arguments["segment_ids"] = ops.from_numpy(part.segments)
        result = self.decoding.step(part.x, cache, **arguments)
        if not isinstance(result, (tuple, list)) or len(result) < 2:
            raise ArgumentError(
                f"`{self.name}` must return the output of the new positions, and the new cache. "
                f"Received: {type(result).__qualname__}."
            )
        output = as_numpy(result[0])
        if output.shape[:2] != part.valid.shape:
            raise ArgumentError(
                f"`{self.name}` must return an output for each new position, (batch, positions, "
                f"...) = {part.valid.shape}. Received: shape {output.shape}."
            )
        return output, result[-1]


@dataclass(frozen=True)
class _Rows:
    """Columns of a call, in the caller's framework, and their facts in NumPy."""

    ops: Any
    x: Any  # (B, t, D) in the caller's framework
    valid: np.ndarray  # (B, t)
    positions: np.ndarray  # (B, t)
    segments: np.ndarray | None  # (B, t)
    given: bool  # Whether the call gives positions
    ragged: bool  # Whether there is padding anywhere in the call

    @classmethod
    def of(cls, request: Request, ops: Any = None) -> _Rows:
        """Those of a call, in a framework; None: as the caller gave them."""
        x, valid = request.originals["query"], valid_of(request)
        x = x if ops is None else ops.from_numpy(request.inputs["query"])
        ops = backend_of(x).ops
        x = np.array(x) if isinstance(x, list) else x
        positions = np.cumsum(valid, axis=1) - valid
        given, ids = (request.call.get(n) for n in ("positions", "segment_ids"))
        positions = positions if given is None else np.broadcast_to(given, valid.shape)
        segments = None if ids is None else np.broadcast_to(ids, valid.shape)
        return cls(ops, x, valid, positions, segments, given is not None, not valid.all())

    def part(self, begin: int, end: int, rows: slice = slice(None)) -> _Rows:
        """Those columns, of all rows or some."""
        at = (rows, slice(begin, end))
        segments = None if self.segments is None else self.segments[at]
        return dataclasses.replace(self, x=fresh(self.x[at]), valid=self.valid[at],
                                   positions=self.positions[at], segments=segments)  # fmt: skip

    def taken(self, order: np.ndarray) -> _Rows:
        """The rows in another order."""
        segments = None if self.segments is None else self.segments[order]
        try:
            x = self.x[order]
        except Exception:  # TensorFlow's tensors take no array of indices
            x = self.ops.from_numpy(as_numpy(self.x)[order])
        return dataclasses.replace(self, x=x, valid=self.valid[order],
                                   positions=self.positions[order], segments=segments)  # fmt: skip


class Whole:
    """An implementation that is compared with one that decodes: called with whole sequences.

    Where rows have padding, it is called for each row with the row's own sequence alone.
    """

    def __init__(self, adapter: Any) -> None:
        self.adapter, self.name = adapter, adapter.name

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        valid, request = valid_of(request), dataclasses.replace(request, masks={})
        if valid.all():
            return self.adapter.trace(request, None)
        made = [(at, self.adapter.trace(row, None)) for at, row in _alone(request, valid)]
        results = {"output": [(at, trace.output) for at, trace in made]}
        results["scores"] = [(at, t.scores) for at, t in made if t.scores is not None]
        for stage in made[0][1].stages:
            results[stage] = [(at, trace.stages[stage]) for at, trace in made]
        whole = {name: _spread(name, rows, valid) for name, rows in results.items() if rows}
        output, scores = whole.pop("output"), whole.pop("scores", None)
        random = any(trace.random for _, trace in made)
        return dataclasses.replace(made[0][1], output=output, scores=scores, stages=whole,
                                   random=random, settled={})  # fmt: skip

    def output(self, request: Request) -> np.ndarray:
        """The output alone."""
        valid, request = valid_of(request), dataclasses.replace(request, masks={})
        own = getattr(self.adapter, "output", lambda call: self.adapter.trace(call, None).output)
        if valid.all():
            return own(request)
        return _spread("output", [(at, own(row)) for at, row in _alone(request, valid)], valid)


def _alone(request: Request, valid: np.ndarray) -> Iterator[tuple[int, Request]]:
    """Each row that has a sequence, and the call with it alone."""
    for at, held in enumerate(valid):
        if held.any():
            x = request.inputs["query"][at : at + 1, held]
            call = dict(request.call)
            for name in ("positions", "key_positions", "segment_ids", "key_segment_ids"):
                if name in call:
                    call[name] = np.broadcast_to(call[name], valid.shape)[at : at + 1, held]
            yield at, request.with_inputs({"query": x}, call=call)


def _spread(name: str, rows: list[tuple[int, np.ndarray]], valid: np.ndarray) -> np.ndarray:
    """Results of rows at the places of their columns; zeros at padding."""
    batch, length = valid.shape
    first = rows[0][1]
    if name in ROWS:
        whole = np.zeros((batch, length, *first.shape[2:]), first.dtype)
        for at, array in rows:
            whole[at, valid[at]] = array[0]
        return whole
    whole = np.zeros((batch, first.shape[1], length, length), first.dtype)
    for at, array in rows:
        held = np.flatnonzero(valid[at])
        whole[at][:, held[:, None], held] = array[0]
    return whole


def valid_of(request: Request) -> np.ndarray:
    """The columns (B, T) that are no padding."""
    shape = request.inputs["query"].shape[:2]
    return np.broadcast_to(request.masks.get("value_mask", np.ones(shape, bool)), shape)


def decoding_pair(one: Adapter, other: Adapter, request: Request) -> tuple[Adapter, Adapter]:
    """Two adapters, of which each that does not decode is called with whole sequences.

    They are as before where neither decodes.

    Raises:
        ArgumentError: the steps do not fit to the call.
        LayoutError: one that decodes does not take what the call asks for.
    """
    decode = [adapter for adapter in (one, other) if isinstance(adapter, Stepwise)]
    if not decode:
        return one, other
    for adapter in decode:
        adapter.check(request)
    if len(decode) == 1:
        _check_frequencies(decode[0], (one, other), request)
    first, second = (a if isinstance(a, Stepwise) else Whole(a) for a in (one, other))
    return first, second


def _check_frequencies(decoding: Stepwise, pair: tuple[Adapter, Adapter], request: Request) -> None:
    """Raise an error where rotary frequencies change on the way: no one causal call has them all.

    Those of the rope_types "dynamic" and "longrope" are of the number of keys that a row holds.
    """
    described = [
        getattr(adapter, name, None) for adapter in pair for name in ("layer", "description")
    ]
    configs = [getattr(one, "config", None) for one in described]
    config = next((c for c in configs if isinstance(c, AttentionConfig)), None)
    rotary: Any = None if config is None else config.rotary
    if config is None or rotary is None or not rotary.depends_on_length:
        return
    valid = valid_of(request)
    ends = np.cumsum(decoding.decoding.pieces(valid.shape[1]))
    width = rotary.width(config.key_dim)
    for lengths in np.cumsum(valid, axis=1)[:, ends - 1]:
        held = {int(n) for n in lengths if n}
        if len({rotary.frequencies(width, "float64", n) for n in held}) > 1:
            kind = rotary.scaled["rope_type"]
            raise LayoutError(
                f"{decoding.name} cannot be compared with one causal call: the rotary frequencies "
                f"of rope_type {kind!r} depend on the number of keys, and change between pieces "
                f"after which rows hold {', '.join(map(str, sorted(held)))}. Read the sequences "
                f"in one piece, `steps=({valid.shape[1]},)`, or give shorter ones."
            )


def decoded_request(request: Request, one: Adapter, other: Adapter) -> Request:
    """The request with how its sequences are read, where an adapter decodes; it is causal then."""
    stepwise = next((a for a in (other, one) if isinstance(a, Stepwise)), None)
    if stepwise is None:
        return request
    call = {**request.call, "use_causal_mask": True}
    if "positions" in call:
        call["key_positions"] = call["positions"]
    masks, facts = dict(request.masks), stepwise.facts(request)
    if facts.ragged:
        masks["query_mask"] = masks["value_mask"]  # the output of padding sees nothing
    return dataclasses.replace(request, masks=masks, call=call, decoded=facts)


def settle_padding(
    request: Request, traces: Sequence[Trace], folded: Folded | None
) -> Sequence[Trace]:
    """The traces with the same numbers at padding, which is not compared: those of the recipe.

    Without a recipe zeros.
    """
    facts = request.decoded
    if facts is None or not facts.ragged:
        return traces
    rows, pairs = facts.valid, facts.valid[:, None, :, None] & facts.valid[:, None, None]

    def settled(name: str, array: np.ndarray) -> np.ndarray:
        held = rows.reshape(*rows.shape, *[1] * (array.ndim - 2)) if name in ROWS else pairs
        fill = exact.get(name, np.zeros_like(array))
        if fill.shape != array.shape:
            return array
        return np.where(held, array, fill.astype(array.dtype))

    exact: Arrays = {} if folded is None else dict(folded.recipe.stages)
    if folded is not None:
        exact["output"] = folded.output(exact["output"])
        exact["scores"] = exact["probabilities"]
    made = []
    for trace in traces:
        stages = {name: settled(name, array) for name, array in trace.stages.items()}
        output = settled("output", trace.output)
        scores = None if trace.scores is None else settled("scores", trace.scores)
        made.append(
            dataclasses.replace(trace, output=output, stages=stages, scores=scores, settled={})
        )
    return made


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of some functions that are written in C
        return []


def _shown(pieces: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, pieces[:8]))
    return f"{shown}, ..." if len(pieces) > 8 else shown

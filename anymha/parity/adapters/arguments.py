"""How a callable of the user's own takes a call: inputs, masks and options by its own names.

A function may name its inputs in another order than anymha's layer, and its masks as its library
does. What its signature does not tell is passed as anymha's layer takes it.
"""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from anymha.errors import LayoutError
from anymha.framework.names import Function
from anymha.parity.oracle.truth import spread_mask
from anymha.parity.stages.trace import (
    INPUTS,
    MASKS,
    POSITIONS,
    SEGMENTS,
    Request,
    as_numpy,
    differs_between_calls,
)

SYNONYMS = {
    "use_causal_mask": ("is_causal", "causal"),
    "attention_bias": ("attn_bias", "bias", "position_bias"),
    "training": ("train",),
}
"""Other names of anymha's arguments, apart from masks."""

PADDING = re.compile("padding|(^|_)pad(s|ded)?$")
"""In the name of a mask: True = padding, which nobody attends to, as in torch."""

SHOWS = frozenset({"msk", "keep", "kept", "valid", "visible", "allow", "allowed", "attend", "adj"})
"""Words of which one in a parameter's name says that it is a mask, True = may attend."""

HIDES = frozenset({"hide", "hidden", "ignore", "ignored", "block", "blocked", "forbidden"})
"""Words of which one in a mask's name says True = may not attend."""

OPTIONS = ("training", "train", "deterministic", "query_offset", "seed", "is_causal", "causal",
           "dropout", "need_weights", "average_attn_weights", "rngs", "rng", "use_causal_mask",
           *POSITIONS, *SEGMENTS)  # fmt: skip


UNSET = {
    **dict.fromkeys(("use_causal_mask", "is_causal", "causal", "training", "train"), False),
    "deterministic": True, "need_weights": False, "query_offset": 0, "dropout": 0.0,
}  # fmt: skip
"""The values of flags that have no default, where the call does not set them."""

HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "heads", "nhead")
"""Attributes in which a module may say how many heads it has."""

NO_INPUT = frozenset({
    "time", "scale", "scaling", "temperature", "tau", "eps", "freq", "freqs", "rope", "rotary",
    "cos", "sin", "pos", "position", "positions", "past", "cache", "index", "idx", "step", "start",
    "offset", "length", "lengths", "len", "lens", "prob", "rate", "seqlen", "seqlens", "window",
    "sink", "sinks", "slopes", "alibi", "size", "device", "dtype", "generator", "return", "config",
})  # fmt: skip
"""Words of which one in a parameter's name says that it is no input: `freqs_cis`, `start_pos`."""

OF_INPUTS = frozenset({
    "x", "y", "z", "query", "queries", "key", "keys", "value", "values", "kv", "context", "memory",
    "encoder", "encoded", "cross", "state", "states", "input", "inputs", "source", "src", "target",
    "tgt", "cond", "condition", "embeddings", "tokens", "features", "latents",
})  # fmt: skip
"""Words of which one in a parameter's name says that it is an input."""

SECONDS = 10.0
"""How long parameters are tried."""

INPUT, MASK, NEITHER = "input", "mask", "neither"
"""What a trial says that a parameter is."""


@dataclass(frozen=True)
class Fitted:
    """One form in which a callable may be given a call."""

    inputs: tuple[tuple[str, str], ...]  # Its parameter, or "" for a place, and the input's name
    arguments: dict[str, Any]  # The call's other arguments by its own names, in NumPy
    notes: tuple[str, ...] = ()  # How masks were handed over, where it could be meant otherwise
    refusal: str = ""  # The error where no form runs; empty for that of the first form

    def call(self, function: Callable[..., Any], inputs: Mapping[str, Any], arguments: Any) -> Any:
        """The result for these inputs by name, of which later ones default to earlier ones."""
        query = inputs["query"]
        value = inputs.get("value", query)
        three = {"query": query, "value": value, "key": inputs.get("key", value)}
        places = [three[which] for name, which in self.inputs if not name]
        named = {name: three[which] for name, which in self.inputs if name}
        return function(*places, **named, **arguments)


@dataclass(frozen=True)
class Parameters:
    """What a callable can be given, as its signature tells."""

    name: str  # What messages call it
    inputs: tuple[str, ...] = INPUTS  # What its inputs are, in its order
    places: tuple[str, ...] = ("", "", "")  # The name of each input's parameter; "": by place
    needs: int = 1  # How many of the inputs it needs
    names: frozenset[str] = frozenset()  # Its other parameters
    needed: frozenset[str] = frozenset()  # Those of them that have no default
    unknown: tuple[str, ...] = ()  # Parameters that it needs and no call has
    anything: bool = True  # Whether it takes arguments of any name
    heads: int = 0  # How many heads it says that it has; 0: it does not say
    firm: tuple[tuple[str, str], ...] = (("", "query"),)  # Inputs that are not loose, see `Fitted`
    # Parameters of names that tell nothing: which input each may be, and whether it is needed
    loose: tuple[tuple[str, str, bool], ...] = ()
    read: Mapping[str, str] = field(default_factory=dict)  # What a trial says that they are

    @classmethod
    def of(
        cls, function: Callable[..., Any], owner: Any = None, read: Mapping[str, str] | None = None
    ) -> Parameters:
        """Those of a function; `owner` is the object whose method it is.

        `read` says what parameters are whose names tell nothing, see `read_by_trial`.
        """
        read = read or {}
        name = name_of(function if owner is None else owner)
        try:
            every = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # of some functions that are written in C
            return cls(name)
        if any(p.kind is p.VAR_POSITIONAL for p in every):
            named = frozenset(p.name for p in every if p.kind is p.KEYWORD_ONLY)
            return cls(name, names=named, anything=any(p.kind is p.VAR_KEYWORD for p in every))
        places = [p for p in every if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        free = [p for p in places if not _is_option(p) and read.get(p.name, INPUT) == INPUT]
        free = free or places[:1]  # as `visible`, `x_pos`: what else should it be
        firm = [p for p in free if p is free[0] or p.name in read or _names_an_input(p.name)]
        inputs = sorted(sorted(free, key=lambda p: p not in firm)[:3], key=free.index)
        led = [a is b for a, b in zip(places, inputs, strict=False)]
        front = led.index(False) if False in led else len(led)
        # Inputs after the first option cannot be given by their place.
        names = ["" if i < front else p.name for i, p in enumerate(inputs)]
        others = [p for p in every if p not in inputs and p.kind is not p.VAR_KEYWORD]
        needed = {p.name for p in every if p.default is p.empty}
        unknown = [p.name for p in others if p.name in needed - {*read} and not _is_of_call(p)]
        roles = dict(zip([p.name for p in inputs], _roles([p.name for p in inputs]), strict=True))
        loose = [(p.name, roles.get(p.name, ""), p.name in needed) for p in free
                 if p not in firm and p.kind is not p.POSITIONAL_ONLY]  # fmt: skip
        return cls(
            name,
            tuple(roles.values()),
            tuple(names),
            sum(p.default is p.empty for p in inputs),
            frozenset(p.name for p in others),
            frozenset(p.name for p in others if p.name in needed),
            tuple(unknown),
            any(p.kind is p.VAR_KEYWORD for p in every),
            _heads_of(owner),
            tuple((p.name if p.kind is p.POSITIONAL_OR_KEYWORD else "", roles[p.name])
                  for p in inputs if p in firm),
            tuple(loose),
            read,
        )  # fmt: skip

    @property
    def like_torch(self) -> bool:
        """Whether its masks have the names of `torch.nn.MultiheadAttention`'s, and their sense."""
        return {"key_padding_mask", "attn_mask"} <= self.names

    @property
    def masks(self) -> dict[str, str]:
        """Its parameters for masks: for the whole mask, and for the mask of the keys."""
        free = sorted(n for n in self.names if _names_a_mask(n) or self.read.get(n) == MASK)
        free = [n for n in free if n not in (*SYNONYMS, *MASKS) or n == "attention_mask"]
        padding = [n for n in free if PADDING.search(n)]
        whole = [n for n in free if n not in padding]
        whole.sort(key=lambda n: (n != "attention_mask", n != "attn_mask", n != "mask"))
        return {kind: several[0] for kind, several in (("whole", whole), ("keys", padding))
                if several}  # fmt: skip

    def lacking(self, request: Request, by_mask: bool = False) -> str:
        """Why it cannot be given the call, in words; empty where it can.

        Causality counts as given in a mask, and a function that has no parameter for it as causal,
        only where `by_mask` says so.
        """
        if self.unknown:
            return f"needs {_listed(self.unknown)}, which no call has"
        if "value" in request.inputs and len(self.inputs) < 2:
            return f"takes one input{self._idle or ' alone'}"
        if "key" in request.inputs and not {"value", "key"} <= {*self.inputs}:
            _, value, key = request.three
            if not (key.shape == value.shape and np.array_equal(key, value, equal_nan=True)):
                return "takes two inputs alone"
        lost = self._assigned(request, by_mask)[2]
        return f"does not take {_listed(lost)}{self._idle}" if lost else ""

    @property
    def _idle(self) -> str:
        """What is said of parameters that a trial finds to be neither inputs nor masks."""
        names = _listed(name for name, kind in self.read.items() if kind == NEITHER)
        words = "fails or changes nothing as an input and as a mask: name it `value` or `mask`"
        return names and f", as {names} {words} if it is one"

    def joined(self, request: Request) -> str:
        """Which masks would reach it as one, in words; empty where none would."""
        folded = self._assigned(request)[1]
        keys = {"value_mask", "key_mask"} if "keys" in self.masks else set()
        whole = [name for name in folded if name not in keys]
        return f"takes {_listed(whole)} as one mask" if len(whole) > 1 else ""

    def forms(self, request: Request) -> Iterator[Fitted]:
        """The forms in which it may take a call, the likeliest first.

        Raises:
            LayoutError: it cannot be given the call.
        """
        reason = self.lacking(request, by_mask=True)
        if reason:
            raise LayoutError(f"{self.name} {reason}.")
        present = [i + 1 for i, name in enumerate(self.inputs) if name in request.inputs]
        count = max(self.needs, *present)
        inputs = tuple(zip(self.places[:count], self.inputs[:count], strict=True))
        own, folded, _ = self._assigned(request, by_mask=True)
        if self.like_torch and "need_weights" in self.names:
            own["need_weights"] = False
        own |= {name: UNSET[name] for name in self.needed & UNSET.keys() - own.keys()}
        needs_mask = not (self.needed - own.keys()).isdisjoint(self.masks.values())
        if not folded and not needs_mask:
            yield Fitted(inputs, own)
            mask = own.get("attention_mask")
            if mask is not None:  # it may take an axis of heads, or of the batch, alone
                for other in _shapes(_dense(request, ["attention_mask"]), False, 0):
                    if other.shape != mask.shape:
                        told = f"`attention_mask` is given as {other.shape}, True = may attend"
                        yield Fitted(inputs, {**own, "attention_mask": other}, (told,))
            return
        refusal = ""
        if "use_causal_mask" in folded:  # a mask of its keys alone cannot say that
            refusal = (
                f"{self.name} takes neither `use_causal_mask` nor a mask of queries and keys. Give "
                "it a parameter `is_causal`, or a mask (B, T, S)."
            )
        for masks, words in self._mask_forms(request, folded):
            yield Fitted(inputs, {**own, **masks}, ("; ".join(words),), refusal)

    def _assigned(
        self, request: Request, by_mask: bool = False
    ) -> tuple[dict[str, Any], list[str], list[str]]:
        """Arguments by its own names; those that reach it in a mask of another name; the others."""
        own: dict[str, Any] = {}
        folded, lost = [], []
        every = request.arguments()
        for name, value in every.items():
            others = [other for other in SYNONYMS.get(name, ()) if other in self.names]
            keys = "keys" in self.masks and name in ("value_mask", "key_mask")
            if name in self.names or others:
                own[name if name in self.names else others[0]] = value
            elif name in MASKS and (keys or "whole" in self.masks):
                folded.append(name)
            elif self.anything:
                own[name] = value
            elif name != "seed" and (isinstance(value, np.ndarray) or bool(value)):
                twin = every.get(name.removeprefix("key_")) if name.startswith("key_") else None
                if twin is None or name in MASKS or not np.array_equal(twin, value):
                    lost.append(name)  # what one argument says for queries and keys, is not
        whole = self.masks.get("whole")
        if by_mask and lost == ["use_causal_mask"] and whole and request.inputs["query"].ndim == 3:
            folded.append(lost.pop())
        if by_mask and lost == ["use_causal_mask"] and not whole:
            lost.clear()  # it has no say in that: what it computes shows whether it is causal
        if whole in own and any(n not in ("value_mask", "key_mask") or "keys" not in self.masks
                                for n in folded):  # fmt: skip
            folded.append(str(whole))
            del own[str(whole)]
        return own, folded, lost

    def _mask_forms(
        self, request: Request, folded: list[str]
    ) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Masks by its own names, in each shape that it may want, and words for it."""
        kinds = self.masks
        keys = [n for n in folded if n in ("value_mask", "key_mask") and "keys" in kinds]
        rest = [n for n in folded if n not in keys]
        padding, words = {}, []
        if keys or kinds.get("keys") in self.needed:
            shown = np.ones(request.three[1].shape[:2], bool)
            seen = np.logical_and.reduce([shown, *(request.masks[n] for n in keys)])
            padding[kinds["keys"]] = ~seen
            words.append(f"`{kinds['keys']}` is given with True = padding")
        if not rest and kinds.get("whole") not in self.needed:
            yield padding, words
            return
        name, seen = kinds["whole"], _dense(request, rest)
        hidden = self.like_torch or not _words(name).isdisjoint(HIDES)
        sense = "may not attend" if hidden else "may attend"
        for dtype, yes in ((np.dtype(bool), "True"), (request.inputs["query"].dtype, "1")):
            for mask in _shapes(seen, self.like_torch, self.heads):
                told = f"`{name}` is given as {mask.shape}, {yes} = {sense}"
                given = (~mask if hidden else mask).astype(dtype)
                yield {**padding, name: given}, [*words, told]


def _shapes(seen: np.ndarray, torch: bool, heads: int) -> Iterator[np.ndarray]:
    """A mask (B, 1 or H, T, S) in each shape that attention takes masks in."""
    batch, count, queries, keys = seen.shape
    of_all = count == 1 and np.array_equal(seen, np.broadcast_to(seen[:1], seen.shape))
    if torch:
        if of_all:
            yield seen[0, 0]
        if heads:
            whole = np.broadcast_to(seen, (batch, heads, queries, keys))
            yield whole.reshape(batch * heads, queries, keys)
    yield seen  # before (B, T, S), whose batch a port with as many heads would take for these
    if count == 1:
        yield seen[:, 0]
    if count == 1 and np.array_equal(seen, np.broadcast_to(seen[:, :, :1], seen.shape)):
        yield seen[:, 0, 0]
    if of_all and not torch:
        yield seen[0, 0]


def _dense(request: Request, names: list[str]) -> np.ndarray:
    """These masks as one (B, 1 or H, T, S), True = may attend."""
    query, value, _ = request.three
    batch, queries, keys = query.shape[0], query.shape[1], value.shape[1]
    seen = np.ones((batch, 1, queries, keys), bool)
    for name in names:
        if name == "use_causal_mask":
            seen = seen & np.tri(queries, keys, dtype=bool)
        else:
            seen = seen & spread_mask(name, request.masks[name], 1, 1, 1)
    return seen


def exits_as_errors(function: Function) -> Function:
    """A function that calls the user's code, with a RuntimeError where that exits.

    The exit's status 0 would say that all is well.
    """

    @functools.wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        try:
            return function(*args, **named)
        except SystemExit as error:
            raise RuntimeError(f"The code raised {error!r}, as `sys.exit` does.") from error

    return cast(Function, checked)


def first_that_runs(
    forms: Iterator[Fitted], run: Callable[[Fitted], Mapping[str, Any]], request: Request
) -> tuple[Fitted, Mapping[str, Any]]:
    """The first form in which a callable gives an output of the query's lengths; and the results.

    Where none does, what the first gives, or raises.

    Raises:
        LayoutError: none does, and what was tried is no more than a guess.
    """
    failed: list[Exception] = []
    ran: list[tuple[Fitted, Mapping[str, Any]]] = []
    refusal = ""
    for form in forms:
        refusal = form.refusal
        try:
            ran.append((form, run(form)))
        except Exception as error:  # whatever it raises; another form may be the one it takes
            failed.append(error)
            continue
        if tuple(ran[-1][1]["output"].shape[:-1]) == request.inputs["query"].shape[:-1]:
            return ran[-1]
    if refusal:
        raise LayoutError(refusal) from next(iter(failed), None)
    if ran:
        return ran[0]
    raise failed[0]


class CalledByNames:
    """An adapter of a callable that is called by its own names."""

    def __init__(self, function: Callable[..., Any], owner: Any) -> None:
        self._reading = functools.partial(Parameters.of, function, owner)
        self.parameters = self._reading()
        self.name = self.parameters.name

    def results(self, request: Request, form: Fitted) -> Mapping[str, Any]:
        """The results by name, in its framework, for the inputs of a request in one form."""
        raise NotImplementedError

    def settle(self, request: Request) -> None:
        """Find out what parameters are whose names tell nothing."""
        if self.parameters.loose:
            read = read_by_trial(self.parameters, request, self.results)
            self.parameters = self._reading(read=read)

    def lacking(self, request: Request, by_mask: bool = False) -> str:
        """As `Parameters.lacking`, with parameters that are settled."""
        self.settle(request)
        return self.parameters.lacking(request, by_mask)


def read_by_trial(
    given: Parameters, request: Request, results: Callable[[Request, Fitted], Mapping[str, Any]]
) -> dict[str, str]:
    """What parameters are whose names tell nothing: what runs and changes the output.

    `results` gives those of the callable; `given` is what its signature tells. A mask may run as an
    input, where its axes are cut; an input runs as a mask only where the output gets its width.
    """
    query = request.inputs["query"]
    if query.ndim != 3:
        return dict.fromkeys((name for name, *_ in given.loose), INPUT)
    widths = {name: x.shape[-1] for name, x in zip(INPUTS, request.three, strict=True)}
    # A length that no other axis has, so that no input has the shape of a mask.
    batch, length, _ = query.shape
    length = next((n for n in range(length, 1, -1) if n not in (batch, *widths.values())), length)
    probe = request.with_inputs({"query": query[:, :length]})
    rng, until = np.random.default_rng(0), time.perf_counter() + SECONDS
    shape = (2, batch, length)
    pairs = {n: rng.standard_normal((*shape, widths[role or "query"])).astype(query.dtype)
             for n, role, _ in given.loose}  # fmt: skip
    seen = rng.random((batch, 1, length, length)) < 0.5
    seen |= np.eye(length, dtype=bool)
    of_keys = np.broadcast_to(np.arange(length) <= length // 2, seen.shape)
    masks = [np.stack([mask, np.ones_like(mask)]).astype(kind) for kind in (bool, query.dtype)
             for one in (seen, of_keys) for mask in _shapes(one, False, 0)]  # fmt: skip

    def width(name: str, pair: Any, others: Mapping[str, Any]) -> int:
        """That of the output, where it depends on which of two arrays a parameter is; else 0."""
        if time.perf_counter() > until:
            return 0
        forms = [Fitted(given.firm, {**others, name: array}) for array in pair]
        try:
            one, other = (as_numpy(results(probe, form)["output"]) for form in forms)
        except (Exception, SystemExit):  # it takes no such array
            return 0
        same = one.shape[:-1] != (batch, length) or not differs_between_calls(one, other)
        return 0 if same else one.shape[-1]

    read = {}
    for name, role, needed in given.loose:
        every = {n: pairs[n][0] for n, known, _ in given.loose if known and n != name}
        least = {n: every[n] for n, _, needs in given.loose if needs and n in every}
        own = role and (width(name, pairs[name], every) or width(name, pairs[name], least))
        found = (width(name, pair, least) for pair in masks)
        is_mask = any(one and one == (own or one) for one in found)
        read[name] = MASK if is_mask else INPUT if own or needed else NEITHER
    return read


def name_of(function: Any) -> str:
    """The name of a callable in messages, without the place where it was made."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    name = name.rpartition("<locals>.")[2]
    return "the function" if name == "<lambda>" else name


def _heads_of(owner: Any) -> int:
    """How many heads an object says that it has; 0 where it does not say."""
    for name in HEADS:
        try:
            said = getattr(owner, name, 0)
        except Exception:  # of a property of the user's
            continue
        if type(said) is int and said > 0:
            return said
    return 0


def _is_option(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is not an input."""
    return _is_of_call(parameter) or not _words(parameter.name).isdisjoint(NO_INPUT)


def _words(name: str) -> set[str]:
    return {name, *(word.strip("0123456789") for word in name.lower().split("_"))}


def _names_a_mask(name: str) -> bool:
    words = _words(name)
    shows = PADDING.search(name) or not words.isdisjoint(SHOWS)
    return "mask" in name or bool(shows and words.isdisjoint(NO_INPUT))


def _names_an_input(name: str) -> bool:
    return any(_plays(name, role) for role in INPUTS) or not _words(name).isdisjoint(OF_INPUTS)


def _is_of_call(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is one of a call's other arguments, or has a value of its own."""
    if parameter.default is not parameter.empty and parameter.default is not None:
        return True
    name = parameter.name
    return _names_a_mask(name) or name.endswith("bias") or name in OPTIONS


def _roles(names: list[str]) -> list[str]:
    """Which input each of these parameters is: by its name, else by its place."""
    roles = [next((role for role in INPUTS if _plays(name, role)), "") for name in names]
    if len(set(filter(None, roles))) < sum(map(bool, roles)):
        roles = [""] * len(names)  # two of one name say nothing
    free = [role for role in INPUTS if role not in roles]
    return [role or free.pop(0) for role in roles]


def _plays(name: str, role: str) -> bool:
    return name in (role, role[0], f"{role}s", f"{role}_states", f"x_{role[0]}", f"x{role[0]}",
                    f"{role[0]}_in", f"input{role[0].upper()}", f"input_{role[0]}")  # fmt: skip


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)

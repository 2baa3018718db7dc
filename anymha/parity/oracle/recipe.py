"""The layer as data and a pipeline of stages, in float64 NumPy, which may be changed to be wrong.

The oracle runs it unchanged. The comparison runs it with a known mistake in it, to see whether that
explains a candidate's results, and runs one stage alone on a candidate's own earlier stages.

    query, key, value     -> x . kernel + bias                          (B, T, H, d_k), ...
    logits                -> scale * query . key                        (B, H, T, S)
    masked_logits         -> logits + bias, -inf where not allowed
    probabilities         -> softmax over the keys; zeros for a row of -inf
    dropped_probabilities -> probabilities after dropout
    context               -> dropped_probabilities . value              (B, T, H, d_v)
    output                -> context . kernel + bias                    (B, T, O)

An option of the attention (a softcap, rotary positions) changes what some of these steps give: see
`Section`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property, lru_cache, reduce
from operator import itemgetter
from typing import Any, ClassVar, Self

import numpy as np

from anymha.parity.oracle.decoded import Decoded

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]


@lru_cache(maxsize=1 << 12)
def _matrices(
    formula: str, first: Shape, second: Shape
) -> tuple[Sequence[Shape], Sequence[Shape], bool] | None:
    """How the formula of arrays of two shapes is a product of matrices; None where it is not.

    Returned are the axes of both in the order of common ones, rows, and columns, and where those of
    the product are in the result; then the shapes of both and of the product as matrices, none
    where they are that already; and whether there are common axes.
    """
    (one, other), result = formula.partition("->")[0].split(","), formula.partition("->")[2]
    summed = [n for n in one if n in other and n not in result]
    common = [n for n in result if n in one and n in other]
    own = [n for n in result if n in one and n not in other]
    others = [n for n in result if n in other and n not in one]
    orders = (common + own + summed, one), (common + summed + others, other)
    orders += ((common + own + others, result),)
    if not summed or any(sorted(names) != sorted(given) for names, given in orders):
        return None
    axes = [tuple(map(given.index, names)) for names, given in orders[:2]]
    axes.append(tuple(map(orders[2][0].index, result)))
    if (len(first), len(second)) != (len(one), len(other)):
        return axes, (), bool(common)  # which fails, as it should
    sizes = dict(zip(other, second, strict=True)) | dict(zip(one, first, strict=True))
    if any(sizes[n] != size for n, size in zip(other, second, strict=True)):
        return None  # `np.einsum` repeats axes of length 1, or says what does not fit
    shapes = [[sizes[n] for n in names] for names in (common, own, summed, others)]
    if len(own) == len(summed) == len(others) == 1:
        return axes, (), bool(common)
    front, (row, inner, column) = shapes[0], map(math.prod, shapes[1:])
    whole = (*front, row, inner), (*front, inner, column), (*front, *shapes[1], *shapes[3])
    return axes, whole, bool(common)


def einsum(formula: str, *arrays: np.ndarray) -> np.ndarray:
    """`np.einsum`, by products of matrices where it is one."""
    way = _matrices(formula, arrays[0].shape, arrays[1].shape) if len(arrays) == 2 else None
    if way is None:
        return np.einsum(formula, *arrays, optimize=len(arrays) > 2)
    axes, shapes, common = way
    first, second = arrays[0].transpose(axes[0]), arrays[1].transpose(axes[1])
    if shapes:
        first, second = first.reshape(shapes[0]), second.reshape(shapes[1])
    if common:
        with np.errstate(all="ignore"):  # as `np.einsum` and `np.dot` are silent
            product = np.matmul(first, second)
    else:
        product = np.dot(first, second)
    return (product.reshape(shapes[2]) if shapes else product).transpose(axes[2])


class Section:
    """One option of the attention, as the oracle computes it; this base changes nothing.

    A subclass stands in a file of its own in `anymha.parity.oracle.features`, as its constant
    ``SECTION``, and shares no code with the layer. Its methods are asked at every stage, by the
    stage's name, after the step of the stage itself.

    Args:
        value: The option's value.

    Attributes:
        option: The name of the option, a field of `AttentionConfig`.
        examples: Values that change the output a lot where logits are of order one; the matrix of
            cases and the self-test take them.
        usual: Values that models use, one of which a port may have in place of another.
        ignores_a_constant: Whether one number added to all logits of a row, before this option
            changes them, still changes no probability. Where it does, the key's bias matters.
        mistakes: Known mistakes with the option: a name, how to fix it, and a function that makes
            the recipes that have it, as `Variants`, from the section and a right recipe; True
            after these where there are so many that they are tried alone.
        faults: Mistakes that the self-test injects into a port: the fault's name, the name in the
            catalogue of mistakes, and the first stage that is wrong.
    """

    option: ClassVar[str]
    examples: ClassVar[tuple[Any, ...]] = ()
    usual: ClassVar[tuple[Any, ...]] = ()
    ignores_a_constant: ClassVar[bool] = False
    mistakes: ClassVar[tuple[tuple[Any, ...], ...]] = ()
    faults: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    def __init__(self, value: Any) -> None:
        self.value = value

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """The section for a config's value; None where the option is off, or is not there."""
        value = getattr(config, cls.option, None)
        return None if value is None or value is False else cls(value)

    @property
    def acts(self) -> Collection[str]:
        """The stages that the option changes; all where a subclass does not say."""
        return STEPS

    def order(self) -> int:
        """The place among the sections that change one stage; the smallest first."""
        return 0

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The stage as the option changes it: from the result of its step and the stages before."""
        return array

    def backward(
        self, stage: str, gradient: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays,
        cancel: bool,
    ) -> np.ndarray:  # fmt: skip
        """The gradient of `array`, the argument of `forward`, from the gradient of its result.

        Without `cancel` it is a size, and every difference is a sum of sizes.
        """
        return gradient

    def own_gradients(
        self, stage: str, gradient: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays,
        cancel: bool,
    ) -> Arrays:  # fmt: skip
        """Gradients of the option's own weights, and its part of the inputs' gradients, by name.

        The arguments are those of `backward`.
        """
        return {}

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """The sizes of the stage's terms, as `Recipe.sizes` counts them, from those of `array`."""
        return sizes

    def own_errors(
        self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray | float:
        """The errors of the option's own numbers, which no sum makes, from its argument `array`.

        They are in units of eps of the dtype in which the option is computed, and broadcast to the
        stage.
        """
        return 0.0

    def ported(self, ops: Any, place: str, array: Any, port: Any) -> Any:
        """An array of the self-test's port as the option changes it, in any framework.

        It is written apart from `forward`, and has the faults that ``port.wrong`` names.

        Args:
            ops: The framework.
            place: A stage's name; or "biased_logits", after the bias and before the masks.
            array: The port's array at that place.
            port: The self-test's port.
        """
        return array


@dataclass(frozen=True)
class Recipe:
    """The data of a computation in float64, and its steps."""

    # Canonical weights; output kernel and bias with a flat output, (H, d_v, O) and (O)
    weights: Arrays
    inputs: Arrays  # "query" (B, T, D_q), "value" (B, S, D_v) and "key" (B, S, D_k)
    scale: float  # Factor of the logits
    # Booleans by the name of their argument, each of which broadcasts to (B, H, T, S); True = may
    # attend; their AND holds
    masks: Arrays = field(default_factory=dict)
    causal: bool = False  # Whether query i sees only keys ``j <= i + offset``
    window: int | None = None  # Query i sees only keys with ``|i + offset - j| < window``
    # Position of the first query among the keys, of each member of the batch (B,)
    offset: np.ndarray | None = None
    # The positions that the call gives of queries (1 or B, T) and keys (1 or B, S)
    positions: np.ndarray | None = None
    key_positions: np.ndarray | None = None
    # The segments of queries (1 or B, T) and keys (1 or B, S); `masks` has what they hide
    segments: np.ndarray | None = None
    key_segments: np.ndarray | None = None
    bias: np.ndarray | None = None  # Added to the logits, broadcasts to (B, H, T, S)
    kept: np.ndarray | None = None  # The factors of dropout on the probabilities, (B, H, T, S)
    # The step of each stage, in order
    steps: Mapping[str, Step] = field(default_factory=lambda: STEPS)
    # How the sequences were read, where they were read step by step: positions then count the
    # valid columns of each row
    decoded: Decoded | None = None
    # The options that change the results of steps, in the order of their `order`
    sections: tuple[Section, ...] = ()
    # Lengths of the axes that the batch was folded from; empty: it is one axis
    batches: tuple[int, ...] = ()
    # Stages that are as in the recipe from which this one was made
    known: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _begun(self) -> Arrays:
        """The stages that are computed so far, in order."""
        return {}

    def until(self, name: str) -> Arrays:
        """The stages up to one by name, in order, and those after it that are known already."""
        stages = self._begun
        for stage in self.steps:
            if name in stages:
                break
            if stage not in stages:
                known = self.known.get(stage)
                stages[stage] = self.stage(stage, stages) if known is None else known
        return stages

    @property
    def stages(self) -> Arrays:
        """Every stage by name, in order; computed once."""
        return self.until("output")

    @cached_property
    def seen(self) -> np.ndarray:
        """Where queries may attend; booleans that broadcast to (B, H, T, S)."""
        return self.known["seen"] if "seen" in self.known else _allowed(self)

    @cached_property
    def computed(self) -> dict[Any, Any]:
        """What others computed of the recipe, by what they call it; kept as long as the recipe."""
        return {}

    @property
    def sizes(self) -> Arrays:
        """The sizes of the terms of each stage; computed once."""
        return self.sizes_at(0.0, 1.0, 0.0)

    def sizes_at(self, relative: float, own: float, least: float) -> Arrays:
        """The sizes of the terms of each stage, as `sizes` counts them; computed once."""
        place = "sizes", relative, own, least
        if place not in self.computed:
            self.computed[place] = sizes(self, self.stages, relative, own, least)
        return self.computed[place]

    @property
    def heads(self) -> tuple[int, int]:
        """The number of query heads and of key heads."""
        return self.weights["query.kernel"].shape[1], self.weights["key.kernel"].shape[1]

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Batch, queries, keys."""
        (batch, queries, _), keys = self.inputs["query"].shape, self.inputs["key"].shape[1]
        return batch, queries, keys

    def places(self, stage: str) -> np.ndarray:
        """The positions of queries or of keys, (1 or B, length): those of the call, or indices."""
        given = self.positions if stage == "query" else self.key_positions
        length = self.inputs[stage].shape[1]
        if given is not None and given.shape[1] == length:  # a mistake may turn the axes
            return given
        indices = np.arange(length)[None]
        if self.decoded is not None and self.decoded.valid.shape[1] == length:
            indices = self.decoded.places
        if stage != "query" or self.offset is None:
            return indices
        return indices + np.reshape(self.offset, (-1, 1))

    def but(self, **changes: Any) -> Recipe:
        """The recipe with other fields; it knows the stages that these do not change."""
        changed: set[str] = set()
        for name, new in changes.items():
            changed.update(_changed(self, name, new))
        every = {**self.known, **self._begun}
        known = {name: every[name] for name in _untouched(frozenset(changed)) if name in every}
        if MASKING.isdisjoint(changes):
            known["seen"] = self.seen
        made = object.__new__(Recipe)  # a search makes thousands, which `replace` is slow for
        fresh = {"known": known, "_begun": {}, "computed": {}}
        vars(made).update(zip(_FIELDS, _VALUES(vars(self)), strict=True), **changes, **fresh)
        return made

    def alone(self) -> Recipe:
        """The recipe without what has been computed of it."""
        made: Recipe = object.__new__(type(self))
        vars(made).update(zip(_FIELDS, _VALUES(vars(self)), strict=True))
        return made

    def of_batch(self, at: int) -> Recipe:
        """The recipe for one element of the batch."""

        def own(array: np.ndarray | None) -> np.ndarray | None:
            return array if array is None or len(array) == 1 else array[at : at + 1]

        inputs = {name: array[at : at + 1] for name, array in self.inputs.items()}
        masks = {
            n: m if m.ndim < 4 or len(m) == 1 else m[at : at + 1] for n, m in self.masks.items()
        }
        names = ("offset", "positions", "key_positions", "segments", "key_segments", "bias", "kept")
        others: dict[str, Any] = {name: own(getattr(self, name)) for name in names}
        if self.decoded is not None:
            others["decoded"] = self.decoded.of_batch(at)
        return self.but(inputs=inputs, masks=masks, **others)

    def stepping(self, stage: str, step: Step) -> Recipe:
        """The recipe with another step for a stage; the sections change its result as before."""
        return self.but(steps={**self.steps, stage: step})

    def after(self, names: Collection[str], change: Callable[[np.ndarray], np.ndarray]) -> Recipe:
        """The recipe with the results of the steps of these stages changed."""
        wrong = self
        for name in names:
            own = self.steps[name]
            wrong = wrong.stepping(name, lambda r, stages, own=own: change(own(r, stages)))
        return wrong

    @property
    def options(self) -> dict[str, Any]:
        """The values of the options that are on, by name."""
        return {section.option: section.value for section in self.sections}

    def with_section(self, section: Section) -> Recipe:
        """The recipe with an option; it replaces another value of the option."""
        others = [one for one in self.sections if one.option != section.option]
        return self.but(sections=ordered((*others, section)))

    def without_section(self, option: str) -> Recipe:
        """The recipe with an option switched off."""
        return self.but(sections=tuple(s for s in self.sections if s.option != option))

    def stage(self, name: str, stages: Arrays) -> np.ndarray:
        """A stage, from those before it: the result of its step, changed by the sections."""
        array = self.steps[name](self, stages)
        for section in self.sections:
            array = section.forward(name, array, self, stages)
        return array

    def taken(self, name: str, stages: Arrays) -> list[tuple[Section, np.ndarray]]:
        """Each section with the array that it takes at a stage, in their order."""
        if not self.sections:
            return []
        array, pairs = self.steps[name](self, stages), []
        for section in self.sections:
            pairs.append((section, array))
            array = section.forward(name, array, self, stages)
        return pairs


MASKING = {"inputs", "masks", "causal", "window", "offset", "decoded"}
"""The fields that tell where queries may attend."""

_FIELDS = tuple(one.name for one in fields(Recipe))
_VALUES = itemgetter(*_FIELDS)

Step = Callable[[Recipe, Arrays], np.ndarray]
"""Computes a stage from a recipe and the stages before it."""

Variants = Iterator[tuple[str, Recipe]]
"""Words for a variant of a mistake, and the recipe that has it."""


def ordered(sections: tuple[Section, ...]) -> tuple[Section, ...]:
    """Sections in the order in which they change one stage."""
    return tuple(sorted(sections, key=lambda section: (section.order(), section.option)))


@cache
def _untouched(changed: frozenset[str]) -> tuple[str, ...]:
    """The stages that stay where the steps of others change."""
    first = min([PLACES[name] for name in changed if name in PLACES], default=len(ORDER))
    # The projections do not depend on each other.
    return tuple(name for name in ORDER[: max(first, 3)] if name not in changed)


def _changed(recipe: Recipe, field_name: str, new: Any) -> Collection[str]:
    """The stages whose own steps another value of a field may change."""
    if field_name in ("masks", "causal", "window", "bias"):
        return {"masked_logits"}
    if field_name in ("scale", "kept"):
        return {"scale": {"logits"}, "kept": {"dropped_probabilities"}}[field_name]
    if field_name in ("positions", "key_positions"):
        return {"query" if field_name == "positions" else "key"}
    if field_name == "steps":
        steps = recipe.steps
        return [name for name in ORDER if new[name] is not steps[name]]
    if field_name == "weights":
        known = recipe.weights
        names = [n for n, array in new.items() if known.get(n) is not array]
        names += [n for n in known if n not in new]
        own = {n.partition(".")[0] for n in names}
        return own if own <= {*STEPS} else STEPS  # a section's weights may act anywhere
    if field_name == "sections":
        one, other = ({id(s): s for s in sections} for sections in (recipe.sections, new))
        return {name for at in one.keys() ^ other.keys() for name in (one | other)[at].acts}
    return STEPS


def projected(recipe: Recipe, name: str) -> np.ndarray:
    """An input's heads, (B, T, H, d)."""
    y = einsum("btd,dhk->bthk", recipe.inputs[name], recipe.weights[f"{name}.kernel"])
    return y + recipe.weights.get(f"{name}.bias", 0.0)


def reads(recipe: Recipe) -> np.ndarray:
    """The key head that each query head reads."""
    return _read(*recipe.heads)


@cache
def _read(heads: int, shared: int) -> np.ndarray:
    order = np.arange(heads) // (heads // shared)
    order.setflags(write=False)
    return order


def allowed(recipe: Recipe) -> np.ndarray:
    """Where queries may attend, by masks and position; booleans that broadcast to (B, H, T, S)."""
    return recipe.seen


def _allowed(recipe: Recipe) -> np.ndarray:
    seen = reduce(np.logical_and, recipe.masks.values(), np.ones((1, 1, 1, 1), bool))
    _, queries, keys = recipe.lengths
    offset = np.zeros(1, int) if recipe.offset is None else recipe.offset
    places = np.arange(queries)[None], np.arange(keys)[None]
    if recipe.decoded is not None and queries == keys:
        places = recipe.decoded.places, recipe.decoded.places
    distance = places[1][:, None, None] - places[0][:, None, :, None]
    distance = distance - offset[:, None, None, None]
    if recipe.causal:
        seen = seen & (distance <= 0)
    if recipe.window is not None:
        seen = seen & (np.abs(distance) < recipe.window)
    return seen


def logits_by(
    recipe: Recipe, stages: Arrays, heads: Callable[[Recipe], np.ndarray] = reads
) -> np.ndarray:
    """The scaled products of queries and keys; `heads` says which key head a query head reads."""
    keys = stages["key"][:, :, heads(recipe)]
    return recipe.scale * einsum("bthk,bshk->bhts", stages["query"], keys)


def masked(recipe: Recipe, stages: Arrays) -> np.ndarray:
    """The logits with the bias, and -inf where a query may not attend."""
    logits = stages["logits"] if recipe.bias is None else stages["logits"] + recipe.bias
    return np.where(allowed(recipe), logits, -np.inf)


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    """Over an axis; where all of it is -inf, zeros."""
    top = np.maximum.reduce(logits, axis, keepdims=True, initial=-np.inf)
    if np.minimum.reduce(top, None, initial=np.inf) > -np.inf:  # false of NaN too
        weights = np.exp(logits - top)
        return np.divide(weights, np.add.reduce(weights, axis, keepdims=True), out=weights)
    empty = top == -np.inf
    weights = np.exp(logits - np.where(empty, 0.0, top))
    return weights / np.where(empty, 1.0, np.add.reduce(weights, axis, keepdims=True))


def dropped(recipe: Recipe, stages: Arrays) -> np.ndarray:
    """The probabilities after dropout."""
    whole = stages["probabilities"]
    return whole if recipe.kept is None else whole * recipe.kept


def context_by(
    recipe: Recipe, stages: Arrays, heads: Callable[[Recipe], np.ndarray] = reads
) -> np.ndarray:
    """The weighted sum of the values of each head; `heads` as for `logits_by`."""
    values = stages["value"][:, :, heads(recipe)]
    return einsum("bhts,bshv->bthv", stages["dropped_probabilities"], values)


def output(recipe: Recipe, stages: Arrays) -> np.ndarray:
    """The heads brought together."""
    y = einsum("bthv,hvo->bto", stages["context"], recipe.weights["output.kernel"])
    return y + recipe.weights.get("output.bias", 0.0)


STEPS: Mapping[str, Step] = {
    "query": lambda recipe, stages: projected(recipe, "query"),
    "key": lambda recipe, stages: projected(recipe, "key"),
    "value": lambda recipe, stages: projected(recipe, "value"),
    "logits": logits_by,
    "masked_logits": masked,
    "probabilities": lambda recipe, stages: softmax(stages["masked_logits"]),
    "dropped_probabilities": dropped,
    "context": context_by,
    "output": output,
}
"""The steps of the layer."""

ORDER = tuple(STEPS)
PLACES = {name: at for at, name in enumerate(ORDER)}
"""The stages in order, and the place of each."""


def sizes(
    recipe: Recipe, stages: Arrays, relative: float = 0.0, own: float = 1.0, least: float = 0.0
) -> Arrays:
    """The sizes of the terms of each stage, however much they cancel.

    The size of a sum is the root of the sum of its squared terms, or its own value where that is
    greater, as rounding errors have random signs. Stages after the logits have the size of the
    effect of the logits' errors.

    A product a b of two stages of the sizes A and B is off by A b and by a B, and by A B times
    `relative`, the error that one unit of size stands for: an error of one factor is not multiplied
    by another. So errors that grow with positions, those of the angles of rotary positions
    (`Section.own_errors`), make those of the logits grow as much, and not with the square. One eps
    of theirs counts as `own` units of size. Projections have `least` more, the size of what
    underflows, but are off by no more than themselves: a norm makes small numbers great, and their
    errors.

    By stage, and for "scores", the array broadcasts to it: one size for each row of logits and
    probabilities, and for each feature of each position of projections, context and output, which
    are sums of their own.
    """

    def size(sums: np.ndarray, stage: np.ndarray) -> np.ndarray:
        """Of each element, from the sum of its squared terms."""
        finite = np.nan_to_num(np.abs(stage), nan=0.0, posinf=0.0, neginf=0.0)
        if sums.shape != finite.shape:  # a mistake turned the axes
            sums = np.max(sums, initial=0.0)
        return np.maximum(np.sqrt(sums), finite)

    kept: Arrays = {}

    def keep(name: str, array: np.ndarray) -> np.ndarray:
        for section, taken in recipe.taken(name, stages):
            array = section.sizes(name, array, taken, recipe, stages)
            errors = section.own_errors(name, taken, recipe, stages)
            array = np.hypot(array, own * errors) if np.ndim(errors) else array
        kept[name] = array
        return array

    def keep_sum(name: str, sums: np.ndarray) -> np.ndarray:
        """Of a stage that is a sum, before the sections change it."""
        sections = recipe.taken(name, stages)
        return keep(name, size(sums, sections[0][1] if sections else stages[name]))

    for name in ("query", "key", "value"):
        x, w = recipe.inputs[name], recipe.weights[f"{name}.kernel"]
        bias = np.square(recipe.weights.get(f"{name}.bias", 0.0))
        sums = _squared("btd,dhk->bthk", x, w) + bias
        keep_sum(name, sums + (np.minimum(least**2, sums / relative**2) if least else 0.0))
    heads = reads(recipe)
    keys = kept["key"][:, :, heads], stages["key"][:, :, heads]
    pairs = (kept["query"], stages["query"]), keys
    logits = keep_sum("logits", recipe.scale**2 * _product("bthk,bshk->bhts", *pairs, relative))
    bias = 0.0 if recipe.bias is None else np.nan_to_num(recipe.bias, posinf=0.0, neginf=0.0)
    masked = keep_sum("masked_logits", np.square(logits) + np.square(bias))
    shares = size(np.zeros(1), stages["probabilities"])
    # A logit that is off by d changes its share p by p (1 - p) d, and each other share q by q p d.
    # The exponent is rounded too, and about log p: great where a sink leaves little.
    exponents = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    squares = np.square(masked) + np.square(exponents)
    others = np.sum(np.square(shares) * squares, axis=-1, keepdims=True)
    spread = np.sqrt(1 + squares + others)
    keep("probabilities", shares * spread)
    left = size(np.zeros(1), stages["dropped_probabilities"])
    dropped = keep("dropped_probabilities", spread * left)
    values = kept["value"][:, :, heads], stages["value"][:, :, heads]
    pairs = (dropped, stages["dropped_probabilities"]), values
    keep_sum("context", _product("bhts,bshv->bthv", *pairs, relative))
    mixed = _squared("bthv,hvo->bto", kept["context"], recipe.weights["output.kernel"])
    keep_sum("output", mixed + np.square(recipe.weights.get("output.bias", 0.0)))
    features = ("output", "context", "query", "key", "value")
    rows = {
        name: array if name in features else np.max(array, (1, 3), keepdims=True, initial=0.0)
        for name, array in kept.items()
    }
    return {**rows, "scores": rows["probabilities"]}


def _product(
    formula: str, one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray],
    relative: float,
) -> np.ndarray:  # fmt: skip
    """The sums of the squared terms of a product of two stages, each its sizes and its numbers.

    With sizes A and B of numbers a and b, the terms are (A b)^2 + (a B)^2 - (a b)^2, which is
    (A B)^2 where one size is no greater than its number, and A B times `relative`, squared.
    """
    (wide, a), (high, b) = one, other
    most = _squared(formula, wide, high)
    if np.shape(wide) != np.shape(a) or np.shape(high) != np.shape(b):
        return most  # a mistake turned the axes
    rest = _squared(formula, _beyond(wide, a), _beyond(high, b))
    return np.maximum(most - (1 - min(relative, 1.0) ** 2) * rest, 0.0)


def _beyond(sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The part of sizes that is no part of the numbers: together they are the sizes, as roots."""
    numbers = np.nan_to_num(np.abs(numbers), nan=0.0, posinf=0.0, neginf=0.0)
    return np.sqrt(np.maximum(np.square(sizes) - np.square(numbers), 0.0))


def _squared(formula: str, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sums of the squared terms of a product; NaN and infinity count as zero."""
    one, other = (np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (one, other))
    return einsum(formula, one * one, other * other)

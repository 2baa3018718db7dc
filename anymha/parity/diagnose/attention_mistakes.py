"""Mistakes between the projections: scale, softmax, heads, positions, dropout, arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from anymha.parity.diagnose.bounded_stages import clipped_stages, quantised_heads
from anymha.parity.diagnose.changes import Maker, Row, fields, no_families, steps
from anymha.parity.diagnose.head_maps import averaged, of_groups
from anymha.parity.diagnose.measured import Family, number
from anymha.parity.diagnose.measured_dropout import other_factors
from anymha.parity.diagnose.merged_parts import not_rescaled, parts_merged
from anymha.parity.diagnose.model_steps import BASE, RotaryStep, rotary_of
from anymha.parity.oracle.features.rotary import RotarySection
from anymha.parity.oracle.features.sinks import SinksSection
from anymha.parity.oracle.features.softcap import SoftcapSection
from anymha.parity.oracle.recipe import (
    Arrays,
    Recipe,
    Step,
    Variants,
    context_by,
    logits_by,
    reads,
    softmax,
)

BASES = (500_000.0, 1_000_000.0, 100_000.0, 50_000.0, 5_000.0, 1_000.0, 100.0)
FACTORS = (2.0, 4.0, 8.0, 0.5)
STARTS = (1, 2, 3, 4, -1)

MOST_KEPT = 33
"""Of a row fewer greatest probabilities are kept."""


def _scale_wrong(recipe: Recipe) -> Variants:
    width = recipe.inputs["query"].shape[2]
    d_k, d_v = _width(recipe, "query"), _width(recipe, "value")
    (heads, shared), (_, queries, keys) = recipe.heads, recipe.lengths
    usual = math.isclose(recipe.scale, 1 / math.sqrt(d_k))
    factors = {
        "1/sqrt(width of a head) in place of `scale`": 1 / math.sqrt(d_k),
        "missing": 1.0,
        "applied twice" + ", 1/(width of a head)" * usual: recipe.scale**2,
        "1/sqrt(number of features)": 1 / math.sqrt(width),
        "1/sqrt(width of all heads)": 1 / math.sqrt(heads * d_k),
        "1/sqrt(number of heads)": 1 / math.sqrt(heads),
        "multiplied in place of divided": 1 / recipe.scale if recipe.scale else 0.0,
        f"1/sqrt(number of {'positions' if queries == keys else 'keys'})": 1 / math.sqrt(keys),
    }
    if d_v != d_k:
        factors["1/sqrt(width of a value head)"] = 1 / math.sqrt(d_v)
    if not usual:
        factors["1/(width of a head)"] = 1 / d_k
    if queries != keys:
        factors["1/sqrt(number of queries)"] = 1 / math.sqrt(queries)
    if 1 < shared < heads:
        every = heads / shared * d_k
        factors["1/sqrt(width of the query heads of a group)"] = 1 / math.sqrt(every)
        factors["1/sqrt(width of all key heads)"] = 1 / math.sqrt(shared * d_k)
    rotary = recipe.options.get("rotary")
    columns = rotary.get("dim") if isinstance(rotary, Mapping) else None
    if columns and columns != d_k:
        factors["1/sqrt(rotated columns)"] = 1 / math.sqrt(columns)
        factors["1/sqrt(columns that are not rotated)"] = 1 / math.sqrt(d_k - columns)
    for words, factor in factors.items():
        if not math.isclose(factor, recipe.scale):
            yield words, recipe.but(scale=factor)
    for words, scale in {"after the softmax, not before it": 1.0, "before and after the softmax":
                         recipe.scale}.items():  # fmt: skip
        wrong = recipe if scale == recipe.scale else recipe.but(scale=scale)
        yield words, _changed_shares(wrong, lambda p: p * recipe.scale)


def _any_scale(recipe: Recipe) -> Iterator[Family]:
    """Any factor of the logits, of either sign, beside the right one."""
    known = {math.log(2): "2 to the power in place of e: log2(e) is missing",
             1 / math.log(2): "log2(e) too many",
             2.0: "as of weights of query or key that are taken twice"}  # fmt: skip

    def words(times: float) -> str:
        for factor, meaning in known.items():
            if math.isclose(times, factor, rel_tol=1e-3):
                return f"{number(times)} times, {meaning}"
        return f"{number(times)} times"

    for sign in (1, -1):

        def make(power: float, sign: int = sign) -> Recipe:
            return recipe.but(scale=sign * recipe.scale * math.exp(power))

        def named(power: float, sign: int = sign) -> str:
            return words(sign * math.exp(power))

        yield Family(make, tuple(np.linspace(-6, 6, 25)), named)


def _grown(recipe: Recipe, log: float, least: float) -> Recipe:
    """Logits times a logarithm of the query's position, from 1 on."""
    place = np.maximum(recipe.places("query")[:, None, :, None] + 1.0, 1.0)
    factor = np.maximum(np.log(place) / log, least)
    return recipe.after(("logits",), lambda x: factor * x)


_OR_ONE = {"": 0.0, ", or 1": 1.0}


def _scale_grows(recipe: Recipe) -> Variants:
    """Times the logarithm of the position, or that by the logarithm of the length."""
    keys = recipe.lengths[2]
    for rest, least in _OR_ONE.items():
        yield f"log(position){rest}", _grown(recipe, 1.0, least)
        if keys > 1 and not least:
            yield f"log(position) / log({keys}), of the keys", _grown(recipe, math.log(keys), 0.0)


def _any_growth(recipe: Recipe) -> Iterator[Family]:
    """A logarithm of any base."""
    for rest, least in _OR_ONE.items():

        def make(log: float, least: float = least) -> Recipe:
            return _grown(recipe, log, least)

        def told(log: float, rest: str = rest) -> str:
            return f"log(position) / log({number(math.exp(log))}){rest}"

        yield Family(make, tuple(np.linspace(0.5, 9, 9)), told)


_BOUNDS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "": np.tanh,
    ", by clipping": lambda x: np.clip(x, -1, 1),
    ", x / (1 + |x|) in place of tanh": lambda x: x / (1 + np.abs(x)),
    ", arctan in place of tanh": np.arctan,
    ", a sigmoid in place of tanh": lambda x: 2 * _sigmoid(x) - 1,
    ", erf in place of tanh": lambda x: np.vectorize(math.erf)(x),
    ", tanh twice": lambda x: np.tanh(np.tanh(x)),
    ", clipped above alone": lambda x: np.minimum(x, 1),
    ", clipped below alone": lambda x: np.maximum(x, -1),
}
"""Functions that bound the logits."""


def any_cap(recipe: Recipe) -> Iterator[Family]:
    """Logits that are bounded by another number, or by another function."""
    right = recipe.options.get("softcap")
    place = "none" if right is None else number(right)
    for how, bounds in _BOUNDS.items():

        def make(power: float, bounds: Callable[[np.ndarray], np.ndarray] = bounds) -> Recipe:
            return recipe.with_section(SoftcapSection(math.exp(power), bounds=bounds))

        def words(power: float, how: str = how) -> str:
            cap = math.exp(power)
            same = right is not None and math.isclose(cap, right, rel_tol=1e-3)
            return f"{number(cap)}{'' if same else f' in place of {place}'}{how}"

        yield Family(make, tuple(np.linspace(-3, 5, 17)), words)


def any_base(recipe: Recipe) -> Iterator[Family]:
    """Rotary positions of another base."""
    for section in recipe.sections:
        if isinstance(section, RotarySection):
            own, right = section, section.value["base"]

            def make(power: float, own: RotarySection = own) -> Recipe:
                value = {**own.value, "base": math.exp(power)}
                return recipe.with_section(RotarySection(value, factor=own.factor))

            def words(power: float, right: float = right) -> str:
                return f"{number(math.exp(power))} in place of {right:.9g}"

            yield Family(make, tuple(np.linspace(2, 18, 17)), words)


def any_turn(recipe: Recipe) -> Iterator[Family]:
    """Rotary positions whose angles have a factor, all alike."""
    for section in recipe.sections:
        if isinstance(section, RotarySection):
            own = section

            def make(power: float, own: RotarySection = own) -> Recipe:
                times = dict.fromkeys(own.on, math.exp(power))
                return recipe.with_section(RotarySection(own.value, times=times, factor=own.factor))

            starts = tuple(np.linspace(-3, 2, 11))
            yield Family(make, starts, lambda power: f"by {number(math.exp(power))}")


def _bias_unscaled(recipe: Recipe) -> Variants:
    """The scale taken for the product of a projection, before its bias is added."""
    for name in ("query", "key"):
        bias = recipe.weights.get(f"{name}.bias")
        if bias is not None and recipe.scale:
            weights = {**recipe.weights, f"{name}.bias": bias / recipe.scale}
            yield f"not of the {name}'s bias", recipe.but(weights=weights)


def _with_shares(recipe: Recipe, step: Step) -> Recipe:
    """Other probabilities where a query sees anything; the rows that see nothing stay."""
    own = recipe.steps["probabilities"]

    def whole(recipe: Recipe, stages: Arrays) -> np.ndarray:
        empty = np.isneginf(stages["masked_logits"]).all(-1, keepdims=True)
        return np.where(empty, own(recipe, stages), step(recipe, stages))

    return recipe.stepping("probabilities", whole)


def _shares(
    weigh: Callable[[np.ndarray], np.ndarray], more: float = 0.0, shifted: bool = True
) -> Step:
    """Probabilities as ``weigh(logits)``, divided by their sum and `more`.

    `shifted`: their greatest is subtracted from the logits before.
    """

    def step(_: Recipe, stages: Arrays) -> np.ndarray:
        logits = stages["masked_logits"]
        top = logits.max(-1, keepdims=True)
        top = np.where(np.isfinite(top) & shifted, top, 0.0)
        weights = weigh(logits - top)
        total = weights.sum(-1, keepdims=True) + more
        return np.where(np.isneginf(logits), 0.0, weights / np.where(total == 0, 1.0, total))

    return step


def _denominator(recipe: Recipe) -> Iterator[Family]:
    """Something added to the sum of the exponentials, with or without their maximum removed."""
    for shifted in (True, False):

        def make(power: float, shifted: bool = shifted) -> Recipe:
            return _with_shares(recipe, _shares(np.exp, math.exp(power), shifted))

        def words(power: float, shifted: bool = shifted) -> str:
            more = math.exp(power)
            if shifted:
                return f"{number(more)} added to the denominator, the sum less the maximum"
            many = round(more) if math.isclose(more, round(more), rel_tol=1e-4) else 0
            keys = "one more key" if many == 1 else f"{many} more keys"
            rest = f"{keys} with a logit of zero (padding that is not hidden)"
            rest = rest if many else f"one more logit, {number(power)}"
            return f"{number(more)} added to the denominator, as of {rest}"

        yield Family(make, tuple(np.linspace(-20, 6, 27)), words)


def _power(recipe: Recipe) -> Iterator[Family]:
    """A power of the probabilities, which no longer add up to 1."""

    def make(power: float) -> Recipe:
        return _changed_shares(recipe, lambda p: p**power)

    yield Family(make, tuple(np.linspace(0.25, 3, 12)), lambda n: f"to the power of {number(n)}")


def _added(recipe: Recipe) -> Iterator[Family]:
    """A number added to each probability, of all keys or of those that are seen."""
    for all_keys, again in itertools.product((True, False), repeat=2):

        def make(power: float, all_keys: bool = all_keys, again: bool = again) -> Recipe:
            def step(shares: np.ndarray, seen: np.ndarray) -> np.ndarray:
                more = shares + math.exp(power) * (all_keys | seen)
                return more / more.sum(-1, keepdims=True) if again else more

            return _changed_shares(recipe, step, seen=True)

        def words(power: float, all_keys: bool = all_keys, again: bool = again) -> str:
            which = "each probability" if all_keys else "the probabilities of the keys seen"
            rest = ", and divided by the sum again" if again else ""
            return f"{number(math.exp(power))} added to {which}{rest}"

        yield Family(make, tuple(np.linspace(-16, 2, 19)), words)


def _other_base(recipe: Recipe) -> Iterator[Family]:
    """Powers of 2 or of 10 in place of e, of sinks too, after bias and masks.

    No other base is looked for.
    """
    for base in (2, 10):

        def make(times: float) -> Recipe:
            other = _with_shares(recipe, _shares(lambda x: np.exp(times * x)))
            if "sinks" in recipe.options:
                return other.with_section(SinksSection(True, log_base=times))
            return other

        log = math.log(base)
        words = f"powers of {base} in place of e" + ", `exp2` for `exp`" * (base == 2)
        yield Family(make, (0.999 * log, log, 1.001 * log), lambda _, words=words: words)


def _absolute(p: np.ndarray) -> np.ndarray:
    return p


def _of_greatest(p: np.ndarray) -> np.ndarray:
    """Parts of the greatest of a row."""
    most = p.max(-1, keepdims=True)
    return p / np.where(most > 0, most, 1.0)


def _not_before(p: np.ndarray) -> np.ndarray:
    """What is left of a row's sum by all that are greater, 1 for the greatest."""
    order = np.argsort(-p, axis=-1, kind="stable")
    sorted_ = np.take_along_axis(p, order, -1)
    left = np.empty_like(p)
    np.put_along_axis(left, order, 1 - (np.cumsum(sorted_, -1) - sorted_), -1)
    return left


_CUTS: tuple[tuple[Callable[[np.ndarray], np.ndarray], Callable[[float], str]], ...] = (
    (_absolute, lambda c: f"probabilities below {c:.4g} set to zero"),
    (
        _of_greatest,
        lambda c: f"probabilities below {c:.4g} times a row's greatest set to zero",
    ),
    (_not_before, lambda c: f"the greatest of a row alone kept, until they add up to {1 - c:.4g}"),
)
"""By what probabilities are cut, and the words for where."""


_USUAL_CUTS = (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Where probabilities are cut most often; from the measured places between two of them, no slope
leads to another."""


def _cut(recipe: Recipe) -> Iterator[Family]:
    """Probabilities below a number are zero; what is left is divided by its sum, or not."""
    for (size, told), again in itertools.product(_CUTS, (False, True)):
        sizes = np.unique(size(recipe.stages["probabilities"]))

        def make(
            power: float, again: bool = again, size: Callable[[np.ndarray], np.ndarray] = size
        ) -> Recipe:
            def kept(p: np.ndarray) -> np.ndarray:
                cut = np.where(size(p) < math.exp(power), 0.0, p)
                return _divided(cut) if again else cut

            return _changed_shares(recipe, kept)

        def words(
            power: float, again: bool = again, sizes: np.ndarray = sizes,
            told: Callable[[float], str] = told,
        ) -> str:  # fmt: skip
            cut = math.exp(power)
            at = np.searchsorted(sizes, cut)
            least, most = sizes[max(at - 1, 0)], sizes[min(at, len(sizes) - 1)]
            short = (float(f"{cut:.{digits}g}") for digits in range(1, 9))
            rest = ", the others divided by their sum" if again else ""
            return told(next((one for one in short if least < one <= most), cut)) + rest

        usual = np.log([*_USUAL_CUTS, 1 / max(recipe.lengths[2], 2)])
        yield Family(make, tuple(np.union1d(np.linspace(-9, -0.25, 36), usual)), words)


def _clamped(recipe: Recipe) -> Iterator[Family]:
    """Probabilities of at least or at most a number, hidden keys too or not."""
    ways: Mapping[str, Callable[..., np.ndarray]] = {
        "at least {}": lambda p, seen, c: np.maximum(p, c),
        "at least {}, where keys are seen": lambda p, seen, c: np.where(seen, np.maximum(p, c), p),
        "at most {}": lambda p, seen, c: np.minimum(p, c),
    }
    for (told, clamp), again in itertools.product(ways.items(), (False, True)):

        def make(
            power: float, again: bool = again, clamp: Callable[..., np.ndarray] = clamp
        ) -> Recipe:
            def within(p: np.ndarray, seen: np.ndarray) -> np.ndarray:
                clamped = clamp(p, seen, math.exp(power))
                return _divided(clamped) if again else clamped

            return _changed_shares(recipe, within, seen=True)

        def words(power: float, again: bool = again, told: str = told) -> str:
            bound = told.format(number(math.exp(power)))
            return f"probabilities clamped to {bound}" + ", and divided by their sum" * again

        yield Family(make, tuple(np.linspace(-14, -0.1, 19)), words)


def _shares_measured(recipe: Recipe) -> Iterator[Family]:
    every = (_denominator, _added, _power, _other_base, _cut, _clamped)
    return itertools.chain.from_iterable(make(recipe) for make in every)


def _changed_shares(
    recipe: Recipe, change: Callable[..., np.ndarray], seen: bool = False
) -> Recipe:
    """Probabilities that are changed; with `seen` the change takes what is not masked too."""
    own = recipe.steps["probabilities"]

    def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
        more = (~np.isneginf(stages["masked_logits"]),) if seen else ()
        return change(own(recipe, stages), *more)

    return recipe.stepping("probabilities", step)


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


_WEIGHTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": _sigmoid,
    "relu": _relu,
    "squared relu": lambda x: _relu(x) ** 2,
    "softplus": lambda x: np.logaddexp(0.0, x),
    "the logits themselves": lambda x: x,
    "the logits' absolute values": np.abs,
    "squares": np.square,
    "tanh": np.tanh,
    "elu + 1": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0.0))),
    "gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "leaky relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "the exponential": lambda x: np.exp(np.minimum(x, 700.0)),
}
"""Functions of a logit that stand in the place of the exponential."""

_TOTALS: Mapping[str, Callable[[np.ndarray], Any]] = {
    "divided by their sum": lambda w: w.sum(-1, keepdims=True),
    "not divided by their sum": lambda w: 1.0,
    "divided by the number of keys": lambda w: w.shape[-1],
    "divided by the root of the number of keys": lambda w: math.sqrt(w.shape[-1]),
    "divided by the number of queries": lambda w: w.shape[-2],
    "divided by the sum of their absolute values": lambda w: np.abs(w).sum(-1, keepdims=True),
    "divided by the root of the sum of their squares": lambda w: np.sqrt(
        np.square(w).sum(-1, keepdims=True)
    ),
}


_RELUS = "relu", "squared relu"
"""Functions that may leave nothing in a row."""

_LEAST = tuple(10.0**-n for n in range(3, 13))
"""Numbers that keep a sum from zero."""

_SUMS = {(2,): "the queries", (1,): "the heads", (0,): "the batch", (2, 3): "the queries and keys",
         (1, 2): "the heads and queries", (0, 1): "the batch and heads",
         (0, 2): "the batch and queries", (0, 3): "the batch and keys",
         (1, 3): "the heads and keys", (1, 2, 3): "heads, queries and keys",
         (0, 1, 2, 3): "all numbers"}  # fmt: skip
"""The axes over which a sum without the right one runs, in words."""


def _of_logits(change: Callable[[np.ndarray], np.ndarray], hidden: float | None = 0.0) -> Step:
    """Shares made of the logits; `hidden` are those of hidden keys, None: as they come."""

    def step(_: Recipe, stages: Arrays) -> np.ndarray:
        logits = stages["masked_logits"]
        shares = change(logits)
        return shares if hidden is None else np.where(np.isneginf(logits), hidden, shares)

    return step


def _other_softmax(recipe: Recipe) -> Variants:
    """Other functions of the logits in the place of the softmax."""
    keys = recipe.lengths[2]

    def twice(logits: np.ndarray) -> np.ndarray:
        return softmax(np.where(np.isneginf(logits), -np.inf, softmax(logits)))

    steps = {
        "sigmoid": _of_logits(_sigmoid),
        "softmax twice": _of_logits(twice),
        "softmax twice, hidden keys take part in the second": _of_logits(
            lambda x: softmax(softmax(x)), None
        ),
        "log_softmax": _of_logits(lambda x: np.log(softmax(x))),
        "1 less the probabilities": _of_logits(lambda x: 1 - softmax(x)),
        "divided by the greatest, not by the sum": _of_logits(
            lambda x: softmax(x) / softmax(x).max(-1, keepdims=True)
        ),
        "sigmoid of the logits less the logarithm of the number of keys": _of_logits(
            lambda x: _sigmoid(x - math.log(keys))
        ),
        "all keys alike": _shares(lambda x: np.where(np.isneginf(x), 0.0, 1.0)),
        "the greatest alone": _shares(lambda x: np.where(x == 0, 1.0, 0.0)),
    }
    for words, step in steps.items():
        yield words, _with_shares(recipe, step)


def _in_place_of_softmax(recipe: Recipe) -> Variants:
    """Each function of the logits, divided by each total; of features; running sums."""
    for words, weigh in _WEIGHTS.items():
        for how, total in _TOTALS.items():

            def weighed(
                logits: np.ndarray, weigh: Callable[[np.ndarray], np.ndarray] = weigh,
                total: Callable[[np.ndarray], Any] = total,
            ) -> np.ndarray:  # fmt: skip
                hidden = np.isneginf(logits)
                weights = np.where(hidden, 0.0, weigh(np.where(hidden, 0.0, logits)))
                whole = total(weights)
                return weights / np.where(whole == 0, 1.0, whole)

            yield f"{words}, {how}", _with_shares(recipe, _of_logits(weighed))

        def by_seen(
            logits: np.ndarray, weigh: Callable[[np.ndarray], np.ndarray] = weigh
        ) -> np.ndarray:
            seen = np.isfinite(logits)
            count = np.maximum(seen.sum(-1, keepdims=True), 1)
            return np.where(seen, weigh(np.where(seen, logits, 0.0)), 0.0) / count

        how = "divided by the number of keys that are seen"
        yield f"{words}, {how}", _with_shares(recipe, _of_logits(by_seen))
    for words, how, kept in _kept_from_zero():
        yield f"{words}, {how}", _with_shares(recipe, _of_logits(kept, None))
    heads, even = recipe.heads[0], _shares(lambda x: np.where(np.isneginf(x), 0.0, 1.0))
    for head in range(heads) if 1 < heads <= 16 else ():
        yield f"all keys alike, in head {head} alone", recipe.stepping("probabilities", partial(
            _in_a_head, own=recipe.steps["probabilities"], other=even, head=head))  # fmt: skip
    yield from _of_features(recipe)
    for words, change in _several_times(recipe.scale).items():
        yield words, _with_shares(recipe, _of_logits(change))
    for filled in _FILLED:
        words = f"log_softmax, hidden logits filled with {filled:g} before"
        yield words, recipe.stepping("probabilities", _of_logits(
            lambda x, n=filled: _log_softmax(np.where(np.isneginf(x), n, x)), None))  # fmt: skip
    for axes, words in _SUMS.items():
        each = _with_shares(recipe, _of_logits(_over(axes, of_row=True)))
        yield f"divided by the sum over {words}, less the maximum of each row", each
        if len(axes) == 1:
            yield f"divided by the sum over {words}", _with_shares(recipe, _of_logits(_over(axes)))
    for count in range(1, min(recipe.lengths[2], MOST_KEPT)):

        def greatest(p: np.ndarray, count: int = count) -> np.ndarray:
            return np.where(p >= np.sort(p, axis=-1)[..., -count, None], p, 0.0)

        def divided(p: np.ndarray, greatest: Callable[..., np.ndarray] = greatest) -> np.ndarray:
            return _divided(greatest(p))

        kept = f"the {count} greatest probabilities of a row alone kept"
        yield kept, _changed_shares(recipe, greatest)
        yield f"{kept}, divided by their sum", _changed_shares(recipe, divided)
    for words, step in not_rescaled(recipe.lengths[2]):
        yield words, recipe.stepping("context", step)
    for words, merged in parts_merged(recipe.lengths[2], not np.all(recipe.seen)):
        yield words, _with_shares(recipe, _of_logits(merged, None))


_FILLED = (-1e9, -1e4, -1e6, -1e30, float(np.finfo(np.float32).min))
"""Finite numbers in the place of hidden logits."""


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    less = logits - logits.max(-1, keepdims=True)
    return less - np.log(np.exp(less).sum(-1, keepdims=True))


def _several_times(scale: float) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Softmaxes one after another, along other axes or of other signs, which are divided again."""

    def again(logits: np.ndarray) -> np.ndarray:
        return softmax(np.where(np.isneginf(logits), -np.inf, softmax(logits)))

    def by_sum(shares: np.ndarray, axis: int) -> np.ndarray:
        total = shares.sum(axis, keepdims=True)
        return shares / np.where(total == 0, 1.0, total)

    every: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "softmax three times": lambda x: softmax(
            np.where(np.isneginf(x), -np.inf, again(x))),
        "softmax twice, scaled before the second": lambda x: softmax(
            np.where(np.isneginf(x), -np.inf, scale * softmax(x))),
        "softmax of the negated logits, softmin": lambda x: softmax(
            np.where(np.isneginf(x), -np.inf, -x)),
        "the negative log_softmax": lambda x: -_log_softmax(x),
        "the logarithm of 1 + the probabilities": lambda x: np.log1p(softmax(x)),
        "log_softmax, divided by its sum": lambda x: (y := np.where(
            np.isneginf(x), 0.0, _log_softmax(x))) / y.sum(-1, keepdims=True),
        "the probabilities squared, divided by their sum": lambda x: by_sum(softmax(x) ** 2, -1),
    }  # fmt: skip
    for axis, other in {2: "queries", 1: "heads", 0: "batch"}.items():
        every |= {
            f"softmax over the {other}, then over the keys": lambda x, axis=axis: softmax(
                np.where(np.isneginf(x), -np.inf, softmax(x, axis))),
            f"softmax over the keys, then over the {other}": lambda x, axis=axis: softmax(
                np.where(np.isneginf(x), -np.inf, softmax(x)), axis),
            f"softmax over the {other}, divided by the sum over the keys": lambda x, axis=axis: (
                by_sum(softmax(x, axis), -1)),
            f"softmax over the keys, divided by the sum over the {other}": lambda x, axis=axis: (
                by_sum(softmax(x), axis)),
            f"softmax over the keys, divided by the sum over the {other} and by that over the keys":
                lambda x, axis=axis: by_sum(by_sum(softmax(x), axis), -1),
        }  # fmt: skip
    return every


def _of_features(recipe: Recipe) -> Variants:
    """Linear attention: products of functions of queries and keys in the place of exponentials."""
    every: dict[str, float | None] = {"not divided by the sum": None, "divided by the sum": 0.0}
    every |= {f"divided by the sum and {n:g}": n for n in (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)}
    for words in ("elu + 1", "relu", "the exponential", "squared relu", "softplus", "squares"):
        features = recipe.after(("query", "key"), _WEIGHTS[words])
        for how, least in every.items():
            scaled = features if least == 0 else features.but(scale=1.0)  # a sum has the scale too

            def shares(x: np.ndarray, more: float | None = least) -> np.ndarray:
                seen = np.where(np.isneginf(x), 0.0, x)
                total = 1.0 if more is None else seen.sum(-1, keepdims=True) + more
                return seen / np.where(np.equal(total, 0), 1.0, total)

            detail = f"none: {words} of the features of queries and keys, {how}"
            yield detail, scaled.stepping("probabilities", _of_logits(shares))

    for words, axis in {"over the features": -1, "over the positions": 1}.items():
        shaped = recipe.after(("query",), softmax).after(("key",), lambda x, a=axis: softmax(x, a))
        for scale in {1.0: "", recipe.scale: ", scaled"}.items():
            plain = shaped.but(scale=scale[0]).stepping("probabilities", _of_logits(lambda x: x))
            detail = f"none: softmax of queries over the features, of keys {words}{scale[1]}"
            yield detail, plain


def _kept_from_zero() -> Iterator[tuple[str, str, Callable[[np.ndarray], np.ndarray]]]:
    """Functions that may leave nothing in a row, and what such a row gives then."""
    ways: Mapping[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
        "added to each, hidden keys too": lambda w, seen, least: _divided(w + least),
        "added to each that is seen": lambda w, seen, least: _divided(w + least * seen),
        "added to the sum": lambda w, seen, least: w / (w.sum(-1, keepdims=True) + least),
        "the least of the sum": lambda w, seen, least: w / np.maximum(
            w.sum(-1, keepdims=True), least),
    }  # fmt: skip
    for words in _RELUS:
        weigh = _WEIGHTS[words]
        for (how, way), least in itertools.product(ways.items(), _LEAST):

            def kept(
                logits: np.ndarray, weigh: Callable[[np.ndarray], np.ndarray] = weigh,
                way: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = way,
                least: float = least,
            ) -> np.ndarray:  # fmt: skip
                return way(weigh(logits), np.isfinite(logits), least)

            yield words, f"divided by their sum, {least:.0e} {how}", kept

        def alone(
            logits: np.ndarray, weigh: Callable[[np.ndarray], np.ndarray] = weigh
        ) -> np.ndarray:
            return _divided(weigh(logits))

        yield words, "divided by their sum, rows without any give NaN", alone


def _divided(weights: np.ndarray) -> np.ndarray:
    """Weights divided by their sum."""
    return weights / weights.sum(-1, keepdims=True)


def _in_a_head(
    recipe: Recipe, stages: Arrays, own: Step, other: Step, head: int
) -> np.ndarray:  # fmt: skip
    """Other shares of one head."""
    shares = np.array(own(recipe, stages))
    shares[:, head] = other(recipe, stages)[:, head]
    return shares


def _over(axes: tuple[int, ...], of_row: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """The softmax over several axes; `of_row`: less the maximum of each row, not of all."""

    def over(logits: np.ndarray) -> np.ndarray:
        weights = np.exp(logits - logits.max(-1 if of_row else axes, keepdims=True))
        return weights / weights.sum(axes, keepdims=True)

    return over


def _other_axis(recipe: Recipe) -> Variants:
    """The softmax over queries, heads or batch; where all of it is hidden, also by a number."""
    hidden = ~np.broadcast_to(recipe.seen, recipe.stages["logits"].shape)
    for axis, words in ((2, "queries"), (1, "heads"), (0, "batch")):
        for rest in ("", ", those that are hidden from all alike")[: 1 + hidden.all(axis).any()]:

            def step(_: Recipe, stages: Arrays, axis: int = axis, alike: bool = bool(rest)) -> Any:
                logits = stages["masked_logits"]
                return softmax(np.maximum(logits, -1e30) if alike else logits, axis)

            yield f"over the {words}{rest}", recipe.stepping("probabilities", step)
    for axes, words in _SUMS.items():
        if len(axes) > 1:
            yield f"over {words} jointly", _with_shares(recipe, _of_logits(_over(axes)))


def _transposed(recipe: Recipe) -> Variants:
    """The values weighed by the queries' axis of the probabilities."""
    if recipe.lengths[1] == recipe.lengths[2]:

        def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
            turned = stages["dropped_probabilities"].swapaxes(2, 3)
            return context_by(recipe, {**stages, "dropped_probabilities": turned})

        yield "queries for keys, where the values are summed", recipe.stepping("context", step)


def _grouped_tiled(recipe: Recipe) -> Variants:
    """Key heads tiled over the query heads: h % K in place of h // (H / K)."""
    heads, shared = recipe.heads
    if 1 < shared < heads:

        def tiled(recipe: Recipe) -> np.ndarray:
            return np.arange(heads) % shared

        keys = recipe.stepping("logits", partial(logits_by, heads=tiled))
        yield "", keys.stepping("context", partial(context_by, heads=tiled))
        yield "of the keys alone", keys
        yield "of the values alone", recipe.stepping("context", partial(context_by, heads=tiled))


def _inputs_exchanged(recipe: Recipe) -> Variants:
    """An input in the place of another, wherever both have one shape and other numbers."""
    x = recipe.inputs
    for words, sources in {
        "key and value exchanged": {"key": "value", "value": "key"},
        "query and value exchanged": {"query": "value", "value": "query"},
        "queries and context exchanged": {"query": "value", "key": "query", "value": "query"},
        "the key for the value": {"value": "key"},
        "the value for the key": {"key": "value"},
        "the query for the value": {"value": "query"},
        "the query for the key": {"key": "query"},
        "the query for key and value": {"key": "query", "value": "query"},
    }.items():
        wrong = {**x, **{name: x[source] for name, source in sources.items()}}
        fits = all(wrong[name].shape[2] == x[name].shape[2] for name in x)
        changes = all(not np.array_equal(wrong[name], x[name]) for name in sources)
        keys = wrong["key"].shape[1]
        fits = fits and wrong["query"].shape[1] == x["query"].shape[1]
        if fits and changes and keys == wrong["value"].shape[1]:
            masks = {n: m for n, m in recipe.masks.items() if m.shape[3] in (1, keys)}
            yield words, recipe.but(inputs=wrong, masks=masks)
    for one, other in itertools.permutations(x, 2):
        same = recipe.stages[one].shape == recipe.stages[other].shape
        if same and not np.array_equal(x[one], x[other]):  # else it is one of the weights
            behind = recipe.stepping(one, recipe.steps[other])
            yield f"after the projections the {other} for the {one}", behind
            if one > other:
                words = f"after the projections {other} and {one} exchanged"
                yield words, behind.stepping(other, recipe.steps[one])


def _residual(recipe: Recipe) -> Variants:
    """What a projection gives added to the context, as a residual around attention proper."""
    shape, own = recipe.stages["context"].shape, recipe.steps["context"]
    for name in ("query", "key", "value"):
        heads = slice(None) if name == "query" else reads(recipe)
        if recipe.stages[name][:, :, heads].shape == shape:

            def step(
                recipe: Recipe, stages: Arrays, name: str = name, heads: Any = heads
            ) -> np.ndarray:
                return own(recipe, stages) + stages[name][:, :, heads]

            yield f"the {name}, as projected, to the context", recipe.stepping("context", step)


def _rotary(pairs: bool, usual: bool = True) -> Maker:
    """Queries and keys turned by their positions, as by the usual rotary positions or not quite."""
    both = ("query", "key")

    def make(recipe: Recipe) -> Variants:
        width = _width(recipe, "query")
        if width % 2 or "rotary" in recipe.options:
            return
        for words, names, options in ((("", both, {}),) if usual else (
            *((f"of {' and '.join(n)} alone", n, {}) for n in (("query",), ("key",), ("value",))),
            ("of the values too", (*both, "value"), {}),
            ("the keys in the other direction", both, {"key": {"sign": -1}}),
            ("the queries in the other direction", both, {"query": {"sign": -1}}),
            ("in the other direction", both, {n: {"sign": -1} for n in both}),
            *((f"base {b:g}", both, {n: {"base": b} for n in both}) for b in BASES),
            *((f"positions divided by {f:g}", both, {n: {"factor": f} for n in both})
              for f in FACTORS),
            *((f"queries from position {n}", both, {"query": {"start": n}}) for n in STARTS),
            *((f"the first {width // n} features", both, {m: {"part": n} for m in both})
              for n in (2, 4) if width % (2 * n) == 0),
            ("positions counted over the heads", both, {n: {"axis": 2} for n in both}),
        )):  # fmt: skip
            wrong = recipe
            for name in names:
                wrong = wrong.stepping(name, _turned(recipe, name, pairs, **options.get(name, {})))
            yield words, wrong

    return make


def _turned(
    recipe: Recipe, name: str, pairs: bool, base: float = BASE, factor: float = 1.0,
    start: float = 0, sign: float = 1, part: float = 1,
    axis: float = 1,
) -> Step:  # fmt: skip
    """A projection turned by its positions."""
    own, width = recipe.steps[name], _width(recipe, name)
    length = recipe.inputs[name].shape[1] if axis == 1 else recipe.heads[0]
    cos, sin, _ = rotary_of(length, int(width / part) // 2, pairs, base, start, factor).value
    turning = RotaryStep((cos, sign * sin, pairs), (name,), int(axis))
    return lambda recipe, stages: turning.forward(name, own(recipe, stages), recipe, stages)


def _inputs_scaled(recipe: Recipe) -> Iterator[Family]:
    """Inputs with a factor, as embeddings have it."""

    def make(power: float) -> Recipe:
        return recipe.but(inputs={n: math.exp(power) * x for n, x in recipe.inputs.items()})

    yield Family(make, tuple(np.linspace(-4, 4, 17)), lambda n: f"multiplied by {math.exp(n):.4g}")


def _positions_added(recipe: Recipe) -> Variants:
    """The usual sines and cosines of positions, added to inputs; biases by distance."""
    x = recipe.inputs
    for words, order in (("sine and cosine beside each other", -1), ("sines before cosines", -2)):
        for names in (tuple(x), ("query", "key"), ("query",), ("key",), ("key", "value")):
            inputs = dict(x)
            for name in names:
                length, features = x[name].shape[1:]
                place = np.arange(length)[:, None] * BASE ** (-np.arange(0, features, 2) / features)
                both = np.stack([np.sin(place), np.cos(place)], order).reshape(length, -1)
                inputs[name] = x[name] + both[:, :features]
            yield f"to the inputs of {' and '.join(names)}, {words}", recipe.but(inputs=inputs)
    _, queries, keys = recipe.lengths
    apart = np.arange(keys) - np.arange(queries)[:, None]
    for words, distance in (("", -np.abs(apart)), (", ahead as well as behind", apart)):
        slopes = 2.0 ** (-8 * np.arange(1, recipe.heads[0] + 1) / recipe.heads[0])
        own = 0.0 if recipe.bias is None else recipe.bias
        bias = slopes[None, :, None, None] * distance + own
        yield f"to the logits, as ALiBi{words}", recipe.but(bias=bias)


_ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    **{
        name: _WEIGHTS[name]
        for name in ("relu", "sigmoid", "tanh", "silu", "softplus", "leaky relu", "squares")
    },
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu by tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "softmax": softmax,
    "log_softmax": _log_softmax,
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "leaky relu, 0.2": lambda x: np.where(x > 0, x, 0.2 * x),
    "leaky relu, 0.3": lambda x: np.where(x > 0, x, 0.3 * x),
}
"""Functions that stand after the layers of other networks."""


def _activated(recipe: Recipe) -> Variants:
    """A function of what projections give, of logits or context, as a Dense layer may have."""
    every = ("query", "key", "value")
    places = ((*every, "output"), every, ("query", "key"), ("key", "value"))
    for words, change in _ACTIVATIONS.items():
        for names in (*places, *((name,) for name in (*every, "logits", "context", "output"))):
            yield f"{words} of {' and '.join(names)}", recipe.after(names, change)
    for names in (("key",), ("query",), ("value",), ("query", "key")):
        over = recipe.after(names, lambda x: softmax(x, 1))
        yield f"softmax over the positions of {' and '.join(names)}", over


def _no_softmax(recipe: Recipe, stages: Arrays) -> np.ndarray:
    return np.where(np.isneginf(stages["masked_logits"]), 0.0, stages["masked_logits"])


def _width(recipe: Recipe, name: str) -> int:
    return recipe.weights[f"{name}.kernel"].shape[2]


MISTAKES: tuple[Row, ...] = (
    ("wrong scale", "The logits are multiplied once, by 1/sqrt(width of a head) unless "
     "`scale` says otherwise.", _scale_wrong, _any_scale),
    ("scale that grows with the position", "The logits are multiplied by one number: leave the "
     "logarithm of the length or of the position out.", _scale_grows, _any_growth),
    ("scale before the bias", "Scale what a projection gives with its bias, or the logits.",
     _bias_unscaled),
    ("softmax over another axis", "The softmax runs over the keys, the last axis.", _other_axis),
    ("probabilities transposed", "The values are summed over the keys, the last axis of the "
     "probabilities.", _transposed),
    ("no softmax", "Probabilities are exp(logits), divided by their sum over the "
     "keys.", steps("probabilities", {
         "no softmax": _no_softmax,
         "rows not divided by their sum":
             lambda r, stages: np.exp(np.minimum(stages["masked_logits"], 700.0))})),
    ("another softmax", "Probabilities are exp(logits - max), divided by their sum over the keys "
     "and by nothing more; over chunks, sum and values are brought to each new maximum.",
     _other_softmax, _shares_measured),
    ("another softmax", "Probabilities are exp(logits - max), divided by their sum over the keys "
     "and by nothing more; over chunks, sum and values are brought to each new maximum.",
     _in_place_of_softmax, no_families, True),
    ("grouped heads tiled", "Query head h reads key head h // (H / K): repeat each key "
     "head, do not tile them all.", _grouped_tiled),
    ("heads averaged", "Each query head has queries, keys, values and a part of the output of its "
     "own: add nothing up over the heads before the output.", averaged),
    ("heads alike in groups", "Each query head has queries, keys and values of its own, or shares "
     "those of its own key head: no group of heads has one for all.", of_groups, no_families,
     True),
    ("inputs exchanged", "Check the order of the arguments: Keras and anymha take query, "
     "value, key; torch, Flax and Equinox query, key, value.", _inputs_exchanged),
    ("residual added", "The residual connection is not of the layer: leave it to the block around "
     "it.", _residual),
    *(("rotary positions, by halves", "The candidate rotates queries and keys by their "
       "positions, by halves of a head; the reference does not, or by pairs.",
       _rotary(False, usual), no_families, not usual) for usual in (True, False)),
    *(("rotary positions, by pairs", "The candidate rotates queries and keys by their "
       "positions, by pairs of neighbours; the reference does not, or by halves.",
       _rotary(True, usual), no_families, not usual) for usual in (True, False)),
    ("input scaled", "Scale embeddings outside of the layer, once.",
     no_families, _inputs_scaled),
    ("positions added", "The layer adds no positions: give it inputs that have them.",
     _positions_added, no_families, True),
    ("activation too many", "The projections of the layer have no activation: leave it out.",
     _activated, no_families, True),
    ("stage clipped", "Nothing cuts queries, keys, values or the context at a limit: clip "
     "where the reference does.", lambda recipe: iter(()), clipped_stages),
    ("quantised with a fixed factor", "Take the factor of whole numbers from the greatest number "
     "that they stand for, so that none is beyond their range.", quantised_heads, no_families,
     True),
    ("wrong dropout", "Both must be in training mode, with one rate and "
     "one seed; kept probabilities are divided by 1 - rate.",
     fields(lambda r: r.kept is not None, other_factors)),
)  # fmt: skip

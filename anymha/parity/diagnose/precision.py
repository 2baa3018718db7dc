"""Numbers of fewer bits: what rounding where gives the errors of a candidate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import ml_dtypes
import numpy as np

from anymha.framework.dtypes import BITS
from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.changes import listed
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.oracle.recipe import STEPS, Arrays, Recipe, Step
from anymha.parity.oracle.rounding import output_errors
from anymha.parity.stages.limits import computed_dtype
from anymha.parity.stages.structure import looks_like_rounding
from anymha.parity.stages.tolerance import eps

Rounding = Callable[[np.ndarray], np.ndarray]

ALIKE = 0.8
"""How alike the errors of a rounding and of the candidate must be at least, as a cosine."""

WIDE_ALIKE = 0.35
"""The same for float32, whose sums lose as much as its roundings, in an order that nobody knows;
and where every number of the output is one of the format."""

GREATER = 2.5
"""How many times greater or smaller than the errors of the rounding those may be."""

WIDE_GREATER = 12.0
"""The same for all of float32: its sums may lose more than its roundings."""

THEIRS = 0.2
"""What may be left of the differences where a candidate's numbers are those of rounded places."""

ROUGH = 0.6
"""No rounding leaves relative differences as great as this, nor does it make them in a stage."""

MOST_OF_IT = 0.5
"""What one place alone may leave for the search to begin with it."""

STIRRED = 0.95
"""Where more is left after all places, the format is another."""

TURNS = 3
"""How often each place is tried."""

PROJECTIONS = ("query", "key", "value")

PRODUCTS = ("logits", "context", "output")
"""The stages that are products of stages before them."""


def rounded_cause(recipe: Recipe, evidence: Evidence) -> tuple[Cause, float, Recipe] | None:
    """The rounding whose errors are those of the candidate, and the recipe that has it.

    Also the greatest error that it leaves, as a share of what its own dtype explains.
    """
    mine = evidence.differences(recipe)
    expected = computed_dtype(evidence.reference or evidence.trace)
    found: list[tuple[float, Cause, float, Recipe]] = []
    rough = ROUGH * len(evidence.names) ** 0.5  # relative to all stages together
    if not np.all(np.isfinite(mine)):
        return None
    for dtype, detail, wrong in _roundings(recipe, expected):
        wide = dtype == "float32"
        with np.errstate(all="ignore"):
            theirs = mine - evidence.differences(wrong)
        sizes = float(np.linalg.norm(mine)), float(np.linalg.norm(theirs))
        output, exact = evidence.reported.get("output"), recipe.stages["output"]
        computed = wide and not detail
        all_of_it = not detail and _is_of(output, dtype)
        most = WIDE_GREATER if computed else GREATER
        if not (all(sizes) and 1 / most < sizes[0] / sizes[1] < most and sizes[1] < rough):
            continue
        left = remaining(evidence, wrong, expected, dtype)
        nearer = wide or all_of_it or evidence.distance(wrong) < sizes[0]
        if not (left <= 1 and nearer):
            continue
        alike = float(mine @ theirs) / (sizes[0] * sizes[1])
        if computed and all_of_it:
            alike = max(alike, ALIKE)
        elif computed and looks_like_rounding(output, exact):
            alike = max(alike, WIDE_ALIKE)
        # Where each sum of a product and a bias is rounded too, only the output shows the format.
        if alike >= (WIDE_ALIKE if wide or all_of_it else ALIKE):
            fix = (f"The reference computes in {expected}: cast weights and inputs, or switch "
                   "mixed precision and TF32 off.")  # fmt: skip
            cause = Cause(f"computed in {dtype}", detail, "query", fix)
            found.append((alike, cause, left, wrong))
    return max(found, key=lambda one: one[0])[1:] if found else None


def remaining(evidence: Evidence, wrong: Recipe, expected: str, dtype: str) -> float:
    """The greatest error beside a rounding, as a share of what numbers of its format explain."""
    bits = dtype.removeprefix("int")
    coarse = 2.0 ** (1 - int(bits)) if bits != dtype else eps(
        "float16" if dtype == "TF32" else dtype)  # fmt: skip
    worst = max(evidence.errors(wrong).values(), default=0.0)
    return worst * min(eps(expected) / coarse, 1.0)


def _is_of(output: np.ndarray | None, dtype: str) -> bool:
    """Whether every number of an output is one of a dtype, though it may be stored in a wider."""
    if output is None or dtype == "TF32" or not np.any(output):
        return False
    own = _cast(output, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    return np.array_equal(output, own, equal_nan=True)


def _roundings(recipe: Recipe, expected: str) -> Iterator[tuple[str, str, Recipe]]:
    """The dtype, what is rounded if not all, and the recipe where it is."""
    recipe = with_joined_sections(recipe)
    for dtype, rounding in formats(expected):
        weights = {name: rounding(w) for name, w in recipe.weights.items()}
        inputs = {name: rounding(x) for name, x in recipe.inputs.items()}
        everything = recipe.but(weights=weights, inputs=inputs)
        stored = {name: _stored(step, rounding) for name, step in recipe.steps.items()}
        soft = {**stored, "probabilities": recipe.steps["probabilities"]}
        factors = {name: _of_factors(recipe.steps[name], name, rounding) for name in PRODUCTS}
        products = everything.but(steps={**recipe.steps, **factors})
        yield dtype, "the factors of each product", products
        if dtype == "TF32":  # a format of products alone
            continue
        yield dtype, "", everything.but(steps=stored)
        yield dtype, "all but the softmax", everything.but(steps=soft)


def with_joined_sections(recipe: Recipe) -> Recipe:
    """The recipe whose steps have what its sections make of each stage, once.

    So what a step gives can be rounded, or what it takes, and the sections stay.
    """
    if not recipe.sections:
        return recipe
    if "joined" not in recipe.computed:

        def joined(name: str) -> Step:
            def step(other: Recipe, stages: Arrays) -> np.ndarray:
                own = other.but(sections=recipe.sections, steps=recipe.steps)
                return own.stage(name, stages)

            return step

        steps = {name: joined(name) for name in recipe.steps}
        recipe.computed["joined"] = recipe.but(steps=steps, sections=())
    return recipe.computed["joined"]


@dataclass(frozen=True)
class _Format:
    """How numbers of fewer bits are made of weights, and of inputs and stages."""

    name: str
    detail: str
    weights: Callable[[str, np.ndarray], np.ndarray]
    arrays: Rounding
    # How the reference's own half precision rounds a projection before it is cast, product and sum
    # with the bias, or the sum alone: a number near the middle of two of the format falls to either
    own: tuple[Rounding, bool] | None = None


def rounded_places(recipe: Recipe, evidence: Evidence) -> tuple[Cause, float, tuple[str, ...],
                                                               Recipe] | None:  # fmt: skip
    """The places that are rounded, and to which format, where a candidate's numbers are those.

    Also the greatest error that is left, as a share of what the format explains, and the other
    formats that give the numbers. Place after place, in the order of the layer, is rounded where
    that leaves less of the differences.
    """
    expected = computed_dtype(evidence.reference or evidence.trace)
    exact = evidence.differences(recipe)
    before = float(np.linalg.norm(exact))

    @cache
    def left(form: _Format, places: frozenset[str]) -> float:
        return evidence.distance(_with_rounded(recipe, form, places)) / before

    theirs = _theirs(recipe, evidence, expected)
    found: list[tuple[float, _Format, frozenset[str]]] = []
    for form in _formats(recipe, expected) if 0 < before < ROUGH else ():
        chosen, least = frozenset[str](), 1.0
        alone = {place: frozenset((place,)) for group in _places(recipe) for place in group}
        for place in _scaled_before(recipe):
            alone[f"{place}, logits"] = frozenset((place, "logits"))
        shares = {place: left(form, places) for place, places in alone.items()}
        first = min(shares, key=lambda place: shares[place])
        if shares[first] < MOST_OF_IT:  # another before it would hide it
            chosen, least = alone[first], shares[first]
        for turn in range(TURNS):
            already = least
            for group in _places(recipe):
                # The place of a stage that leaves least, as long as one leaves less than before;
                # what changes nothing is not rounded.
                while group:
                    shares = {place: left(form, chosen ^ {place}) for place in group}
                    best = min(group, key=lambda place: shares[place] - 1e-6 * (place in chosen))
                    if shares[best] >= least * (1 + 1e-6 if best in chosen else 1 - 1e-6):
                        break
                    chosen, least = chosen ^ {best}, shares[best]
            if least > STIRRED or (turn and least > 0.9 * already):
                break
        if least <= theirs:
            found.append((least, form, chosen))
    if not found:
        return None
    # The numbers of TF32 are those of float16 but for the least.
    nearest = 1.5 * min(share for share, _, _ in found)
    least, form, chosen = min((one for one in found if one[0] <= nearest),
                              key=lambda one: one[1].name == "TF32")  # fmt: skip
    if computed_dtype(evidence.trace) != expected and least > THEIRS / 4:
        return None
    others = tuple(dict.fromkeys(one.name for share, one, _ in found
                                 if one.name != form.name and share <= 1.5 * least))  # fmt: skip
    wrong = _with_rounded(recipe, form, chosen)
    rest = remaining(evidence, wrong, expected, form.name)
    if not rest <= 1:
        return None
    places = [place for group in _places(recipe) for place in group if place in chosen]
    name, detail, stage = _named(recipe, form, places)
    fix = f"The reference computes in {expected}, with weights and stages as they are."
    return Cause(name, detail, stage, fix), rest, others, wrong


def rounded_alone(recipe: Recipe, evidence: Evidence) -> Iterator[tuple[Cause, Recipe]]:
    """Each place rounded alone to each format, whatever it leaves."""
    expected = computed_dtype(evidence.reference or evidence.trace)
    fix = f"The reference computes in {expected}, with weights and stages as they are."
    for form in _formats(recipe, expected):
        for place in (place for group in _places(recipe) for place in group):
            name, detail, stage = _named(recipe, form, [place])
            yield Cause(name, detail, stage, fix), _with_rounded(recipe, form, {place})


def _theirs(recipe: Recipe, evidence: Evidence, expected: str) -> float:
    """What may be left: of an output in half precision also what its own roundings leave."""
    output = evidence.reported.get("output")
    if BITS[expected] > 16 or output is None or len(evidence.reported) > 1:
        return THEIRS
    own = np.square(output - recipe.stages["output"])
    usual = np.mean(np.square(output_errors(recipe, expected)))
    return float(np.hypot(THEIRS, min(np.sqrt(usual / np.mean(own)), 2 * THEIRS)))


def _formats(recipe: Recipe, expected: str) -> Iterator[_Format]:
    half: Rounding = partial(_cast, dtype=np.dtype(getattr(ml_dtypes, expected, expected)))
    for dtype, rounding in formats(expected):
        half_first = ((half, True), (half, False)) if BITS[expected] == 16 else ()
        for first in (*half_first, None):
            yield _Format(dtype, "", lambda _, w, to=rounding: to(w), rounding, first)
    if eps("bfloat16") > eps(expected):
        cut = _cut_off
        yield _Format("bfloat16", "cut off in place of rounded", lambda _, w: cut(w), cut)
    packed = [f"{name}.kernel" for name in ("query", "key", "value")]
    peak = max(float(np.max(np.abs(recipe.weights[name]))) for name in packed)
    for bits in (8, 4):
        most = 2 ** (bits - 1) - 1

        def pack(name: str, w: np.ndarray, most: int = most) -> np.ndarray:
            return _whole(w, peak if name in packed else np.max(np.abs(w)), most)

        def own(name: str, w: np.ndarray, most: int = most) -> np.ndarray:
            return _whole(w, np.max(np.abs(w)), most)

        def rows(name: str, w: np.ndarray, most: int = most) -> np.ndarray:
            axes = (0, 1) if name == "output.kernel" else (0,)
            return _whole(w, np.max(np.abs(w), axis=axes, keepdims=True), most)

        def uneven(name: str, w: np.ndarray, bits: int = bits) -> np.ndarray:
            low, high = np.min(w), np.max(w)
            step = max(float(high - low), np.finfo(np.float64).tiny) / (2**bits - 1)
            return np.round((w - low) / step) * step + low

        def vectors(x: np.ndarray, most: int = most) -> np.ndarray:
            return _whole(x, np.max(np.abs(x), axis=-1, keepdims=True), most)

        def whole(x: np.ndarray, most: int = most) -> np.ndarray:
            return _whole(x, np.max(np.abs(x)), most)

        for words, weights, arrays in (
            ("one factor for the packed kernel", pack, whole),
            ("one factor for each kernel", own, whole),
            ("one factor for each output", rows, vectors),
            ("from the least to the greatest", uneven, lambda x: x),
        ):
            yield _Format(f"int{bits}", words, weights, arrays)


FACTORS = "factors of "
"""Before a stage: what is multiplied for it is rounded."""

SCALED: Mapping[str, tuple[float, float]] = {
    "factors of logits with scaled queries": (1.0, 0.0),
    "factors of logits with scaled keys": (0.0, 1.0),
    "factors of logits with both scaled by the root": (0.5, 0.5),
}
"""What powers of the scale queries and keys have before they are rounded and multiplied."""

INSIDE = "steps of the softmax"
"""The exponentials and their sum, and what they are made of."""

UNDIVIDED = "factors of context, divided by the sum after their product"
"""Values and exponentials, as a fused kernel has them; the sum is not rounded."""

BEFORE = " before the bias"
"""After a stage: what its product gives is rounded, before the bias or the scale."""


def _places(recipe: Recipe) -> list[list[str]]:
    """What may be rounded, by stage, in the order of the layer."""
    x = recipe.inputs
    alike = all(np.array_equal(x[name], x["query"]) for name in x)
    groups = [["inputs"] if alike else [f"input of {name}" for name in x]]
    for stage in STEPS:
        own = [f"{stage}.{part}" for part in ("kernel", "bias")]
        places = [name for name in own if name in recipe.weights]
        places += [FACTORS + stage] * (stage in (*PROJECTIONS, *PRODUCTS))
        places += _scaled_before(recipe) if stage == "logits" else []
        places += [INSIDE] * (stage == "probabilities" and not recipe.sections)
        places += [UNDIVIDED] * (stage == "context")
        if not recipe.sections:
            places += [stage + BEFORE] * (stage in ("logits", "output") or own[1] in recipe.weights)
        same = {"masked_logits": recipe.bias, "dropped_probabilities": recipe.kept}
        places += [stage] * (stage not in same or same[stage] is not None)
        groups.append(places)
    return groups


def _scaled_before(recipe: Recipe) -> list[str]:
    """The places where the scale is taken before a rounding, and changes what that gives."""
    scale = recipe.scale
    return [
        place for place, powers in SCALED.items()
        if scale > 0 and any(np.frexp(scale**power)[0] != 0.5 for power in powers)
    ]  # fmt: skip


def _with_rounded(recipe: Recipe, form: _Format, places: Collection[str]) -> Recipe:
    """The recipe with these places rounded."""
    recipe = with_joined_sections(recipe)
    weights = {n: form.weights(n, w) if n in places else w for n, w in recipe.weights.items()}
    inputs = {n: form.arrays(x) if {"inputs", f"input of {n}"} & {*places} else x
              for n, x in recipe.inputs.items()}  # fmt: skip
    steps = dict(recipe.steps)
    for stage in STEPS:
        if FACTORS + stage in places:
            steps[stage] = _of_factors(steps[stage], stage, form.arrays)
        for place in {*SCALED} & {*places} if stage == "logits" else ():
            steps[stage] = _of_scaled_factors(steps[stage], SCALED[place], form.arrays)
        if stage == "context" and UNDIVIDED in places:
            steps[stage] = partial(_undivided, steps[stage], form.arrays)
        if stage == "probabilities" and INSIDE in places:
            steps[stage] = partial(_by_steps, steps[stage], form.arrays)
        if stage + BEFORE in places:
            steps[stage] = _before_the_bias(steps[stage], stage, form.arrays)
        if stage in places and stage in PROJECTIONS and form.own is not None:
            half, twice = form.own
            product = _before_the_bias(steps[stage], stage, half) if twice else steps[stage]
            steps[stage] = _stored(product, half)
        if stage in places:
            steps[stage] = _stored(steps[stage], form.arrays)
    return recipe.but(weights=weights, inputs=inputs, steps=steps)


def _by_steps(own: Step, rounding: Rounding, recipe: Recipe, stages: Arrays) -> np.ndarray:
    """A softmax whose steps are rounded; of a row that sees nothing its own result."""
    masked = stages["masked_logits"]
    seen = np.isfinite(masked)  # no format moves what is hidden
    least = masked[seen].min() if seen.any() else 0.0
    logits = rounding(np.where(seen, masked, least))
    top = np.where(seen, logits, -np.inf).max(-1, keepdims=True)
    weights = rounding(np.exp(rounding(np.where(seen, logits - top, 0.0)))) * seen
    total = rounding(weights.sum(-1, keepdims=True))
    rounded = weights / np.where(total == 0, 1.0, total)
    return np.where(seen.any(-1, keepdims=True), rounded, own(recipe, stages))


def _undivided(own: Step, rounding: Rounding, recipe: Recipe, stages: Arrays) -> np.ndarray:
    """A context of rounded values and rounded exponentials."""
    masked = stages["masked_logits"]
    top = masked.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(masked - np.where(np.isfinite(top), top, 0.0))
    ratio = rounding(weights) / np.where(weights > 0, weights, 1.0)
    shares = stages["dropped_probabilities"] * ratio
    value = rounding(stages["value"])
    return own(recipe, {**stages, "dropped_probabilities": shares, "value": value})


def _before_the_bias(own: Step, stage: str, rounding: Rounding) -> Step:
    """A product that is rounded before its bias is added, or before it is scaled."""

    def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
        if stage == "logits":
            return recipe.scale * rounding(own(recipe, stages) / (recipe.scale or 1.0))
        bias = recipe.weights.get(f"{stage}.bias", 0.0)
        return rounding(own(recipe, stages) - bias) + bias

    return step


def _named(recipe: Recipe, form: _Format, places: list[str]) -> tuple[str, str, str]:
    """Name, detail and first stage of what is rounded."""
    every = sum(map(len, _places(recipe)))
    weights = [name for name in places if name in recipe.weights]
    stage = (
        places[0]
        .removeprefix("input of ")
        .removeprefix(FACTORS)
        .partition(".")[0]
        .partition(" with ")[0]
        .removesuffix(BEFORE)
    )
    known = {UNDIVIDED.removeprefix(FACTORS): "context", INSIDE: "probabilities"}
    stage = {"inputs": "query", **known}.get(stage, stage)
    bits = form.name.removeprefix("int")
    verb = "quantised" if bits != form.name else "rounded"
    to = f"{bits} bits" if bits != form.name else form.name
    more = [f"int{bits}, {form.detail}"] if bits != form.name else [form.detail] * bool(form.detail)
    if len(weights) == len(places):
        kernels = {name for name in recipe.weights if name.endswith("kernel")}
        which = [] if {*weights} == {*recipe.weights} else (
            ["the kernels"] if {*weights} == kernels else [listed([*weights])])  # fmt: skip
        if verb == "quantised" and {*weights} >= kernels:
            which = []
        return f"weights {verb} to {to}", "; ".join([*more, *which]), stage
    if not weights and all(p.startswith("input") for p in places):
        which = "the inputs" if places == ["inputs"] else listed(places)
        return f"computed in {form.name}", "; ".join([*more, which]), stage
    softmax = {"logits", "masked_logits", INSIDE, "probabilities"}
    if {*places} <= softmax and len(places) > 1 and places[-1] in (INSIDE, "probabilities"):
        return f"computed in {form.name}", "; ".join([*more, "the softmax"]), stage
    products = {FACTORS + "logits", *SCALED}
    of_logits = bool(products & {*places}) or {"query", "key"} <= {*places}
    last = [name for name in places if name not in (*PROJECTIONS, *products)]
    if of_logits and last in ([UNDIVIDED, "context"], [FACTORS + "context", "context"]):
        kernel = "attention alone, from queries, keys and values to the context"
        return f"computed in {form.name}", "; ".join([*more, kernel]), stage
    if len(places) > every / 3:
        return f"computed in {form.name}", "; ".join(more), stage
    return f"{verb} to {to}", "; ".join([*more, listed(places)]), stage


def formats(expected: str) -> Iterator[tuple[str, Rounding]]:
    """The formats of fewer bits than the expected dtype, the widest first."""
    for dtype in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        if eps(dtype) > eps(expected):
            yield dtype, partial(_cast, dtype=np.dtype(getattr(ml_dtypes, dtype, dtype)))
        if dtype == "float32" and eps("float16") > eps(expected):
            yield "TF32", _tf32


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(dtype).astype(np.float64)


def _tf32(array: np.ndarray) -> np.ndarray:
    """Rounded to a mantissa of 10 bits, with the exponents of float32."""
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.round(mantissa * 2.0**11) / 2.0**11, exponent)


def _stored(own: Step, rounding: Rounding) -> Step:
    """A step whose result is rounded."""
    return lambda recipe, stages: rounding(own(recipe, stages))


def _of_factors(own: Step, name: str, rounding: Rounding) -> Step:
    """A product of rounded factors; the result is not rounded."""
    kernel = f"{name}.kernel"

    def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
        factors = {n: rounding(array) for n, array in stages.items()}
        weights, inputs = dict(recipe.weights), dict(recipe.inputs)
        if name in PROJECTIONS:
            weights[kernel], inputs[name] = rounding(weights[kernel]), rounding(inputs[name])
        elif kernel in weights:
            weights[kernel] = rounding(weights[kernel])
        return own(recipe.but(weights=weights, inputs=inputs), factors)

    return step


def _of_scaled_factors(own: Step, powers: tuple[float, float], rounding: Rounding) -> Step:
    """Logits of rounded queries and keys that are scaled before, each by a power of the scale."""

    def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
        factors = {n: rounding(stages[n] * recipe.scale**power)
                   for n, power in zip(("query", "key"), powers, strict=True)}  # fmt: skip
        return own(recipe.but(scale=1.0), {**stages, **factors})

    return step


def _cut_off(array: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 alone, those after it left out."""
    bits = array.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def _whole(kernel: np.ndarray, peak: float | np.ndarray, most: int) -> np.ndarray:
    factor = np.maximum(peak, np.finfo(np.float64).tiny) / most
    return np.round(kernel / factor) * factor

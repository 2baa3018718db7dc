"""Numbers of fewer bits: what rounding where gives the errors of a candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.oracle.recipe import STEPS, Arrays, Recipe, Step, softmax
from anymha.parity.stages.limits import computed_dtype
from anymha.parity.stages.structure import looks_like_rounding
from anymha.parity.stages.tolerance import eps

Rounding = Callable[[np.ndarray], np.ndarray]

ALIKE = 0.8
"""How alike the errors of a rounding and of the candidate must be at least, as a cosine."""

WIDE_ALIKE = 0.35
"""The same for float32: its sums lose as much as its roundings, in an order that nobody knows."""

GREATER = 2.5
"""How many times greater or smaller than the errors of the rounding those may be."""

WIDE_GREATER = 12.0
"""The same for all of float32: its sums may lose more than its roundings."""

PRODUCTS = ("logits", "context", "output")
"""The stages that are products of stages before them."""


def rounded_cause(recipe: Recipe, evidence: Evidence) -> tuple[Cause, Recipe] | None:
    """The rounding whose errors are those of the candidate, and the recipe that has it."""
    mine = evidence.differences(recipe.stages)
    expected = computed_dtype(evidence.reference or evidence.trace)
    found: list[tuple[float, Cause, Recipe]] = []
    for name, detail, stage, wide, wrong in _roundings(recipe, expected):
        with np.errstate(all="ignore"):
            theirs = mine - evidence.differences(wrong.stages)
        sizes = float(np.linalg.norm(mine)), float(np.linalg.norm(theirs))
        output, exact = evidence.reported.get("output"), recipe.stages["output"]
        computed = wide and not detail and name.startswith("computed")
        all_of_it = computed and _is_of_float32(output)
        most = WIDE_GREATER if computed else GREATER
        if not (all(sizes) and 1 / most < sizes[0] / sizes[1] < most):
            continue
        alike = float(mine @ theirs) / (sizes[0] * sizes[1])
        if all_of_it:
            alike = max(alike, ALIKE)
        elif computed and looks_like_rounding(output, exact):
            alike = max(alike, WIDE_ALIKE)
        if alike >= (WIDE_ALIKE if wide else ALIKE):
            fix = (f"The reference computes in {expected}: cast weights and inputs, or switch "
                   "mixed precision and TF32 off.")  # fmt: skip
            found.append((alike, Cause(name, detail, stage, fix), wrong))
    if not found:
        return None
    _, cause, wrong = max(found, key=lambda one: one[0])
    return cause, wrong


def _is_of_float32(output: np.ndarray | None) -> bool:
    """Whether every number of an output is one of float32."""
    return output is not None and np.array_equal(
        output, output.astype(np.float32).astype(np.float64), equal_nan=True
    )


def _roundings(recipe: Recipe, expected: str) -> Iterator[tuple[str, str, str, bool, Recipe]]:
    """Name, detail, first stage, whether it is a wide dtype, and the recipe of each rounding."""
    for dtype, rounding in _dtypes(expected):
        wide = dtype == "float32"
        exact = {name: rounding(w) for name, w in recipe.weights.items()}
        inputs = {name: rounding(x) for name, x in recipe.inputs.items()}
        everything = recipe.but(weights=exact, inputs=inputs)
        stored = {name: _stored(recipe, name, rounding) for name in STEPS}
        soft = {**stored, "probabilities": recipe.steps["probabilities"]}
        factors = {name: _of_factors(recipe, name, rounding) for name in PRODUCTS}
        words = "the factors of each product"
        products = everything.but(steps={**recipe.steps, **factors}, sections=())
        yield f"computed in {dtype}", words, "query", wide, products
        if dtype == "TF32":  # a format of products alone
            continue
        # The steps have what the sections make of a stage in them, so that this is rounded too.
        yield f"computed in {dtype}", "", "query", wide, everything.but(steps=stored, sections=())
        words = "all but the softmax"
        rest = everything.but(steps=soft, sections=())
        yield f"computed in {dtype}", words, "query", wide, rest
        yield f"weights rounded to {dtype}", "", "query", wide, recipe.but(weights=exact)
        kernels = {**recipe.weights, **{n: w for n, w in exact.items() if n.endswith("kernel")}}
        words = f"weights rounded to {dtype}"
        yield words, "the kernels", "query", wide, recipe.but(weights=kernels)
        yield f"computed in {dtype}", "the inputs", "query", wide, recipe.but(inputs=inputs)

        def shares(_: Recipe, stages: Arrays, rounding: Rounding = rounding) -> np.ndarray:
            return rounding(softmax(rounding(stages["masked_logits"])))

        wrong = recipe.stepping("probabilities", shares)
        yield f"computed in {dtype}", "the softmax", "probabilities", wide, wrong
        for names in (("key", "value"), *((name,) for name in STEPS)):
            steps = {**recipe.steps, **{name: stored[name] for name in names}}
            words = " and ".join(names)
            # What the sections make of the other stages stays theirs.
            if not recipe.sections:
                yield f"rounded to {dtype}", words, names[0], wide, recipe.but(steps=steps)
    yield from _quantised(recipe)


def _dtypes(expected: str) -> Iterator[tuple[str, Rounding]]:
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


def _stored(recipe: Recipe, name: str, rounding: Rounding) -> Step:
    def step(other: Recipe, stages: Arrays) -> np.ndarray:
        return rounding(other.but(sections=recipe.sections, steps=recipe.steps).stage(name, stages))

    return step


def _of_factors(recipe: Recipe, name: str, rounding: Rounding) -> Step:
    """A product of rounded factors; the result is not rounded."""

    def step(other: Recipe, stages: Arrays) -> np.ndarray:
        factors = {n: rounding(array) for n, array in stages.items()}
        return other.but(sections=recipe.sections, steps=recipe.steps).stage(name, factors)

    return step


def _quantised(recipe: Recipe) -> Iterator[tuple[str, str, str, bool, Recipe]]:
    """Kernels as whole numbers of few bits, with one factor for each of several groupings."""
    kernels = {n: w for n, w in recipe.weights.items() if n.endswith("kernel")}
    packed = [f"{name}.kernel" for name in ("query", "key", "value")]
    for bits in (8, 4):
        most = 2 ** (bits - 1) - 1
        peak = max(float(np.max(np.abs(kernels[name]))) for name in packed)
        pack = {n: _whole(w, peak, most) for n, w in kernels.items() if n in packed}
        own = {n: _whole(w, np.max(np.abs(w)), most) for n, w in kernels.items()}
        rows = {}
        for name, kernel in kernels.items():
            axes = (0, 1) if name == "output.kernel" else (0,)
            rows[name] = _whole(kernel, np.max(np.abs(kernel), axis=axes, keepdims=True), most)
        for words, changed in {
            "one factor for the packed kernel": {**own, **pack},
            "one factor for each kernel": own,
            "one factor for each output": rows,
        }.items():
            wrong = recipe.but(weights={**recipe.weights, **changed})
            yield f"weights quantised to {bits} bits", f"int{bits}, {words}", "query", False, wrong


def _whole(kernel: np.ndarray, peak: float | np.ndarray, most: int) -> np.ndarray:
    factor = np.maximum(peak, np.finfo(np.float64).tiny) / most
    return np.round(kernel / factor) * factor

"""Outputs that hold NaN or infinity where the reference has numbers: what is known of the cause.

Whatever gives NaN everywhere gives a candidate's numbers where these are NaN, so nothing is told
from that. The numbers that are left are judged; and the candidate is called again with smaller
inputs, which overflow no more, and without masks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator

import ml_dtypes
import numpy as np

from anymha.parity.comparison.baseline import outputs_alone
from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.diagnosis import EMPTY_ROWS
from anymha.parity.diagnose.gradient_mistakes import gradients_alone
from anymha.parity.reports.report import Comparison
from anymha.parity.stages.limits import computed_dtype
from anymha.parity.stages.structure import is_masked
from anymha.parity.stages.trace import STAGES, Adapter, Request

OF_THE_MASK = "NaN of the mask"

SMALLER = (2.0**-6, 2.0**-12)
"""By what inputs are multiplied to see whether their size is the reason."""

OVERFLOW = ("Keep numbers within those of the dtype: scale the queries before the product, take a "
            "row's maximum off before its exponentials, or compute in float32.")  # fmt: skip

MASKING = ("0 times infinity is NaN, and so is the softmax of a row of -inf alone: put -inf where "
           "a mask hides, and leave the other logits as they are.")  # fmt: skip


BACKWARD = "NaN in the backward pass"

BEHIND = (
    "A `where` keeps NaN and infinity behind it out of the output, not out of the gradients: "
    "0 times NaN is NaN. Put finite numbers there before the softmax, too."
)


def holes(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Where a candidate has NaN or infinity in place of the reference's numbers."""
    if reference.shape != candidate.shape:
        return np.zeros(1, bool)
    one, other = (array.astype(np.float64) for array in (reference, candidate))
    return np.isfinite(one) & ~np.isfinite(other)


def says_nothing(comparison: Comparison) -> bool:
    """Whether the candidate has no number in its output that is not as the reference's.

    Its NaN and infinity are then all that is wrong with it.
    """
    first, second = comparison.traces
    empty = holes(first.output, second.output)
    if not empty.any() or second.output.dtype.kind in "iub":
        return False
    filled = np.where(empty, first.output, second.output).astype(second.output.dtype)
    stages = {} if empty.all() else second.stages
    rest = dataclasses.replace(second, output=filled, scores=None, gradients={}, stages=stages)
    with np.errstate(all="ignore"):
        return bool(empty.all() or outputs_alone(comparison.request, first, rest).passed)


def without_numbers(
    comparison: Comparison, candidate: Adapter, again: Callable[[Request], Comparison]
) -> Comparison:
    """The comparison with what is known of why a candidate has no numbers.

    `again` compares both in another call.
    """
    diagnosis, (first, second) = comparison.diagnosis, comparison.traces
    if diagnosis is not None and diagnosis.explained:
        by_rows = not holes(first.output, second.output).all()
        if by_rows and any(cause.name.endswith(EMPTY_ROWS) for cause in diagnosis.causes):
            return comparison

    def other(request: Request) -> Comparison | None:
        """The comparison in another call, where the candidate has numbers in it."""
        try:
            if np.isfinite(candidate.trace(request, None).output.astype(np.float64)).all():
                return again(request)
        except Exception:  # it takes no such call
            pass
        return None

    stage, reason = _first(comparison)
    for factor in SMALLER:
        smaller = other(_scaled(comparison.request, factor))
        if smaller is not None:
            words = [reason] * bool(reason)
            words += [_judged(smaller, f"of inputs {1 / factor:.0f} times smaller")]
            return _with(comparison, Cause("overflow", "; ".join(words), stage, OVERFLOW), smaller)
    if stage == "masked_logits" and _shown_alone(comparison):
        words = "NaN where keys are seen, -inf where they are hidden, as 0 times -inf gives"
        return _with(comparison, Cause(OF_THE_MASK, words, stage, MASKING), None)
    every = _masking(comparison.request)
    for names in dict.fromkeys((*((name,) for name in every), tuple(every))):
        free = other(_without(comparison.request, names))
        if free is not None:
            words = _judged(free, _without_words(names))
            at = "masked_logits" if stage == "output" else stage
            return _with(comparison, Cause(OF_THE_MASK, words, at, MASKING), free)
    wider = _in_float32(comparison, candidate) if computed_dtype(second) == "float16" else None
    if wider is not None:
        words = (_judged(wider, "of the same inputs in float32") + ": no smaller inputs do, so a "
                 "number of its own, such as -1e9 or 1e-9, is infinite or zero")  # fmt: skip
        fix = ("Take constants from the dtype, as `finfo(dtype).min`, or hide with `where` and "
               "-inf: float16 ends at 65504, and below 6e-8 it is zero.")  # fmt: skip
        return _with(comparison, Cause("constant beyond float16", words, stage, fix), wider)
    if holes(first.output, second.output).all() and diagnosis is not None and diagnosis.causes:
        told = dataclasses.replace(diagnosis, remaining=math.inf)
        return dataclasses.replace(comparison, diagnosis=told)
    begin = "" if stage == "output" else f" from the {stage} on"
    masks = " and without masks" if every else ""
    rest = "no number" if holes(first.output, second.output).all() else "no wrong number"
    untried = (f"it has NaN or infinity{begin}, of smaller inputs{masks} too, as where 0 is "
               f"multiplied by infinity, and {rest} to judge by")  # fmt: skip
    told = dataclasses.replace(comparison, diagnosis=Diagnosis(untried=untried))
    return dataclasses.replace(told, first_divergence=stage)


def without_gradients(
    comparison: Comparison, again: Callable[[Request], Comparison]
) -> Comparison | None:
    """The comparison with why gradients alone have NaN or infinity; None where they have none.

    `again` compares both in another call: without what may be the reason there are numbers.
    """
    wrong = [stage.name for stage in comparison.stages if not stage.passed]
    if not wrong or not wrong[0].startswith("gradient") or not _lost(comparison):
        return None
    request, first = comparison.request, wrong[0]
    calls: list[tuple[str, str, str, Request]] = []
    shown = {n: mask | ~mask.any(-1, keepdims=True) if mask.dtype == bool else mask
             for n, mask in request.masks.items()}  # fmt: skip
    if any(np.any(shown[name] != mask) for name, mask in request.masks.items()):
        words = "where rows that see nothing are shown all keys"
        calls += [(BACKWARD, BEHIND, words, dataclasses.replace(request, masks=shown))]
    for factor in SMALLER:
        words = f"of inputs {1 / factor:.0f} times smaller"
        calls += [("overflow of gradients", OVERFLOW, words, _scaled(request, factor))]
    every = _masking(request)
    groups = dict.fromkeys((*((name,) for name in every), tuple(every))) if every else ()
    calls += [(BACKWARD, BEHIND, _without_words(n), _without(request, n)) for n in groups]
    for name, fix, words, call in calls:
        try:
            other = again(call)
        except Exception:  # it takes no such call
            continue
        if other.traces[1].gradients and not _lost(other):
            shown_too = other.diagnosis or Diagnosis()
            causes = (Cause(name, _judged(other, words), first, fix), *shown_too.causes)
            left = 0.0 if other.passed or shown_too.explained else math.inf
            return dataclasses.replace(comparison, diagnosis=Diagnosis(causes, left))
    return dataclasses.replace(comparison, diagnosis=gradients_alone(first))


def _lost(comparison: Comparison) -> bool:
    """Whether a gradient of the candidate has NaN or infinity in place of numbers."""
    first, second = (trace.gradients for trace in comparison.traces)
    return any(name in second and holes(array, second[name]).any()
               for name, array in first.items())  # fmt: skip


def _without_words(names: Collection[str]) -> str:
    return "without " + " and ".join(f"`{name}`" for name in names)


def _in_float32(comparison: Comparison, candidate: Adapter) -> Comparison | None:
    """The comparison of what a candidate gives for inputs in float32; None without its numbers."""
    first, second = comparison.traces
    try:
        output = candidate.trace(_scaled(comparison.request, 1.0, "float32"), None).output
    except Exception:  # it takes no other dtype
        return None
    if not np.isfinite(output.astype(np.float64)).all():
        return None
    cast = output.astype(second.output.dtype)
    rest = dataclasses.replace(second, output=cast, scores=None, gradients={}, stages={})
    return outputs_alone(comparison.request, first, rest)


def _shown_alone(comparison: Comparison) -> bool:
    """Whether masked logits are NaN exactly where keys are seen, and -inf elsewhere."""
    got, right = (one["masked_logits"] for one in (comparison.reported, comparison.exact))
    hidden = np.isneginf(right)
    return bool(hidden.any()) and np.array_equal(np.where(hidden, -np.inf, np.nan), got,
                                                 equal_nan=True)  # fmt: skip


def _with(comparison: Comparison, cause: Cause, other: Comparison | None) -> Comparison:
    """The comparison with this cause, and with those that another call shows, or its own stages."""
    shown = comparison.diagnosis if other is None else other.diagnosis
    causes = (cause, *(() if shown is None else shown.causes))
    causes = tuple(sorted(causes, key=lambda one: _place(one.stage)))
    known = shown is None or shown.explained or (other is None and not shown.causes)
    diagnosis = Diagnosis(causes, 0.0 if known else math.inf)
    return dataclasses.replace(comparison, diagnosis=diagnosis, first_divergence=causes[0].stage)


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _judged(other: Comparison, call: str) -> str:
    return f"{call} it gives numbers, {'and they are right' if other.passed else 'which differ'}"


def _first(comparison: Comparison) -> tuple[str, str]:
    """The first stage that has NaN or infinity, and why it may.

    Where the candidate does not tell it, that whose numbers exceed those of the dtype; else "".
    """
    exact, reported = comparison.exact, comparison.reported
    stages = [n for n in STAGES if n in exact and n in reported and n != "output"]
    for name in stages:
        got, right = reported[name], exact[name]
        same = is_masked(got) & is_masked(right) if got.shape == right.shape else False
        if np.any(holes(right, got) & ~np.asarray(same)):
            return name, next((why for stage, why in _too_great(comparison) if stage == name), "")
    behind = STAGES.index(stages[-1]) + 1 if stages else 0
    known = (one for one in _too_great(comparison) if STAGES.index(one[0]) >= behind)
    return next(known, ("output", ""))


def _too_great(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """The stages that would exceed the candidate's dtype, in order, and what of them would."""
    traces, exact = comparison.traces, comparison.exact
    dtype = computed_dtype(traces[1])
    config = traces[0].config or traces[1].config
    most = float(ml_dtypes.finfo(dtype).max)
    for name in STAGES:
        peak, what = _peak(exact.get(name)), f"numbers of the {name}"
        if name == "logits" and config is not None:
            scale = abs(config.key_dim**-0.5 if config.scale is None else config.scale)
            peak, what = peak / scale if scale else peak, "products before the scale"
        if name == "probabilities" and name in exact:
            logits = exact["masked_logits"]
            top = float(np.max(logits, initial=0.0, where=np.isfinite(logits)))
            if top > math.log(most):
                yield name, f"exponentials of logits up to {top:.3g} exceed {most:.3g} of {dtype}"
        elif peak > most:
            yield name, f"{what} up to {peak:.3g} exceed {most:.3g} of {dtype}"


def _peak(array: np.ndarray | None) -> float:
    if array is None:
        return 0.0
    return float(np.max(np.abs(array), initial=0.0, where=np.isfinite(array)))


def _scaled(request: Request, factor: float, dtype: str | None = None) -> Request:
    """The request with inputs times a factor, in another dtype."""
    inputs = {n: (x * factor).astype(dtype or x.dtype) for n, x in request.inputs.items()}
    return request.with_inputs(inputs)


def _masking(request: Request) -> list[str]:
    """The arguments of a call that hide keys, or are added to the logits."""
    names = [*request.masks, *(["attention_bias"] if request.bias is not None else [])]
    return names + ["use_causal_mask"] * bool(request.call.get("use_causal_mask"))


def _without(request: Request, names: Collection[str]) -> Request:
    masks = {name: mask for name, mask in request.masks.items() if name not in names}
    call = {name: value for name, value in request.call.items() if name not in names}
    bias = None if "attention_bias" in names else request.bias
    return dataclasses.replace(request, masks=masks, call=call, bias=bias)

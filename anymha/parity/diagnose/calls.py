"""Mistakes that show where no weights are known: the reference called with the mistake in the call.

An inverted mask is the reference called with the opposite mask, exchanged inputs are the reference
called with exchanged inputs; and what stands around it shows in its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from anymha.parity.diagnose.around import sums
from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.mistakes import catalogue
from anymha.parity.stages.trace import Request

Judge = Callable[[np.ndarray], float]
"""How far an output is from the candidate's, as a share of what rounding explains."""

NOT_ASKED = "causal mask not asked for"


def diagnose_by_calls(
    request: Request, call: Callable[[Request], np.ndarray], output: np.ndarray,
    got: np.ndarray, judge: Judge,
) -> Diagnosis:  # fmt: skip
    """Why the output `got` of a candidate differs from a reference's `output`.

    `call` gives the reference's output for another request.
    """
    fixes = {mistake.name: mistake.fix for mistake in catalogue()}
    found: list[tuple[float, Cause]] = []
    for name, detail, stage, other, back in _calls(request):
        try:
            theirs = back(call(other))
        except Exception:
            continue
        share = judge(theirs) if theirs.shape == got.shape else np.inf
        if share <= 1:
            found.append((share, Cause(name, detail, stage, fixes[name])))
    if output.shape == got.shape:
        inputs = {n: x.astype(np.float64) for n, x in request.inputs.items()}
        terms = {"output": output.astype(np.float64)} | {
            n: x for n, x in inputs.items() if x.shape == output.shape
        }
        for causes, more in sums(terms, output.astype(np.float64), got.astype(np.float64)):
            theirs = output + sum(factor * terms[name] for name, factor in more.items())
            share = judge(theirs)
            if share <= 1 and len(causes) == 1:
                found.append((share, causes[0]))
    if not found:
        return Diagnosis()
    share, first = found[0]
    others = dict.fromkeys(str(c) for _, c in found[1:] if c.name != first.name)
    return Diagnosis((first,), share, tuple(others)[:3])


def _same(output: np.ndarray) -> np.ndarray:
    return output


def _calls(
    request: Request,
) -> Iterator[tuple[str, str, str, Request, Callable[[np.ndarray], np.ndarray]]]:
    """Name, detail, first stage, the call that has the mistake, and what to do with its output."""
    masks = request.masks
    for name, mask in masks.items():
        words = f"`{name}`"
        changed = {
            ("inverted mask", words): ~mask,
            ("ignored mask", words): np.ones_like(mask),
            ("mask of other positions", f"{words}, in reverse along the keys"): mask[..., ::-1],
            ("mask of other positions", f"{words}, of another of the sequences"): np.roll(
                mask, 1, 0
            ),
        }
        if mask.ndim > 2 and mask.shape[-1] == mask.shape[-2]:
            changed["transposed mask", words] = np.swapaxes(mask, -1, -2)
        for by, words_of in ((1, "after"), (-1, "before")):
            later = mask | np.roll(mask, by, -1)
            detail = f"{words}, one of the keys more is seen {words_of} each, off by one"
            changed["mask of other positions", detail] = later
        for (mistake, detail), wrong in changed.items():
            if not np.array_equal(wrong, mask):
                other = replace(request, masks={**masks, name: wrong})
                yield mistake, detail, "masked_logits", other, _same
    if request.call.get("use_causal_mask"):
        other = replace(request, call={**request.call, "use_causal_mask": False})
        yield "causal mask ignored", "", "masked_logits", other, _same
        for by in (1, -1):
            offset = request.call.get("query_offset", 0)
            moved = replace(request, call={**request.call, "query_offset": offset + by})
            yield "causal mask off by one", "", "masked_logits", moved, _same
    elif "use_causal_mask" not in request.call:
        other = replace(request, call={**request.call, "use_causal_mask": True})
        yield NOT_ASKED, "", "masked_logits", other, _same
    if request.bias is not None:
        for words, bias in {"left out": 0 * request.bias, "subtracted": -request.bias,
                            "added twice": 2 * request.bias}.items():  # fmt: skip
            other = replace(request, bias=bias)
            yield "wrong attention bias", words, "masked_logits", other, _same
    yield from _of_inputs(request)


def _of_inputs(
    request: Request,
) -> Iterator[tuple[str, str, str, Request, Callable[[np.ndarray], np.ndarray]]]:
    """Inputs that are exchanged, turned, or in another order."""
    inputs = request.inputs
    for one, other in (("value", "key"), ("query", "value"), ("query", "key")):
        if one in inputs and other in inputs and inputs[one].shape == inputs[other].shape:
            swapped = {one: inputs[other], other: inputs[one]}
            words = f"{one} and {other} exchanged"
            yield "inputs exchanged", words, "query", _with(request, swapped), _same
    if all(x.ndim == 3 for x in inputs.values()):
        turned = {name: np.swapaxes(x, 0, 1) for name, x in inputs.items()}
        yield ("batch and time exchanged", "", "query", _with(request, turned),
               lambda output: np.swapaxes(output, 0, 1))  # fmt: skip
    for axis, name in ((1, "positions"), (0, "batch")):
        words = f"the output is flipped, in reverse along the {name}"
        yield ("in another order of positions", words, "output", request,
               lambda output, axis=axis: np.flip(output, axis))  # fmt: skip
        words = f"the inputs are flipped, in reverse along the {name}"
        flipped = {n: np.flip(x, axis) for n, x in inputs.items()}
        yield "in another order of positions", words, "query", _with(request, flipped), _same


def _with(request: Request, inputs: dict[str, np.ndarray]) -> Request:
    """The request with other inputs, also in the caller's framework."""
    inputs = {name: np.ascontiguousarray(x) for name, x in inputs.items()}
    return request.with_inputs({**request.inputs, **inputs})

"""Kernels that are measured by calls of the candidate, where no known mistake explains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import numpy as np

from anymha.parity.adapters.decoding import Stepwise
from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.own_weights import FIX
from anymha.parity.diagnose.probed_kernels import probed_kernels
from anymha.parity.oracle.truth import fold
from anymha.parity.reports.report import Comparison
from anymha.parity.stages.trace import Adapter, Request, problem_of


def _open_masks(request: Request, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Masks of the call's kinds for other inputs, by which everything is seen."""
    query = inputs["query"]
    batch, queries, keys = *query.shape[:2], inputs.get("value", query).shape[1]
    rows = {"query_mask": (batch, queries), "value_mask": (batch, keys), "key_mask": (batch, keys)}
    masks = {}
    for name, mask in request.masks.items():
        of_pairs = (batch, *mask.shape[1:-2], queries, keys) if mask.ndim > 2 else (queries, keys)
        masks[name] = np.ones(rows.get(name, of_pairs), bool)
    return masks


def with_probed_kernels(comparison: Comparison, candidate: Adapter) -> Comparison:
    """The comparison with kernels that differ, as calls measure them, where these explain it."""
    request, (first, second), told = comparison.request, comparison.traces, comparison.diagnosis
    known = told is None or told.causes or told.untried
    if comparison.passed or known or comparison.first_divergence != "output":
        return comparison
    if first.weights is None or first.config is None or first.random or second.random:
        return comparison
    if isinstance(candidate, Stepwise) or "key" in request.inputs or request.training:
        return comparison
    if not comparison.exact or first.output.ndim != 3 or first.output.dtype != np.float32:
        return comparison

    def ask(inputs: Mapping[str, np.ndarray], masked: bool = False) -> np.ndarray:
        own = {name: inputs[name].astype(np.float32) for name in request.inputs}
        call = {n: value for n, value in request.call.items() if n == "use_causal_mask"}
        masks = _open_masks(request, own) if masked else {}
        other = request.with_inputs(own, masks=masks, bias=None, call=call)
        return candidate.trace(other, None).output

    recipe = fold(problem_of(first.config, first.weights, request)).recipe
    evidence = Evidence(second, {"output": second.output.astype(np.float64)}, first)
    found = None
    for masked in (False, True) if request.masks else (False,):
        try:
            found = probed_kernels(recipe, partial(ask, masked=masked), evidence)
            break
        except Exception:  # it takes no such call, as without masks
            continue
    if found is None:
        return comparison
    stage = found[0].partition(".")[0]
    worst = max(evidence.errors(found[1]).values())
    diagnosis = Diagnosis((Cause("other weights", found[0], stage, FIX),), worst, (), found[1])
    return dataclasses.replace(comparison, diagnosis=diagnosis, first_divergence=stage)

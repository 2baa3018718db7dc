"""What a comparison says where no known mistake explains a difference, and why none could."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from anymha.errors import AnymhaError
from anymha.interchange.detect import find_layers
from anymha.parity.comparison.baseline import outputs_alone
from anymha.parity.diagnose.causes import Diagnosis
from anymha.parity.reports.report import Comparison
from anymha.parity.stages.trace import Adapter

WEIGHT = "weight "
"""How the names of stages begin that compare weights."""


def explained(comparison: Comparison, adapters: Sequence[Adapter]) -> Comparison:
    """The comparison with causes that need no known weights, or with why none was found.

    `adapters` are those of reference and candidate.
    """
    diagnosis = comparison.diagnosis
    if comparison.passed or diagnosis is None:
        return comparison
    if any(trace.random for trace in comparison.traces):
        return _with(comparison, _random(comparison, adapters[1]))
    axes = _other_axes(comparison)
    if axes is not None:
        return _with(comparison, axes)
    if diagnosis.causes:
        return comparison
    untold = _untold_weights(comparison)
    if untold is not None:
        return _with(comparison, untold)
    reason = _reason(comparison)
    compared = "they are compared: weights that differ would explain this, too"
    end = "causes are searched for" if reason else compared
    offers = dict.fromkeys(f"{one}, and {end}." for one in map(offer, adapters) if one)
    notes = (*comparison.notes, *offers)
    diagnosis = dataclasses.replace(diagnosis, untried=reason or diagnosis.untried)
    return dataclasses.replace(comparison, diagnosis=diagnosis, notes=notes)


def _with(comparison: Comparison, diagnosis: Diagnosis) -> Comparison:
    stage = diagnosis.causes[0].stage
    return dataclasses.replace(comparison, diagnosis=diagnosis, first_divergence=stage)


def _reason(comparison: Comparison) -> str:
    """Why known mistakes could not be tried; empty where they were."""
    first, second = comparison.traces
    if first.weights is second.weights is None:
        return "neither side tells its weights"
    if not comparison.exact:
        return "the reference computes more than attention of its weights, as the note says"
    if first.output.shape != second.output.shape:
        return f"the output has the shape {second.output.shape}, not {first.output.shape}"
    return ""


def _untold_weights(comparison: Comparison) -> Diagnosis | None:
    """Weights that one side alone tells, where all results agree."""
    wrong = [stage.name for stage in comparison.stages if not stage.passed]
    if not wrong or not all(name.startswith(WEIGHT) for name in wrong):
        return None
    names = [name.removeprefix(WEIGHT) for name in wrong]
    for trace in comparison.traces:
        if not {*names} & {*(trace.weights or ()), *trace.extras}:
            fix = ("The results agree. Give `declare`, or the layer, the option that has these "
                   "weights: `query_key_norm`, `gate` or `sinks`.")  # fmt: skip
            told = f"{trace.name} does not tell {', '.join(names)}"
            return Diagnosis.certain(told, wrong[0], fix)
    return None


def _other_axes(comparison: Comparison) -> Diagnosis | None:
    """Right numbers in another order of axes, as time first."""
    first, second = comparison.traces
    if second.output.ndim != 3 or second.output.shape == first.output.shape:
        return None
    for order, words in (((1, 0, 2), "time before batch"), ((0, 2, 1), "features before time")):
        output = second.output.transpose(order)
        if output.shape == first.output.shape:
            turned = dataclasses.replace(second, output=output, scores=None, gradients={})
            if outputs_alone(comparison.request, first, turned).passed:
                fix = "Exchange the axes of the output: it is (batch, time, features)."
                return Diagnosis.certain(f"{words} in the output", "output", fix)
    return None


def _random(comparison: Comparison, adapter: Any) -> Diagnosis:
    """Why two calls gave two results, as far as the numbers tell."""
    first, second = comparison.traces
    if comparison.request.training:
        fix = ("In training each draws random numbers of its own: compare in evaluation; only "
               "layers that take one `seed` can be compared in training.")  # fmt: skip
        name = "dropout that draws random numbers of its own"
        return Diagnosis.certain(name, "dropped_probabilities", fix)
    if first.random:
        fix = "Switch dropout and other random numbers off: nothing can be compared with it."
        whose = "both give" if second.random else "the reference gives"
        return Diagnosis.certain(f"{whose} another result each time", "output", fix)
    fix = "Two calls gave two results: switch the candidate to evaluation."
    if first.output.shape == second.output.shape:
        if _is_dropped(second.output.astype(np.float64), first.output.astype(np.float64)):
            return Diagnosis.certain("dropout of the output left on", "output", fix)
        shares = _dropped_shares(comparison)
        if _is_dropped(*shares) if shares is not None else _has_dropout(adapter):
            return Diagnosis.certain("dropout left on", "dropped_probabilities", fix)
    name = "another result each time: dropout left on, or other random numbers"
    return Diagnosis.certain(name, "output", fix)


def _has_dropout(adapter: Any) -> bool:
    """Whether a module has dropout that acts, or a layer has it among its options."""
    config = getattr(getattr(adapter, "layer", None), "config", None)
    if getattr(config, "dropout", 0):
        return True
    module = getattr(adapter, "module", None)
    parts = () if module is None else module.modules()
    return any("Dropout" in type(part).__name__ and part.training and getattr(part, "p", 0)
               for part in parts)  # fmt: skip


def _is_dropped(got: np.ndarray, whole: np.ndarray) -> bool:
    """Whether numbers are zero or those of `whole` times one factor above one."""
    counts = np.abs(whole) > 1e-3 * np.max(np.abs(whole), initial=0.0)
    ratios = np.divide(got, whole, out=np.zeros_like(got), where=counts)[counts]
    kept = ratios[np.abs(ratios) > 0.5]
    if not kept.size or kept.size == ratios.size:
        return False
    factor = float(np.median(kept))
    near = np.minimum(np.abs(ratios), np.abs(ratios - factor)) < 0.05
    return factor > 1.0 and bool(np.mean(near) > 0.99)


def _dropped_shares(comparison: Comparison) -> tuple[np.ndarray, np.ndarray] | None:
    """The dropped probabilities and the whole ones, or their factors by the output, and ones.

    None where the weights are not known, or the output has fewer features than the unknowns.
    """
    exact, (first, second) = comparison.exact, comparison.traces
    weights = first.weights or second.weights
    told = comparison.reported.get("dropped_probabilities")
    if exact and told is not None and told.shape == exact["probabilities"].shape:
        return told, exact["probabilities"]
    if not exact or weights is None or second.output.ndim != 3:
        return None
    shares, values = exact["probabilities"], exact["value"]
    batch, heads, queries, keys = shares.shape
    kernel = weights["output.kernel"].astype(np.float64)
    if heads * keys > kernel.shape[-1] or kernel.ndim != 3:
        return None
    values = np.repeat(values, heads // values.shape[2], axis=2)
    terms = np.einsum("bhts,bshv,hvo->btohs", shares, values, kernel)
    bias = weights.get("output.bias", np.zeros(1)).astype(np.float64)
    rest = second.output.astype(np.float64) - bias
    columns = terms.reshape(batch, queries, -1, heads * keys)
    if not (np.isfinite(columns).all() and np.isfinite(rest).all()):
        return None
    sizes = np.linalg.norm(columns, axis=2)
    factors = np.stack([
        np.linalg.lstsq(columns[b, t], rest[b, t], rcond=None)[0]
        for b in range(batch) for t in range(queries)
    ]).reshape(sizes.shape)  # fmt: skip
    seen = sizes > 0.02 * sizes.max()  # the others are lost in rounding
    return factors[seen], np.ones_like(factors[seen])


def offer(adapter: Adapter) -> str:
    """How an implementation's weights can be named, where they are not known; else empty."""
    silent: Any = adapter
    if getattr(silent, "description", True) is not None or not hasattr(silent, "parameters"):
        return ""
    module, heads = getattr(silent, "module", None), silent.parameters.heads or "..."
    if module is None:
        return (f"Name the weights of {adapter.name} with `declare(function, layer)`, a layer of "
                "anymha that has them, or with `declare(function, weights, layout)`")  # fmt: skip
    try:
        groups = find_layers(dict(module.state_dict()))
    except AnymhaError:
        groups = []
    fits = [fit.name for group in groups[:1] for fit in group.fits if len(group.prefixes) == 1]
    if not fits:
        return f"Name the weights of {adapter.name} with `declare(module, weights, layout)`"
    others = f" (or {', '.join(fits[1:4])})" if fits[1:] else ""
    part = groups[0].prefixes[0].rstrip(".")
    state = f"module.get_submodule({part!r}).state_dict(), " if part else ""
    return (f"Name the weights of {adapter.name} with `declare(module, {state}layout={fits[0]!r}, "
            f"num_heads={heads})`{others}")  # fmt: skip

"""`compare` and `assert_parity`: two implementations, one call, where they differ, and why."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import numpy as np

from anymha.errors import AnymhaError
from anymha.framework.dtypes import accumulation_dtype
from anymha.framework.names import answers
from anymha.parity.adapters import adapter_for
from anymha.parity.adapters.arguments import exits_as_errors
from anymha.parity.adapters.decoding import (
    Stepwise,
    Whole,
    decoded_request,
    decoding_pair,
    settle_padding,
)
from anymha.parity.adapters.ours import Ours
from anymha.parity.comparison.baseline import Baseline, outputs_alone
from anymha.parity.comparison.cut import cut, sequences, words
from anymha.parity.comparison.named_layers import with_layers
from anymha.parity.comparison.no_numbers import says_nothing, without_gradients, without_numbers
from anymha.parity.comparison.probed import with_probed_kernels
from anymha.parity.comparison.proven_weights import proven
from anymha.parity.comparison.unexplained import explained
from anymha.parity.diagnose.cache_functions import ways_of
from anymha.parity.diagnose.calls import diagnose_by_calls
from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.decoding_mistakes import MISTAKES
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.oracle.recipe import Arrays
from anymha.parity.oracle.truth import fold
from anymha.parity.reports.report import Comparison
from anymha.parity.stages.limits import computed_dtype, turned_away
from anymha.parity.stages.structure import distance
from anymha.parity.stages.tolerance import eps
from anymha.parity.stages.trace import (
    INPUTS,
    POSITIONS,
    Adapter,
    Request,
    Trace,
    make_request,
    problem_of,
)

STIRRED = 4
"""How many calls tell what rounding changes, where one is too few."""

OF_A_CACHE = {name for name, *_ in MISTAKES}
"""The causes that may be mistakes of what is done to a cache between calls."""

OF_A_FUNCTION = {"reorder": "cache of another row", "join": "rotation after the join"}
"""The causes that say which function of a cache is wrong."""


class ParityError(AnymhaError, AssertionError):
    """Two implementations do not agree; the message says where they differ, and why.

    Example:
        >>> import anymha, numpy as np
        >>> from anymha.parity import ParityError, assert_parity
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
        >>> x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
        >>> try:
        ...     assert_parity(layer, lambda query: -layer(query), x)
        ... except ParityError as error:
        ...     print(str(error).split(":")[0])
        PARITY DOES NOT HOLD
    """


@exits_as_errors
@answers()
def compare(reference: Any, candidate: Any, inputs: Any, **call: Any) -> Comparison:
    """Compare two implementations on the same inputs, stage by stage.

    Args:
        reference: The implementation that counts as right: a layer of anymha in any framework; a
            live layer of torch, Keras, Flax or Equinox; a function of query, value and
            key, by its own names for them, which returns the output, or the output and the scores,
            or a dict of stages; what `decoding` makes of a function that decodes step by step; or
            the name of a backend, as "numpy", whose layer gets the other's weights.
        candidate: What is judged; likewise.
        inputs: The query (B, T, D), a sequence of query, value and key, or a mapping of them by
            name; arrays of NumPy or of any framework.
        **call: The call's other arguments by the names of anymha's layer: masks, True = may attend,
            `use_causal_mask`, `attention_bias`, `training`, `seed`. Each library gets them as it
            takes them.

    Returns:
        The comparison: `passed`, `first_divergence`, `stages`, `diagnosis`, and reports.

    Raises:
        ArgumentError: an implementation or an argument is not known.
        LayoutError: an implementation cannot do, or does not take, what the call asks for.

    Example:
        >>> import anymha, numpy as np
        >>> from anymha.parity import compare
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
        >>> x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
        >>> compare(layer, layer, x, use_causal_mask=True).passed
        True
        >>> forgot = lambda query, use_causal_mask: layer(query)
        >>> report = compare(layer, forgot, x, use_causal_mask=True)
        >>> report.first_divergence, str(report.diagnosis)
        ('masked_logits', 'causal mask ignored')
    """
    request = make_request(inputs, call)
    reference, candidate, note = with_layers(reference, candidate)
    one, other = decoding_pair(adapter_for(reference), adapter_for(candidate), request)
    comparison = _compared_in_part(one, other, request)
    # Without what was called: reports are copied and pickled.
    first, second = (dataclasses.replace(trace, again=None) for trace in comparison.traces)
    notes = (*filter(None, [note]), *comparison.notes)
    return dataclasses.replace(comparison, notes=notes, traces=(first, second))


def _compared_in_part(one: Adapter, other: Adapter, request: Request) -> Comparison:
    """The comparison of two implementations, of which a large call's first part shows the rest."""
    part = cut(request)
    if part is None:
        return _compared(one, other, request)
    try:
        comparison = _compared(one, other, part)
    except AnymhaError:
        raise
    except Exception:  # of what takes no other length
        return _compared(one, other, request)
    return _at_full_length(comparison, one, other, request)


def _compared(one: Adapter, other: Adapter, request: Request, proving: bool = True) -> Comparison:
    """The comparison of two implementations in one call.

    `proving`: weights that nobody has named are read, where no cause is found without them.
    """
    request = decoded_request(request, one, other)
    first, cotangent = _traced("reference", one, request, None), None
    if not request.training:
        cotangent = np.random.default_rng(0).standard_normal(first.output.shape)
        first = _traced("reference", one, request, cotangent)
    second = _traced("candidate", other, request, cotangent if first.gradients else None)
    if request.decoded is None and not request.training:
        first, second = (
            dataclasses.replace(trace, again=partial(_again, adapter, request))
            for trace, adapter in ((first, one), (second, other))
        )
    stirred, pulled = None, None
    floating = all("float" in x.dtype.name for x in request.inputs.values())
    if first.weights is second.weights is None and floating and not first.random:
        pulled = cotangent if first.gradients and second.gradients else None
        stirred = _traced("reference", one, _stirred(request, first), pulled)
    comparison = judge_traces(request, first, second, cotangent, stirred)
    if stirred is not None and not comparison.passed:
        stirred = _stirred_often(one, request, first, stirred, pulled)
        if pulled is not None:
            stirred = _shaken_too(stirred, other, request, second, pulled)
        comparison = judge_traces(request, first, second, cotangent, stirred)
    if says_nothing(comparison) and not (first.random or second.random):
        return without_numbers(comparison, other, lambda request: _compared(one, other, request))
    lost = proving and without_gradients(
        comparison, lambda request: _compared(one, other, request, proving=False)
    )
    if lost:
        return lost
    unknown = first.weights is second.weights is None and not (first.random or second.random)
    if unknown and comparison.first_divergence == "output":
        comparison = _explained_by_calls(comparison, one, stirred)
    read = _with_proven_weights(comparison, one, other) if proving else None
    if read is not None:
        return read
    comparison = explained(comparison, (one, other))
    comparison = with_probed_kernels(comparison, other)
    if isinstance(other, Stepwise) and not comparison.passed:
        return _with_less(comparison, other)
    return comparison


def _with_proven_weights(comparison: Comparison, one: Adapter, other: Adapter) -> Comparison | None:
    """The comparison with weights that nobody has named, where it has no cause without them."""
    request, (first, second) = comparison.request, comparison.traces
    found = comparison.diagnosis
    if comparison.passed or (found is not None and found.causes) or first.random or second.random:
        return None
    if first.weights is None and second.weights is None:
        whose = proven(one, request, first)
        if whose is not None:
            one, other = whose.adapter, whose.alike(other)
    else:  # a candidate may have others than it was declared to have
        whose, own = None, getattr(other, "state", None)
        if first.weights is not None and own is None:
            whose = proven(other, request, second, first.config)
        if whose is not None:
            other = whose.adapter
    if whose is None:
        return None
    read = _compared(one, other, request, proving=False)
    return dataclasses.replace(read, notes=(whose.note, *read.notes))


def _with_less(comparison: Comparison, candidate: Stepwise) -> Comparison:
    """The comparison with the function of a cache without which the candidate is right."""
    diagnosis, request, (first, second) = (
        comparison.diagnosis, comparison.request, comparison.traces)  # fmt: skip
    found = diagnosis.causes if diagnosis is not None and diagnosis.explained else ()
    if first.random or second.random or (found and found[0].name not in OF_A_CACHE):
        return comparison
    for name, other in candidate.less():
        traces = first, _traced("candidate", other, request, None)
        one, two = settle_padding(request, traces, None)
        one = dataclasses.replace(one, scores=None)
        if not outputs_alone(request, one, two).passed:
            continue
        fix = f"Without `{name}` all agrees: look at what it does to keys, values and lengths."
        if diagnosis and found and found[0].name == OF_A_FUNCTION.get(name):
            cause = dataclasses.replace(found[0], fix=f"{found[0].fix} {fix}")
            diagnosis = dataclasses.replace(diagnosis, causes=(cause, *found[1:]))
        else:
            known = f"as of {' and '.join(map(str, found))}" if found else ""
            ways = _ways_of(name, comparison) or [known]
            stage = found[0].stage if found else "output"
            cause = Cause(f"wrong with `{name}`", ways[0], stage, fix)
            diagnosis = Diagnosis((cause,), 0.0, tuple(ways[1:4]))
        return dataclasses.replace(comparison, diagnosis=diagnosis)
    return comparison if found else _with_none(comparison, candidate)


def _with_none(comparison: Comparison, candidate: Stepwise) -> Comparison:
    """The comparison with what explains it where no function of the cache is called."""
    request, (first, _), bare = comparison.request, comparison.traces, candidate.bare()
    if bare is None or request.decoded is None:
        return comparison
    request = dataclasses.replace(request, decoded=bare.facts(request))
    other = judge_traces(request, first, _traced("candidate", bare, request, None))
    if other.passed or other.diagnosis is None or not other.diagnosis.explained:
        return comparison
    note = "The cause is that of calls without `truncate`, `reorder` and `join`; more may differ."
    return dataclasses.replace(comparison, diagnosis=other.diagnosis,
                               first_divergence=other.first_divergence,
                               notes=(*comparison.notes, note))  # fmt: skip


def _ways_of(function: str, comparison: Comparison) -> list[str]:
    """In what ways a function of a cache may be wrong, in words; none where it is not known."""
    request, (first, second) = comparison.request, comparison.traces
    basis = first if first.weights is not None else second
    if basis.weights is None or basis.config is None or not comparison.exact:
        return []
    folded = fold(problem_of(basis.config, basis.weights, request))
    recipe = folded.recipe.but(decoded=request.decoded)
    _, second = settle_padding(request, (first, second), folded)
    with np.errstate(all="ignore"):
        reported = {"output": second.output.astype(np.float64)}
        return [*ways_of(function, recipe, Evidence(second, reported, first))]


def _explained_by_calls(
    comparison: Comparison, reference: Adapter, stirred: Trace | None
) -> Comparison:
    """The comparison with the mistakes that show as the reference is called with them."""
    request, (first, second) = comparison.request, comparison.traces
    rounding = 0.0 if stirred is None else stirred.output - first.output

    def judge(output: np.ndarray) -> float:
        output = output.astype(first.output.dtype)
        trace = dataclasses.replace(first, output=output, scores=None)
        nearby = None
        if stirred is not None and output.shape == first.output.shape:
            nearby = dataclasses.replace(stirred, output=output + rounding)
        stage = outputs_alone(request, trace, second, stirred=nearby).stages[0]
        return stage.units / stage.budget if stage.budget else math.inf

    with np.errstate(all="ignore"):
        diagnosis = diagnose_by_calls(
            request, lambda other: reference.trace(other, None).output, first.output,
            second.output, judge,
        )  # fmt: skip
    return dataclasses.replace(comparison, diagnosis=diagnosis)


def _at_full_length(
    comparison: Comparison, one: Adapter, other: Adapter, whole: Request
) -> Comparison:
    """The comparison of a part, with the outputs at the full length of the call."""
    note = ("The case is large: stages, gradients and causes are those of its first part, "
            f"{words(whole, comparison.request)}.")  # fmt: skip
    request = None if whole.training or not comparison.passed else sequences(whole)
    if request is None:
        rest = "" if not comparison.passed else " Nothing is known of greater lengths."
        return dataclasses.replace(comparison, notes=(note + rest, *comparison.notes))
    request = decoded_request(request, one, other)
    outputs = [
        adapter.output(request) if isinstance(adapter, (Ours, Whole))
        else _traced(role, adapter, request, None).output
        for role, adapter in (("reference", one), ("candidate", other))
    ]  # fmt: skip
    first, second = (
        dataclasses.replace(trace, output=output, scores=None, stages={})
        for trace, output in zip(comparison.traces, outputs, strict=True)
    )
    first, second = settle_padding(request, (first, second), None)
    with np.errstate(all="ignore"):
        turned = _turned_away(request, first, second)
        (stage,) = outputs_alone(request, first, second, turned=turned).stages
    stage = dataclasses.replace(stage, name="output at full length")
    stages = (*comparison.stages, stage)
    note += f" The outputs agree at {words(whole, request)}." * stage.passed
    changes: dict[str, Any] = {"stages": stages, "notes": (note, *comparison.notes)}
    if not stage.passed:
        fix = ("The first positions agree: look for tables of positions, windows, chunks, and "
               "limits that long sequences exceed.")  # fmt: skip
        name = "a mistake that long sequences alone show"
        changes["diagnosis"] = Diagnosis.certain(name, stage.name, fix)
        changes["first_divergence"] = stage.name
        changes["request"] = whole  # what repeats it
    return dataclasses.replace(comparison, **changes)


def _turned_away(request: Request, first: Trace, second: Trace) -> np.ndarray | None:
    """How much rounded angles change each position of an output, as a part; None: by nothing."""
    basis = first if first.weights is not None else second
    if basis.weights is None or basis.config is None:
        return None
    folded = fold(problem_of(basis.config, basis.weights, request))
    recipe = folded.recipe
    if not recipe.sections or folded.output_shape != first.output.shape or first.output.ndim != 3:
        return None
    recipe = recipe if request.decoded is None else recipe.but(decoded=request.decoded)
    return turned_away(recipe, computed_dtype(first))


def _stirred_often(
    adapter: Adapter, request: Request, first: Trace, stirred: Trace, pulled: np.ndarray | None
) -> Trace:
    """A stirred trace whose results are off by the root of the mean square of several.

    What rounding changes in one softmax is one random number for all features of its position, and
    may be small by chance: the root of the mean over the features is the least that any of them
    counts. The rounding of a rotation's angle grows with its position, of which it is a part: what
    it changes is that part of what a displacement by one changes.
    """
    far = max([_greatest_position(request.call.get(name)) for name in POSITIONS])
    part = min(1.0, far * eps(accumulation_dtype(computed_dtype(first))) / 2)
    others = [stirred]
    for seed in range(1, STIRRED):
        others.append(_traced("reference", adapter, _stirred(request, first, seed), None))
    moved = [
        _traced("reference", adapter, _displaced(request, seed), pulled)
        for seed in range(STIRRED if far else 0)
    ]

    def squares(exact: np.ndarray, arrays: list[np.ndarray | None]) -> Any:
        same = [array for array in arrays if array is not None and array.shape == exact.shape]
        apart = [distance(array.astype(np.float64), exact) ** 2 for array in same]
        return np.mean(apart, axis=0) if apart else 0.0

    def off(name: str) -> np.ndarray:
        exact = getattr(first, name).astype(np.float64)
        total = squares(exact, [getattr(trace, name) for trace in others])
        total = total + part**2 * squares(exact, [getattr(trace, name) for trace in moved])
        total = np.maximum(total, np.mean(total, axis=-1, keepdims=True))
        return exact + np.sqrt(total)

    with np.errstate(all="ignore"):
        gradients = dict(stirred.gradients)
        for name, array in stirred.gradients.items():
            apart = [np.abs(trace.gradients[name] - array) for trace in moved]
            gradients[name] = array + part * np.max(apart, axis=0) if apart else array
        scores = None if first.scores is None else off("scores")
        return dataclasses.replace(
            stirred, output=off("output"), scores=scores, gradients=gradients
        )


def _shaken_too(
    stirred: Trace, candidate: Adapter, request: Request, second: Trace, pulled: np.ndarray
) -> Trace:
    """A stirred trace with gradients that are off by what rounding changes in the candidate's too.

    Where the softmax is saturated, a gradient is the rest of terms that cancel: of one way to
    compute it nothing may be left, of another their rounding. What another call with the same
    inputs changes is no rounding.
    """
    again = _traced("candidate", candidate, request, pulled).gradients
    calls = [
        _traced("candidate", candidate, _stirred(request, second, seed), pulled).gradients
        for seed in range(STIRRED)
    ]
    gradients = dict(stirred.gradients)
    for name, array in second.gradients.items():
        apart, repeated = (
            np.max([distance(one[name].astype(np.float64), array) for one in some], axis=0)
            for some in (calls, [again])
        )
        alike = np.max(repeated, initial=0.0) <= np.max(apart, initial=0.0) / STIRRED
        if alike and name in gradients and gradients[name].shape == array.shape:
            gradients[name] = gradients[name] + np.nan_to_num(apart, posinf=0.0)
    return dataclasses.replace(stirred, gradients=gradients)


def _stirred(request: Request, trace: Trace, seed: int = 0) -> Request:
    """The request with inputs and a bias that are off by their rounding in the trace's dtype."""
    rng, unit = np.random.default_rng(seed), eps(computed_dtype(trace))
    inputs = {
        name: (array * (1 + unit * rng.choice([-1.0, 1.0], array.shape))).astype(array.dtype)
        for name, array in request.inputs.items()
    }
    bias = request.bias
    if bias is not None:
        bias = (bias * (1 + unit * rng.choice([-1.0, 1.0], bias.shape))).astype(bias.dtype)
    return request.with_inputs(inputs, bias=bias)


def _again(adapter: Adapter, request: Request, seed: int) -> tuple[Arrays, Trace]:
    """The inputs and the results of a call with random inputs, as great as those of a request."""
    rng = np.random.default_rng([seed, 15])
    inputs: Arrays = {}
    for name, array in request.inputs.items():
        like = next((n for n in inputs if np.array_equal(request.inputs[n], array)), None)
        size = np.sqrt(np.mean(np.square(array, dtype=np.float64)))
        drawn = (size * rng.standard_normal(array.shape)).astype(array.dtype)
        inputs[name] = drawn if like is None else inputs[like]
    other = request.with_inputs(inputs)
    return dict(zip(INPUTS, other.three, strict=True)), adapter.trace(other, None)


def _greatest_position(positions: Any) -> float:
    return 0.0 if positions is None else float(np.max(np.abs(positions), initial=0))


def _displaced(request: Request, seed: int) -> Request:
    """The request with positions that are lower by 0 or 1: a table of angles may have no more."""
    rng = np.random.default_rng(seed)
    given = {n: np.asarray(request.call[n]) for n in POSITIONS if request.call.get(n) is not None}
    moved = {
        name: np.maximum(places - rng.integers(0, 2, places.shape), 0).astype(places.dtype)
        for name, places in given.items()
    }
    return dataclasses.replace(request, call={**request.call, **moved})


def _traced(role: str, adapter: Adapter, request: Request, cotangent: np.ndarray | None) -> Trace:
    """The trace of one implementation; an error that it raises says which one it was."""
    try:
        return adapter.trace(request, cotangent)
    except Exception as error:
        error.add_note(f"It was raised as the {role} was called: {adapter.name}.")
        raise


def judge_traces(
    request: Request,
    first: Trace,
    second: Trace,
    cotangent: np.ndarray | None = None,
    stirred: Trace | None = None,
) -> Comparison:
    """The comparison of two traces of one call; with the output's cotangent, of gradients too.

    `stirred` is the trace of the reference with inputs that are off by their rounding: where no
    weights are known, it tells what rounding changes.
    """
    basis = first if first.weights is not None else second
    with np.errstate(all="ignore"):  # the comparison reports overflow and NaN
        if basis.weights is None or basis.config is None:
            first, second = settle_padding(request, (first, second), None)
            if stirred is not None:
                (stirred,) = settle_padding(request, (stirred,), None)
            return outputs_alone(request, first, second, cotangent, stirred=stirred)
        folded = fold(problem_of(basis.config, basis.weights, request))
        if request.decoded is not None:
            recipe = folded.recipe.but(decoded=request.decoded)
            folded = dataclasses.replace(folded, recipe=recipe)
            first, second = settle_padding(request, (first, second), folded)
        return Baseline(request, folded, first).judge(second, cotangent)


@answers()
def assert_parity(reference: Any, candidate: Any, inputs: Any, **call: Any) -> None:
    """Fail unless two implementations agree; the message says where they differ, and why.

    Args:
        reference: As for `compare`.
        candidate: As for `compare`.
        inputs: As for `compare`.
        **call: As for `compare`.

    Raises:
        ParityError: they do not agree; it is an AssertionError too.
        ArgumentError: an implementation or an argument is not known.
        LayoutError: an implementation cannot do, or does not take, what the call asks for.

    Example:
        >>> import anymha, numpy as np
        >>> from anymha.parity import assert_parity
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
        >>> x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
        >>> assert_parity(layer, layer, x, use_causal_mask=True)
    """
    report = compare(reference, candidate, inputs, **call)
    if not report.passed:
        raise ParityError(report.to_text())

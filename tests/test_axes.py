"""Attention over any axes: each batch place on its own, against the oracle, masks of all ranks."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from anymha.framework.registry import Backend
from anymha.layer.axes import Axes, resolve_axes
from anymha.parity.oracle.oracle import Truth
from tests.support import Arrays, Problem, agree, check, make, normal, run, truth

pytestmark = pytest.mark.usefixtures("quick_programs")

H = 4

# shape of the query, attention axes as given, as positive and in order named; keys' lengths there
LAYOUTS: dict[str, tuple[tuple[int, ...], Any, tuple[int, ...], tuple[int, ...]]] = {
    "two axes by default": ((2, 3, 4), None, (1, 2), (2, 5)),
    "one of two": ((2, 5, 3), 1, (1,), (4,)),
    "the other of two": ((2, 5, 3), (2,), (2,), (4,)),
    "negative": ((2, 5, 3), -2, (2,), (4,)),
    "negative, apart": ((2, 3, 2, 4), (-4, -2), (1, 3), (2, 3)),
    "in another order": ((2, 3, 4), (2, 1), (2, 1), (5, 2)),
    "the first named": ((5, 2, 3), 0, (0,), (4,)),
    "the first and another": ((3, 2, 4), (0, -2), (0, 2), (2, 5)),
    "all named": ((2, 3), (0, 1), (0, 1), (2, 4)),
    "rank 2, no batch": ((5,), 0, (0,), (4,)),
    "three batch axes": ((2, 1, 2, 5), (3,), (3,), (4,)),
}


def _layout(name: str) -> tuple[Problem, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A problem, and the lengths of its batch, query and key axes."""
    query, given, axes, keys = LAYOUTS[name]
    value = list(query)
    for axis, length in zip(axes, keys, strict=True):
        value[axis] = length
    batch = tuple(n for axis, n in enumerate(query) if axis not in axes)
    queries = tuple(query[axis] for axis in axes)
    problem = make(
        query, tuple(value), attention_axes=given, output_shape=(2, 3),
        score_shape=(*batch, H, *queries, *keys),
    )  # fmt: skip
    return problem, batch, queries, keys


def _truth(
    name: str, problem: Problem, allowed: np.ndarray | None, bias: np.ndarray | None
) -> Truth:
    """The oracle asked for one batch place after another, and put together by hand.

    Args:
        name: The layout.
        problem: The problem.
        allowed: (batch axes, H, query axes, key axes) booleans, or None.
        bias: Of that shape, or None.
    """
    _, batch, queries, keys = _layout(name)
    _, _, axes, _ = LAYOUTS[name]
    rest = [axis for axis in range(len(problem.inputs["query"].shape) - 1) if axis not in axes]
    lengths = {"query": queries, "value": keys, "key": keys}
    t, s = math.prod(queries), math.prod(keys)

    def at(place: tuple[int, ...]) -> tuple[Any, ...]:
        index: list[Any] = [slice(None)] * (len(rest) + len(axes))
        for axis, i in zip(rest, place, strict=True):
            index[axis] = i
        return tuple(index)

    def rows(array: np.ndarray) -> np.ndarray:
        """What is left at a place, its axes in the order named, as (1, length, ...)."""
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        named = np.moveaxis(array, range(len(axes)), order)
        return named.reshape(1, math.prod(named.shape[: len(axes)]), *named.shape[len(axes) :])

    def back(array: np.ndarray, name: str) -> np.ndarray:
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        named = array.reshape(*lengths[name], *array.shape[2:])
        return np.moveaxis(named, order, range(len(axes)))

    def zeros() -> Arrays:
        shapes = {n: a.shape for n, a in {**problem.weights, **problem.inputs}.items()}
        shapes |= {"output": problem.d_output.shape, "scores": problem.d_scores.shape}
        if bias is not None:
            shapes["attention_bias"] = problem.d_scores.shape
        return {n: np.zeros(shape) for n, shape in shapes.items()}

    def add(total: Arrays, part: Arrays, place: tuple[int, ...]) -> None:
        for n, array in part.items():
            if n in ("scores", "attention_bias"):
                total[n][place] = array.reshape(H, *queries, *keys)
            elif n in lengths or n == "output":
                total[n][at(place)] = back(array, "query" if n == "output" else n)
            else:
                total[n] += array.reshape(total[n].shape)

    exact, magnitudes = zeros(), zeros()
    for place in itertools.product(*map(range, batch)):
        here = problem.but(
            inputs={n: rows(problem.inputs[n][at(place)]) for n in lengths},
            d_output=rows(problem.d_output[at(place)]),
            d_scores=problem.d_scores[place].reshape(1, H, t, s),
        )
        if bias is not None:
            here.inputs["attention_bias"] = bias[place].reshape(1, H, t, s)
        mask = None if allowed is None else allowed[place].reshape(1, H, t, s)
        found = truth(here, allowed=mask)
        add(exact, {"output": found.output, "scores": found.scores, **found.gradients}, place)
        largest = found.magnitudes["output"].reshape(found.output.shape)
        add(magnitudes, {**found.magnitudes, "output": largest}, place)
    return Truth(exact.pop("output"), exact.pop("scores"), {}, exact, magnitudes)


@lru_cache
def _plain(name: str) -> tuple[Problem, Truth]:
    problem, *_ = _layout(name)
    return problem, _truth(name, problem, None, None)


# With masks each layout is below; without, those that take long to compile share the layouts.
PLAIN = [
    *itertools.product(("numpy", "torch"), LAYOUTS),
    *zip(itertools.cycle(("tensorflow", "jax")), LAYOUTS, strict=False),
]


@pytest.mark.parametrize(("backend", "name"), PLAIN, indirect=["backend"])
def test_each_batch_place_is_on_its_own(backend: Backend, name: str) -> None:
    _agree(backend, *_plain(name))


def _agree(backend: Backend, problem: Problem, exact: Truth) -> None:
    agree(run(backend, problem), exact, problem)


RANKS = ("queries and keys", "batch", "heads")


@pytest.mark.parametrize(
    ("name", "rank"),
    [*zip(LAYOUTS, itertools.cycle(RANKS)), *(("negative, apart", rank) for rank in RANKS[::2])],
)
def test_masks_of_all_ranks_and_bias(backend: Backend, name: str, rank: str) -> None:
    _agree(backend, *_masked(name, rank))


@lru_cache
def _masked(name: str, rank: str) -> tuple[Problem, Truth]:
    problem, batch, queries, keys = _layout(name)
    full = (*batch, H, *queries, *keys)
    lead = {"queries and keys": (), "batch": batch, "heads": (*batch, H)}[rank]
    mask = normal((*lead, *queries, *keys), name, rank) > -0.4
    padding = normal((*batch, *keys), name, "padding") > -0.8
    counted = normal((*batch, *queries), name, "counted") > -1
    bias = normal(full, name, "bias")
    held = (*lead, *[1] * (len(batch) - len(lead[: len(batch)])))  # ones for batch axes not there
    spread = mask.reshape(*held[: len(batch)], *(lead[len(batch) :] or (1,)), *queries, *keys)
    allowed = np.broadcast_to(spread, full)
    allowed = allowed & padding.reshape(*batch, 1, *[1] * len(queries), *keys)
    allowed = allowed & counted.reshape(*batch, 1, *queries, *[1] * len(keys))
    problem = problem.calling(
        attention_mask=mask, value_mask=padding, query_mask=counted, attention_bias=bias
    )
    return problem, _truth(name, problem, allowed, problem.inputs["attention_bias"])


@pytest.mark.parametrize("name", ["two axes by default", "in another order", "the first named"])
def test_causal_is_row_major_over_the_axes_as_named(backend: Backend, name: str) -> None:
    problem, batch, queries, keys = _layout(name)
    t, s = math.prod(queries), math.prod(keys)
    allowed = np.arange(s)[None, :] <= np.arange(t)[:, None] + 1
    allowed = np.broadcast_to(allowed.reshape(*queries, *keys), (*batch, H, *queries, *keys))
    problem = problem.calling(use_causal_mask=True, query_offset=1)
    _agree(backend, problem, _truth(name, problem, allowed, None))


def test_masks_broadcast_along_axes_of_length_one(backend: Backend) -> None:
    problem, batch, queries, keys = _layout("two axes by default")
    mask = normal((*batch, 1, 4, 2, 1), "ones") > 0
    bias = normal((H, 3, 1, 1, 5), "ones", "bias")
    problem = problem.calling(attention_mask=mask, attention_bias=bias)
    full = (*batch, H, *queries, *keys)
    spread = np.broadcast_to(problem.inputs["attention_bias"], full)
    exact = _truth("two axes by default", problem, np.broadcast_to(mask[:, None], full), spread)
    for arrays in (exact.gradients, exact.magnitudes):
        summed = arrays["attention_bias"].sum((0, 3, 4), keepdims=True)[0]  # [H, 3, 1, 1, 5]
        arrays["attention_bias"] = summed
    _agree(backend, problem, exact)


def test_offset_counts_by_each_batch_place(backend: Backend) -> None:
    problem, batch, queries, keys = _layout("the other of two")
    offsets = np.arange(10, dtype=np.int32) % 3
    allowed = np.arange(4) <= np.arange(3)[:, None] + offsets[:, None, None]
    allowed = allowed.reshape(*batch, 1, *queries, *keys)
    problem = problem.calling(use_causal_mask=True, query_offset=offsets)
    full = np.broadcast_to(allowed, (*batch, H, *queries, *keys))
    _agree(backend, problem, _truth("the other of two", problem, full, None))


def test_naming_the_second_axis_is_the_plain_layer(backend: Backend) -> None:
    plain, named = make(), make(attention_axes=1)
    check(backend, named)
    a, b = run(backend, plain), run(backend, named)
    assert a.output.tobytes() == b.output.tobytes()


def test_axes_resolve_to_batch_and_attention() -> None:
    assert resolve_axes(None, 4) == Axes((0,), (1, 2))
    assert resolve_axes((-2, 0), 4) == Axes((1,), (2, 0))
    assert resolve_axes((0,), 2) == Axes((), (0,))

"""Steps by `torch.compile` write into arrays that are donated; older caches stay right."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from anymha.framework.registry import get_layer
from tests.frameworks import required

MOST, WIDTH, ROWS = 9, 8, 2
NAN = float("nan")
ASKED = "ignore:The .grad attribute"
"""What torch's compiler itself asks of tensors that have a gradient to flow through."""


@pytest.fixture(autouse=True)
def torch() -> Iterator[Any]:
    module = required("torch")
    module._dynamo.reset()
    # A program has one number of new positions, one mode of differentiation, and may write or not.
    with module._dynamo.config.patch(recompile_limit=64, automatic_dynamic_shapes=False):
        yield module
    module._dynamo.reset()


class Compiled:
    """A layer, its compiled step, and what calls of it must give.

    Args:
        torch: The module.
        backend: The compiler's backend.
        **options: The layer's options.
    """

    def __init__(self, torch: Any, backend: str = "eager", **options: Any) -> None:
        self.torch = torch
        self.layer: Any = get_layer("torch")(2, 4, query_features=WIDTH, seed=0, **options)
        testing = importlib.import_module("torch._dynamo.testing")
        self.programs = testing.CompileCounterWithBackend(backend)
        self.step: Any = torch.compile(
            lambda x, cache, mask=None: self.layer(x, cache=cache, value_mask=mask),
            fullgraph=True, backend=self.programs,
        )  # fmt: skip
        self.x = self.drawn(1, MOST)
        with torch.no_grad():
            self.expected = self.layer(self.x, use_causal_mask=True)

    def drawn(self, seed: int, length: int) -> Any:
        generator = self.torch.Generator().manual_seed(seed)
        return self.torch.randn(ROWS, length, WIDTH, generator=generator)

    def caches(self, *lengths: int) -> list[Any]:
        """The caches of compiled steps of so many positions, from an empty one on; all checked."""
        caches, at = [self.layer.make_cache(ROWS, MOST, donate=True)], 0
        for length in lengths:
            output, cache = self.step(self.x[:, at : at + length], caches[-1])
            at += length
            self.check(output, at - length, at)
            caches.append(cache)
        return caches

    def check(self, output: Any, begin: int, end: int) -> None:
        self.torch.testing.assert_close(
            output.detach(), self.expected[:, begin:end], atol=2e-6, rtol=0
        )

    def goes_on(self, cache: Any, at: int) -> None:
        """Check the next position after a cache, by both ways."""
        for step in (self.step, lambda x, cache: self.layer(x, cache=cache)):
            output, _ = step(self.x[:, at : at + 1], cache)
            self.check(output, at, at + 1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_steps_write_into_the_arrays(torch: Any, backend: str) -> None:
    case = Compiled(torch, backend)
    with torch.no_grad():
        caches = case.caches(*[1] * MOST)
        assert case.programs.frame_count == 1
        for cache in caches:
            assert cache.keys.data_ptr() == caches[0].keys.data_ptr()
            assert cache.values.data_ptr() == caches[0].values.data_ptr()
        caches = case.caches(3, 3, 3)
    assert caches[0].keys.data_ptr() == caches[-1].keys.data_ptr()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_positions_with_padding_are_written_too(torch: Any, backend: str) -> None:
    """Rows come to their end in different pieces; what is padding is NaN, and stays out."""
    case = Compiled(torch, backend)
    pieces = [(3, 1), (2, 3), (3, 3), (1, 2)]  # so many positions of each row
    at = np.zeros(ROWS, int)
    with torch.no_grad():
        cache = first = case.layer.make_cache(ROWS, MOST, donate=True)
        for counts in pieces:
            mask = torch.arange(3) < torch.tensor(counts)[:, None]
            x = torch.full((ROWS, 3, WIDTH), NAN)
            for row, count in enumerate(counts):
                x[row, :count] = case.x[row, at[row] : at[row] + count]
            output, cache = case.step(x, cache, mask)
            for row, count in enumerate(counts):
                expected = case.expected[row, at[row] : at[row] + count]
                torch.testing.assert_close(output[row, :count], expected, atol=2e-6, rtol=0)
            at += counts
    assert cache.lengths.tolist() == at.tolist() == [MOST, MOST]
    assert cache.keys.data_ptr() == first.keys.data_ptr()


def test_an_older_cache_keeps_its_meaning(torch: Any) -> None:
    """What later steps have written, NaN too, is not seen; the newer caches stay as they are."""
    case = Compiled(torch)
    with torch.no_grad():
        caches = case.caches(*[1] * 5)
        _, lost = case.step(torch.full((ROWS, 1, WIDTH), NAN), caches[-1])
        kept = lost.keys.clone()
        for at, cache in enumerate(caches):
            case.goes_on(cache, at)
            case.goes_on(copy.copy(cache), at)
            case.goes_on(copy.deepcopy(cache), at)
            case.goes_on(dataclasses.replace(cache), at)
            case.goes_on(cache.truncate(at), at)
        assert _same(lost.keys, kept)


def _same(one: Any, other: Any) -> bool:
    return np.array_equal(one.numpy(), other.numpy(), equal_nan=True)


def test_caches_of_eager_calls_before_keep_theirs(torch: Any) -> None:
    """Those that are still there, and those whose successor is gone."""
    case = Compiled(torch)
    with torch.no_grad():
        empty = case.layer.make_cache(ROWS, MOST, donate=True)
        _, first = case.layer(case.x[:, :2], cache=empty)
        _, second = case.layer(case.x[:, 2:3], cache=first)
        output, third = case.step(case.x[:, 3:4], second)
        case.check(output, 3, 4)
        assert third.keys.data_ptr() == empty.keys.data_ptr()
        del second
        kept = third.keys.clone()
        case.goes_on(first, 2)
        case.goes_on(empty, 0)
        assert _same(third.keys, kept)
        case.goes_on(third, 4)


def test_a_cache_that_was_cut_does_not_write_into_the_longer_one(torch: Any) -> None:
    case = Compiled(torch)
    with torch.no_grad():
        *_, longer = case.caches(3, 1)
        _, longer = case.layer(case.x[:, 4:5], cache=longer)
        kept = longer.keys.clone()
        case.goes_on(longer.truncate(3), 3)
        assert _same(longer.keys, kept)
        case.goes_on(longer, 5)


def test_a_step_past_the_end_leaves_what_is_held(torch: Any) -> None:
    case = Compiled(torch)
    with torch.no_grad():
        *_, full = case.caches(3, 3, 3)
        kept = full.keys.clone()
        output, cache = case.step(case.x[:, :1], full)
        assert output.isnan().all()
        assert cache.overflowed.all()
        assert _same(cache.keys, kept)
        assert _same(full.keys, kept)
        case.goes_on(full.truncate(MOST - 1), MOST - 1)


def test_a_ring_is_copied(torch: Any) -> None:
    """A later position takes the slot of one that an older cache may need."""
    case = Compiled(torch, sliding_window=3)
    with torch.no_grad():
        caches = case.caches(*[1] * MOST)
        for at, cache in enumerate(caches[:MOST]):
            case.goes_on(cache, at)


@pytest.mark.filterwarnings(ASKED)
def test_all_modes_of_torch_follow_each_other(torch: Any) -> None:
    case = Compiled(torch)
    with torch.inference_mode():
        first = cache = case.layer.make_cache(ROWS, MOST, donate=True)
    modes = [torch.inference_mode, torch.no_grad] * 3 + [torch.enable_grad] * 2 + [torch.no_grad]
    for at, mode in enumerate(modes):
        with mode():
            step = case.step if at % 4 else lambda x, cache: case.layer(x, cache=cache)
            output, cache = step(case.x[:, at : at + 1], cache)
        case.check(output, at, at + 1)
        same = cache.keys.data_ptr() == first.keys.data_ptr()
        assert same == (at < 6)  # what has a gradient to flow through is copied


@pytest.mark.filterwarnings(ASKED)
def test_what_a_graph_of_gradients_needs_is_not_written(torch: Any) -> None:
    case = Compiled(torch)
    gradients = []
    for goes_on in (False, True):
        case.layer.zero_grad()
        _, cache = case.layer(case.x[:, :3], cache=case.layer.make_cache(ROWS, MOST, donate=True))
        output, cache = case.layer(case.x[:, 3:4], cache=cache)
        if goes_on:
            with torch.no_grad():
                case.step(case.x[:, 4:5], cache)
        output.square().sum().backward()
        gradients.append(case.layer.key.weight.grad.clone())
    assert torch.equal(*gradients)


def test_without_donate_nothing_is_written(torch: Any) -> None:
    """So that threads may go on from one prompt."""
    case = Compiled(torch)
    with torch.no_grad():
        _, prompt = case.step(case.x[:, :3], case.layer.make_cache(ROWS, MOST))
        kept = prompt.keys.clone()
        for _ in range(2):
            output, cache = case.step(case.x[:, 3:4], prompt)
            case.check(output, 3, 4)
            assert cache.keys.data_ptr() != prompt.keys.data_ptr()
            assert torch.equal(prompt.keys, kept)


LATER: dict[str, Callable[[Any], Any]] = {
    "itself": lambda cache: cache,
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
    "replaced": dataclasses.replace,
    "truncated": lambda cache: cache.truncate(cache.lengths),
    "reordered": lambda cache: cache.reorder([0, 1]),
    "its own copy": lambda cache: cache.copy(),
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
}


def test_a_ragged_cache_is_read_without_what_was_written_later(torch: Any) -> None:
    """A row that is shorter reads slots past its end, which are hidden; NaN there would be seen."""
    case = Compiled(torch)
    ways = {"compiled": case.step, "eager": lambda x, cache, mask=None: case.layer(
        x, cache=cache, value_mask=mask)}  # fmt: skip
    mask, x = torch.arange(3) < torch.tensor([[3], [1]]), case.drawn(2, 1)
    lost = torch.full((ROWS, 1, WIDTH), NAN)
    with torch.no_grad():
        expected = [
            case.layer(torch.cat([case.x[row, :length], x[row]])[None], use_causal_mask=True)[0, -1]
            for row, length in enumerate((3, 1))
        ]
        every = itertools.product(LATER, (True, False), ("before", "after"), ways, ways)
        for how, donate, when, made, then in every:
            given = case.layer.make_cache(ROWS, MOST, donate=donate)
            _, cache = ways[made](case.x[:, :3], given, mask)
            later = LATER[how](cache) if when == "before" else None
            ways[then](lost, cache)
            later = LATER[how](cache) if later is None else later
            for name, goes_on in ways.items():
                output, _ = goes_on(x, later)
                told = f"{donate=}, {how} {when}, {made}, then {then}, then {name}"
                torch.testing.assert_close(
                    output[:, 0], torch.stack(expected), atol=2e-6, rtol=0, msg=told
                )


def test_readers_do_not_see_what_was_written_later(torch: Any) -> None:
    """Queries of another layer over an older cache of ragged rows."""
    case = Compiled(torch)
    reader = get_layer("torch")(2, 4, query_features=WIDTH, seed=1)
    read = torch.compile(
        lambda x, cache, mask: reader(x, memory=cache, value_mask=mask),
        fullgraph=True, backend="eager",
    )  # fmt: skip
    mask, lost = torch.arange(3) < torch.tensor([[3], [1]]), torch.full((ROWS, 1, WIDTH), NAN)
    with torch.no_grad():
        _, cache = case.step(case.x[:, :3], case.layer.make_cache(ROWS, MOST, donate=True), mask)
        expected = reader(case.x[:, :3], memory=cache, value_mask=mask)
        case.step(lost, cache)
        for output in (
            reader(case.x[:, :3], memory=cache, value_mask=mask),
            read(case.x[:, :3], cache, mask),
        ):
            torch.testing.assert_close(output[mask], expected[mask], atol=2e-6, rtol=0)


def test_an_overflowed_row_leaves_the_others_right(torch: Any) -> None:
    """Also of an older cache, after a later step of NaN."""
    case = Compiled(torch)
    with torch.no_grad():
        *_, cache = case.caches(3, 3, 1)
        mask = torch.tensor([[True] * 3, [False] * 3])
        _, cache = case.step(case.x[:, :3], cache, mask)
        assert cache.overflowed.tolist() == [True, False]
        case.step(torch.full((ROWS, 1, WIDTH), NAN), cache)
        for step in (case.step, lambda x, cache: case.layer(x, cache=cache)):
            output, _ = step(case.x[:, 7:8], cache)
            assert output[0].isnan().all()
            torch.testing.assert_close(output[1], case.expected[1, 7:8], atol=2e-6, rtol=0)


def test_a_call_that_fails_leaves_nothing_behind(torch: Any) -> None:
    """Its NaN is in slots that the next step, compiled or not, does not read."""
    case = Compiled(torch)
    with torch.no_grad():
        *_, cache = case.caches(3)

        def fail(*_: Any) -> None:
            raise RuntimeError("no output")

        hook = case.layer.output.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="no output"):
            case.layer(torch.full((ROWS, 1, WIDTH), NAN), cache=cache)
        hook.remove()
        case.goes_on(cache, 3)


@pytest.mark.filterwarnings(ASKED)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_compiled_steps_and_readers_keep_their_arrays(
    torch: Any, frozen: bool
) -> None:
    """With keys and values that are not trained, and of another layer that reads the cache."""
    case = Compiled(torch, "aot_eager")
    for name in ("key", "value") if frozen else ():
        getattr(case.layer, name).requires_grad_(False)
    reader = get_layer("torch")(2, 4, query_features=WIDTH, seed=1)
    with torch.no_grad():
        *_, cache = case.caches(3)
    output, after = case.step(case.x[:, 3:4], cache)
    read = reader(case.x[:, 3:4], memory=after)
    with torch.no_grad():
        case.step(case.x[:, 4:5], after)
    (output.square().sum() + read.square().sum()).backward()
    assert case.layer.query.weight.grad.isfinite().all()
    assert reader.query.weight.grad.isfinite().all()


def test_a_step_of_nothing_and_steps_of_any_length(torch: Any) -> None:
    """With lengths that the compiler treats as symbols, and with masks."""
    case = Compiled(torch)
    step = torch.compile(
        lambda x, cache, mask: case.layer(x, cache=cache, value_mask=mask),
        fullgraph=True, backend="eager", dynamic=True,
    )  # fmt: skip
    with torch.no_grad():
        empty, cache = case.step(case.x[:, :0], case.layer.make_cache(ROWS, MOST, donate=True))
        assert empty.shape == (ROWS, 0, WIDTH)
        at = 0
        for length in (3, 2, 4):
            x = case.x[:, at : at + length]
            output, cache = step(x, cache, torch.ones(x.shape[:2], dtype=torch.bool))
            case.check(output, at, at + length)
            at += length


class Schedule:
    """Caches of random calls, each with the positions that its rows have read."""

    def __init__(self, case: Compiled, seed: int) -> None:
        self.case, self.random, self.seed = case, random.Random(seed), seed
        empty: list[list[Any]] = [[] for _ in range(ROWS)]
        self.states = [(case.layer.make_cache(ROWS, MOST, donate=True), empty)]

    def run(self, events: int) -> None:
        ways: list[Callable[[Any, Any], Any]] = [
            self.append, self.append, self.append, self.truncated, self.reordered, self.forgotten,
        ]  # fmt: skip
        for _ in range(events):
            cache, rows = self.random.choice(self.states)
            found = self.random.choice(ways)(cache, rows)
            self.states += [] if found is None else [found]

    def append(self, cache: Any, rows: list[list[Any]]) -> Any:
        torch, case = self.case.torch, self.case
        length = self.random.choice([1, 3])
        self.seed += 1
        x = case.drawn(self.seed, length)
        mask = torch.arange(length) < torch.tensor([[self.random.randint(0, length)] for _ in rows])
        rows = [[*row, *x[b, mask[b]]] for b, row in enumerate(rows)]
        if max(map(len, rows)) > MOST:
            return None
        x[~mask] = NAN
        eager = self.random.random() < 0.3
        call = {"cache": cache, "value_mask": mask}
        output, new = case.layer(x, **call) if eager else case.step(x, cache, mask)
        for b, row in enumerate(rows):
            count = int(mask[b].sum())
            if count:
                alone = case.layer(torch.stack(row)[None], use_causal_mask=True)[0, -count:]
                torch.testing.assert_close(output[b, mask[b]], alone, atol=2e-6, rtol=0)
        return new, rows

    def truncated(self, cache: Any, rows: list[list[Any]]) -> Any:
        lengths = [self.random.randint(0, len(row)) for row in rows]
        return cache.truncate(lengths), [row[:n] for row, n in zip(rows, lengths, strict=True)]

    def reordered(self, cache: Any, rows: list[list[Any]]) -> Any:
        order = [self.random.randrange(ROWS) for _ in rows]
        return cache.reorder(order), [rows[i] for i in order]

    def forgotten(self, cache: Any, rows: list[list[Any]]) -> None:
        if len(self.states) > 1:
            self.states = [state for state in self.states if state[0] is not cache]


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_random_schedules_of_eager_and_compiled_calls(torch: Any, mode: str) -> None:
    case = Compiled(torch)
    with getattr(torch, mode)():
        for seed in (0, 1, 2, 3, 100, 101, 102, 103):
            Schedule(case, seed).run(12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", [0, 1], ids=["batches", "lengths"])
def test_one_program_reads_prompts_of_every_size(torch: Any, axis: int, masked: bool) -> None:
    """Of every length, and of batches; of one row it may be another one."""
    layer: Any = get_layer("torch")(2, 4, query_features=WIDTH, seed=0, rotary=True)
    programs = importlib.import_module("torch._dynamo.testing").CompileCounter()

    def read(x: Any, cache: Any, mask: Any) -> Any:
        return layer(x, cache=cache, value_mask=mask)

    compiled = torch.compile(read, fullgraph=True, backend=programs, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=True):
        for size in range(5, 12):
            shape = (size, 3) if axis == 0 else (3, size)
            x, mask = torch.randn(*shape, WIDTH), None
            if masked:
                mask = torch.ones(shape, dtype=torch.bool)
                mask[0, -1] = False
            output, cache = compiled(x, layer.make_cache(shape[0], 40), mask)
            expected, other = read(x, layer.make_cache(shape[0], 40), mask)
            torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)
            torch.testing.assert_close(cache.keys, other.keys, atol=2e-6, rtol=0)
    assert programs.frame_count <= 2


def test_prompts_of_every_length_are_exported(torch: Any) -> None:
    layer: Any = get_layer("torch")(2, 4, query_features=WIDTH, seed=0, rotary=True)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any, cache: Any) -> Any:
            return self.layer(x, cache=cache)

    pytree = importlib.import_module("torch.utils._pytree")
    cache, x = layer.make_cache(ROWS, MOST), torch.randn(ROWS, 4, WIDTH)
    leaves = pytree.tree_leaves(cache)
    sizes = ({1: torch.export.Dim("length", min=2, max=MOST)}, [None] * len(leaves))
    with torch.no_grad():
        program = torch.export.export(Model(), (x, cache), dynamic_shapes=sizes).module()
        for length in (2, 5, MOST):
            x = torch.randn(ROWS, length, WIDTH)
            output, held = program(x, layer.make_cache(ROWS, MOST))
            expected, other = layer(x, cache=layer.make_cache(ROWS, MOST))
            torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)
            torch.testing.assert_close(held.keys, other.keys, atol=2e-6, rtol=0)

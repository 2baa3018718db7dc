"""Steps of decoding that follow one another: planned once, they give what every call gives."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from threading import Thread
from typing import Any
from weakref import ref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anymha
from anymha.attention.features.softcap import Softcap
from anymha.framework.registry import Backend
from anymha.layer import decoding
from anymha.layer.cache import Line
from tests.conftest import usable
from tests.frameworks import required
from tests.support import normal

WIDTH, MOST = 8, 24
SIZES = {"num_heads": 4, "num_key_value_heads": 2, "key_dim": 4, "query_features": WIDTH, "seed": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "no bias": {"use_bias": False},
    "bias": {},
    "rotary and norms": {"rotary": True, "query_key_norm": "rms"},
    "rotary of pairs": {"rotary": anymha.Rotary(2, layout="interleaved", columns="last")},
    "ring": {"rotary": True, "sliding_window": 3, "sinks": True},
    "alibi": {"alibi": True, "softcap": 5.0},
    "gate of heads": {"gate": "head", "rotary": True},
    "gate of columns": {"gate": "elementwise", "value_dim": 6},
    "output": {"output_shape": (3, 2)},
}
DTYPES = {
    "float32": ({}, None),
    "float16": ({"dtype": "float16"}, None),
    "bfloat16": ({"dtype": "bfloat16"}, None),
    "computed in bfloat16": ({"compute_dtype": "bfloat16"}, None),
    "kept in bfloat16": ({}, "bfloat16"),
}


@pytest.fixture(scope="module", params=["numpy", "torch"])
def home(request: pytest.FixtureRequest) -> Backend:
    """Frameworks that compute as they are called, and write arrays in place."""
    return usable(request.param)


def make(backend: Backend, **options: Any) -> Any:
    return anymha.MultiHeadAttention(**{**SIZES, **options}, backend=backend.name)


def plain(backend: Backend, x: Any) -> np.ndarray:
    return np.asarray(backend.ops.to_numpy(x)).astype(np.float32)


def writing(backend: Backend) -> Any:
    """Where arrays are written in place, as far as the framework does it."""
    return required("torch").no_grad() if backend.name == "torch" else nullcontext()


class Counted:
    """Counts the calls that are planned steps, and those of them that belong to a line."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps = self.of_lines = 0
        step, end_step = decoding.next_step, Line.end_step

        def counted(*args: Any) -> Any:
            found = step(*args)
            self.steps += found is not None
            return found

        def counted_line(line: Line, cache: Any) -> Any:
            self.of_lines += 1
            return end_step(line, cache)

        patch.setattr("anymha.layer.forward.next_step", counted)
        patch.setattr(Line, "end_step", counted_line)


def by_both_ways(run: Callable[[], list[Any]]) -> tuple[list[Any], list[Any], Counted]:
    """What a function gives by steps and by whole calls, and how many steps there were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anymha.layer.forward.next_step", lambda *_: None)
        expected = run()
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        return run(), expected, counted


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_have_the_bits_of_other_calls(
    options: str, dtype: str, ragged: bool, home: Backend
) -> None:
    own, kept = DTYPES[dtype]
    layer, native = make(home, **OPTIONS[options], **own), home.ops.from_numpy
    x = normal((2, 14, WIDTH), "x").astype(np.float32)
    dtype = own.get("dtype", "float32")
    valid = np.ones((2, 6), bool)
    valid[0, 4:] = not ragged

    def inputs(part: np.ndarray) -> Any:
        return home.ops.astype(native(np.ascontiguousarray(part)), home.ops.dtype(dtype))

    def run() -> list[np.ndarray]:
        found = []
        cache = layer.make_cache(2, MOST, dtype=kept)
        _, cache = layer(inputs(x[:, :6]), cache=cache, value_mask=native(valid))
        for at in range(6, 14):
            output, cache = layer(inputs(x[:, at : at + 1]), cache=cache)
            found.append(plain(home, output))
        return [*found, *(plain(home, array) for array in (cache.keys, cache.lengths))]

    with writing(home):
        found, expected, counted = by_both_ways(run)
    rounds = home.name == "numpy" and bool(own)  # whose weights are cast anew in each call
    assert counted.steps >= (0 if rounds else 6)
    assert (counted.of_lines >= 5) == (not (ragged or rounds) and options != "ring")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_steps_have_what_an_option_does_to_the_context(
    home: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Softcap, "context", lambda self, ops, context, arrays: context * 2.0)
    layer = make(home, softcap=5.0, use_bias=False)
    with writing(home):
        cache = line_of(home, layer, 6)
        check_after(home, layer, cache, [1.0] * 6)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("options", ["bias", "rotary and norms", "gate of heads"])
def test_steps_under_autocast_have_the_bits_of_other_calls(options: str, mode: str) -> None:
    torch, home = required("torch"), usable("torch")
    layer = make(home, **OPTIONS[options])
    x = home.ops.from_numpy(normal((2, 12, WIDTH), "x").astype(np.float32))

    def run() -> list[Any]:
        found, cache = [], layer.make_cache(2, MOST)
        with getattr(torch, mode)(), torch.autocast("cpu", torch.bfloat16):
            for at in range(12):
                output, cache = layer(x[:, at : at + 1], cache=cache)
                found.append(output)
        return found

    found, expected, counted = by_both_ways(run)
    multiplies: Any = home.ops.capabilities.multiplies
    assert (counted.steps >= 8) == multiplies(torch.bfloat16, torch.device("cpu"))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is torch.bfloat16
        assert torch.equal(one, other)


@dataclasses.dataclass
class Held:
    """A cache, and the sequence (T, D) that its one row has read."""

    cache: Any
    row: np.ndarray


actions = st.tuples(
    st.sampled_from(
        [*["step"] * 8, "three", "fail", "truncate", "copy", "deepcopy", "pickle", "replace",
         "reorder", "drop", "gradient"]
    ),
    st.one_of(st.just(-1), st.just(-1), st.integers(0, 30)),
    st.integers(0, 1 << 16),
)  # fmt: skip


class Tree:
    """Caches that come from one another in any way, each held against its sequence alone."""

    def __init__(self, home: Backend, layer: Any) -> None:
        self.home, self.layer = home, layer
        self.held = [Held(layer.make_cache(1, MOST), np.zeros((0, WIDTH), np.float32))]

    def do(self, action: str, number: int, seed: int) -> None:
        held = self.held[number % len(self.held)]
        cache = held.cache
        if action == "step":
            self.append(held, 1, seed)
        elif action == "three":
            self.append(held, 3, seed)
        elif action == "fail":
            self.fail(held, seed)
        elif action == "drop" and len(self.held) > 1:
            self.held.remove(held)
        elif action == "truncate":
            length = seed % (len(held.row) + 1)
            refused = contextlib.suppress(anymha.AnymhaError)  # a ring, where it does not go back
            with nullcontext() if cache.window is None else refused:
                self.held.append(Held(cache.truncate(length), held.row[:length]))
        elif action == "gradient" and self.home.name == "torch":
            torch = required("torch")
            if len(held.row) < MOST:
                with torch.enable_grad():
                    self.append(held, 1, seed)
        made = {
            "copy": copy.copy, "deepcopy": copy.deepcopy, "replace": dataclasses.replace,
            "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
            "reorder": lambda cache: cache.reorder([0]),
        }  # fmt: skip
        if action in made:
            self.held.append(Held(made[action](cache), held.row))

    def drawn(self, count: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((1, count, WIDTH)).astype(np.float32)

    def append(self, held: Held, count: int, seed: int) -> None:
        if len(held.row) + count > MOST:
            with pytest.raises(anymha.AnymhaError, match="has room for"):
                self.layer(self.home.ops.from_numpy(self.drawn(count, seed)), cache=held.cache)
            return
        x = self.drawn(count, seed)
        output, cache = self.layer(self.home.ops.from_numpy(x.copy()), cache=held.cache)
        made = Held(cache, np.concatenate([held.row, x[0]]))
        self.check(made, output)
        self.held.append(made)

    def fail(self, held: Held, seed: int) -> None:
        def failing(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        if len(held.row) == MOST:
            return
        x = np.full_like(self.drawn(1, seed), np.nan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("anymha.layer.forward.attend", failing)
            patch.setattr("anymha.layer.decoding.context_of", failing)
            with pytest.raises(KeyboardInterrupt):
                self.layer(self.home.ops.from_numpy(x), cache=held.cache)

    def check(self, held: Held, output: Any) -> None:
        whole = self.layer(self.home.ops.from_numpy(held.row[None]), use_causal_mask=True)
        count = output.shape[1]
        expected = plain(self.home, whole)[:, -count:]
        np.testing.assert_allclose(plain(self.home, output), expected, atol=2e-6)

    def check_all(self) -> None:
        for held in list(self.held):
            assert plain(self.home, held.cache.lengths).tolist() == [len(held.row)]
            if len(held.row) < MOST:
                self.append(held, 1, len(held.row))


@settings(max_examples=30)
@given(st.lists(actions, min_size=6, max_size=40))
@pytest.mark.parametrize("options", ["no bias", "rotary and norms", "ring"])
def test_caches_of_any_steps_keep_their_meaning(options: str, home: Backend, events: Any) -> None:
    with writing(home):
        tree = Tree(home, make(home, **OPTIONS[options]))
        for event in [("three", -1, 0), *[("step", -1, seed) for seed in range(3)], *events]:
            tree.do(*event)
        tree.check_all()


def positions(home: Backend, number: float, count: int = 1) -> Any:
    """(2, T, D), all the same number."""
    return home.ops.from_numpy(np.full((2, count, WIDTH), number, np.float32))


def line_of(home: Backend, layer: Any, count: int, **made: Any) -> Any:
    """A cache of so many equal positions, the newest of a line of steps."""
    x = positions(home, 1.0)
    cache = layer.make_cache(2, MOST, **made)
    for _ in range(count):
        _, cache = layer(x, cache=cache)
    assert cache._sharing.line is not None
    assert "lengths" not in vars(cache)
    return cache


def test_the_arrays_of_lengths_are_made_when_they_are_asked_for(home: Backend) -> None:
    layer = make(home, sinks=True)
    with writing(home):
        cache = line_of(home, layer, 6)
        told = repr(cache)
    assert plain(home, cache.lengths).tolist() == [6, 6]
    assert plain(home, cache.previous).tolist() == [5, 5]
    assert cache.lengths.dtype == cache.previous.dtype == home.ops.int32
    assert "lengths=" in told
    with pytest.raises(AttributeError, match="no attribute `length`"):
        _ = cache.length
    assert not hasattr(cache, "start")


def check_after(home: Backend, layer: Any, cache: Any, numbers: list[float]) -> None:
    """The next position after a cache whose rows have read positions of these numbers."""
    numbers = [*numbers, 7.0]
    x = np.ones((2, len(numbers), WIDTH), np.float32) * np.array(numbers, np.float32)[:, None]
    expected = plain(home, layer(home.ops.from_numpy(x), use_causal_mask=True))[:, -1:]
    output, _ = layer(positions(home, 7.0), cache=cache)
    np.testing.assert_allclose(plain(home, output), expected, atol=2e-6)


@pytest.mark.parametrize("later", ["step", "several"])
def test_a_cache_from_which_another_call_went_on_is_no_longer_the_newest(
    later: str, home: Backend
) -> None:
    layer = make(home)
    with writing(home):
        cache = line_of(home, layer, 5)
        count = 1 if later == "step" else 3
        _, longer = layer(positions(home, 2.0, count), cache=cache)
        _, other = layer(positions(home, 3.0), cache=cache)
        check_after(home, layer, longer, [1.0] * 5 + [2.0] * count)
        check_after(home, layer, other, [1.0] * 5 + [3.0])
        check_after(home, layer, cache, [1.0] * 5)


def test_an_older_cache_of_inference_is_not_the_newest() -> None:
    torch, home = required("torch"), usable("torch")
    layer = make(home)
    with torch.inference_mode():
        cache = layer.make_cache(2, MOST).copy()  # in arrays that inference makes
        for _ in range(5):
            _, cache = layer(positions(home, 1.0), cache=cache)
        assert cache._sharing.line is not None
        _, later = layer(positions(home, 2.0), cache=cache)
        _, other = layer(positions(home, 3.0), cache=cache)
        check_after(home, layer, later, [1.0] * 5 + [2.0])
        check_after(home, layer, other, [1.0] * 5 + [3.0])


def test_a_call_during_a_step_writes_elsewhere(
    home: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of another thread, which goes on from the same cache."""
    layer, others, context_of = make(home), [], decoding.context_of

    def beside(*args: Any) -> Any:
        if not others:
            others.append(layer(positions(home, 3.0, 3), cache=cache)[1])
        return context_of(*args)

    with writing(home):
        cache = line_of(home, layer, 5)
        monkeypatch.setattr(decoding, "context_of", beside)
        _, later = layer(positions(home, 2.0), cache=cache)
        assert others[0].keys is not later.keys
        check_after(home, layer, later, [1.0] * 5 + [2.0])
        check_after(home, layer, others[0], [1.0] * 5 + [3.0] * 3)


def test_what_a_line_has_written_leaves_no_trace(home: Backend) -> None:
    layer = make(home)
    with writing(home):
        cache = line_of(home, layer, 5)
        later = cache
        for _ in range(9):
            _, later = layer(positions(home, np.nan), cache=later)
        assert later.keys is cache.keys
        del later
        valid = home.ops.from_numpy(np.array([[True] + [False] * 3, [True] * 4]))
        output, cache = layer(positions(home, 1.0, 4), cache=cache, value_mask=valid)
    for array in (output, cache.keys, cache.values):
        assert np.isfinite(plain(home, array)).all()


@pytest.mark.parametrize("newest", [True, False])
def test_a_graph_that_needs_the_arrays_of_a_cache_ends_the_line(newest: bool) -> None:
    torch, home = required("torch"), usable("torch")
    layer = make(home)
    with torch.no_grad():
        cache = line_of(home, layer, 5)
        last = cache if newest else layer(positions(home, 1.0), cache=cache)[1]
    x = torch.full((2, 1, WIDTH), 2.0, requires_grad=True)
    output = layer(x, memory=cache)
    with torch.no_grad():
        _, later = layer(positions(home, 3.0), cache=last)
    assert later.keys is not cache.keys
    output.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("newest", [True, False])
def test_a_compiled_step_takes_over_the_arrays_of_the_newest_alone(newest: bool) -> None:
    torch, home = required("torch"), usable("torch")
    layer = make(home)
    step = torch.compile(lambda x, cache: layer(x, cache=cache), backend="eager", fullgraph=True)
    with torch.no_grad():
        cache, later = line_of(home, layer, 5, donate=True), None
        if not newest:
            _, later = layer(positions(home, 4.0), cache=cache)
        _, compiled = step(positions(home, 2.0), cache)
        _, other = layer(positions(home, 3.0), cache=cache)
        check_after(home, layer, compiled, [1.0] * 5 + [2.0])
        check_after(home, layer, other, [1.0] * 5 + [3.0])
        if later is not None:
            check_after(home, layer, later, [1.0] * 5 + [4.0])


def test_threads_go_on_from_the_newest_cache_of_a_line(home: Backend) -> None:
    layer, native = make(home), home.ops.from_numpy
    found: dict[int, list[np.ndarray]] = {}
    with writing(home):
        prompt = line_of(home, layer, 5)

    def run(number: int) -> None:
        cache, x = prompt, normal((2, MOST - 5, WIDTH), f"x{number}").astype(np.float32)
        found[number] = []
        with writing(home):
            for at in range(MOST - 5):
                output, cache = layer(native(x[:, at : at + 1].copy()), cache=cache)
                found[number].append(plain(home, output)[:, 0])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for number, outputs in found.items():
        x = normal((2, MOST - 5, WIDTH), f"x{number}").astype(np.float32)
        whole = native(np.concatenate([np.ones((2, 5, WIDTH), np.float32), x], axis=1))
        expected = plain(home, layer(whole, use_causal_mask=True))[:, 5:]
        np.testing.assert_allclose(np.stack(outputs, axis=1), expected, atol=2e-6)


def test_a_compiled_step_goes_on_from_a_line() -> None:
    torch = required("torch")
    backend = usable("torch")
    layer = make(backend, rotary=True)
    step = torch.compile(lambda x, cache: layer(x, cache=cache), backend="eager", fullgraph=True)
    x = torch.ones(2, 1, WIDTH)
    with torch.no_grad():
        expected = layer(torch.ones(2, 8, WIDTH), use_causal_mask=True)
        for count in (5, 6):
            cache = line_of(backend, layer, count)
            for at in range(count, 8):
                output, cache = step(x, cache)
                torch.testing.assert_close(output[:, 0], expected[:, at], atol=2e-6, rtol=0)
            assert cache.lengths.tolist() == [8, 8]
            output, _ = layer(x, cache=cache)
            assert torch.isfinite(output).all()


CHANGES: dict[str, Any] = {
    "overflowed": lambda cache: cache.overflowed | True,
    "max_length": lambda cache: MOST + 6,
    "donate": lambda cache: True,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_assigned_to_the_newest_cache_is_kept(name: str, home: Backend) -> None:
    layer = make(home)
    with writing(home):
        cache = line_of(home, layer, 6)
        given = CHANGES[name](cache)
        setattr(cache, name, given)
        _, later = layer(positions(home, 1.0), cache=cache)
    assert getattr(later, name) is given


def test_lengths_that_are_read_are_those_of_the_caches_that_follow(home: Backend) -> None:
    layer = make(home)
    with writing(home):
        cache = line_of(home, layer, 6)
        for count in range(6, 10):
            assert plain(home, cache.lengths).tolist() == [count] * 2
            assert plain(home, cache.previous).tolist() == [count - 1] * 2
            _, cache = layer(positions(home, 1.0), cache=cache)


def test_a_smaller_limit_is_heeded(home: Backend) -> None:
    layer = make(home)
    with writing(home):
        cache = line_of(home, layer, 6)
        cache.max_length = 6
        with pytest.raises(anymha.AnymhaError, match="has room for"):
            layer(positions(home, 1.0), cache=cache)


def test_a_line_keeps_no_arrays_that_its_caches_have_not(home: Backend) -> None:
    layer = make(home)
    with writing(home):
        cache = line_of(home, layer, 6)
        before = [ref(cache.keys), ref(cache.values)]
        cache.keys, cache.values = (home.ops.astype(x, home.ops.dtype("float16"))
                                    for x in (cache.keys, cache.values))  # fmt: skip
    assert [one() for one in before] == [None, None]


def test_a_compiled_reader_serves_all_lengths_of_a_line() -> None:
    torch, home = required("torch"), usable("torch")
    layer, reader = make(home), make(home, seed=1)
    counter = importlib.import_module("torch._dynamo.testing").CompileCounter()
    read = torch.compile(lambda x, cache: reader(x, memory=cache), backend=counter, fullgraph=True)
    x = positions(home, 1.0)
    with torch.no_grad():
        cache = line_of(home, layer, 6)
        for _ in range(MOST - 6):
            _, cache = layer(x, cache=cache)
            torch.testing.assert_close(read(x, cache), reader(x, memory=cache))
    assert counter.frame_count <= 3


def test_a_compiled_program_copies_the_newest_cache() -> None:
    torch, home = required("torch"), usable("torch")
    layer = make(home)
    step = torch.compile(
        lambda x, cache: layer(x, cache=copy.copy(cache)), backend="eager", fullgraph=True
    )
    with torch.no_grad():
        for count in range(5, 17):
            _, later = step(positions(home, 2.0), line_of(home, layer, count))
            check_after(home, layer, later, [1.0] * count + [2.0])


def test_a_compiled_call_after_a_step_that_failed_reads_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    torch, home = required("torch"), usable("torch")
    layer = make(home)
    call = torch.compile(
        lambda x, cache, valid: layer(x, cache=cache, value_mask=valid), backend="eager"
    )
    with torch.no_grad():
        cache = line_of(home, layer, 5)
        with monkeypatch.context() as patch:
            patch.setattr("anymha.layer.decoding.context_of", failing)
            with pytest.raises(KeyboardInterrupt):
                layer(positions(home, np.nan), cache=cache)
        valid = torch.tensor([[True, False, False], [False, False, False]])
        output, _ = call(positions(home, 1.0, 3), cache, valid)
    assert torch.isfinite(output).all()


def test_a_step_that_is_interrupted_between_its_writes_leaves_no_trace(home: Backend) -> None:
    layer, reader = make(home), make(home)
    x, write, calls = positions(home, 1.0, 3), home.ops.capabilities.write_slots, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args)

    with writing(home):
        line_of(home, layer, 6)
        _, cache = layer(x, cache=layer.make_cache(2, MOST))
        expected = plain(home, reader(x, memory=cache))
        object.__setattr__(home.ops.capabilities, "write_slots", interrupted)
        try:
            with pytest.raises(KeyboardInterrupt):
                layer(positions(home, np.nan), cache=cache)
        finally:
            object.__setattr__(home.ops.capabilities, "write_slots", write)
        np.testing.assert_array_equal(plain(home, reader(x, memory=cache)), expected)


def test_compiled_steps_write_into_nothing_that_inference_has_made() -> None:
    torch, home = required("torch"), usable("torch")
    layer = make(home)
    step = torch.compile(lambda x, cache: layer(x, cache=cache), backend="eager")
    x = positions(home, 1.0)
    with torch.inference_mode():
        cache = layer.make_cache(2, MOST, donate=True).copy()
        for _ in range(5):
            _, cache = layer(x, cache=cache)
    with torch.no_grad():
        _, cache = step(x, cache)
        check_after(home, layer, cache, [1.0] * 6)


@pytest.mark.parametrize("options", [{"sinks": True}, {"softcap": 5.0}])
def test_steps_after_a_change_of_dtype_have_the_bits_of_other_calls(
    options: dict[str, Any],
) -> None:
    torch, home = required("torch"), usable("torch")

    def run() -> list[Any]:
        layer, found = make(home, **options), []
        x = normal((2, 14, WIDTH), "x").astype(np.float32)
        cache, dtype = layer.make_cache(2, MOST), torch.float32
        for at in range(14):
            if at == 6:
                layer, dtype = layer.half(), torch.float16
            given = home.ops.from_numpy(x[:, at : at + 1].copy()).to(dtype)
            output, cache = layer(given, cache=cache)
            found.append(output)
        return found

    with torch.no_grad():
        found, expected, counted = by_both_ways(run)
    assert counted.steps >= 8
    assert all(map(torch.equal, found, expected))

"""Dropout's generator: the same everywhere, a function of seed and place alone, and random."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import anymha
from anymha.attention.dropout import STEPS, Dropout, keep_mask, rate_threshold
from anymha.errors import ArgumentError, DtypeError, ShapeError
from anymha.framework.registry import Backend, get_backend
from tests.conftest import BACKENDS, usable
from tests.frameworks import required
from tests.support import compilers, make, normal, run

SHAPE = (2, 3, 5, 7)
SEEDS = (0, 1, -1, 12345, 2**31, 2**32 - 1, 2**40 + 5, -(2**40) - 3, 2**63 - 1, -(2**63), 2**64 - 1)


def _kept(backend: Backend, seed: Any, shape: Any = SHAPE, threshold: int = 20000) -> np.ndarray:
    return backend.ops.to_numpy(keep_mask(backend.ops, seed, threshold, shape))


def _mix(x: int, key: int = 0) -> int:
    x ^= x >> 17
    x = x * 0xED5AD4BB % 2**32
    x ^= x >> 11
    x = x * 0xAC4C1B51 % 2**32
    x ^= key
    x ^= x >> 15
    x = x * 0x31848BAB % 2**32
    return x ^ x >> 14


def _bits(seed: int, b: int, h: int, t: int, s: int) -> int:
    """The generator as its documentation has it, in Python's integers."""
    low, high = seed % 2**32, (seed >> 32) % 2**32
    a = _mix(_mix((low + 0x9E3779B9) % 2**32) ^ high)
    c = _mix(_mix((high + 0x85EBCA6B) % 2**32) ^ low)
    for place in (b, h, t // 2):
        a, c = _mix((a + place) % 2**32), _mix(c ^ place)
    word = _mix((a + s) % 2**32, c)
    return word >> 16 if t % 2 else word & 0xFFFF


def _by_the_book(seed: int, shape: tuple[int, ...], threshold: int) -> np.ndarray:
    kept = np.zeros(shape, bool)
    for place in np.ndindex(*shape):
        kept[place] = _bits(seed, *place) >= threshold
    return kept


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_that_of_the_documented_generator(backend: Backend, seed: int) -> None:
    for threshold in (1, 20000, 32768, 65535):
        want = _by_the_book(seed, SHAPE, threshold)
        assert np.array_equal(_kept(backend, seed, threshold=threshold), want)


def test_known_answers() -> None:
    # Pinned, so that no release drops other elements for a seed than the one before.
    assert [_bits(seed, 0, 0, 0, 0) for seed in (0, 1, -1, 2**40)] == KNOWN_SEEDS
    assert [_bits(7, *place) for place in PLACES] == KNOWN_PLACES
    for place, bits in list(zip(PLACES, KNOWN_PLACES, strict=True))[:-1]:
        shape = tuple(n + 1 for n in place)
        backend = get_backend("numpy")
        assert _kept(backend, 7, shape, bits)[place]
        assert not _kept(backend, 7, shape, bits + 1)[place]


PLACES = [(0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 2, 0), (0, 1, 0, 0), (1, 0, 0, 0), (9, 8, 7, 65536)]
KNOWN_SEEDS = [48775, 45996, 20445, 7844]
KNOWN_PLACES = [54416, 61286, 19294, 46043, 35819, 20026]


def _integers(name: str) -> list[str]:
    """The integer dtypes in which a framework can hold a seed."""
    return ["int32", "uint32"] if name == "jax" else ["int32", "int64", "uint32", "uint64"]


@pytest.mark.parametrize("seed", SEEDS)
def test_seed_may_be_an_array_of_any_integer_dtype(backend: Backend, seed: int) -> None:
    want = _kept(backend, seed)
    for dtype in _integers(backend.name):
        limits = np.iinfo(dtype)
        if limits.min <= seed <= limits.max:
            array = backend.ops.from_numpy(np.array(seed, dtype))
            assert np.array_equal(_kept(backend, array), want), dtype


def test_seed_may_be_an_integer_of_numpy(backend: Backend) -> None:
    problem = make(dropout=0.5)
    for seed in (np.int64(-5), np.int32(-5)):
        got = run(backend, problem.calling(training=True, seed=seed), gradients=False)
        want = run(backend, problem.calling(training=True, seed=-5), gradients=False)
        assert got.output.tobytes() == want.output.tobytes()


HOMES = ("numpy", "torch", "tensorflow", "jax", "flax", "equinox")


@pytest.fixture(params=HOMES)
def dropping(request: pytest.FixtureRequest) -> tuple[Any, Callable[[Any], Any]]:
    """A layer with dropout of each home, and its output of a seed as a NumPy array."""
    home = request.param
    if home in ("flax", "equinox"):
        required(home)
    else:
        usable(home)
    layer = anymha.MultiHeadAttention(2, 4, dropout=0.5, query_features=8, seed=0, backend=home)
    ops = layer.ops
    x = ops.from_numpy(normal((1, 6, 8), "x").astype("float32"))
    return ops, lambda seed: ops.to_numpy(layer(x, training=True, seed=seed))


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_integer_of_any_shape_is_that_integer(dropping: Any, shape: tuple[int, ...]) -> None:
    ops, output = dropping
    want = output(5)
    for dtype in ("int32", "uint32"):
        seed = np.full(shape, 5, dtype)
        np.testing.assert_array_equal(output(seed), want)
        np.testing.assert_array_equal(output(ops.from_numpy(seed)), want)
    np.testing.assert_array_equal(output(np.full(shape, 2**64 + 5)), want)  # of Python's ints


SEVERAL = {
    "two integers": np.array([1, 2], np.int32),
    "a key in a batch": np.array([[0, 5]], np.uint32),
    "three words": np.array([1, 9, 2], np.uint32),
    "none": np.zeros(0, np.int32),
}


@pytest.mark.parametrize("seed", SEVERAL.values(), ids=SEVERAL)
def test_several_integers_are_refused_in_the_same_words(dropping: Any, seed: np.ndarray) -> None:
    ops, output = dropping
    received = re.escape(f"Received: shape {seed.shape}, dtype {seed.dtype}. Pass an int.")
    with pytest.raises(ShapeError, match=rf"^`seed` must be one integer, or one key .* {received}"):
        output(ops.from_numpy(seed))
    if ops.name != "numpy":
        with pytest.raises(ArgumentError, match=r"^`seed` must be an int, or an integer array of"):
            output(seed)


def test_numbers_that_are_no_integers_are_refused(dropping: Any) -> None:
    ops, output = dropping
    with pytest.raises(DtypeError, match=r"^`seed` must be an integer\. Received: shape \(1,\)"):
        output(ops.from_numpy(np.ones(1, np.float32)))
    other = "torch" if ops.name != "torch" else "tensorflow"
    foreign = usable(other).ops.from_numpy(np.array(5.0))
    for seed in (foreign, lambda: foreign, lambda: 1.5):
        with pytest.raises(ArgumentError, match=r"^`seed` must be an int, or an integer array of"):
            output(seed)


def test_an_integer_of_another_framework_is_that_integer(dropping: Any) -> None:
    _, output = dropping
    want = output(5)
    for name in BACKENDS:
        seed = usable(name).ops.from_numpy(np.array(5))
        np.testing.assert_array_equal(output(seed), want)


def test_keys_of_jax_are_one(dropping: Any) -> None:
    """One key is a seed of JAX's layers; several, and keys elsewhere, are refused."""
    ops, output = dropping
    random = required("jax").random
    keys = random.split(random.key(5), 4)
    if ops.name != "jax":
        for seed in (keys, random.key(5), random.PRNGKey(5), lambda: random.key(5)):
            with pytest.raises(ArgumentError, match=r"^`seed` must be an int, or an integer array"):
                output(seed)
        return
    with pytest.raises(ShapeError, match=r"one key .* Received: shape \(4,\), dtype key"):
        output(keys)
    with required("jax").enable_x64(True):
        words = ops.from_numpy(np.array([0, 5]))
        with pytest.raises(ShapeError, match=r"one key .* Received: shape \(2,\), dtype int64"):
            output(words)


def test_mask_is_the_same_compiled_with_a_traced_seed(backend: Backend) -> None:
    ops = backend.ops

    def masked(seed: Any) -> Any:
        return keep_mask(ops, seed, 20000, SHAPE)

    for function in compilers(backend, masked):
        for seed in (3, -3):
            array = ops.from_numpy(np.array(seed, np.int32))
            assert np.array_equal(ops.to_numpy(function(array)), _by_the_book(seed, SHAPE, 20000))


def test_keys_of_jax_are_seeds() -> None:
    backend = get_backend("jax")
    if not backend.installed:
        pytest.skip("jax is not installed")
    random = importlib.import_module("jax").random
    for seed in (7, 2**32 - 1):
        for key in (random.key(seed), random.PRNGKey(seed)):
            assert np.array_equal(_kept(backend, key), _by_the_book(seed, SHAPE, 20000))
    first, second = random.split(random.key(0))
    assert not np.array_equal(_kept(backend, first), _kept(backend, second))


lengths = st.integers(1, 9)


@given(large=st.tuples(lengths, lengths, lengths, lengths), data=st.data())
def test_what_is_kept_does_not_depend_on_the_lengths(
    large: tuple[int, int, int, int], data: Any
) -> None:
    backend = get_backend("numpy")
    small = tuple(data.draw(st.integers(1, n)) for n in large)
    block = tuple(slice(n) for n in small)
    assert np.array_equal(_kept(backend, 5, large)[block], _kept(backend, 5, small))


def test_long_rows_are_the_prefix_of_longer_ones(backend: Backend) -> None:
    long, longer = _kept(backend, 5, (1, 2, 63, 700)), _kept(backend, 5, (1, 2, 64, 1500))
    assert np.array_equal(long, longer[:, :, :63, :700])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_mask_of_nothing_is_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    assert _kept(backend, 5, shape).shape == shape


@pytest.mark.parametrize(
    ("rate", "threshold"),
    [(0, 0), (0.5, 32768), (0.1, 6554), (1e-9, 1), (0.9999999, 65535), (1 / 65536, 1)],
)
def test_rate_is_held_in_steps_of_one_in_65536(rate: float, threshold: int) -> None:
    assert rate_threshold(rate) == threshold


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 1e-9])
def test_kept_values_are_scaled_exactly(backend: Backend, rate: float) -> None:
    ops, threshold = backend.ops, rate_threshold(rate)
    assert Dropout(threshold, 0).factor == STEPS / (STEPS - threshold)
    b, t, s, h = 2, 6, 8, 3
    x = ops.from_numpy(normal((b, t, h, 4), "query").astype(np.float32))
    y = ops.from_numpy(normal((b, s, h, 4), "key").astype(np.float32))
    # The values are unit vectors, so that the output is the probabilities themselves.
    unit = np.broadcast_to(np.eye(s, dtype=np.float32)[None, :, None], (b, s, h, s))
    output, scores = anymha.dot_product_attention(
        x, y, ops.from_numpy(np.ascontiguousarray(unit)), dropout=rate, seed=2, return_scores=True
    )
    kept = _by_the_book(2, (b, h, t, s), threshold)
    factor = np.float32(STEPS / (STEPS - threshold))
    want = np.where(kept, ops.to_numpy(scores) * factor, np.float32(0))
    got = ops.to_numpy(output).transpose(0, 2, 1, 3)
    assert np.array_equal(got != 0, want != 0)
    np.testing.assert_allclose(got, want, rtol=1e-6)  # in float32 the row's sum divides last


# Each statistic is near a standard normal number for independent fair bits. Of the some 50 that are
# looked at, one beyond 5 has odds of 1 to 30,000; seeds are fixed, so it happens never or always.
LIMIT = 5.0


def _correlation(a: np.ndarray, b: np.ndarray, keep: float) -> float:
    """How often both are kept, in standard deviations from what independence gives."""
    scale = math.sqrt(a.size) * keep * (1 - keep)
    return float(((a - keep) * (b - keep)).sum() / scale)


def _statistics(generate: Callable[[int, Any, int], np.ndarray]) -> dict[str, float]:
    """Deviations of a generator ``(seed, shape, threshold) -> kept`` from fair and independent."""
    shape, found = (4, 4, 64, 128), {}
    for threshold in (6554, 32768, 58982):
        keep, kept = 1 - threshold / STEPS, generate(11, shape, threshold).astype(float)
        spread = math.sqrt(keep * (1 - keep))
        found[f"{threshold}: frequency"] = (kept - keep).sum() / (spread * math.sqrt(kept.size))
        for axis, name in enumerate("bhts"):
            # Counts along one axis vary as much as those of a binomial distribution do, no less.
            others = tuple(i for i in range(4) if i != axis)
            counts = kept.sum(axis)
            expected = kept.shape[axis] * keep * (1 - keep)
            chi2 = ((counts - kept.shape[axis] * keep) ** 2 / expected).sum()
            found[f"{threshold}: counts along {name}"] = _chi2_deviation(
                chi2, counts.size, kept.shape[axis], keep
            )
            found[f"{threshold}: sums over all but {name}"] = max(
                abs(kept.sum(others) - kept.size / kept.shape[axis] * keep)
            ) / (spread * math.sqrt(kept.size / kept.shape[axis]))
            for step in (1, 2):
                near = np.take(kept, range(kept.shape[axis] - step), axis)
                far = np.take(kept, range(step, kept.shape[axis]), axis)
                found[f"{threshold}: {step} apart along {name}"] = _correlation(near, far, keep)
        for name, seed in (("next", 12), ("high", 11 + 2**32), ("negative", -11)):
            other = generate(seed, shape, threshold)
            found[f"{threshold}: {name} seed"] = _correlation(kept, other, keep)
    return found


def _chi2_deviation(chi2: float, count: int, length: int, keep: float) -> float:
    """A sum of squares of `count` standardised binomial counts, in its standard deviations."""
    excess = (1 - 6 * keep * (1 - keep)) / (length * keep * (1 - keep))  # of kurtosis, over 3
    return (chi2 - count) / math.sqrt(count * (2 + excess))


def _ours(seed: int, shape: Any, threshold: int) -> np.ndarray:
    return _kept(get_backend("numpy"), seed, shape, threshold)


def test_mask_is_fair_and_independent() -> None:
    statistics = _statistics(_ours)
    assert len(statistics) > 50
    far = {name: value for name, value in statistics.items() if abs(value) > LIMIT}
    assert not far


def _weyl(seed: int, shape: Any, threshold: int) -> np.ndarray:
    """Multiples of the golden ratio: of the right frequency, and no more."""
    place = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(seed % 2**64)
    return ((place * np.uint64(40503)) % np.uint64(STEPS) >= threshold).reshape(shape)


def _one_round(seed: int, shape: Any, threshold: int) -> np.ndarray:
    """A linear congruential generator, one step of it, on the running number."""
    place = np.arange(math.prod(shape), dtype=np.uint64) ^ np.uint64(seed % 2**32)
    word = (place * np.uint64(1664525) + np.uint64(1013904223)) % np.uint64(2**32)
    return ((word >> np.uint64(16)) >= threshold).reshape(shape)


def _same_in_all_heads(seed: int, shape: Any, threshold: int) -> np.ndarray:
    return np.broadcast_to(_ours(seed, (shape[0], 1, *shape[2:]), threshold), shape)


def _deaf_to_the_high_word(seed: int, shape: Any, threshold: int) -> np.ndarray:
    return _ours(seed % 2**32, shape, threshold)


def _biased(seed: int, shape: Any, threshold: int) -> np.ndarray:
    return _ours(seed, shape, threshold + STEPS // 128)


@pytest.mark.parametrize(
    "weak", [_weyl, _one_round, _same_in_all_heads, _deaf_to_the_high_word, _biased]
)
def test_weak_generator_is_found_out(weak: Callable[[int, Any, int], np.ndarray]) -> None:
    assert max(map(abs, _statistics(weak).values())) > LIMIT


def test_native_generator_keeps_the_right_share_and_repeats_itself(backend: Backend) -> None:
    problem = make((2, 64), (2, 128), dropout=0.25, dropout_rng="native")

    def output(seed: int) -> np.ndarray:
        called = problem.calling(training=True, seed=seed)
        return run(backend, called, gradients=False).output

    assert output(3).tobytes() == output(3).tobytes()
    assert output(3).tobytes() != output(4).tobytes()
    ops = backend.ops
    shape, device = (2, 4, 64, 128), ops.device(ops.from_numpy(np.zeros(1, np.float32)))
    kept = ops.to_numpy(ops.native_keep_mask(3, shape, 0.75, device))
    assert abs(kept.mean() - 0.75) < LIMIT * math.sqrt(0.25 * 0.75 / kept.size)


# JAX has no generator of its own; its error is tested among the errors.
@pytest.mark.parametrize("backend", ["numpy", "torch", "tensorflow"], indirect=True)
def test_seed_left_out_comes_from_the_frameworks_own_generator(backend: Backend) -> None:
    framework: Any = importlib.import_module(backend.framework)
    set_seed = {
        "numpy": lambda seed: framework.random.seed(seed),
        "torch": lambda seed: framework.manual_seed(seed),
        "tensorflow": lambda seed: framework.random.set_seed(seed),
    }[backend.name]
    problem = make(dropout=0.5).calling(training=True)

    def outputs(seed: int) -> list[bytes]:
        set_seed(seed)
        return [run(backend, problem, gradients=False).output.tobytes() for _ in range(2)]

    assert outputs(1) == outputs(1)
    assert outputs(1) != outputs(2)
    assert len(set(outputs(1))) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
# Inductor imports a part of torch that warns of another, whichever test imports it first.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_mask_is_the_same_under_inductor_with_a_traced_seed() -> None:
    # Its C++ leaves an overflow of int32 undefined, of which a compiler may make anything.
    torch: Any = pytest.importorskip("torch")
    backend = get_backend("torch")
    ones = torch.ones(SHAPE)

    @torch.compile(fullgraph=True)
    def masked(seed: Any) -> Any:
        return Dropout(20000, seed).keep(backend.ops, SHAPE, like=ones)

    for seed in (5, -1):
        got = masked(torch.tensor(seed, dtype=torch.int32)).numpy()
        assert np.array_equal(got, _kept(backend, seed))

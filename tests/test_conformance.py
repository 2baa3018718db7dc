"""The conformance kit on the built-in backends, and on one such as a stranger brings."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import array_api_strict
import numpy as np
import pytest

from anymha.framework.capabilities import Capabilities
from anymha.framework.registry import Backend
from anymha.testing import Conformance
from anymha.testing.capabilities import compiler_of
from anymha.testing.capability_tests import CapabilityTests
from anymha.testing.known import KNOWN_MASKS, KnownMask
from tests.backends.anymha_strict import ops as strict
from tests.backends.faults import CAPABILITIES, SOUND, torch_compile

pytest_plugins = ["pytester"]


WITHIN_ROUNDING = (
    *("test_layer_agrees_with_the_oracle", "test_half_precision_is_that_of_float32"),
    *("test_gradients_agree_with_the_oracle", "test_loop_has_the_gradients_of_a_plain_loop"),
    *("test_loop_is_a_plain_loop", "test_window_of_unequal_sides"),
)
"""What needs no program as users compile it."""


class TestBuiltIn(Conformance):
    @pytest.fixture(autouse=True)
    def _quick(self, request: pytest.FixtureRequest) -> None:
        if request.node.originalname in WITHIN_ROUNDING:
            request.getfixturevalue("quick_programs")

    @pytest.fixture
    def ops(self, backend: Backend) -> Any:
        return backend.ops

    @pytest.fixture
    def compiler(self, ops: Any) -> Any:
        return torch_compile if ops.name == "torch" else compiler_of(ops)


class TestStrict(Conformance):
    """Anything that is not in the standard, version 2024.12, raises here."""

    backend = strict
    requires = ("float64",)

    @pytest.fixture(autouse=True)
    def _standard(self) -> Any:
        with array_api_strict.ArrayAPIStrictFlags(
            api_version="2024.12", boolean_indexing=False, data_dependent_shapes=False
        ):
            yield


class TestSound(CapabilityTests):
    """The planted capabilities of NumPy's arrays, where nothing is wrong with them."""

    backend = SOUND
    requires = tuple({*CAPABILITIES} - {"vjp", "eager_loop"})


def mix(x: int, key: int = 0) -> int:
    x = x % 2**32
    x ^= x >> 17
    x = x * 0xED5AD4BB % 2**32
    x ^= x >> 11
    x = x * 0xAC4C1B51 % 2**32 ^ key
    x ^= x >> 15
    x = x * 0x31848BAB % 2**32
    return x ^ x >> 14


@pytest.mark.parametrize("known", KNOWN_MASKS, ids=str)
def test_known_masks_follow_the_documented_formula(known: KnownMask) -> None:
    low, high = known.seed % 2**32, known.seed // 2**32 % 2**32
    for (b, h, t, s), kept in np.ndenumerate(known.mask):
        first = mix(mix(low + 0x9E3779B9) ^ high)
        second = mix(mix(high + 0x85EBCA6B) ^ low)
        for place in (b, h, t // 2):
            first, second = mix(first + place), mix(second ^ place)
        word = mix(first + s, second)
        bits = word // 2**16 if t % 2 else word % 2**16
        assert kept == (bits >= known.threshold), (b, h, t, s)


class Narrow:
    """Functions of a framework without float64."""

    name = "narrow"

    def dtype(self, name: str) -> Any:
        raise KeyError(name)


def test_capability_that_is_lacking_skips_or_fails_where_it_is_required() -> None:
    kit, narrow = Conformance(), cast(Any, Narrow())
    message = r"narrow lacks float64: ops.dtype\('float64'\) raised KeyError: 'float64'"
    with pytest.raises(pytest.skip.Exception, match=message):
        kit.need(narrow, "float64")
    kit.requires = ("float64",)
    with pytest.raises(pytest.fail.Exception, match=message):
        kit.need(narrow, "float64")
    kit.requires = ("float46",)
    with pytest.raises(pytest.fail.Exception, match="`requires` names float46; it may name: flo"):
        kit.need(narrow, "float64")


def test_is_tracing_that_cannot_be_judged_is_a_skip_that_says_so() -> None:
    ops = cast(Any, SimpleNamespace(name="mine", capabilities=Capabilities(is_tracing=bool)))
    with pytest.raises(pytest.skip.Exception, match=r"of mine is not judged inside of a compiler"):
        Conformance().test_is_tracing_is_true_inside_of_a_compiler(ops, compiler_of(ops))


@pytest.mark.parametrize("field", dataclasses.fields(Capabilities), ids=lambda field: field.name)
def test_each_capability_has_a_test_and_may_be_required(field: Any) -> None:
    assert any(name.startswith(f"test_{field.name}_") for name in dir(Conformance))
    kit, bare = Conformance(), cast(Any, strict)
    message = f"strict lacks {field.name}: `capabilities` does not name `{field.name}`"
    with pytest.raises(pytest.skip.Exception, match=message):
        kit.need(bare, field.name)
    kit.requires = (field.name,)
    with pytest.raises(pytest.fail.Exception, match=message):
        kit.need(bare, field.name)


def test_kit_without_a_backend_says_what_to_write(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "from anymha.testing import Conformance\nclass TestMine(Conformance): pass\n"
    )
    result = pytester.runpytest_inprocess("-k", "test_name", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["*Name the module of functions: `backend = ops` in TestMine.*"])

"""What a backend may lack, and how its lack is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anymha.errors import ArgumentError
from anymha.framework.capabilities import Capabilities
from anymha.framework.protocol import Ops
from anymha.parity.matrix.run import why_no_dtype


def _function(ops: Ops, name: str) -> str | None:
    return None if hasattr(ops, name) else f"there is no function `{name}`"


def _declared(ops: Ops, name: str) -> str | None:
    return None if name in ops.capabilities.names else f"`capabilities` does not name `{name}`"


def _draw_seed(ops: Ops, name: str) -> str | None:
    return _function(ops, name) or _refused(name, lambda: ops.draw_seed())


def _native_keep_mask(ops: Ops, name: str) -> str | None:
    device = ops.device(ops.from_numpy(np.zeros(1, np.float32)))
    return _function(ops, name) or _refused(
        name, lambda: ops.native_keep_mask(0, (1, 1, 1, 1), 0.5, device)
    )


def _refused(name: str, function: Callable[[], Any]) -> str | None:
    try:
        function()
    except ArgumentError as error:
        return f"`{name}` raised ArgumentError: {error}"
    return None


CAPABILITIES: dict[str, Callable[[Ops, str], str | None]] = {
    "float16": why_no_dtype,
    "bfloat16": why_no_dtype,
    "float64": why_no_dtype,
    "draw_seed": _draw_seed,
    "native_keep_mask": _native_keep_mask,
    **{field.name: _declared for field in dataclasses.fields(Capabilities)},
}
"""What a backend may lack, and the function that says why it does, or None where it does not.

A dtype is lacking where `ops.dtype` raises; a generator where its function raises `ArgumentError`;
a field of `Capabilities` where the backend does not name it.
"""


PAIRS = 30
"""Some calls of the tests have more pairs of a query and a key, others fewer."""


def compiler_of(ops: Ops) -> Any:
    """The capability `compile`, as a function of the function alone."""
    compile = ops.capabilities.compile
    return None if compile is None else lambda function: compile(function, PAIRS)


class BackendTests:
    """The base of the tests: the backend under test.

    Attributes:
        backend: The module of functions.
        requires: Names out of `CAPABILITIES`; what is named here and lacking is a failure.
    """

    backend: Any = None
    requires: tuple[str, ...] = ()

    @pytest.fixture
    def ops(self) -> Any:
        """The module of functions under test."""
        if self.backend is None:
            pytest.fail(f"Name the module of functions: `backend = ops` in {type(self).__name__}.")
        return self.backend

    @pytest.fixture
    def compiler(self, ops: Ops) -> Any:
        """Compiles a function of a dict of arrays; None where there is no compiler.

        Override it where the framework's users compile layers with another one than `compile`.
        """
        return compiler_of(ops)

    def need(self, ops: Ops, *capabilities: str) -> None:
        """Skip the test where the backend lacks something, or fail where that is required.

        Capabilities that are not in `CAPABILITIES`, as float32, every backend has.
        """
        unknown = sorted(set(self.requires) - set(CAPABILITIES))
        if unknown:
            known = ", ".join(CAPABILITIES)
            pytest.fail(f"`requires` names {', '.join(unknown)}; it may name: {known}.")
        for name in capabilities:
            reason = CAPABILITIES[name](ops, name) if name in CAPABILITIES else None
            if reason is not None:
                verdict = pytest.fail if name in self.requires else pytest.skip
                verdict(f"{ops.name} lacks {name}: {reason}")

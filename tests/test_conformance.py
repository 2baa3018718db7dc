"""The conformance kit on the built-in backends, and on one such as a stranger brings."""

from __future__ import annotations

from typing import Any

import array_api_strict
import pytest

from anymha.registry import Backend
from anymha.testing import Conformance
from tests.backends.anymha_strict import ops as strict


class TestBuiltIn(Conformance):
    @pytest.fixture
    def ops(self, backend: Backend) -> Any:
        return backend.ops


class TestStrict(Conformance):
    """Anything that is not in the standard, version 2024.12, raises here."""

    backend = strict
    requires = ("float64",)

    @pytest.fixture(autouse=True)
    def _standard(self) -> Any:
        flags = {"boolean_indexing": False, "data_dependent_shapes": False}
        with array_api_strict.ArrayAPIStrictFlags(api_version="2024.12", **flags):
            yield

"""Caches in Keras, on each of its backends, in processes of their own."""

from __future__ import annotations

import importlib.util

import pytest

from anymha.framework.registry import get_backend
from tests.conftest import BACKENDS
from tests.frameworks import skip_or_fail
from tests.test_keras_layer import SCIPY, pytest_in


@pytest.mark.parametrize("name", BACKENDS)
def test_caches_in_keras(name: str) -> None:
    if importlib.util.find_spec("keras") is None:
        skip_or_fail("keras", "keras is not installed")
    found = get_backend(name)
    if not found.installed:
        skip_or_fail(name, f"{found.framework} is not installed")
    if name == "numpy" and not SCIPY:
        skip_or_fail("keras", "Keras's NumPy backend needs scipy, which is not installed")
    assert " passed" in pytest_in(name, "keras_cache_checks.py")

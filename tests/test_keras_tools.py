"""Keras's tools on the layer's projections, on each Keras backend that trains."""

from __future__ import annotations

import importlib.util

import pytest

from anymha.framework.registry import get_backend
from tests.frameworks import skip_or_fail
from tests.test_keras_layer import pytest_in


@pytest.mark.parametrize("backend", ["torch", "tensorflow", "jax"])
def test_tools_act_on_the_projections(backend: str) -> None:
    if importlib.util.find_spec("keras") is None:
        skip_or_fail("keras", "keras is not installed")
    found = get_backend(backend)
    if not found.installed:
        skip_or_fail(backend, f"{found.framework} is not installed")
    output = pytest_in(backend, "keras_tools_checks.py")
    assert " passed" in output

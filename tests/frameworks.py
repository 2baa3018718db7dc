"""Frameworks that a test needs: a missing one skips it, or fails it where it must be there."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import pytest

EXPECTED = os.environ.get("ANYMHA_EXPECT_BACKENDS", "").replace(" ", "").split(",")
"""The names of those that must be there."""


def skip_or_fail(name: str, reason: str) -> None:
    """Skip the test; fail it where `name` is expected."""
    if name in EXPECTED:
        pytest.fail(f"{reason}, but ANYMHA_EXPECT_BACKENDS names {name}")
    pytest.skip(reason, allow_module_level=True)


def required(name: str) -> Any:
    """The framework's module, for the top of a file all of whose tests need it."""
    package = name.partition(".")[0]  # `find_spec` of a submodule imports the package
    if importlib.util.find_spec(package) is None:
        skip_or_fail(package, f"{package} is not installed")
    module: ModuleType = importlib.import_module(name)
    return module

"""Conformance tests for backends, and the pytest plugin.

In the tests of a project that brings a backend of its own:

    from anymha.testing import Conformance
    from anymha_mylib import ops

    class TestMyLib(Conformance):
        backend = ops

Each check is a test of its own; its name says which function it is about. What a backend may lack
(see `anymha.testing.capabilities`) is skipped with a printed reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anymha.testing.conformance import CAPABILITIES, Conformance, FunctionTests, SemanticsTests

__all__ = ["CAPABILITIES", "Conformance", "FunctionTests", "SemanticsTests"]


def __getattr__(name: str) -> Any:
    """Import a class at its first use: every run of pytest imports this package, for its plugin."""
    import importlib  # noqa: PLC0415

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.conformance"), name)

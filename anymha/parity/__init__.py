"""Proof that two implementations of the layer agree, and where they part if they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anymha.parity.adapters import declare
    from anymha.parity.adapters.decoding import decoding
    from anymha.parity.comparison.compare import ParityError, assert_parity, compare
    from anymha.parity.reports.report import Comparison

__all__ = ["Comparison", "ParityError", "assert_parity", "compare", "declare", "decoding"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: the pytest plugin is imported by every run of pytest."""
    import importlib  # noqa: PLC0415

    places = dict.fromkeys(__all__, "comparison.compare")
    places |= {"Comparison": "reports.report", "declare": "adapters",
               "decoding": "adapters.decoding"}  # fmt: skip
    if name not in places:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{places[name]}"), name)

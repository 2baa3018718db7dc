"""JSON from files, bounded before it is parsed."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_VALUES = 1_000_000
"""The most values; a tensor of safetensors takes eight. A value of one byte takes 64 in memory."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(content: bytes, **options: Any) -> Any:
    """The value that a text of JSON stands for.

    Args:
        content: The text in UTF-8.
        options: Those of `json.loads`.

    Raises:
        ValueError: it is not JSON, has too many values or too deep ones, or holds half a surrogate
            pair, which is no text.
    """
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} values")
    try:
        value = json.loads(content.decode("utf-8"), **options)
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    return value

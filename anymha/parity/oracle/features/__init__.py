"""The options of the attention in the oracle, one file each; see `oracle.recipe.Section`.

A file of this folder holds one option, all that the oracle, `compare`, the matrix of cases and the
self-test know of it, as its constant ``SECTION``. A file that is put here is found.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from anymha.parity.oracle.recipe import Section, ordered


def _sections() -> dict[str, type[Section]]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{name}").SECTION for name in names]
    return {section.option: section for section in found}


SECTIONS: dict[str, type[Section]] = _sections()
"""The sections by the name of their option."""


def sections_of(config: Any) -> tuple[Section, ...]:
    """The sections of the options that are on in a config, in their order."""
    found = (section.from_config(config) for section in SECTIONS.values())
    return ordered(tuple(section for section in found if section is not None))

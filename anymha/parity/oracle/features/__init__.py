"""The options of the attention in the oracle, one file each; see `oracle.recipe.Section`.

Each file of this folder has one option as its constant ``SECTION``: all that the oracle, `compare`,
the matrix of cases and the self-test know of it. Every file here is loaded.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from anymha.parity.oracle.recipe import Section, ordered


def _sections() -> dict[str, type[Section]]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    loaded = [importlib.import_module(f"{__name__}.{name}").SECTION for name in names]
    return {section.option: section for section in loaded}


SECTIONS: dict[str, type[Section]] = _sections()
"""The sections by the name of their option."""


def sections_of(config: Any) -> tuple[Section, ...]:
    """The sections of the options that are on in a config, in their order."""
    sections = (section.from_config(config) for section in SECTIONS.values())
    return ordered(tuple(section for section in sections if section is not None))

"""The options of training: which objects each may be, and whether these fit the layer's weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from anymha.errors import ConfigError
from anymha.options.constraints import CONSTRAINTS
from anymha.options.initializers import INITIALIZERS
from anymha.options.regularizers import REGULARIZERS
from anymha.options.serialization import ConfigObject, resolved

ObjectLike: TypeAlias = str | Mapping[str, Any] | ConfigObject | Callable[..., Any]
"""An initialiser, regulariser or constraint: a name, a config dict, an object or a callable."""

OBJECTS = {
    "kernel_initializer": INITIALIZERS,
    "bias_initializer": INITIALIZERS,
    "kernel_regularizer": REGULARIZERS,
    "bias_regularizer": REGULARIZERS,
    "activity_regularizer": REGULARIZERS,
    "kernel_constraint": CONSTRAINTS,
    "bias_constraint": CONSTRAINTS,
}
"""The options that are objects, and what each may be by name."""


def checked_object(value: Any, argument: str) -> Any:
    """The option `argument` in its one form; None stays None but for initialisers.

    Raises:
        ConfigError: the value is of no kind that the option may be.
    """
    known = OBJECTS[argument]
    return resolved(value, known, argument, optional=known is not INITIALIZERS)


def check_ranks(
    objects: Mapping[str, Any], ranks: Mapping[str, int], biased: Collection[str]
) -> None:
    """Each object of `OBJECTS` can act on all the arrays that it meets, which differ in rank.

    Args:
        objects: The options that are objects, by name.
        ranks: The number of axes of what projections give for a position, where it is not 2.
        biased: The projections that have a bias.

    Raises:
        ConfigError: one cannot.
    """
    kernels = {1 + rank + (name == "output") for name, rank in ranks.items()}
    met = {
        "kernel": {3, *kernels},
        "bias": {ranks.get(name, 2) for name in biased},
        "activity": {4, *(2 + rank for rank in ranks.values())},
    }
    for name, value in objects.items():
        part = name.partition("_")[0]
        if isinstance(value, ConfigObject):
            as_matrix = part == "kernel" and getattr(value, "as_matrix", False)
            for rank in {2} if as_matrix else met[part]:
                if reason := value.refusal(rank):
                    raise ConfigError(
                        f"`{name}` must fit arrays of {rank} axes, which this layer has. "
                        f"Received: {value}; {reason}."
                    )

"""Every error that anymha raises on bad input, and the warnings that it gives.

Each is an `AnymhaError` and also the builtin exception that a user would expect there, so both
``except AnymhaError`` and ``except ValueError`` work.
"""

from __future__ import annotations

from anymha.text import escaped


class AnymhaWarning(UserWarning):
    """The base of all warnings given by anymha."""


class BiasWarning(AnymhaWarning):
    """A bias of zeros was added or left out, as the target has biases elsewhere than the source."""


class AnymhaError(Exception):
    """The base of all errors raised by anymha.

    Example:
        >>> import anymha
        >>> try:
        ...     anymha.AttentionConfig(num_heads=0, key_dim=4)
        ... except anymha.AnymhaError as error:
        ...     print(type(error).__name__, isinstance(error, ValueError))
        ConfigError True
    """

    # TensorFlow raises the errors of a traced function anew, with where in the user's code they
    # came from; those whose constructor it does not know become one of its own.
    __init__ = Exception.__init__

    def __str__(self) -> str:
        """The message; what a file's names hold moves no cursor and hides nothing."""
        return escaped(super().__str__(), kept="\n\t")


class ConfigError(AnymhaError, ValueError):
    """An option of the layer has a value that it cannot have."""


class ShapeError(AnymhaError, ValueError):
    """An array does not have the shape that the call needs."""


class CacheError(AnymhaError, ValueError):
    """A cache cannot be made so, has no room for a call, or does not hold what is asked for."""


class DtypeError(AnymhaError, TypeError):
    """An array does not have the dtype that the call needs."""


class ArgumentError(AnymhaError, TypeError):
    """An argument is missing, or is not of a kind that the call takes."""


class UnknownOptionError(ConfigError, ArgumentError):
    """The layer has no option of this name; the message has the right one."""


class MixedBackendsError(AnymhaError, TypeError):
    """The arrays of one call come from more than one framework."""


class UnknownBackendError(AnymhaError, ValueError):
    """No backend has this name, or none handles this kind of array."""


class BackendNotInstalledError(AnymhaError, ImportError):
    """The backend exists, but its framework is not installed."""


class WeightsError(AnymhaError, ValueError):
    """Weights have names or shapes that do not fit the layer."""


class LayoutError(WeightsError):
    """A layout of weights cannot hold what it is asked to hold."""


class UnknownLayoutError(AnymhaError, ValueError):
    """No layout of weights has this name."""


class FileError(AnymhaError, OSError, ValueError):
    """A file cannot be read or written, or does not hold what it should."""


class UsageError(AnymhaError, ValueError):
    """A command was called in a way that it cannot do."""

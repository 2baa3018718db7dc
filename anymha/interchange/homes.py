"""`anymha.MultiHeadAttention`, and for type checkers the native layer of each backend.

Nothing of a backend is imported: what stands under `TYPE_CHECKING` is read by type checkers alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from anymha.errors import ArgumentError
from anymha.framework.registry import BUILT_IN, LAYERS, get_layer
from anymha.layer.native import NativeLayer, options_documentation
from anymha.options.config import AttentionConfig

P = ParamSpec("P")
L = TypeVar("L")

if TYPE_CHECKING:
    from anymha_equinox.layer import EquinoxOptions
    from anymha_equinox.layer import MultiHeadAttention as EquinoxLayer
    from anymha_flax.layer import FlaxOptions
    from anymha_flax.layer import MultiHeadAttention as FlaxLayer
    from anymha_jax.layer import JaxOptions
    from anymha_jax.layer import MultiHeadAttention as JaxLayer
    from anymha_keras.layer import MultiHeadAttention as KerasLayer
    from anymha_keras.options import KerasOptions
    from anymha_numpy.layer import MultiHeadAttention as NumpyLayer
    from anymha_tensorflow.layer import MultiHeadAttention as TensorflowLayer
    from anymha_torch.layer import MultiHeadAttention as TorchLayer
    from anymha_torch.layer import TorchOptions

    def makes(
        options: Callable[P, Any],
    ) -> Callable[[Callable[..., L]], Callable[Concatenate[Any, P], L]]:
        """Give a method of a class the arguments of a class of options, and its own result."""
        ...

    @dataclass(frozen=True, kw_only=True)
    class InNumpy(AttentionConfig):
        backend: Literal["numpy"]

    @dataclass(frozen=True, kw_only=True)
    class InTorch(TorchOptions):
        backend: Literal["torch"]

    @dataclass(frozen=True, kw_only=True)
    class InTensorflow(AttentionConfig):
        backend: Literal["tensorflow"]

    @dataclass(frozen=True, kw_only=True)
    class InJax(JaxOptions):
        backend: Literal["jax"]

    @dataclass(frozen=True, kw_only=True)
    class InKeras(KerasOptions):
        backend: Literal["keras"]

    @dataclass(frozen=True, kw_only=True)
    class InFlax(FlaxOptions):
        backend: Literal["flax"]

    @dataclass(frozen=True, kw_only=True)
    class InEquinox(EquinoxOptions):
        backend: Literal["equinox"]

    @dataclass(frozen=True, kw_only=True)
    class InOther(AttentionConfig):
        backend: str


class _AnyBackend(type):
    """The class whose instances are the native layers of all backends."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, NativeLayer)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or issubclass(subclass, NativeLayer)

    if TYPE_CHECKING:  # for pyright, which does not know decorated overloads of `__new__`

        @overload
        @makes(InNumpy)
        def __call__(cls) -> NumpyLayer: ...
        @overload
        @makes(InTorch)
        def __call__(cls) -> TorchLayer: ...
        @overload
        @makes(InTensorflow)
        def __call__(cls) -> TensorflowLayer: ...
        @overload
        @makes(InJax)
        def __call__(cls) -> JaxLayer: ...
        @overload
        @makes(InKeras)
        def __call__(cls) -> KerasLayer: ...
        @overload
        @makes(InFlax)
        def __call__(cls) -> FlaxLayer: ...
        @overload
        @makes(InEquinox)
        def __call__(cls) -> EquinoxLayer: ...
        @overload
        @makes(InOther)
        def __call__(cls) -> Any: ...
        def __call__(cls, *args: Any, **options: Any) -> Any: ...


class MultiHeadAttention(metaclass=_AnyBackend):
    """The native layer of a backend; each native layer of anymha is an instance of this class.

    ``anymha.MultiHeadAttention(num_heads, key_dim, ..., backend="torch")`` makes an
    `anymha_torch.MultiHeadAttention`. ``isinstance(layer, anymha.MultiHeadAttention)`` and
    `issubclass` hold for the layers of all backends, and import none. To derive a class of your
    own, take that of one framework.

    Args:
        {options}
        backend: "numpy", "torch", "tensorflow", "jax", "keras", "flax", "equinox", or the name of
            a backend of others.

    The backend's own options, as torch's `device`, are passed on.

    Raises:
        UnknownBackendError: no backend has this name.
        BackendNotInstalledError: its framework is not installed.
        ConfigError: an option has a value that it cannot have.
        UnknownOptionError: there is no such option; the message has the right one.

    Example:
        >>> import anymha
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
        >>> layer
        MultiHeadAttention(num_heads=2, key_dim=4, query_features=8)
        >>> isinstance(layer, anymha.MultiHeadAttention)
        True
    """

    if TYPE_CHECKING:  # for mypy, which does not look at the metaclass

        @overload
        @makes(InNumpy)
        def __new__(cls) -> NumpyLayer: ...  # type: ignore[misc]
        @overload
        @makes(InTorch)
        def __new__(cls) -> TorchLayer: ...  # type: ignore[misc]
        @overload
        @makes(InTensorflow)
        def __new__(cls) -> TensorflowLayer: ...  # type: ignore[misc]
        @overload
        @makes(InJax)
        def __new__(cls) -> JaxLayer: ...  # type: ignore[misc]
        @overload
        @makes(InKeras)
        def __new__(cls) -> KerasLayer: ...  # type: ignore[misc]
        @overload
        @makes(InFlax)
        def __new__(cls) -> FlaxLayer: ...  # type: ignore[misc]
        @overload
        @makes(InEquinox)
        def __new__(cls) -> EquinoxLayer: ...  # type: ignore[misc]
        @overload
        @makes(InOther)
        def __new__(cls) -> Any: ...
        def __new__(cls, *args: Any, **options: Any) -> Any: ...

    else:

        def __new__(cls, *args: Any, backend: str | None = None, **options: Any) -> Any:
            if backend is None:
                known = ", ".join(repr(each.name) for each in (*BUILT_IN, *LAYERS))
                raise ArgumentError(
                    f"`backend` must be passed, one of {known}. Received: "
                    f"{', '.join([*map(repr, args), *options]) or 'nothing'}. "
                    "Pass e.g. backend='numpy'."
                )
            return get_layer(backend)(*args, **options)

    def __init_subclass__(cls) -> None:
        raise TypeError(
            f"`{cls.__name__}` must derive from the layer of one framework, as "
            "`anymha_torch.MultiHeadAttention`. Received: `anymha.MultiHeadAttention`, which is "
            "the layers of all. Derive from one of them."
        )


def _document(layer: Any) -> None:
    """Write the options into the class's docstring and signature."""
    kinds = inspect.Parameter
    options = inspect.signature(AttentionConfig).parameters.values()
    backend = kinds("backend", kinds.KEYWORD_ONLY, annotation="str")
    layer.__signature__ = inspect.Signature([*options, backend])
    if layer.__doc__:
        documentation = options_documentation(AttentionConfig)
        layer.__doc__ = inspect.cleandoc(layer.__doc__).replace("    {options}", documentation)


_document(MultiHeadAttention)

"""What the native layers share: the constructor's options, the call's, and the first weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, ParamSpec, Self, TypedDict, TypeVar

import numpy as np

from anymha.errors import ShapeError, WeightsError
from anymha.framework.protocol import Array, Dim
from anymha.framework.shapes import is_known, show
from anymha.layer.arguments import call_parameters
from anymha.layer.plan import Plans
from anymha.layer.weights import constrained_weights, initial_weights, regularization_loss
from anymha.options.config import AttentionConfig

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])


class CallOptions(TypedDict, total=False):
    """The keyword arguments of a layer's call; see `anymha.multi_head_attention`."""

    attention_mask: Array | None
    attention_bias: Array | None
    query_mask: Array | None
    value_mask: Array | None
    key_mask: Array | None
    return_attention_scores: bool
    return_activity_loss: bool
    training: bool | None
    use_causal_mask: bool
    query_offset: Any
    seed: Any


def takes_options(init: Callable[..., None]) -> Callable[..., None]:
    """Give a constructor ``__init__(self, config, ...)`` the arguments of `AttentionConfig`.

    Keyword arguments that the constructor itself has beside `config`, as torch's `device`, stay
    its own.
    """
    itself, _, *own = inspect.signature(init).parameters.values()

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **options: Any) -> None:
        extra = {p.name: options.pop(p.name) for p in own if p.name in options}
        init(self, AttentionConfig(*args, **options), **extra)

    options = inspect.signature(AttentionConfig).parameters.values()
    wrapper.__signature__ = inspect.Signature([itself, *options, *own])  # pyright: ignore
    return wrapper


def takes_call(function: F) -> F:
    """Show the arguments of a layer's call, one by one, as the signature of ``(self, **call)``.

    Keyword arguments that the call itself has, as Flax's `deterministic`, are shown after them.
    """
    itself, *mine = inspect.signature(function).parameters.values()
    own = [p for p in mine if p.kind is p.KEYWORD_ONLY]
    shown = [itself, *call_parameters(), *own]
    function.__signature__ = inspect.Signature(shown)  # pyright: ignore
    return function


class NativeLayer:
    """What the layers of all frameworks share.

    A native layer has the attributes `config`, `ops` and `plans` (see `anymha.layer.plan.Plans`),
    and two primitives: `canonical_weights`, which reads its weights, and `_assigned`.
    """

    config: Any
    ops: ClassVar[Any]
    plans: Plans

    def canonical_weights(self) -> dict[str, Array]:
        """The weights by canonical name; none where they are not made yet."""
        raise NotImplementedError

    def _assigned(self, values: Mapping[str, Any]) -> Self:
        """The layer with other values of some weights: itself, or a new one where it is frozen.

        Args:
            values: By canonical name arrays of NumPy, to be rounded to the layer's dtype, or of
                the framework.
        """
        raise NotImplementedError

    def with_canonical_weights(self, weights: Mapping[str, Any]) -> Self:
        """The layer with these weights, in its own dtype: itself, or a new one where it is frozen.

        Args:
            weights: Arrays by canonical name, one for each weight of the layer.

        Raises:
            WeightsError: names or shapes do not fit; the layer is left as it was.
        """
        return self._assigned(checked_values(self.config, self.canonical_weights(), weights))

    def regularization_loss(self) -> Any:
        """The sum of the penalties of all weights; 0 where there are no regularisers.

        Raises:
            WeightsError: there are no weights yet.
        """
        return regularization_loss(self.ops, self.config, self.canonical_weights())

    def apply_constraints(self) -> Self:
        """The layer with the weights that the constraints make: itself, or a new one if frozen.

        Raises:
            WeightsError: there are no weights yet.
        """
        return self._assigned(constrained_weights(self.ops, self.config, self.canonical_weights()))


def first_weights(
    config: AttentionConfig,
    widths: Sequence[Dim],
    draw_seed: Callable[[], Any],
    ops: Any = None,
) -> dict[str, np.ndarray]:
    """The initial values of a layer's weights, float64, by canonical name.

    Args:
        config: The layer's options.
        widths: Widths of query, value and key; none for those of the config.
        draw_seed: Gives the seed where the config has none.
        ops: The backend, for initialisers in its framework's own style.

    Raises:
        ShapeError: a width is not known yet.
        ConfigError: an initialiser of the user's gives what cannot be a weight.
    """
    if not all(map(is_known, widths)):
        raise ShapeError(
            "The first call makes the weights and needs inputs of known width. Received: widths "
            f"{show(widths)} of query, value and key. Pass `query_features` to the constructor."
        )
    seed = int(draw_seed()) if config.seed is None else config.seed
    return initial_weights(config, config.weight_shapes(*widths), seed, ops)


def checked_values(
    config: AttentionConfig, stored: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """`weights` as NumPy arrays, if they have the names and shapes of the layer's own.

    Args:
        config: The layer's options.
        stored: The layer's weights; none where it has none yet, and any widths fit.
        weights: The new values by canonical name.

    Raises:
        WeightsError: a name is missing or unknown, or a shape is another.
    """
    shapes = {name: tuple(array.shape) for name, array in stored.items()}
    shapes = shapes or config.weight_shapes(*widths_of(weights))
    missing = [name for name in shapes if name not in weights]
    unknown = [name for name in weights if name not in shapes]
    if missing or unknown:
        raise WeightsError(
            f"Weights must have the names {', '.join(shapes)}. Missing: "
            f"{', '.join(missing) or 'none'}. Unknown: {', '.join(unknown) or 'none'}."
        )
    values = {name: np.asarray(weights[name]) for name in shapes}
    for name, value in values.items():
        if value.shape != shapes[name]:
            raise WeightsError(
                f"`{name}` must have shape {shapes[name]}. Received: shape {value.shape}."
            )
    return values


def widths_of(weights: Mapping[str, Any]) -> tuple[int, int, int]:
    """The widths of query, value and key that canonical weights have.

    Raises:
        WeightsError: a kernel is missing.
    """
    names = ("query.kernel", "value.kernel", "key.kernel")
    missing = [name for name in names if name not in weights]
    if missing:
        raise WeightsError(f"Weights lack {', '.join(missing)}. Received: {', '.join(weights)}.")
    query, value, key = (int(weights[name].shape[0]) for name in names)
    return query, value, key

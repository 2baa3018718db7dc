"""What the native layers share: the constructor's options, the call's, and the first weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import (
    Any,
    ClassVar,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

import numpy as np

from anymha.errors import (
    ArgumentError,
    ConfigError,
    ShapeError,
    UnknownOptionError,
    WeightsError,
)
from anymha.framework.dtypes import dtype_name
from anymha.framework.names import answers
from anymha.framework.protocol import Array, Dim, Index
from anymha.framework.registry import named_arrays
from anymha.framework.shapes import is_known, show
from anymha.framework.validation import checked_flag
from anymha.layer.arguments import BY_NAME, call_documentation, call_parameters
from anymha.layer.cache import Cache, Memory, make_cache
from anymha.layer.forward import make_memory
from anymha.layer.plan import Plans
from anymha.layer.weights import (
    NAMES,
    constrained_weights,
    initial_weights,
    regularization_loss,
)
from anymha.options.config import AttentionConfig
from anymha.options.option import taken
from anymha.options.other_names import unknown_options

A = TypeVar("A")
P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class PlainCall(TypedDict, Generic[A], total=False):
    """The keyword arguments of a call that gives no more than its output."""

    attention_mask: A | None
    attention_bias: A | None
    query_mask: A | None
    value_mask: A | None
    key_mask: A | None
    segment_ids: A | None
    key_segment_ids: A | None
    positions: A | None
    key_positions: A | None
    memory: Memory | Cache | None
    training: bool | None
    use_causal_mask: bool
    query_offset: Index | A
    seed: Index | A | None


class CallOptions(PlainCall[A], total=False):
    """The keyword arguments of a layer's call with arrays of type A, for type checkers."""

    cache: Cache | None
    return_attention_scores: bool
    return_activity_loss: bool


class Call(Protocol[A]):
    """A layer's call with arrays of type A, for type checkers: what it gives."""

    @overload
    def __call__(
        self, query: A | Sequence[A], value: A | None = None, key: A | None = None,
        **call: Unpack[PlainCall[A]],
    ) -> A: ...  # fmt: skip

    @overload
    def __call__(
        self, query: A | Sequence[A], value: A | None = None, key: A | None = None,
        *, cache: Cache, **call: Unpack[PlainCall[A]],
    ) -> tuple[A, Cache]: ...  # fmt: skip

    @overload
    def __call__(
        self, query: A | Sequence[A], value: A | None = None, key: A | None = None,
        *, return_attention_scores: Literal[True], **call: Unpack[PlainCall[A]],
    ) -> tuple[A, A]: ...  # fmt: skip

    @overload
    def __call__(
        self, query: A | Sequence[A], value: A | None = None, key: A | None = None,
        **call: Unpack[CallOptions[A]],
    ) -> Any: ...  # fmt: skip


class typed_as(Generic[T]):
    """Type a method as T, for type checkers."""

    def __call__(self, method: Callable[..., Any]) -> T:
        """The method itself."""
        return cast(Any, method)


def takes_options(
    options: Callable[P, AttentionConfig],
    read: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None,
    default_dtype: Callable[[], Any] | None = None,
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give a constructor ``__init__(self, config, *, ...)`` the arguments of a class of options.

    Args:
        options: `AttentionConfig`; or a subclass, with a field for each keyword argument that the
            constructor has beside `config`, as torch's `device`. It is only looked at: type
            checkers and `help` read from it what the constructor takes.
        read: Makes of the arguments by place and by name the one argument of another constructor,
            ``__init__(self, found)``.
        default_dtype: Gives the dtype where none is passed; default the config's.
    """
    kind: Any = options
    known = [field.name for field in fields(kind)]
    own = {name for name in known if name not in AttentionConfig.__dataclass_fields__}

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        @functools.wraps(init)
        def wrapper(self: Any, *args: Any, **given: Any) -> None:
            if read is not None:
                init(self, read(args, given))
                return
            if default_dtype is not None and given.get("dtype") is None:
                given["dtype"] = default_dtype()
            extra = {name: given.pop(name) for name in own & given.keys()} if own else {}
            try:
                config = AttentionConfig(*args, **given)
            except UnknownOptionError:
                unknown = [name for name in given if name not in known]
                if not unknown:  # but within an option
                    raise
                raise unknown_options(unknown, known, BY_NAME) from None
            init(self, config, **extra)

        show_options(wrapper, kind)
        return wrapper

    return decorate


def show_options(init: Any, options: type[AttentionConfig]) -> None:
    """Show a class of options as the arguments of a constructor, in `help` and `inspect`."""
    itself, *_ = inspect.signature(init).parameters.values()
    parameters = inspect.signature(options).parameters.values()
    shown = [each.replace(annotation=taken(each.annotation)) for each in parameters]
    init.__signature__ = inspect.Signature([itself, *shown], return_annotation="None")
    init.__doc__ = f"""Make the layer.

Args:
{options_documentation(options)}

Raises:
    ConfigError: an option has a value that it cannot have.
    UnknownOptionError: there is no such option; the message has the right one.
"""


def options_documentation(options: type[AttentionConfig]) -> str:
    """The lines of the section "Args" for a class of options, those of its bases first."""
    sections = []
    for kind in reversed(options.__mro__):
        if issubclass(kind, AttentionConfig) and kind.__doc__:
            sections.append(_section_of_arguments(kind))
    return "\n".join(sections)


def _section_of_arguments(documented: Any) -> str:
    """The lines of the section "Args" of a docstring; none where there is none."""
    _, _, rest = inspect.cleandoc(documented.__doc__ or "").partition("Args:\n")
    return rest.partition("\n\n")[0].rstrip()


def takes_call(function: F) -> F:
    """Show the arguments of a layer's call, one by one, as the signature of ``(self, **call)``.

    Keyword arguments that the call itself has, as Flax's `deterministic`, are shown after them;
    the section "Args" of its docstring says what they mean.
    """
    itself, *mine = inspect.signature(function).parameters.values()
    own = [p for p in mine if p.kind is p.KEYWORD_ONLY]
    method: Any = function
    method.__signature__ = inspect.Signature([itself, *call_parameters(), *own])
    method.__doc__ = call_help(_section_of_arguments(function))
    # A call without `query` is answered where its arguments are read, as one by a wrong name is.
    method.__defaults__ = (None, None, None)
    return function


def shown_as(function: F) -> Callable[[Callable[..., Any]], F]:
    """Show and type a method as another one, which it passes its arguments on to."""
    return cast(Any, functools.wraps(function))


def call_help(own: str = "", without: Container[str] = ()) -> str:
    """The docstring of a layer's call.

    Args:
        own: The lines about arguments that the framework's call has beside the common ones.
        without: The common ones that it does not have.
    """
    arguments = "\n".join(filter(None, [call_documentation(without), own]))
    return f"""Attend from `query` to `key` and `value`.

Args:
{arguments}

Returns:
    The output (B, T, *O); with ``return_attention_scores=True`` also the probabilities before
    dropout (B, H, T, S); with ``return_activity_loss=True`` also a scalar; with a `cache` also
    the new `Cache`, last.

Raises:
    ArgumentError: there is no such argument; the message has the right one.
    ShapeError: shapes do not fit; the message has the expected and the received.
    DtypeError: a mask is not boolean, or an input is not floating.
    MixedBackendsError: an array is of another framework.
"""


class StaticOptions:
    """A layer's options and plans as static metadata of a pytree.

    Two are equal whatever their layers' names, seeds and initialisers are, so that these layers
    can be stacked.
    """

    def __init__(self, config: AttentionConfig) -> None:
        self.config = replace(config, seed=None)
        self.plans = Plans()
        plain = {"name": None, "kernel_initializer": "zeros", "bias_initializer": "zeros"}
        self._compared = replace(self.config, **plain)
        self._hash = hash(self._compared)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, StaticOptions) and self._compared == other._compared
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return repr(self.config)

    def __reduce__(self) -> Any:
        return StaticOptions, (self.config,)


class NativeLayer:
    """What the layers of all frameworks share.

    A native layer has the attributes `config`, `ops` and `plans` (see `anymha.layer.plan.Plans`),
    and two primitives: `canonical_weights`, which reads its weights, and `_assigned`.
    """

    config: Any
    ops: ClassVar[Any]
    plans: Plans

    @classmethod
    def valid_name(cls, name: str) -> str:
        """The name for a layer; with other characters where the framework does not allow some."""
        return name

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

    @answers()
    def with_canonical_weights(self, weights: Mapping[str, Any]) -> Self:
        """The layer with these weights, in its own dtype: itself, or a new one where it is frozen.

        Args:
            weights: Arrays by canonical name, one for each weight of the layer.

        Raises:
            WeightsError: names or shapes do not fit; the layer is left as it was.
        """
        values = checked_values(self.config, self.canonical_weights(), weights)
        first: dict[Any, str] = {}
        for name, place in self._places().items():
            other = first.setdefault(place, name)
            if other != name and name in values and other in values:
                self._check_tied(other, name, values)
        return self._assigned(values)

    def _places(self) -> dict[str, Any]:
        """By the names of weights where each is held, hashable; one place for those that are tied.

        None of a layer whose weights cannot be tied: Keras allows no other variable once a layer is
        built, and layers of JAX and NumPy have their arrays in a dict.
        """
        return {}

    def _check_tied(self, one: str, other: str, values: Mapping[str, Any]) -> None:
        """Refuse two values for two weights that are one."""
        a, b = (x if isinstance(x, np.ndarray) else self.ops.to_numpy(x)
                for x in (values[one], values[other]))  # fmt: skip
        if not np.array_equal(a.reshape(-1), b.reshape(-1), equal_nan=True):
            raise WeightsError(
                f"`{one}` and `{other}` are tied: the layer holds one array for both. Received: "
                "two values. Give both the same, or give each an array of its own."
            )

    @answers(
        {"Leave it out: the cache is made where the layer's weights are.": "device"},
        max_length="max_len max_seq_len max_seq_length max_cache_len length size capacity",
        batch_size="batch bsz max_batch_size",
    )
    def make_cache(
        self, batch_size: int, max_length: int, dtype: Any = None, *, rewind: int = 0,
        donate: bool = False,
    ) -> Cache:  # fmt: skip
        """An empty cache for decoding: ``output, cache = layer(x, cache=cache)``.

        Args:
            batch_size: The number B of rows.
            max_length: How many positions a row may have; going past it is an error.
            dtype: The dtype in which keys and values are held, or its name; default the one in
                which the layer computes.
            rewind: Where `sliding_window` is shorter than `max_length` the cache is a ring of so
                many positions, and `rewind` more, by which `truncate` may go back at least.
            donate: Whether a step by `torch.compile` may write into the arrays of the cache that it
                is given, as eager steps do. Only one thread at a time may then go on from a cache.
                JAX's `donate_argnums` says so for its steps.

        Raises:
            CacheError: a size is not a positive integer, or the layer attends over other axes.
        """
        device, computing = None, self.config.compute_dtype or self.config.dtype
        for weight in self.canonical_weights().values():
            device = self.ops.device(weight)
            computing = self.config.compute_dtype or dtype_name(weight.dtype)
            break
        sizes = batch_size, max_length, rewind
        return make_cache(self.ops, self.config, computing, *sizes, dtype, device, donate)

    @answers(
        {"Pass `value_mask` to the call.": "value_mask key_padding_mask"},
        value="context encoder_hidden_states memory x", key_positions="positions",
    )  # fmt: skip
    def make_memory(
        self, value: Array, key: Array | None = None, *, key_positions: Any = None
    ) -> Memory:
        """Keys and values of another sequence, projected once: ``layer(x, memory=memory)``.

        Args:
            value: (B, S, D_v) floating.
            key: (B, S, D_k) floating; default `value`.
            key_positions: (S,) or (B, S) integers, the keys' positions for `rotary` and `alibi`;
                default their index.

        Raises:
            WeightsError: there are no weights yet.
            AnymhaError: the arrays are not such as a call takes.
        """
        weights = self._weights_for_memory() if self.canonical_weights() else None
        if not weights:
            raise WeightsError(
                "The first call makes the weights, and a memory needs them. Received: a layer "
                "without weights. Pass `query_features`, and `value_features` where it differs, to "
                "the constructor."
            )
        return make_memory(self.ops, self.config, weights, value, key, key_positions)

    def _weights_for_memory(self) -> Any:
        """The weights, or the projections that a call would call."""
        return self.canonical_weights()

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


def weights_of_projections(layer: Any) -> dict[str, Any]:
    """What a layer's projections hold as `kernel` and `bias`, None left out, by canonical name.

    Raises:
        WeightsError: something else stands in the place of a projection.
    """
    try:
        named = {name: part(layer) for name, part in _PARTS.items()}
    except AttributeError:
        raise _replaced(layer) from None
    config = layer.config
    further = [f"{name}.{part}" for name in config.further_projections for part in PARTS]
    for name in (*further, *config.feature_weights):
        named[name] = held(layer, name)
    return {name: weight for name, weight in named.items() if weight is not None}


def _replaced(layer: Any) -> WeightsError:
    """What is said of a layer whose projection is another object than its own."""
    name, own, part = "", None, ""
    for full in _PARTS:
        name, _, part = full.partition(".")
        own = getattr(layer, name, None)
        if not hasattr(own, part):
            break
    return WeightsError(
        f"`layer.{name}` must hold `{part}`, which the layer reads: it does not call what stands "
        f"there. Received: {type(own).__module__}.{type(own).__name__}. Give the kernel new values "
        "instead, of a low-rank update (LoRA) its product, by `anymha.set_weights`."
    )


def held(layer: Any, name: str) -> Any:
    """What a layer holds at a canonical name, ``layer.query_norm.scale``; None for nothing."""
    for part in name.split("."):
        layer = getattr(layer, part, None)
    return layer


def held_together(names: Iterable[str]) -> dict[str, list[str]]:
    """Canonical names by their first part, which a layer has as an attribute; each its last part.

    The list of a name without parts is empty: the attribute is the weight itself.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        first, _, part = name.partition(".")
        found.setdefault(first, []).extend([part] if part else [])
    return found


PARTS = ("kernel", "bias")
_PARTS = {name: attrgetter(name) for name in NAMES}


def as_stored(ops: Any, value: Any, dtype: Any) -> Any:
    """A new value of a weight: a NumPy array as one of the framework, rounded to that dtype."""
    return ops.from_numpy(value.astype(dtype)) if isinstance(value, np.ndarray) else value


def mode_of_training(mode: str, passed: bool | None, own: bool, training: bool | None) -> bool:
    """Whether a call trains, where the framework has an argument that is ``not training``.

    Args:
        mode: The argument's name.
        passed: What was passed for it.
        own: The layer's own.
        training: What was passed as `training`.

    Raises:
        ArgumentError: both were passed.
    """
    if training is None:
        return not checked_flag(own if passed is None else passed, mode)
    if passed is not None:
        raise ArgumentError(
            f"`training` and `{mode}` say the same; pass one. Received: training={training!r}, "
            f"{mode}={passed!r}."
        )
    return training


def check_name(layer: type[NativeLayer], name: str | None, rule: str) -> None:
    """Refuse a name that the framework does not allow.

    Args:
        layer: The native layer.
        name: The name; None for none.
        rule: What a name must be, in words.

    Raises:
        ConfigError: it is not.
    """
    if name is not None and layer.valid_name(name) != name:
        raise ConfigError(
            f"`name` must be {rule}. Received: {name!r}. Pass e.g. name={layer.valid_name(name)!r}."
        )


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
        ArgumentError: they are no dict of arrays.
        WeightsError: a name is missing or unknown, or a shape is another.
    """
    values = named_arrays(weights)
    shapes = {name: tuple(array.shape) for name, array in stored.items()}
    shapes = shapes or config.weight_shapes(*widths_of(values))
    missing = [name for name in shapes if name not in values]
    unknown = [name for name in values if name not in shapes]
    if missing or unknown:
        raise WeightsError(
            f"Weights must have the names {', '.join(shapes)}. Missing: "
            f"{', '.join(missing) or 'none'}. Unknown: {', '.join(unknown) or 'none'}."
        )
    for name, shape in shapes.items():
        if values[name].shape != shape:
            raise WeightsError(
                f"`{name}` must have shape {shape}. Received: shape {values[name].shape}."
            )
    return {name: values[name] for name in shapes}


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

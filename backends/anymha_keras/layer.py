"""The layer for Keras: a `keras.layers.Layer`, on whichever of Keras's backends is set."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras.src.backend import get_keras_mask, set_keras_mask  # of which there are no public names

from anymha.errors import AnymhaError, ConfigError
from anymha.framework.registry import get_backend
from anymha.layer.arguments import CALL_ARGUMENTS
from anymha.layer.checks import unpack_inputs
from anymha.layer.forward import Projections, multi_head_attention
from anymha.layer.native import (
    NativeLayer,
    call_help,
    check_name,
    first_weights,
    held,
    held_together,
    shown_as,
    takes_options,
    widths_of,
)
from anymha.layer.other_names import unexpected
from anymha.layer.plan import Plans, WeightsKind, plans_unless_tracing
from anymha.options.config import AttentionConfig, shown_options
from anymha_keras.caches import symbolic_results
from anymha_keras.call import (
    MASKS,
    all_masks,
    any_shape,
    as_tensor,
    of_words,
    result_shapes,
    unpack_shapes,
    with_mask,
)
from anymha_keras.options import Given, KerasOptions, core_dtypes, read_options, saved
from anymha_keras.projection import (
    Projection,
    Values,
    check_readable,
    check_writable,
    copied,
    is_plain,
    make_projection,
    rounded,
)

ORDER = ("query", "key", "gate", "value", "output")
"""The projections in the order of their weights."""
KERAS_ADDS = ("return_activity_loss",)
"""Arguments of the call that Keras's has not: Keras adds the loss to `layer.losses`."""
CALL = tuple(argument.name for argument in CALL_ARGUMENTS if argument.name not in KERAS_ADDS)
"""The arguments of the call."""
UNCAST = ("cache", "memory", "attention_bias", "seed")
"""Arguments that Keras would cast, to the layer's dtype or to 32 bits, and that keep theirs."""


class _Ops:
    """The functions of Keras's backend."""

    def __get__(self, layer: Any, kind: type) -> Any:
        return get_backend(keras.config.backend()).ops


@keras.saving.register_keras_serializable(package="anymha")
class MultiHeadAttention(NativeLayer, keras.layers.Layer):
    """Multi-head attention as a Keras layer, in the place of `keras.layers.MultiHeadAttention`.

    The constructor takes the options of `anymha.AttentionConfig` and the arguments of every Keras
    layer, of which `dtype` may be a policy; the call the arguments of
    `anymha.multi_head_attention`. Masks that Keras's layers attach to their outputs count
    where none is passed. Weights have the names, the order and the shapes of Keras's layer.

    Initial values are anymha's, and from the same `seed` the same in every framework; but for an
    instance of Keras's initialisers they are that object's own. Penalties and constraints go
    Keras's way: `layer.losses`, and the variables' constraints.

    Differs from:
        `keras.layers.MultiHeadAttention`: a row whose keys are all masked gives exactly the
        output's bias; scores have their shape in the functional API where key and query differ in
        length; a `query_mask` that is passed counts; the order of the options after
        `attention_axes`; `flash_attention=True` is taken wherever dropout and scores are off.

    Example:
        >>> import keras
        >>> from anymha_keras import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, seed=0)
        >>> tuple(layer(keras.ops.ones((1, 3, 8))).shape)
        (1, 3, 8)
    """

    ops: ClassVar[Any] = _Ops()

    @takes_options(KerasOptions, read_options)
    def __init__(self, given: Given) -> None:
        config = given.config
        check_name(type(self), config.name, "without a slash, which parts names in Keras's paths")
        super().__init__(dtype=given.policy, name=config.name, **given.of_layer)
        self.supports_masking = True
        self._convert_input_args = False  # which `__call__` does
        self.seed = config.seed
        self._config = config
        self.plans = Plans()
        self._flash_attention = given.flash_attention
        self._own_compute_dtype = given.compute_dtype
        self._own_initializers = given.initializers
        self._dropout_layer = keras.layers.Dropout(
            config.dropout,
            seed=None if config.seed is None else config.seed % 2**31,
            dtype=self.dtype_policy,
        )
        if config.query_features is not None:
            shapes = config.weight_shapes()
            self._build_of([shapes[f"{name}.kernel"][0] for name in ("query", "value", "key")])

    num_heads = property(lambda self: self._config.num_heads)
    key_dim = property(lambda self: self._config.key_dim)
    value_dim = property(lambda self: self._config.value_dim)
    dropout = property(lambda self: self._config.dropout)
    use_bias = property(lambda self: self._config.use_bias)
    attention_axes = property(lambda self: self._config.attention_axes)
    sliding_window = property(lambda self: self._config.sliding_window)
    query_dense = property(lambda self: self._query_dense)
    key_dense = property(lambda self: self._key_dense)
    value_dense = property(lambda self: self._value_dense)
    output_dense = property(lambda self: self._output_dense)

    @property
    def config(self) -> AttentionConfig:
        """The options, with the dtypes of the layer's policy."""
        dtypes = core_dtypes(self, self._own_compute_dtype)
        if any(getattr(self._config, name) != dtype for name, dtype in dtypes.items()):
            self._config = dataclasses.replace(self._config, **dtypes)
        return self._config

    def build(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, query_shape: Any, value_shape: Any = None, key_shape: Any = None
    ) -> None:
        if self.built:
            return
        config = self.config
        shapes = unpack_shapes(query_shape, value_shape, key_shape)
        names = ("query_features", "value_features", "key_features")
        result_shapes(config, shapes, [getattr(config, name) for name in names], {})
        widths = [shape[-1] for shape in shapes]
        plain = dict.fromkeys(self._own_initializers, "zeros")  # not drawn twice
        values = first_weights(
            dataclasses.replace(config, **plain), widths, lambda: random.randrange(2**31), self.ops
        )

        def initializer(name: str) -> Any:
            own = self._own_initializers.get(f"{name.partition('.')[2]}_initializer")
            return Values(values[name]) if own is None else copied(own)

        heads = (config.num_heads, config.value_dim)
        query, value, key = shapes
        ends = {"query": query, "key": key, "value": value, "output": (*query[:-1], *heads)}
        ends |= dict.fromkeys(config.further_projections, query)
        # In the order of Keras's layer, where the gate stands between key and value.
        for name in sorted(config.projections, key=ORDER.index):
            kernel = values[f"{name}.kernel"].shape
            dense = make_projection(
                config, name, kernel, len(query), initializer, self.dtype_policy
            )
            setattr(self, f"_{name}_dense", dense)
            dense.build(ends[name])
        for name, parts in held_together(config.feature_weights).items():
            holder = keras.layers.Layer(dtype=self.dtype_policy, name=name) if parts else self
            for full in [f"{name}.{part}" for part in parts] or [name]:
                own = full.rpartition(".")[2]
                shape = values[full].shape
                variable = holder.add_weight(shape, Values(values[full]), name=own)
                setattr(holder, own, variable)
            if parts:
                holder.built = True
                setattr(self, name, holder)
        if keras.config.backend() == "numpy":  # where an initialiser's float64 becomes float32
            quantised = [n for n, dense in self._projections().items() if dense.quantization_mode]
            self._assign({
                n: v for n, v in values.items()
                if isinstance(initializer(n), Values) and n.partition(".")[0] not in quantised
            })  # fmt: skip

    def _build_of(self, widths: Sequence[int]) -> None:
        """Build for inputs of these widths: query, value, key."""
        self.build(*(any_shape(self._config, width) for width in widths))

    def call(
        self,
        query: Any,
        value: Any = None,
        key: Any = None,
        *,
        attention_mask: Any = None,
        attention_bias: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        segment_ids: Any = None,
        key_segment_ids: Any = None,
        positions: Any = None,
        key_positions: Any = None,
        cache: Any = None,
        memory: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        query_offset: Any = 0,
        seed: Any = None,
    ) -> Any:
        if self._flash_attention and return_attention_scores:  # in Keras's words
            raise ConfigError(
                "Returning attention scores is not supported when flash attention is enabled. "
                "Please disable flash attention to access attention scores."
            )
        query, value, key = map(as_tensor, unpack_inputs(query, value, key))
        passed = map(as_tensor, (query_mask, value_mask, key_mask, attention_mask))
        masks = all_masks(dict(zip(MASKS, passed, strict=True)), query, value, key)
        if memory is not None:  # what is attached to the queries is not of the memory
            masks |= {"value_mask": as_tensor(value_mask), "key_mask": as_tensor(key_mask)}
        penalised = self._config.activity_regularizer is not None
        result = multi_head_attention(
            self.ops,
            self.config,
            self._weights_of_call(),
            query,
            value,
            key,
            plans=plans_unless_tracing(self.ops, self.plans),
            **masks,
            attention_bias=as_tensor(attention_bias),
            segment_ids=as_tensor(segment_ids),
            key_segment_ids=as_tensor(key_segment_ids),
            positions=as_tensor(positions),
            key_positions=as_tensor(key_positions),
            return_attention_scores=return_attention_scores,
            return_activity_loss=penalised,
            training=training,
            use_causal_mask=use_causal_mask,
            query_offset=query_offset,
            seed=self._draw_seed if seed is None else of_words(seed),
            cache=cache,
            memory=memory,
        )
        if penalised:
            results = list(result)
            self.add_loss(results.pop(-1 if cache is None else -2))
            result = tuple(results) if len(results) > 1 else results[0]
        return with_mask(result, masks["query_mask"])

    call.__doc__ = call_help(without=KERAS_ADDS)

    @shown_as(call)
    def __call__(self, *args: Any, **call: Any) -> Any:
        own = {name: call.pop(name) for name in UNCAST if name in call}
        if "attention_bias" in own:
            own["attention_bias"] = self._converted(own["attention_bias"], False)
        converted: Any = keras.tree.map_structure(self._converted, (args, call))
        args, call = converted[0], {**converted[1], **own}
        try:
            return super().__call__(*args, **call)
        except TypeError as error:
            unknown = [name for name in call if name not in CALL]
            if unknown and not isinstance(error, AnymhaError):
                raise unexpected(unknown[0], CALL) from None
            raise

    def _converted(self, x: Any, casts: bool = True) -> Any:
        """A leaf of the call's arguments as a tensor, as Keras makes it, cast or not."""
        mask = get_keras_mask(x)
        x = self.dtype_policy.convert_input(x, casts and self.autocast, self.input_dtype)
        if mask is not None:
            set_keras_mask(x, mask)
        return x

    def __repr__(self) -> str:
        options = shown_options(dataclasses.replace(self.config, name=None))
        about = f"name={self.name}, built={self.built}"
        return f"<MultiHeadAttention {about}, {options}>"

    @classmethod
    def valid_name(cls, name: str) -> str:
        """The name without slashes."""
        return name.replace("/", "_")

    def _draw_seed(self) -> Any:
        return of_words(self._dropout_layer.seed_generator.next())

    def compute_output_shape(
        self, query_shape: Any, value_shape: Any = None, key_shape: Any = None
    ) -> tuple[int | None, ...]:
        shapes = unpack_shapes(query_shape, value_shape, key_shape)
        return result_shapes(self._config, shapes, self._widths, {})[0]

    def compute_output_spec(
        self, query: Any, value: Any = None, key: Any = None, **call: Any
    ) -> Any:
        inputs = unpack_inputs(query, value, key)
        masks = all_masks({name: call.get(name) for name in MASKS}, *inputs)
        if call.get("cache") is not None or call.get("memory") is not None:
            result = symbolic_results(
                self._config, inputs, self._widths, self.compute_dtype, {**call, **masks}
            )
            return with_mask(result, masks["query_mask"])
        extra = {**masks, "attention_bias": call.get("attention_bias")}
        given = {name: array for name, array in extra.items() if array is not None}
        shapes = result_shapes(self._config, [x.shape for x in inputs], self._widths, given)
        output, scores = (keras.KerasTensor(shape, self.compute_dtype) for shape in shapes)
        result = (output, scores) if call.get("return_attention_scores") else output
        return with_mask(result, masks["query_mask"])

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """The query's mask."""
        return previous_mask[0] if isinstance(previous_mask, (list, tuple)) else previous_mask

    @property
    def _widths(self) -> tuple[int | None, ...]:
        if not self.built:
            return (None, None, None)
        dense = self._projections()
        # One that is packed as int4 would be unpacked for it.
        parts = [dense[name] for name in ("query", "value", "key")]
        kernels = [
            None if getattr(one, "quantization_mode", None) else getattr(one, "kernel", None)
            for one in parts
        ]
        return tuple(None if kernel is None else kernel.shape[0] for kernel in kernels)

    def _projections(self) -> dict[str, Projection]:
        return {name: getattr(self, f"_{name}_dense") for name in self._config.projections}

    def canonical_weights(self) -> dict[str, Any]:
        """The weights by canonical name, as tensors of Keras's backend."""
        if not self.built:
            return {}
        found = {}
        for name, dense in self._projections().items():
            check_readable(name, dense)
            found[f"{name}.kernel"] = dense.kernel
            if dense.bias is not None:
                found[f"{name}.bias"] = dense.bias
        found |= {name: held(self, name) for name in self._config.feature_weights}
        return {name: keras.ops.convert_to_tensor(weight) for name, weight in found.items()}

    def _weights_of_call(self) -> Any:
        """The weights, where all projections are plain; else the projections, which are called."""
        dense = self._projections()
        if all(is_plain(one) for one in dense.values()):
            return self.canonical_weights()
        heads, width = self._config.num_heads, self._config.value_dim

        def function(name: str) -> Any:
            one, merged = dense[name], name == "output"

            def called(x: Any) -> Any:
                shape: Any = keras.ops.shape(x)
                batch, length = shape[:2]
                last = (heads, width) if merged else (x.shape[-1],)
                rank = getattr(one.input_spec, "ndim", None)
                more = 0 if rank is None else rank - 2 - len(last)
                if more or merged:  # it takes arrays with all axes of the layer's inputs
                    x = keras.ops.reshape(x, (batch, length, *(1,) * more, *last))
                return keras.ops.reshape(one(x), (batch, length, -1))

            return called

        kind = WeightsKind(self.config.dtype, self._widths, "called")
        own = {name: keras.ops.convert_to_tensor(held(self, name))
               for name in self._config.feature_weights}  # fmt: skip
        return Projections({name: function(name) for name in dense}, kind, weights=own)

    def _weights_for_memory(self) -> Any:
        return self._weights_of_call()

    def _assigned(self, values: Mapping[str, Any]) -> MultiHeadAttention:
        if not self.built:
            self._build_of(widths_of(values))
        for name, dense in self._projections().items():
            check_writable(name, dense)
        self._assign(values)
        return self

    def _assign(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            projection, _, part = name.partition(".")
            own = name in self._config.feature_weights
            variable = held(self, name) if own else getattr(self._projections()[projection], part)
            if isinstance(value, np.ndarray):
                value = rounded(value, self.variable_dtype)
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        found = {**super().get_config(), **saved(self._config, self._own_initializers)}
        if self._own_compute_dtype is not None:
            found["compute_dtype"] = self._own_compute_dtype
        return found

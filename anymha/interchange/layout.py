"""`Layout`: how a library or a model family stores the weights of an attention layer, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.errors import ArgumentError, LayoutError, WeightsError
from anymha.framework.registry import as_numpy
from anymha.interchange.compared_options import (
    check_supported,
    differing_options,
    result_options,
    show_options,
)
from anymha.interchange.forms import OPTION_OF, Extra, Form, Need
from anymha.interchange.leftovers import MASKS, is_buffer, learned
from anymha.interchange.limits import Limit, check_scale, choose_form, same_heads, same_widths
from anymha.interchange.model_needs import NormNeed, need_of
from anymha.interchange.name_index import NameIndex
from anymha.interchange.packing import NAMES, Arrays, Sizes, contiguous_copy
from anymha.interchange.reading import check_floats, check_plain, config_of, form_of
from anymha.interchange.rotary_order import check_columns, check_order, reordered, with_order
from anymha.interchange.sizes import (
    HEADS_APART,
    Shapes,
    StatedSizes,
    possible_heads,
    solve_sizes,
)
from anymha.interchange.weights import Weights
from anymha.interchange.writing import (
    check_biases,
    check_weights,
    split_features,
    with_layout_biases,
)
from anymha.options.config import AttentionConfig
from anymha.text import quoted


@dataclass(frozen=True)
class Layout:
    """A layout of weights: names, shapes and transforms, both ways, and limits.

    Args:
        name: Its name, as ``"torch.MultiheadAttention"``.
        forms: Its forms; the first that can hold the weights is written.
        extras: Arrays other than the projections'.
        needs: What the forward pass needs besides plain attention, whatever the arrays: in words,
            or as a `Need` where an option of `AttentionConfig` is or will be that.
        limits: Rules of `anymha.interchange.limits` that its layers obey.
        together: Projections that all have a bias or none of them, where each bias is an array.
        options: Options that its layers have besides those that the arrays show and those of
            `needs`: names of `AttentionConfig`'s fields.
        fixed: Options that all its layers have with these values, which nothing need state.
        scale: Factor of the logits: None for ``1/sqrt(key_dim)``, a number, or "free" where
            only the model's configuration states it.
        refused: The reasons why layers with certain names cannot be converted, by name.
        reference: Where it is defined.
        separator: What stands between the parts of its names.
    """

    name: str
    forms: tuple[Form, ...]
    extras: tuple[Extra, ...] = ()
    needs: tuple[Need | str, ...] = ()
    limits: tuple[Limit, ...] = ()
    together: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    fixed: Mapping[str, Any] | None = None
    scale: float | str | None = None
    refused: Mapping[str, str] | None = None
    reference: str = ""
    separator: str = "."

    @property
    def supported(self) -> tuple[str, ...]:
        """All options that its layers have besides those that the arrays show."""
        own = (extra.option for extra in self.extras if extra.option)
        return (*self.options, *self.need_options, *(self.fixed or ()), *own)

    @property
    def need_options(self) -> tuple[str, ...]:
        """The options, also of steps that `AttentionConfig` does not have, of its needs."""
        return tuple(need.option for need in self.needs if isinstance(need, Need))

    def names(self) -> tuple[str, ...]:
        """All names that a layer of this layout may have, relative to the layer's prefix."""
        forms = dict.fromkeys(name for form in self.forms for name in form.names())
        return (*forms, *(extra.array for extra in self.extras))

    @property
    def _rotary(self) -> Need | None:
        return need_of(self.needs, "rotary")

    @property
    def _norm(self) -> NormNeed | None:
        need = need_of(self.needs, "query_key_norm")
        return need if isinstance(need, NormNeed) else None

    def is_buffer(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether an array of that name means nothing to the layers of this layout."""
        return is_buffer(name, shape, "rotary" in self.need_options)

    def required(self) -> tuple[tuple[str, ...], ...]:
        """For each form, the names that its layers always have."""
        extras = tuple(extra.array for extra in self.extras if extra.required)
        return tuple((*form.required(), *extras) for form in self.forms)

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """The prefix of each layer of this layout, among a model's names.

        The name of the query's kernel marks a layer; `fits` checks the other names and the shapes.

        Args:
            names: All names of a file or a model.
        """
        index = NameIndex(names)
        marks = dict.fromkeys(required[0] for required in self.required())
        return list(dict.fromkeys(prefix for mark in marks for prefix in index.prefixes(mark)))

    def fits(self, shapes: Shapes) -> str | None:
        """The reason why no layer of this layout has these names and shapes; None where one may.

        Args:
            shapes: Shapes by name, relative to the layer's prefix.
        """
        try:
            form = self._form(shapes)
            stated = self._stated_sizes(shapes, None, None, None)
        except WeightsError as error:
            return str(error)
        # An unknown number of heads may be any divisor of the rows; one of them must fit.
        trials = [stated] if stated != StatedSizes() else possible_heads(form.pieces, shapes)
        reasons = []
        for trial in trials:
            try:
                sizes = solve_sizes(self.name, form.pieces, shapes, trial)
                self._check_sizes(form, sizes)
                self._check_extras(shapes, sizes)
            except WeightsError as error:
                reasons.append(str(error))
            else:
                return None
        return reasons[0]

    def to_canonical(
        self,
        arrays: Mapping[str, Any],
        *,
        num_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        **options: Any,
    ) -> tuple[Weights, AttentionConfig]:
        """The canonical weights and the config that they fit; see `anymha.to_canonical`."""
        _check_integers(
            num_heads=num_heads, num_key_value_heads=num_key_value_heads, head_dim=head_dim
        )
        check_plain(arrays)
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        form = self._form(shapes)
        check_floats({name: arrays[name] for name in form.names() if name in arrays})
        stated = self._stated_sizes(shapes, num_heads, num_key_value_heads, head_dim)
        sizes = solve_sizes(self.name, form.pieces, shapes, stated)
        self._check_sizes(form, sizes)
        self._check_extras(shapes, sizes)
        for name in sorted(arrays.keys() - form.names()):
            reason = learned(name, arrays[name])
            if reason is not None:
                raise WeightsError(f"{reason}, and {self.name} has no place for it.")
        read: Arrays = {}
        for piece in form.pieces:
            if piece.array in arrays:
                read |= piece.read(arrays[piece.array], sizes)
        values = {name: read[name] for name in NAMES if name in read}
        options = {**self._shown_options(arrays), **options}
        unmet = self._unmet(arrays, options)
        for name in self.need_options:
            if name not in result_options():
                options.pop(name, None)
        if options.get("scale") is None and isinstance(self.scale, float):
            options["scale"] = self.scale
        config = config_of(values, options)
        check_order(self.name, self._rotary, config)
        values |= self._features(arrays, config, sizes)
        extras = {n: np.array(arrays[n]) for n in arrays if n not in form.names()}
        for extra in self.extras:
            if extra.weight in values:
                del extras[extra.array]
        needs = [need if isinstance(need, str) else need.words() for need in unmet]
        needs += [e.need for e in self.extras if e.need and e.array in extras]
        return (
            Weights(
                values,
                layout=self.name,
                form=form.name,
                extras=extras,
                lost=tuple(
                    e.array for e in self.extras if (e.need or e.weight) and e.array in extras
                ),
                needs=tuple(needs),
                unknown=tuple(
                    n.option for n in unmet if isinstance(n, Need) and n.option in result_options()
                ),
                config=config,
                rotary=self._rotary if self._rotary in unmet else None,
            ),
            config,
        )

    def _shown_options(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The options that every layer of the layout has, or that these arrays show."""
        shown = dict(self.fixed or {})
        own = [extra for extra in self.extras if extra.weight]
        if any(extra.weight == "sinks" and extra.array in arrays for extra in own):
            shown["sinks"] = True
        norms = [extra.array for extra in own if extra.option == "query_key_norm"]
        known = self._norm is not None and not self._norm.key
        if self._norm is not None and known and norms and all(n in arrays for n in norms):
            shown["query_key_norm"] = self._norm.norm
        return shown

    def _unmet(self, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> list[Need | str]:
        """The needs that no option meets, of a layer with these arrays."""
        lacking = [name for name in self.need_options if name in options and not options[name]]
        met = {name for name in options if name in result_options() or name in lacking}
        present = {extra.option for extra in self.extras if extra.array in arrays}
        if self._norm is None or self._norm.has_weights:
            if "query_key_norm" not in present:
                met.add("query_key_norm")
            elif not options.get("query_key_norm"):
                met.discard("query_key_norm")
        return [n for n in self.needs if isinstance(n, str) or n.option not in met]

    def _features(self, arrays: Mapping[str, Any], config: AttentionConfig, sizes: Sizes) -> Arrays:
        """The weights of the config's options among the extra arrays.

        Raises:
            LayoutError: layers of this layout have no such norm.
            WeightsError: an array is missing, or has another shape.
        """
        self._check_norm(config)
        found: Arrays = {}
        shapes = config.weight_shapes()
        for extra in self.extras:
            if extra.weight in config.feature_weights and extra.array in arrays:
                check_floats({extra.array: arrays[extra.array]})
                array = contiguous_copy(arrays[extra.array])
                if array.shape != shapes[extra.weight]:
                    raise WeightsError(
                        f"`{extra.array}` must have shape {shapes[extra.weight]}, as "
                        f"`{extra.option}` has it. Received: shape {array.shape}."
                    )
                found[extra.weight] = array
        missing = [name for name in config.feature_weights if name not in found]
        if missing:
            raise WeightsError(
                f"The arrays of this layer of {self.name} lack {', '.join(missing)}, which "
                f"{', '.join(sorted({OPTION_OF.get(n.partition('.')[0], n) for n in missing}))} "
                "needs. Leave the option out, or pass the layer's other arrays too."
            )
        return {name: found[name] for name in config.feature_weights}

    def _check_norm(self, config: AttentionConfig | None) -> None:
        """Check that layers of this layout can have a config's norm of queries and keys.

        Raises:
            LayoutError: they cannot.
        """
        norm: Any = None if config is None else config.query_key_norm
        if norm is not None and self._norm is not None and not self._norm.fits(norm):
            raise LayoutError(
                f"A layer of {self.name} has the norm {self._norm.norm!r}, with an `eps` of its "
                f"model. Received: {norm!r}."
            )

    def from_canonical(
        self,
        weights: Mapping[str, Any],
        config: AttentionConfig | None = None,
        *,
        extras: Mapping[str, Any] | None = None,
        form: str | None = None,
        copy: bool = True,
    ) -> Weights:
        """The arrays of this layout that hold canonical weights; see `anymha.from_canonical`.

        Without `copy` those that are the same as a weight are that weight.
        """
        source = weights if isinstance(weights, Weights) else None
        needs, unknown = (source.needs, source.unknown) if source is not None else ((), ())
        extra_arrays = self._extras(source, extras, weights)
        if config is None and source is not None:
            config = source.config
        if config is not None and (config.feature_weights or config.further_projections):
            check_supported(self.name, config, self.supported)
        values, sizes = check_weights(weights)
        rotary = source.rotary if source is not None else None
        if rotary is not None and self._rotary is not None and self._rotary.order:
            values = reordered(values, rotary, self._rotary)
            needs = tuple(self._rotary.words() if n == rotary.words() else n for n in needs)
        if self._rotary is not None:
            values, config = with_order(values, config, self._rotary.order)
        values, features = split_features(values)
        written = self._written_features(features, config, sizes)
        self._check_extras(
            {name: tuple(array.shape) for name, array in {**extra_arrays, **written}.items()}, sizes
        )
        if form is None and source is not None and source.layout == self.name:
            form = source.form
        chosen = choose_form(self.name, self.forms, self.limits, values, sizes, form)
        check_biases(values)
        if config is not None:
            check_supported(self.name, config, self.supported)
            check_scale(self.name, self.scale, sizes, config)
            self._check_fixed(config)
            check_columns(self.name, self._rotary, config)
        values = with_layout_biases(self.name, chosen.pieces, self.together, values)
        arrays = {
            piece.array: piece.write(values, sizes, copy)
            for piece in chosen.pieces
            if piece.names[0] in values
        }
        arrays |= {name: np.array(as_numpy(array)) for name, array in extra_arrays.items()}
        arrays |= {name: contiguous_copy(array) for name, array in written.items()}
        return Weights(
            arrays,
            layout=self.name,
            form=chosen.name,
            needs=needs,
            unknown=unknown,
            config=config,
            rotary=self._rotary or rotary,
        )

    def _check_fixed(self, config: AttentionConfig) -> None:
        """Check that a config has the options that all layers of this layout have.

        Raises:
            LayoutError: it has not.
        """
        wanted = dataclasses.replace(config, **(self.fixed or {}))
        names = [n for n in differing_options(config, wanted) if n in (self.fixed or {})]
        if names:
            raise LayoutError(
                f"Every layer of {self.name} has {show_options(wanted, names)}, and the results "
                f"would change. Received: {show_options(config, names)}. Use another layout, or "
                "convert the arrays alone, with `dict(weights)` and no config."
            )

    def _written_features(
        self, features: Arrays, config: AttentionConfig | None, sizes: Sizes
    ) -> Arrays:
        """The weights of options by their names in the layout.

        Raises:
            LayoutError: one has no place, or is of another norm than layers of this layout have.
        """
        names = {extra.weight: extra.array for extra in self.extras if extra.weight}
        homeless = [name for name in features if name not in names]
        if homeless:
            raise LayoutError(
                f"{self.name} has no place for {', '.join(homeless)}, and without the results "
                "would change. Use a layout that holds them, or leave them out of the weights."
            )
        self._check_norm(config)
        return {names[name]: array for name, array in features.items()}

    def _form(self, shapes: Shapes) -> Form:
        """The form that has these names; buffers do not count.

        Raises:
            LayoutError: the layer has what cannot be converted.
            WeightsError: a name is missing or unknown.
        """
        known = set(self.names())
        counted = {n: s for n, s in shapes.items() if n in known or not self.is_buffer(n, s)}
        return form_of(self.name, self.forms, self.extras, self.refused or {}, counted)

    def _stated_sizes(
        self, shapes: Shapes, heads: int | None, shared: int | None, head_dim: int | None
    ) -> StatedSizes:
        """The sizes that the caller states, or else the extra arrays show."""
        stated = {"num_heads": heads, "head_dim": head_dim}
        for extra in self.extras:
            shape = shapes.get(extra.array, ())
            if extra.shows is not None and len(shape) > extra.shows[1]:
                name, axis = extra.shows
                # A norm as wide as all heads together may be one of all of them, as OLMo 2's.
                whole = name == "head_dim" and shape[axis] == self._width(shapes)
                if heads is None and head_dim is None and not whole:
                    stated[name] = shape[axis]
        if same_heads in self.limits and shared is None:
            shared = heads
        return StatedSizes(stated["num_heads"], shared, stated["head_dim"])

    def _width(self, shapes: Shapes) -> int | None:
        """The width of all query heads together, where the heads have no axis of their own."""
        marks = (
            piece
            for form in self.forms
            for piece in form.pieces
            if piece.part == "kernel" and piece.holds in (("query",), ("output",))
            if piece.form not in HEADS_APART and len(shapes.get(piece.array, ())) == 2
        )
        mark = next(marks, None)
        return None if mark is None else shapes[mark.array][mark.outputs]

    def _check_sizes(self, form: Form, sizes: Sizes) -> None:
        """Check that layers of this layout can have these heads.

        Raises:
            LayoutError: they cannot.
        """
        for rule in (*self.limits, *form.limits):
            reason = rule(sizes, {}) if rule in (same_heads, same_widths) else None
            if reason is not None:
                raise LayoutError(f"No layer of {self.name} has these arrays: {reason}.")

    def _check_extras(self, shapes: Shapes, sizes: Sizes) -> None:
        """Check that the extra arrays have as many heads, of the same width, as the projections.

        Raises:
            WeightsError: one has not.
        """
        for extra in self.extras:
            shape = shapes.get(extra.array)
            if shape is None:
                continue
            if (
                extra.array in MASKS
                and extra.need is None
                and not is_buffer(extra.array, shape, rotary=False)
            ):
                raise WeightsError(
                    f"`{extra.array}` of shape {shape} is no causal mask, and {self.name} has no "
                    "other array of that name."
                )
            expected = self._expected(extra, sizes)
            if expected is not None and shape != expected:
                raise WeightsError(
                    f"`{extra.array}` must have shape {expected}, by the projections. Received: "
                    f"shape {shape}."
                )
            if expected is not None or extra.shows is None:
                continue
            name, axis = extra.shows
            expected = sizes.key_dim if name == "head_dim" else sizes.heads
            if len(shape) <= axis or shape[axis] != expected:
                raise WeightsError(
                    f"Axis {axis} of `{extra.array}` must be `{name}`, which is {expected} by the "
                    f"projections. Received: shape {shape}."
                )

    def _expected(self, extra: Extra, sizes: Sizes) -> tuple[int, ...] | None:
        """The shape of an extra array that is a norm's weight of heads like these; else None."""
        over = self._norm.norm.over if self._norm is not None else ""
        if extra.option != "query_key_norm" or over in ("", "head"):
            return None
        heads, width = sizes.split(extra.weight.partition("_")[0])
        return (heads, width) if over == "heads" else (heads * width,)

    def _extras(
        self, source: Weights | None, extras: Mapping[str, Any] | None, weights: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The extra arrays to write.

        Raises:
            LayoutError: one is missing or unknown, without which the layer computes otherwise.
        """
        known = {extra.array: extra for extra in self.extras}
        if extras is None:
            extras = source.extras if source is not None and source.layout == self.name else {}
            lost = source.lost if source is not None and source.layout != self.name else ()
            if lost and source is not None:
                raise LayoutError(
                    f"{self.name} has no place for {', '.join(lost)}, which the layer of "
                    f"{source.layout} has besides the projections. Pass `dict(weights)` to convert "
                    "the projections alone."
                )
        unknown = [
            name
            for name, array in extras.items()
            if name not in known and not self.is_buffer(name, tuple(array.shape))
        ]
        missing = [
            name
            for name, extra in known.items()
            if extra.required and name not in extras and extra.weight not in weights
        ]
        if unknown or missing:
            raise LayoutError(
                f"{self.name} has {', '.join(known) or 'nothing'} besides the projections. "
                f"Missing: {', '.join(missing) or 'none'}. "
                f"Unknown: {', '.join(unknown) or 'none'}. Pass them by name as `extras`."
            )
        return extras


def _check_integers(**sizes: Any) -> None:
    for name, size in sizes.items():
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise ArgumentError(f"`{name}` must be an integer. Received: {quoted(size)}.")
        if size >= 2**63:
            raise ArgumentError(f"`{name}` must be below 2**63. Received: {quoted(size)}.")

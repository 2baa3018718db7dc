"""`Layout`: how a library or a model family holds the weights of an attention layer, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.errors import LayoutError, WeightsError
from anymha.interchange.compared_options import check_supported, result_options
from anymha.interchange.forms import Extra, Form, Need
from anymha.interchange.limits import Limit, check_scale, form_for, same_heads, same_widths
from anymha.interchange.packing import Arrays, Sizes
from anymha.interchange.reading import check_floats, config_of, form_of
from anymha.interchange.sizes import Shapes, Told, possible_heads, solve
from anymha.interchange.weights import Weights
from anymha.interchange.writing import as_numpy, balanced, check_biases, checked
from anymha.layer.weights import NAMES
from anymha.options.config import AttentionConfig


@dataclass(frozen=True)
class Layout:
    """A layout of weights: names, shapes and transforms, both ways, and what it cannot hold.

    Args:
        name: Its name, as ``"torch.MultiheadAttention"``.
        forms: Its forms; the first that can hold the weights is written.
        extras: Arrays beside the projections.
        needs: What the forward pass needs beside plain attention, whatever the arrays: in words,
            or as a `Need` where an option of `AttentionConfig` is or will be that.
        limits: Rules of `anymha.interchange.limits` that its layers obey.
        together: Projections whose biases are all there or none; beside those of one array.
        options: Options that its layers have beside those that the arrays show and those of
            `needs`: names of `AttentionConfig`'s fields.
        scale: Factor of the logits: None for ``1/sqrt(key_dim)``, a number, or "free" where it
            stands in the model's configuration alone.
        refused: Names that some of its layers have, and why such a layer cannot be converted.
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
    scale: float | str | None = None
    refused: Mapping[str, str] | None = None
    reference: str = ""
    separator: str = "."

    @property
    def supported(self) -> tuple[str, ...]:
        """All options that its layers have beside those that the arrays show."""
        return (*self.options, *(need.option for need in self.needs if isinstance(need, Need)))

    def names(self) -> tuple[str, ...]:
        """All names that a layer of this layout may have, relative to the layer's prefix."""
        forms = dict.fromkeys(name for form in self.forms for name in form.names())
        return (*forms, *(extra.array for extra in self.extras))

    def required(self) -> tuple[tuple[str, ...], ...]:
        """For each form, the names that its layers always have."""
        extras = tuple(extra.array for extra in self.extras if extra.required)
        return tuple((*form.required(), *extras) for form in self.forms)

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """What the names of each layer of this layout begin with, in a model's names.

        A layer is found by the name of the kernel that makes its queries; whether the rest is
        there, and of what shapes, `fits` says.

        Args:
            names: All names of a file or a model.
        """
        marks = {required[0] for required in self.required()}
        found: dict[str, None] = {}
        for name in names:
            for mark in marks:
                start = name.removesuffix(mark)
                if name.endswith(mark) and start[-1:] in ("", ".", "/"):
                    found[start] = None
        return list(found)

    def fits(self, shapes: Shapes) -> str | None:
        """Why no layer of this layout has these names and shapes; None where one may.

        Args:
            shapes: Shapes by name, relative to the layer's prefix.
        """
        try:
            form = form_of(self.name, self.forms, self.extras, self.refused or {}, shapes)
            told = self._told(shapes, None, None, None)
        except WeightsError as error:
            return str(error)
        # Heads that nothing tells may be any number that divides the rows; one must do.
        trials = [told] if told != Told() else possible_heads(form.pieces, shapes)
        reasons = []
        for trial in trials:
            try:
                sizes = solve(self.name, form.pieces, shapes, trial)
                self._check_sizes(sizes)
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
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        form = form_of(self.name, self.forms, self.extras, self.refused or {}, shapes)
        check_floats({name: arrays[name] for name in form.names() if name in arrays})
        told = self._told(shapes, num_heads, num_key_value_heads, head_dim)
        sizes = solve(self.name, form.pieces, shapes, told)
        self._check_sizes(sizes)
        self._check_extras(shapes, sizes)
        read: Arrays = {}
        for piece in form.pieces:
            if piece.array in arrays:
                read |= piece.read(arrays[piece.array], sizes)
        values = {name: read[name] for name in NAMES if name in read}
        if options.get("scale") is None and isinstance(self.scale, float):
            options["scale"] = self.scale
        config = config_of(values, options)
        held = {e.array: np.array(arrays[e.array]) for e in self.extras if e.array in arrays}
        unmet = [n for n in self.needs if isinstance(n, str) or n.option not in options]
        needs = [need if isinstance(need, str) else need.words() for need in unmet]
        needs += [e.need for e in self.extras if e.need and e.array in held]
        return (
            Weights(
                values,
                layout=self.name,
                form=form.name,
                extras=held,
                lost=tuple(e.array for e in self.extras if e.need and e.array in held),
                needs=tuple(needs),
                unknown=tuple(
                    n.option for n in unmet if isinstance(n, Need) and n.option in result_options()
                ),
                config=config,
            ),
            config,
        )

    def from_canonical(
        self,
        weights: Mapping[str, Any],
        config: AttentionConfig | None = None,
        *,
        extras: Mapping[str, Any] | None = None,
        form: str | None = None,
    ) -> Weights:
        """The arrays of this layout that hold canonical weights; see `anymha.from_canonical`."""
        source = weights if isinstance(weights, Weights) else None
        needs, unknown = (source.needs, source.unknown) if source is not None else ((), ())
        beside = self._extras(source, extras)
        if config is None and source is not None:
            config = source.config
        values, sizes = checked(weights)
        self._check_extras({name: tuple(array.shape) for name, array in beside.items()}, sizes)
        if form is None and source is not None and source.layout == self.name:
            form = source.form
        chosen = form_for(self.name, self.forms, self.limits, values, sizes, form)
        check_biases(values)
        if config is not None:
            check_supported(self.name, config, self.supported)
            check_scale(self.name, self.scale, sizes, config)
        values = balanced(self.name, chosen.pieces, self.together, values)
        arrays = {
            piece.array: piece.write(values, sizes)
            for piece in chosen.pieces
            if piece.names[0] in values
        }
        arrays |= {name: np.array(as_numpy(array)) for name, array in beside.items()}
        return Weights(
            arrays,
            layout=self.name,
            form=chosen.name,
            needs=needs,
            unknown=unknown,
            config=config,
        )

    def _told(
        self, shapes: Shapes, heads: int | None, shared: int | None, head_dim: int | None
    ) -> Told:
        """What the caller tells, and else the arrays beside the kernels."""
        told = {"num_heads": heads, "head_dim": head_dim}
        for extra in self.extras:
            shape = shapes.get(extra.array, ())
            if extra.tells is not None and len(shape) > extra.tells[1]:
                name, axis = extra.tells
                if heads is None and head_dim is None:
                    told[name] = shape[axis]
        if same_heads in self.limits and shared is None:
            shared = heads
        return Told(told["num_heads"], shared, told["head_dim"])

    def _check_sizes(self, sizes: Sizes) -> None:
        """That layers of this layout have such heads.

        Raises:
            LayoutError: they have not.
        """
        for rule in self.limits:
            reason = rule(sizes, {}) if rule in (same_heads, same_widths) else None
            if reason is not None:
                raise LayoutError(f"No layer of {self.name} has these arrays: {reason}.")

    def _check_extras(self, shapes: Shapes, sizes: Sizes) -> None:
        """That the arrays beside the projections have the heads that these have.

        Raises:
            WeightsError: one has not.
        """
        for extra in self.extras:
            shape = shapes.get(extra.array)
            if shape is None or extra.tells is None:
                continue
            name, axis = extra.tells
            wanted = sizes.key_dim if name == "head_dim" else sizes.heads
            if len(shape) <= axis or shape[axis] != wanted:
                raise WeightsError(
                    f"Axis {axis} of `{extra.array}` must be `{name}`, which is {wanted} by the "
                    f"projections. Received: shape {shape}."
                )

    def _extras(self, source: Weights | None, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The arrays to write beside the projections.

        Raises:
            LayoutError: the layer would compute something else without one.
        """
        known = {extra.array: extra for extra in self.extras}
        if given is None:
            given = source.extras if source is not None and source.layout == self.name else {}
            lost = source.lost if source is not None and source.layout != self.name else ()
            if lost and source is not None:
                raise LayoutError(
                    f"{self.name} has no place for {', '.join(lost)}, which the layer of "
                    f"{source.layout} has beside the projections. Pass `dict(weights)` to convert "
                    "the projections alone."
                )
        unknown = [name for name in given if name not in known]
        missing = [name for name, extra in known.items() if extra.required and name not in given]
        if unknown or missing:
            raise LayoutError(
                f"{self.name} has {', '.join(known) or 'nothing'} beside the projections. Missing: "
                f"{', '.join(missing) or 'none'}. Unknown: {', '.join(unknown) or 'none'}. "
                "Pass them by name as `extras`."
            )
        return given

"""Convert all attention layers of a model's file to another layout, one layer at a time.

Names and shapes are checked first, and what cannot be done is refused; then each layer is read,
converted and written, so that the memory of one layer is enough for any model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from anymha.errors import ArgumentError, BiasWarning, UsageError
from anymha.interchange.anymha_files import ENTRY, read_configs
from anymha.interchange.conversion_plan import (
    OWN,
    Conversion,
    ConversionJob,
    ConvertedLayer,
    choose_layers,
    choose_layout,
    plan_conversion,
)
from anymha.interchange.detect import LayerGroup, LayoutFit, find_layer_groups
from anymha.interchange.files.atomic_write import check_writable
from anymha.interchange.files.formats import (
    create_file,
    format_of,
    new_files,
    open_file,
    writable_format,
)
from anymha.interchange.files.paths import check_not_source
from anymha.interchange.files.reader import Reader, Tensor, Writer
from anymha.interchange.files.siblings import siblings
from anymha.interchange.layer_config import LayerConfig
from anymha.interchange.layout import Layout
from anymha.interchange.layouts import SIZES, get_layout
from anymha.interchange.model_config import (
    NAME,
    layer_number,
    part_of,
    parts_of,
    read_config,
    stated_options,
    unmet_options,
    with_part,
)
from anymha.interchange.naming import file_namings
from anymha.options.config import AttentionConfig
from anymha.text import listed, quoted, shown


def convert_file(
    source: Path,
    target: Path,
    layout: str | None,
    to: str,
    *,
    prefix: str | Sequence[str] = "",
    to_prefix: str | None = None,
    others: bool = False,
    max_bytes: int | None = None,
    max_shard_bytes: int | None = None,
    dry_run: bool = False,
    on_layer: Callable[[int, int, str], None] = lambda done, count, prefix: None,
    check: Callable[[ConvertedLayer], None] = lambda layer: None,
    **sizes: Any,
) -> Conversion:
    """Convert the attention layers of a file, and write them to another.

    Args:
        source: A file of any known format.
        target: The new file; the end of its name says the format. It is written as a whole or not
            at all.
        layout: The layout of the source's layers; None for the one that the names and shapes, or
            the `config.json` beside the file, leave.
        to: Their new layout; "anymha" for files that `anymha.load` reads.
        prefix: Only layers whose names begin so; ``{i}`` stands for a number, ``*`` for any text.
            A sequence of such prefixes takes the layers of each.
        to_prefix: What their names begin with in the target, with ``{i}``, ``{j}`` ... for the
            numbers of the source; default as in the source.
        others: Whether the other tensors of the source are copied as they are, and the texts that
            a safetensors file has besides them.
        max_bytes: The most bytes that the source's arrays may take together, whatever it claims;
            default 100 times the bytes of the file, and 64 MiB always.
        max_shard_bytes: The most bytes of tensors in a file; where there are more, `target` stands
            for shards and their index, as `anymha.interchange.files.formats.create_file` writes.
        dry_run: Whether all is read, converted and checked, and nothing written.
        on_layer: Called before each layer with the number of layers done, the number of all
            layers, and its prefix.
        check: Called with each layer; an error that it raises ends the conversion without a file.
        **sizes: Sizes and options that the shapes do not show, as `anymha.to_canonical` takes them.

    Raises:
        ArgumentError: an argument is of another type.
        UsageError: there is no such layer, several layouts may be meant, or it cannot be
            converted; or a new file is one of those that the source consists of, by whatever name.
        FileError: a file cannot be read or written.
        UnknownLayoutError: no layout has this name.
    """
    prefixes = [prefix] if isinstance(prefix, str) else prefix
    _check_texts(layout=[layout or ""], to=[to], prefix=prefixes, to_prefix=[to_prefix or ""])
    new_format = writable_format(target)
    check_writable(target)
    check_not_source(target, source, [source])
    new, old = get_layout(to, "to"), None if layout is None else get_layout(layout)
    with open_file(source, max_bytes) as reader:
        sources = reader.files()
        sources += siblings(sources, target)
        check_not_source(target, source, sources)
        prefixes = list(prefixes) or [""]
        file_format, model_config = format_of(source), reader.config or read_config(source)
        groups = find_layer_groups(reader.tensors, file_format, model_config)
        if old is None:
            layout = _only_layout(reader, groups, prefixes)
            old = get_layout(layout)
        known = (*SIZES, *AttentionConfig.__dataclass_fields__, *old.need_options)
        unknown = [name for name in sizes if name not in known]
        if unknown:
            raise UsageError(
                f"`convert_file` has no argument, and a layer of {old.name} no option, of the name "
                f"{listed(unknown)}. Sizes are {', '.join(SIZES)}."
            )
        parts = parts_of(model_config)
        configs = read_configs(reader) if layout == OWN and ENTRY in reader.metadata else {}

        kinds: list[dict[str, Any]] = []

        def one_of(options: dict[str, Any]) -> dict[str, Any]:
            """The same object for the same options."""
            if options not in kinds:
                kinds.append(options)
            return kinds[kinds.index(options)]

        @cache
        def stated(part: str, number: int | None) -> dict[str, Any]:
            return one_of(_stated(with_part(model_config, part), old, sizes, number))

        @cache
        def sizes_of(part: str, number: int | None) -> dict[str, Any]:
            return one_of({**stated(part, number), **sizes})

        def place_of(start: str) -> tuple[str, int | None]:
            return part_of(parts, start), layer_number(start)

        namings = file_namings(old, file_format)
        target_naming = file_namings(new, new_format)[0]
        job = ConversionJob(
            reader,
            namings,
            target_naming,
            lambda start: sizes_of(*place_of(start)),
            configs,
            lambda start: LayerConfig(
                with_part(model_config, part_of(parts, start)), layer_number(start)
            ),
        )
        layers = {
            start: fit for one in prefixes for start, fit in choose_layers(job, groups, one).items()
        }
        plan, metadata = plan_conversion(job, layers, to_prefix, others)
        starts_of: dict[tuple[str, int], list[str]] = {}
        for start in layers:
            part, number = place_of(start)
            starts_of.setdefault((part, id(stated(part, number))), []).append(start)
        for (part, _), starts in starts_of.items():
            number = layer_number(starts[0])
            of = f" about {listed(starts)}" if len(starts_of) > 1 and not part else ""
            if values := stated(part, number):
                known = ", ".join(f"{n}={quoted(value)}" for n, value in values.items())
                place = "file" if reader.config else f"{NAME} beside the file"
                plan.note(f"Taken from the {place}{f' ({shown(part)})' * bool(part)}{of}: {known}.")
            own_config = with_part(model_config, part)
            for option, words in unmet_options(own_config, old, number).items():
                if option not in sizes:
                    plan.note(words)
        if to == OWN and not new_format.metadata:
            plan.note(
                f"{shown(target.name)} has no place for the configuration: `anymha.load` will not "
                "read it. Write a .safetensors file."
            )
        if others and file_format.metadata:
            metadata = {n: text for n, text in reader.metadata.items() if n != ENTRY} | metadata
        metadata = metadata if new_format.metadata else {}
        plan.files = new_files(target, plan.tensors, max_shard_bytes)
        for file in plan.files:
            check_not_source(file, source, sources)
        create = _rehearse if dry_run else create_file
        with create(target, plan.tensors, metadata, max_shard_bytes) as writer:
            for number, (start, fit) in enumerate(layers.items()):
                on_layer(number, len(layers), start)
                for name, array in _convert_layer(job, start, fit, plan, check):
                    writer.write(name, array)
            for name in plan.copied:
                writer.write(name, reader.read(name))
        return plan


def _check_texts(**arguments: Any) -> None:
    """Check that each argument is a text, or a sequence of texts."""
    for name, texts in arguments.items():
        is_list = isinstance(texts, Sequence)
        if not is_list or not all(isinstance(text, str) for text in texts):
            received = texts[0] if is_list and len(texts) == 1 else texts
            raise ArgumentError(f"`{name}` must be a text. Received: {quoted(received)}.")


def _stated(
    model_config: Mapping[str, Any], layout: Layout, sizes: Mapping[str, Any], number: int | None
) -> dict[str, Any]:
    """What the configuration states and the caller does not; of the heads, one size is enough."""
    stated = stated_options(model_config, layout, number)
    skipped = SIZES if not set(SIZES).isdisjoint(sizes) else ()
    return {n: value for n, value in stated.items() if n not in sizes and n not in skipped}


def _only_layout(reader: Reader, groups: Sequence[LayerGroup], prefixes: Sequence[str]) -> str:
    names = {one: choose_layout(reader, groups, one) for one in prefixes}
    if len(set(names.values())) > 1:
        told = ", ".join(f"{one!r}: {name}" for one, name in names.items())
        raise UsageError(f"Layers of several layouts are converted one after another: {told}.")
    return names[prefixes[0]]


class _Rehearsed(Exception):
    """Ends a file that is not to be."""


class _NoFile:
    def write(self, name: str, array: np.ndarray) -> None:
        """Forget a tensor."""


@contextmanager
def _rehearse(
    target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_bytes: int | None
) -> Iterator[Writer]:
    """A writer that writes nothing; what `create_file` refuses is refused."""
    with (
        TemporaryDirectory() as folder,
        suppress(_Rehearsed),
        create_file(Path(folder) / target.name, tensors, metadata, max_bytes),
    ):
        raise _Rehearsed
    yield _NoFile()


def _convert_layer(
    job: ConversionJob,
    prefix: str,
    fit: LayoutFit,
    plan: Conversion,
    check: Callable[[ConvertedLayer], None],
) -> Iterator[tuple[str, np.ndarray]]:
    """The names and arrays of a layer in the target."""
    arrays = {name: job.reader.read(prefix + place) for name, place in fit.names.items()}
    wrong = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        names = listed([prefix + fit.names[name] for name in wrong])
        plan.note(f"Not all values are finite, and are carried as they are: {names}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasWarning)  # they are notes of the plan
        layer = job.convert(prefix, arrays)
        check(layer)
    for name, array in layer.result.items():
        yield plan.layers[prefix] + job.target.names[name], array

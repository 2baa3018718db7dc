"""The command `anymha compare`: implementations compared stage by stage."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anymha.cli.forms import FORMS, add_forms, check_files, write_forms
from anymha.cli.inputs import (
    CASES,
    DECODED,
    FEATURES,
    SELF,
    CallInputs,
    make_cases,
    make_layer,
    variants,
    widths_of,
)
from anymha.cli.names import Implementation, implementation_named, is_model
from anymha.errors import AnymhaError, FileError, LayoutError, UsageError
from anymha.framework.registry import get_backend
from anymha.parity.adapters import adapter_for
from anymha.parity.adapters.arguments import CalledByNames
from anymha.parity.adapters.decoding import Decoding, Stepwise
from anymha.parity.comparison.compare import compare as compare_two
from anymha.parity.comparison.named_layers import without_weights
from anymha.parity.oracle.cases import trio
from anymha.parity.reports.comparison_view import comparison_document
from anymha.parity.reports.outcome import Outcome, exit_status, to_dict
from anymha.parity.reports.report import Comparison
from anymha.parity.stages.saved_case import SavedCase, SavedLayer, load_case
from anymha.parity.stages.trace import Request, as_numpy, make_request, name_of_dtype
from anymha.text import shown

FILES = (*FORMS, "save")


def add_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser(
        "compare",
        help="find the stage where two implementations differ, and why",
        description=compare.__doc__,
    )
    command.add_argument("reference", metavar="REFERENCE",
                         help="the implementation that counts as right: MODULE:OBJECT, "
                         "FILE.py:OBJECT, FILE.onnx, a backend (numpy, torch, ...) "
                         "or a library's layer (torch.MultiheadAttention, ...)")  # fmt: skip
    command.add_argument("candidates", nargs="+", metavar="CANDIDATE",
                         help="the implementation to judge, likewise; several: all pairs are "
                         "compared")  # fmt: skip
    command.add_argument("--inputs", type=Path, metavar="FILE",
                         help="an .npz file with query, value, key, masks; or a saved case; "
                         "default: inputs are made")  # fmt: skip
    command.add_argument("--cases", metavar="A,B",
                         help=f"which inputs are made: {','.join((*CASES, DECODED))}; "
                         "default: those that the implementations are made for")  # fmt: skip
    command.add_argument("--arrays", metavar="BACKEND",
                         help="the framework whose arrays plain functions get; default numpy, or "
                         "as saved")  # fmt: skip
    add_forms(command)
    command.add_argument("--save", type=Path, metavar="FILE",
                         help="write the first case that differs, else the first, as an .npz "
                         "file")  # fmt: skip
    command.set_defaults(run=compare)


def compare(options: argparse.Namespace) -> int:
    """Compare implementations on the same inputs, and say where they differ, and why.

    For a backend or a library's layer, a layer is made with the weights of the first implementation
    whose weights are known; where none are known, with random weights.
    """
    from anymha.parity.reports import terminal  # noqa: PLC0415  needs the extra "cli"

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    names = _cases(options)
    _check_files(options)
    saved = None if options.inputs is None else load_case(options.inputs, options.arrays)
    if options.arrays is not None:
        _ = get_backend(options.arrays).ops  # says what there is, and which extra installs it
    every = [implementation_named(name) for name in (options.reference, *options.candidates)]
    if options.cases is None and _decoding(every):
        names = (DECODED,)
    outcomes = list(_outcomes(every, names, saved, options))
    document = comparison_document(outcomes)
    console = terminal.Terminal()
    terminal.print_verdict(console, document)
    terminal.print_document(console, document)
    terminal.print_environment(console, document)
    # One comparison of a command is written as several are.
    write_forms(dataclasses.replace(document, data=to_dict(outcomes)), options)
    _save(options, outcomes)
    return exit_status(outcomes)


def _cases(options: argparse.Namespace) -> tuple[str, ...]:
    if options.cases is None:
        return CASES
    if options.inputs is not None:
        raise UsageError("`--cases` says which inputs are made, `--inputs` has them: give one.")
    names = tuple(name.strip() for name in options.cases.split(","))
    unknown = [name for name in names if name not in (*CASES, DECODED)]
    if unknown:
        raise UsageError(
            f"`--cases` is some of {', '.join((*CASES, DECODED))}. Received: {options.cases}."
        )
    return names


def _decoding(every: Sequence[Implementation]) -> list[Decoding]:
    """Those that decode step by step."""
    return [one.implementation for one in every if isinstance(one.implementation, Decoding)]


def _longest(every: Sequence[Implementation]) -> int:
    """The length of the sequences that are decoded: longer than the steps that users name."""
    return max([13, *(sum(one.steps or ()) + 2 for one in _decoding(every))])


def _without_padding(case: CallInputs) -> CallInputs:
    """The case that is decoded with rows of one length; another case as it is."""
    call = {name: value for name, value in case.call.items() if name != "value_mask"}
    return dataclasses.replace(case, call=call) if case.name == DECODED else case


def _check_files(options: argparse.Namespace) -> None:
    """Raise now where a file cannot be written later."""
    models = [Path(name) for name in (options.reference, *options.candidates) if is_model(name)]
    check_files({name: getattr(options, name) for name in FILES}, (options.inputs, *models))
    if options.save is not None and options.save.suffix != ".npz":
        raise FileError(f"A case is saved as an .npz file. Received: {shown(options.save)}.")


def _outcomes(
    every: Sequence[Implementation],
    names: Sequence[str],
    saved: SavedCase | None,
    options: argparse.Namespace,
) -> Iterator[Outcome]:
    teller = next((one for one in every if one.layer is not None), None)
    known, other = None if teller is None else teller.layer, None
    note = teller.note if teller and any(one.implementation is None for one in every) else ""
    if saved is not None:
        several = len(every) > 2
        cases = [CallInputs(options.inputs.stem if several else "", saved.inputs, saved.call)]
        layer = saved.layers.get("reference") or known
        layer = layer or _random_layer(every, *_shape_of(saved.inputs))
        other = saved.layers.get("candidate") if not several else None
    else:
        if known is None and all(one.implementation is not None for one in every):
            told = (widths_of(one.implementation) for one in every)
            widths = next(filter(None, told), None)
            if widths is None:
                raise UsageError(
                    "The widths of the inputs are not known: none of these has weights that "
                    "anymha knows, or a linear layer. Give inputs with `--inputs`."
                )
            known = make_layer(widths)
        layer = known or _random_layer(every, (FEATURES, FEATURES, FEATURES))
        widths = [layer.weights[f"{name}.kernel"].shape[0] for name in ("query", "value", "key")]
        dtype = layer.weights["query.kernel"].dtype
        cases = make_cases(names, (widths[0], widths[1], widths[2]), dtype, _longest(every))
        if any(Stepwise(one).mask is None for one in _decoding(every)):
            cases = [_without_padding(case) for case in cases]
    layers = [other if i and other is not None else layer for i in range(len(every))]
    live = [one.make(own) for one, own in zip(every, layers, strict=True)]
    for (i, one), (j, two) in itertools.combinations(enumerate(every), 2):
        explicit = options.cases is not None or saved is not None or names != CASES
        pair, both = (one, two), (live[i], live[j])
        own = (pair, both, options.arrays, explicit, note)
        done = {case.name: _outcome(case, *own) for case in cases
                if explicit or case.name not in SELF.values() or case.name == "self"}  # fmt: skip
        alone = any("one input" in (outcome.reason or "") for outcome in done.values())
        for case in cases:
            if case.name not in done and alone:
                done[case.name] = _outcome(case, *own)
        for case in cases:
            outcome = done.get(case.name)
            if outcome is None:
                continue
            if not explicit and outcome.reason and "one input alone" in outcome.reason:
                outcome = dataclasses.replace(outcome, left_out=True)
            yield outcome


def _random_layer(
    every: Sequence[Implementation], widths: tuple[int, int, int], dtype: str = "float32"
) -> SavedLayer:
    """Random weights; an error where an implementation has its own and they are not known."""
    silent = [one for one in every if one.implementation is not None]
    named_alone = [one.name for one in every if one.implementation is None]
    if silent and named_alone:
        other = silent[0]
        raise UsageError(without_weights(named_alone[0], other.name, other.implementation))
    return make_layer(widths, dtype)


def _shape_of(inputs: dict[str, Any]) -> tuple[tuple[int, int, int], str]:
    """The widths and the dtype of a file's inputs."""
    query, value, key = map(as_numpy, trio(inputs))
    dtype = name_of_dtype(query)
    widths = (query.shape[-1], value.shape[-1], key.shape[-1])
    return widths, dtype if dtype in ("float64", "float16", "bfloat16") else "float32"


def _outcome(
    case: CallInputs,
    pair: tuple[Implementation, Implementation],
    live: tuple[Any, Any],
    arrays: str | None,
    explicit: bool,
    note: str,
) -> Outcome:
    """One comparison: its result, the error that was raised, or why it cannot run."""
    names = (pair[0].name, pair[1].name)
    ops = None if arrays is None else get_backend(arrays).ops
    reason, fewest, neither = "", len(live) + 1, True
    for part in variants(case):
        inputs = part.inputs
        if ops is not None:
            inputs = {name: ops.from_numpy(as_numpy(array)) for name, array in inputs.items()}
        request = make_request(inputs, part.call)
        decode = [one for one in live if isinstance(one, Decoding)]  # others get rows alone then
        lacking = [*filter(None, (_lacking(one, request, explicit) for one in decode or live))]
        neither = neither and len(lacking) == len(decode or live)
        try:
            if lacking:
                raise LayoutError(" and ".join(lacking))
            result: Comparison = compare_two(*live, inputs, **part.call)
        except LayoutError as error:
            if len(lacking) < fewest:
                reason, fewest = str(error), len(lacking)
            continue
        except AnymhaError:
            raise
        except Exception as error:  # whatever an implementation raises is its result
            words = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
            return Outcome(case.name, *names, error=words)
        if reason:
            tried = {**part.inputs, **part.call}
            names_left = [f"`{n}`" for n in {**case.inputs, **case.call} if n not in tried]
            instead = [f"`{n}`" for n in part.call if n not in case.call]
            left = f"Without {', '.join(names_left)}: {reason}."
            left = f"With {instead[0]} in place of {names_left[0]}: {reason}." if instead else left
            result = dataclasses.replace(result, notes=(left, *result.notes))
        notes = (*filter(None, [note]), *result.notes)
        result = dataclasses.replace(result, command_names=names, notes=notes)
        return Outcome(case.name, *names, result=result)
    # Where neither takes an argument in any form, there is nothing of it to compare.
    return Outcome(case.name, *names, reason=reason, left_out=neither and not explicit)


def _lacking(implementation: Any, request: Request, explicit: bool) -> str:
    """Why an implementation cannot be given a call; empty where it can, or does not say."""
    adapter: Any = adapter_for(implementation)
    lacking = getattr(adapter, "lacking", None)
    if isinstance(adapter, CalledByNames):  # a causal function is known by its output alone
        reason = adapter.lacking(request, by_mask=explicit)
    else:
        reason = "" if lacking is None else lacking(request)
    if not reason and len(request.masks) > 1 and hasattr(adapter, "parameters"):
        # A mistake in one mask is named more surely where it is the only one.
        reason = adapter.parameters.joined(request)
    return f"{adapter.name} {reason}" if reason else ""


def _save(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    if options.save is None:
        return
    done = [(one.case, one.result) for one in outcomes if isinstance(one.result, Comparison)]
    if not done:
        print("Nothing was saved: no comparison ran to its end.")
        return
    case, first = min(done, key=lambda one: one[1].passed)
    first.save(options.save)
    on = f" ({case})" if case else ""
    print(f"Saved{on}; repeat it with: {first.repeat_command(str(options.save))}")

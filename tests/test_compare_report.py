"""How a comparison is told: HTML, JSON, JUnit, Markdown, terminal, and the file that repeats it."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

import anymha
from anymha.errors import FileError
from anymha.layer.forward import multi_head_attention
from anymha.parity import compare
from anymha.parity.reports.comparison_view import comparison_document
from anymha.parity.reports.environment import FLAGS, environment
from anymha.parity.reports.markdown import to_markdown
from anymha.parity.reports.outcome import Outcome, passed, to_dict, verdict
from anymha.parity.reports.page import to_page
from anymha.parity.reports.pictures import heat_map, heat_maps, histogram
from anymha.parity.reports.report import Comparison
from anymha.parity.reports.terminal import print_document, print_verdict
from anymha.parity.stages.saved_case import load_case
from anymha_numpy import ops

HOSTILE = "<script>alert(1)</script> | [bold]`x`[/nothing] & \"'\x00"


def layer(**options: Any) -> Any:
    sizes = {"num_heads": 4, "key_dim": 6, "query_features": 12, **options}
    return anymha.MultiHeadAttention(
        **sizes, bias_initializer="random_normal", backend="numpy", seed=0
    )


def x(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def port(own: Any, *told: str, **wrong: Any) -> Callable[..., dict[str, np.ndarray]]:
    """A function that computes what the layer does, with other arguments, and tells stages."""

    def ported(query: np.ndarray, **call: Any) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        output, scores = multi_head_attention(
            ops, own.config, own.weights, query, **{**call, **wrong}, return_attention_scores=True,
            observe=lambda name, value: found.__setitem__(name, np.asarray(value)),
        )  # fmt: skip
        return {"output": output, "scores": scores, **{name: found[name] for name in told}}

    return ported


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no mistake explains is given up early."""
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.PAIRS_SECONDS", 0.0)


@pytest.fixture(scope="module")
def good() -> Comparison:
    one = layer()
    return compare(one, one, x(2, 5, 12), use_causal_mask=True)


@pytest.fixture(scope="module")
def bad() -> Comparison:
    one = layer()
    wrong = port(one, "query", "key", "logits", "probabilities", use_causal_mask=False)
    return compare(one, wrong, x(2, 5, 12), use_causal_mask=True)


def page(found: Comparison, tmp_path: Path) -> str:
    found.to_html(tmp_path / "deep" / "index.html")
    return (tmp_path / "deep" / "index.html").read_text(encoding="utf-8")


def alone(comparison: Comparison) -> Outcome:
    return Outcome("", comparison.reference, comparison.candidate, comparison)


def show(console: Console, outcomes: list[Outcome]) -> None:
    document = comparison_document(outcomes)
    print_verdict(console, document)
    print_document(console, document)


class Checked(HTMLParser):
    """Sees to it that elements are closed in order, and keeps what is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.loaded: list[str] = []
        self.boxes: dict[str, str] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        named = {name: value or "" for name, value in attrs}
        self.loaded += [v for n, v in named.items() if n in ("src", "href")]
        kinds = named.get("class", "").split()
        if "box" in kinds:
            self.boxes[kinds[1]] = kinds[2]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag, attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def test_page_of_a_failure_marks_where_the_two_part(bad: Comparison, tmp_path: Path) -> None:
    text = page(bad, tmp_path)
    seen = Checked(text)
    assert bad.first_divergence == "masked_logits"
    assert seen.boxes == {
        "query": "is-good", "key": "is-good", "logits": "is-good", "value": "is-unreported",
        "masked_logits": "is-first", "probabilities": "is-own",
        "dropped_probabilities": "is-unreported", "context": "is-unreported",
        "output": "is-carried", "scores": "is-carried",
    }  # fmt: skip
    words = " ".join(seen.words)
    assert words.index(bad.verdict) < words.index("Switch the causal mask on.")
    assert words.index("Switch the causal mask on.") < words.index("Stages")
    assert "anymha compare numpy MODULE:OBJECT --inputs case.npz" in words
    assert f"numpy {np.__version__}" in words


def test_page_loads_nothing_and_knows_light_and_dark(bad: Comparison, tmp_path: Path) -> None:
    text = page(bad, tmp_path)
    assert [link for link in Checked(text).loaded if not link.startswith("data:")] == []
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_page_of_an_agreement_has_no_cause_and_carries_no_case(
    good: Comparison, tmp_path: Path
) -> None:
    text = page(good, tmp_path)
    seen = Checked(text)
    assert seen.boxes.pop("dropped_probabilities") == "is-unreported"
    assert set(seen.boxes.values()) == {"is-good"}
    assert "no dropout" in seen.words
    assert 'class="causes"' not in text
    assert "data:" not in text
    assert good.verdict in " ".join(seen.words)


def test_page_carries_the_case_that_repeats_it(bad: Comparison, tmp_path: Path) -> None:
    (link,) = [s for s in Checked(page(bad, tmp_path)).loaded if s.startswith("data:")]
    path = tmp_path / "case.npz"
    path.write_bytes(base64.b64decode(link.partition("base64,")[2]))
    case = load_case(path)
    np.testing.assert_array_equal(case.inputs["query"], bad.request.inputs["query"])
    assert case.call == {"use_causal_mask": True}


def test_page_shows_foreign_words_as_they_are(bad: Comparison, tmp_path: Path) -> None:
    text = page(bad.with_notes(HOSTILE), tmp_path)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    Checked(text)


def test_heat_map_marks_the_cells_that_a_causal_mask_hides(bad: Comparison) -> None:
    (drawn,) = heat_maps(bad)
    assert (drawn.stage, drawn.axes) == ("probabilities", ("query", "key"))
    assert [panel.title for panel in drawn.panels] == [f"head {h}" for h in range(4)]
    for panel in drawn.panels:
        assert (panel.columns, panel.rows) == (5, 5)
        cells = np.zeros((5, 5), int)
        for level, path in panel.paths.items():
            for a, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1", path):
                block = cells[int(row), int(a) : int(a) + int(width)]
                assert not block.any(), "each cell has one level"
                block[:] = 0 if level == "within" else int(level)
        assert (cells[np.triu_indices(5, 1)] > 0).all(), "later keys are seen, which none may"
        assert (cells[4] == 0).all(), "the last query sees all in both"


@pytest.mark.usefixtures("hasty")
def test_heat_map_of_many_numbers_keeps_the_worst() -> None:
    one = layer(num_heads=12)
    x_long = x(1, 100, 12)
    wrong = port(one, "probabilities", use_causal_mask=False)
    found = compare(one, wrong, x_long, use_causal_mask=True)
    drawn = heat_map(found, "probabilities")
    assert drawn is not None
    assert len(drawn.panels) == 8
    assert {(p.columns, p.rows) for p in drawn.panels} == {(34, 34)}
    assert "a cell is the greatest of 3 by 3 numbers" in drawn.note
    assert "the 8 heads of 12" in drawn.note
    apart = np.abs(np.subtract(*found.arrays("probabilities")))  # type: ignore[misc]
    assert drawn.greatest == apart.max()


@pytest.mark.usefixtures("hasty")
def test_heat_map_tells_what_is_no_number() -> None:
    def broken(query: np.ndarray) -> np.ndarray:
        output = one(query).copy()
        output[1, 2, 3] = np.nan
        return output

    one = layer()
    found = compare(one, broken, x(2, 5, 12))
    (drawn,) = heat_maps(found)
    assert drawn.stage == "output"
    assert drawn.panels[0].paths["broken"] == "M3 2h1v1h-1z"
    assert "batch element 1 of 2" in drawn.note
    assert histogram(found)[-1].label == "one is no number"
    assert histogram(found)[-1].count == 1


@pytest.mark.usefixtures("hasty")
def test_histogram_counts_units_in_the_last_place() -> None:
    one = layer()
    x_one = x(1, 4, 12)
    steps = np.array([0, 1, 3, 4, 17, 1 << 24])

    def off(query: np.ndarray) -> np.ndarray:
        output = one(query).copy()
        flat = output.reshape(-1)[: len(steps)]
        place = np.spacing(np.abs(flat))
        flat += np.copysign(steps * place, flat).astype(np.float32)
        return output

    bars = {bar.label: bar.count for bar in histogram(compare(one, off, x_one))}
    assert sum(bars.values()) == 48
    assert bars["0"] == 43
    assert (bars["1"], bars["2 to 4"], bars["17 to 64"]) == (1, 2, 1)


def test_json_has_its_schema(bad: Comparison, good: Comparison, tmp_path: Path) -> None:
    bad.to_json(tmp_path / "bad.json")
    told = json.loads((tmp_path / "bad.json").read_text(encoding="utf-8"))
    assert told == bad.to_dict()
    assert told["schema"] == "anymha.compare/1"
    assert (told["passed"], told["first_divergence"]) == (False, "masked_logits")
    assert told["diagnosis"]["causes"][0]["name"] == "causal mask ignored"
    assert told["versions"]["numpy"] == np.__version__
    assert told["call"] == {"query": "float32 (2, 5, 12)", "use_causal_mask": "True"}
    (output,) = [stage for stage in told["stages"] if stage["name"] == "output"]
    assert set(output) == {
        "name", "passed", "culprit", "error", "own_error", "units", "own_units", "unit", "budget",
        "ratio", "faults", "at", "values",
    }  # fmt: skip
    assert good.to_dict()["diagnosis"] is None
    assert set(good.to_dict()) == set(told)


def test_junit_has_a_test_case_for_each_stage(bad: Comparison, tmp_path: Path) -> None:
    bad.with_notes(HOSTILE).to_junit(tmp_path / "junit.xml")
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    (suite,) = root.findall("testsuite")
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    states = {name: [child.tag for child in case] for name, case in cases.items()}
    assert states == {
        "query": [], "key": [], "value": ["skipped"], "logits": [], "masked_logits": ["failure"],
        "probabilities": ["failure"], "dropped_probabilities": ["skipped"],
        "context": ["skipped"], "output": ["failure"], "scores": ["failure"],
    }  # fmt: skip
    failure = cases["masked_logits"].find("failure")
    assert failure.get("type") == "first divergence"
    assert "causal mask ignored" in str(failure.text)
    counts = {"tests": "10", "failures": "4", "errors": "0", "skipped": "3"}
    for element in (root, suite):
        assert {name: element.get(name) for name in counts} == counts


def test_markdown_tells_verdict_stages_cause_and_fix(bad: Comparison, tmp_path: Path) -> None:
    text = bad.with_notes(HOSTILE).to_markdown(tmp_path / "summary.md")
    assert text == (tmp_path / "summary.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0].startswith("### ❌ ")
    assert "PARITY DOES NOT HOLD" in lines[2]
    assert "- **causal mask ignored**, at `masked_logits`. Switch the causal mask on." in lines
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {9}
    assert any("➡️" in line and "`masked_logits`" in line for line in table)
    assert "<script>" not in text
    noted = bad.with_notes("`a | <b>` _c_ <d>").to_markdown()
    assert "- Note: `a \\| <b>` \\_c\\_ &lt;d&gt;" in noted.splitlines()


def test_several_are_told_together(bad: Comparison, good: Comparison, tmp_path: Path) -> None:
    every = [
        Outcome("self", "a", "b", good), Outcome("causal", "a", "b", bad),
        Outcome("self", "a", "c", error=f"ValueError: {HOSTILE}"),
        Outcome("causal", "a", "c", reason="it has no causal mask"),
    ]  # fmt: skip
    assert verdict(every) == (
        "PARITY DOES NOT HOLD: 2 of 3 comparisons differ, on causal, self; 1 could not be run"
    )
    assert not passed(every)
    assert passed(every[:1])
    assert not passed(every[3:]), "what could not be run shows nothing"
    told = to_dict(every)
    assert told["schema"] == "anymha.comparisons/1"
    assert [one["state"] for one in told["comparisons"]] == ["agrees", "differs", "error",
                                                             "not run"]  # fmt: skip
    json.dumps(told, allow_nan=False)
    text = to_markdown(comparison_document(every))
    assert "| b against a | ✅ agrees | ❌ differs |" in text
    assert "| c against a | ❌ error | ⚪ not run |" in text
    assert "<summary>✅ b against a, self: agrees in" in text
    html = to_page(comparison_document(every))
    assert html.count("<details") == 4
    assert html.count(" open>") == 2
    Checked(html)


@pytest.mark.usefixtures("hasty")
def test_other_weights_are_told_in_every_form(tmp_path: Path) -> None:
    one = layer()
    held = anymha.get_weights(one)
    other = anymha.set_weights(layer(), {**held, "value.bias": held["value.bias"] + 1})
    found = compare(one, other, x(2, 5, 12))
    words = "Their weights differ: value.bias. Give both the same, and compare again."
    assert found.first_divergence == "value"
    assert words in found.to_text()
    assert words in found.to_markdown()
    assert words in page(found, tmp_path)
    stream = io.StringIO()
    show(Console(file=stream, width=100), [alone(found)])
    assert words in stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_terminal_tells_verdict_first_and_loses_nothing(
    bad: Comparison, width: int, encoding: str
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    noted = alone(bad.with_notes("[bold]note[/nothing]"))
    show(Console(file=stream, width=width), [noted])
    stream.flush()
    lines = stream.buffer.getvalue().decode(encoding).splitlines()
    assert lines[0] == bad.verdict
    arrow = "→" if encoding == "utf-8" else "->"
    (first,) = [line for line in lines if line.startswith(f"{arrow} ")]
    assert "masked_logits" in first
    assert "first" in first.partition("masked_logits")[2]
    assert "Cause: causal mask ignored" in lines
    assert "Fix:   Switch the causal mask on." in lines
    assert "Note: [bold]note[/nothing]" in lines


def test_terminal_tells_several(bad: Comparison, good: Comparison) -> None:
    stream = io.StringIO()
    every = [Outcome("self", "a", "b", good), Outcome("causal", "a", "b", bad),
             Outcome("padded", "a", "b", reason="it takes no mask")]  # fmt: skip
    show(Console(file=stream, width=100), every)
    text = stream.getvalue()
    assert text.startswith("PARITY DOES NOT HOLD: 1 of 2 comparisons differ")
    assert "✓ agrees" in text
    assert "✗ differs" in text
    assert "- b against a, padded: not run: it takes no mask" in text
    assert text.count("Cause: ") == 1
    assert "   3 other quantities agree\n" in text
    assert "logits   " not in text.replace("masked_logits", "")


def test_saved_case_gives_back_every_bit(tmp_path: Path) -> None:
    one, other = layer(dtype="bfloat16"), layer(dtype="bfloat16", num_heads=4)
    given = {"query": x(2, 5, 12, dtype=ml_dtypes.bfloat16), "value": x(2, 7, 12, dtype=np.float32)}
    call = {
        "attention_mask": np.random.default_rng(0).random((2, 5, 7)) < 0.5,
        "attention_bias": x(2, 1, 5, 7), "query_offset": np.array([0, 2]), "use_causal_mask": True,
    }  # fmt: skip
    found = compare(one, other, given, **call)
    found.save(tmp_path / "case.npz")
    case = load_case(tmp_path / "case.npz")
    for name, array in given.items():
        assert case.inputs[name].dtype == array.dtype
        np.testing.assert_array_equal(case.inputs[name], array)
    assert set(case.call) == set(call)
    assert case.call["use_causal_mask"] is True
    np.testing.assert_array_equal(case.call["attention_bias"], call["attention_bias"])
    for side, trace in zip(("reference", "candidate"), found.traces, strict=True):
        held = case.layers[side]
        assert held.config.num_heads == 4
        for name, array in trace.weights.items():
            assert held.weights[name].tobytes() == array.tobytes(), name
    again = compare(one, other, case.inputs, **case.call)
    assert again.to_dict()["stages"] == found.to_dict()["stages"]


def test_case_files_that_are_none_are_refused(bad: Comparison, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"\.npz file"):
        bad.save(tmp_path / "case.txt")
    with pytest.raises(FileError):
        load_case(tmp_path / "none.npz")
    path = tmp_path / "wrong.npz"
    np.savez(path, key=x(1, 2, 3), colour=x(1))
    with pytest.raises(FileError, match="has no 'query' and has 'colour', which no call takes"):
        load_case(path)
    np.savez(path, query=x(1, 2, 3), **{"reference.config": "{", "reference.weights.a": x(1)})
    with pytest.raises(FileError, match=r"broken 'reference\.config'"):
        load_case(path)
    np.savez(path, query=x(1, 2, 3),
             **{"reference.config": '{"colour": 1}', "reference.weights.a": x(1)})  # fmt: skip
    with pytest.raises(FileError, match="broken 'reference'"):
        load_case(path)


def test_environment_tells_of_what_is_imported_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch:
        __version__ = "9.9"

        def get_float32_matmul_precision(self) -> str:
            return "high"

        def get_default_dtype(self) -> str:
            raise RuntimeError("half imported")

    for name in ("torch", "tensorflow", "jax", "keras"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    assert environment().flags == {}
    monkeypatch.setitem(__import__("sys").modules, "torch", Torch())
    found = environment()
    assert found.versions["torch"] == "9.9"
    assert found.flags == {"torch float32 matmul precision": "high"}
    assert all(name in ("torch", "tensorflow", "jax", "keras") for name, _ in FLAGS.values())


def test_a_report_is_copied_without_what_was_called() -> None:
    own, other = layer(), layer(scale=0.7)
    report = compare(own, lambda query: other(query), x(2, 5, 12))
    assert copy.deepcopy(report).to_text() == report.to_text()
    assert all(trace.again is None for trace in report.traces)

"""`anymha compare`: what it finds, what it names, what it refuses, what it writes and repeats."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import anymha.cli.names
from anymha.cli.inputs import CASES, make_cases
from anymha.cli.main import main
from anymha.cli.names import LIVE, settle_keras_backend
from tests.conftest import usable
from tests.frameworks import required

ROOT = Path(__file__).parent.parent
Run = Callable[..., tuple[int, str, str]]

PORT = """
import numpy as np
import anymha
from anymha.parity import decoding

layer = anymha.MultiHeadAttention(4, 6, query_features=12, backend="numpy", seed=0,
                                  bias_initializer="random_normal")
calls = []


def right(query, value=None, key=None, **call):
    return layer(query, value, key, **call)


def forgot(query, value=None, key=None, use_causal_mask=False, **call):
    return layer(query, value, key, **call)


def one_input(query, use_causal_mask=False):
    return layer(query, use_causal_mask=use_causal_mask)


def three_inputs(query, value, key):
    return layer(query, value, key)


def two_inputs(query, value):
    return layer(query, value)


def breaks(query, value=None, key=None, **call):
    raise RuntimeError("no [such] kernel")


def exits(query, value=None, key=None, **call):
    raise SystemExit(0)


def make_and_exit():
    raise SystemExit(0)


def interrupts(query, value=None, key=None, **call):
    raise KeyboardInterrupt


class Exits:
    def __init__(self):
        self.forward = layer

    @property
    def num_heads(self):
        raise SystemExit(0)

    def __call__(self, query):
        return layer(query)


def answers_oddly(query, value=None, key=None, **call):
    return {"colour": query}


def make():
    calls.append("make")
    return layer


def make_nothing():
    return 3


def make_badly():
    raise RuntimeError("no luck")


class Model:
    def __init__(self):
        self.attention = layer

    def __call__(self, query, value=None, key=None, **call):
        return self.attention(query, value, key, **call)


model = Model()
number = 3


def again(x, cache):
    held = x if cache is None else np.concatenate([cache, x], axis=1)
    return layer(held, use_causal_mask=True)[:, -x.shape[1]:], held


decodes = decoding(again, steps=(2, 20))
forgets = decoding(lambda x, cache: (layer(x, use_causal_mask=True), cache))
decodes_and_exits = decoding(lambda x, cache: exits(x))
own = decoding(layer, join=True, truncate=True, reorder=True)
holds = decoding(lambda x, cache, valid: again(x, cache))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a module `port` that a user might have."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.PAIRS_SECONDS", 0.0)
    (tmp_path / "port.py").write_text(PORT)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("port", None)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives its exit status, what it printed and what it printed as errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["compare", *arguments])
        except SystemExit as stop:  # of argparse
            status = int(str(stop.code))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_planted_mistake_is_named_in_the_case_that_shows_it(command: Run) -> None:
    status, out, err = command("port:layer", "port:forgot")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[0] == "PARITY DOES NOT HOLD: 1 of 4 comparisons differ, on causal"
    (row,) = [line for line in lines if line.startswith("port:forgot against port:layer")]
    assert row.split()[3:] == ["✓", "agrees", "✓", "agrees", "✗", "differs", "✓", "agrees"]
    assert "Cause: causal mask ignored" in lines
    assert out.count("Cause:") == 1


def test_right_port_passes(command: Run) -> None:
    status, out, err = command("port:layer", "port:right")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "PARITY HOLDS: 4 comparisons agree"


@pytest.mark.parametrize("name", ["port:make", "port:Model", "port:model", "port:model.attention"])
def test_objects_that_make_hold_and_are_layers(command: Run, name: str) -> None:
    status, out, err = command("port:layer", name, "--cases", "cross,causal")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "PARITY HOLDS: 2 comparisons agree"
    assert sys.modules["port"].calls == ["make"] * (name == "port:make")


def test_a_file_stands_for_its_module(command: Run, folder: Path) -> None:
    elsewhere = folder / "other"
    elsewhere.mkdir()
    (elsewhere / "neighbour_of_port.py").write_text("from port import layer")
    (elsewhere / "port.py").write_text("raise ImportError('the wrong one')")
    (elsewhere / "json.py").write_text(
        "from neighbour_of_port import layer\nport = layer"
    )  # a name taken
    file = str(elsewhere / "json.py")
    for names in (("port.py:layer", "port:right"), ("port:layer", f"{file}:port")):
        status, out, err = command(*names, "--cases", "self")
        assert (status, err) == (0, ""), out
    assert sys.modules["json"].__file__ != file
    status, _, err = command("nowhere/port.py:layer", "port:right")
    assert status == 2
    assert "there is no file nowhere/port.py. The folder is" in err


def test_all_pairs_of_several_are_compared(command: Run) -> None:
    status, out, _ = command("port:layer", "port:right", "port:forgot", "--cases", "causal")
    assert status == 1
    assert out.splitlines()[0] == "PARITY DOES NOT HOLD: 2 of 3 comparisons differ, on causal"
    rows = [line for line in out.splitlines() if " against " in line and "parts at" not in line]
    assert [row.rsplit(" ", 1)[-1].strip() or row.split()[-1] for row in rows[1:]] == [
        "agrees", "differs", "differs",
    ]  # fmt: skip


def test_backend_gets_the_weights_of_the_layer_beside_it(command: Run) -> None:
    status, out, _ = command("numpy", "port:layer", "--cases", "padded")
    assert status == 0, out
    status, out, _ = command("numpy", "numpy", "--cases", "self,cross")
    assert status == 0, out
    assert out.splitlines()[0] == "PARITY HOLDS: 2 comparisons agree"


def test_function_that_decodes_has_inputs_of_its_own(command: Run) -> None:
    status, out, err = command("port:layer", "port:decodes")
    assert (status, err) == (0, "")
    assert "reads pieces of 2, 20, 1, 1 positions" in out
    assert "rows of unequal lengths: there is no padding" in out
    status, out, _ = command("port:layer", "port:forgets")
    assert status == 1
    assert "Cause: stale keys (a call sees itself alone)" in out
    status, out, _ = command("numpy", "port:own")
    assert status == 0, out
    assert "padding" not in out
    status, out, _ = command("port:layer", "port:holds")
    assert status == 1
    assert "Cause: padding held" in out
    status, out, _ = command("port:layer", "port:right", "--cases", "decoded")
    assert status == 0, out


def test_function_is_asked_only_what_it_takes(command: Run) -> None:
    status, out, _ = command("port:layer", "port:one_input")
    assert status == 3
    assert out.splitlines()[0] == (
        "PARITY IS NOT SHOWN: 2 comparisons agree, but self-masked could not be run: one_input "
        "does not take `attention_mask`, `value_mask`; 3 do not apply"
    )
    assert "cross: not run: one_input takes one input alone" in out
    arguments = ("port:layer", "port:one_input", "--cases", "self,self-causal")
    assert command(*arguments)[0] == 0
    status, out, _ = command("port:layer", "port:three_inputs", "port:two_inputs", "--cases",
                             "self,cross")  # fmt: skip
    assert status == 0, out
    assert out.splitlines()[0] == "PARITY HOLDS: 6 comparisons agree"
    assert "Without `key`: two_inputs takes two inputs alone." in out


MASKED = """
import numpy as np
import torch
import anymha
from anymha.parity import declare

layer = anymha.MultiHeadAttention(4, 6, query_features=12, backend="numpy", seed=0,
                                  bias_initializer="random_normal")


def forgets_causal(query, use_causal_mask=False):
    return layer(query)


def inverts(x, attention_mask=None, is_causal=False):
    mask = None if attention_mask is None else ~attention_mask
    return layer(x, attention_mask=mask, use_causal_mask=is_causal)


def four_axes(x, mask=None, causal=False):
    if mask is not None:
        assert mask.ndim == 4
        mask = mask[:, 0]
    return layer(x, attention_mask=mask, use_causal_mask=causal)


def three_axes(x, attn_mask=None, is_causal=False):
    if attn_mask is not None:
        assert attn_mask.ndim == 3
    return layer(x, attention_mask=attn_mask, use_causal_mask=is_causal)


def padding(x, key_padding_mask=None, is_causal=False):
    mask = None if key_padding_mask is None else ~key_padding_mask
    return layer(x, value_mask=mask, use_causal_mask=is_causal)


def inverted_padding(x, key_padding_mask=None, is_causal=False):
    return layer(x, value_mask=key_padding_mask, use_causal_mask=is_causal)


def whole(x, mask):
    return layer(x, attention_mask=mask[:, 0])


class Own(torch.nn.Module):
    def __init__(self, reads="causal"):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.reads = reads

    def forward(self, x, mask=None, causal=False):
        b, t, _ = x.shape
        q, k, v = (a.view(b, t, 2, 8).transpose(1, 2) for a in self.qkv(x).chunk(3, -1))
        causal = causal and self.reads == "causal"
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(b, t, 16))


class Half(Own):  # takes the mask (B, T, S) alone
    def forward(self, x, attention_mask=None):
        mask = None if attention_mask is None else attention_mask[:, None]
        return super().forward(x, mask)


class NoMask(Own):
    def forward(self, x):
        return super().forward(x)


class Keep(Own):
    def forward(self, x, keep=None):
        return super().forward(x, keep)


class ForgetsKeep(Own):
    def forward(self, x, keep=None):
        return super().forward(x)


class ForgetsFoo(Own):
    def forward(self, x, foo=None):
        return super().forward(x)


class Rest(Half):
    def forward(self, x, **call):
        return super().forward(x, call.get("attention_mask"))


torch.manual_seed(0)
original, forgetful = Own().eval(), Own("nothing").eval()
forgetful.load_state_dict(original.state_dict())
half, nomask, keep, forgets_keep, forgets_foo, rest = (
    kind().eval() for kind in (Half, NoMask, Keep, ForgetsKeep, ForgetsFoo, Rest)
)
for one in (half, nomask, keep, forgets_keep, forgets_foo, rest):
    one.load_state_dict(original.state_dict())
declared = declare(original, layout="timm.vit", num_heads=2)
calls = lambda x, mask=None, causal=False: original(x, mask, causal)


def of_numpy(query, attention_mask=None, use_causal_mask=False):
    mask = None if attention_mask is None else torch.as_tensor(attention_mask)[:, None]
    return original(torch.as_tensor(query), mask, use_causal_mask).detach().numpy()


def masks_nothing(query):
    return original(torch.as_tensor(query)).detach().numpy()
"""


@pytest.fixture
def masked(folder: Path) -> Iterator[None]:
    """A module `masked`, whose implementations take one input and masks by names of their own."""
    usable("torch")
    (folder / "masked.py").write_text(MASKED)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("masked", None)


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize(
    ("names", "case", "cause"),
    [
        (("layer", "forgets_causal"), "self-causal", "causal mask ignored"),
        (("layer", "inverts"), "self-masked", "inverted mask"),
        (("layer", "inverted_padding"), "self-masked", "inverted mask"),
        (("declared", "forgetful"), "self-causal", "causal mask ignored"),
    ],
)
def test_masks_of_self_attention_are_tried(
    command: Run, names: tuple[str, str], case: str, cause: str
) -> None:
    status, out, err = command(*(f"masked:{name}" for name in names))
    assert (status, err) == (1, "")
    assert f"on {case}" in out.splitlines()[0]
    assert cause in out


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("name", ["four_axes", "three_axes", "padding"])
def test_masks_of_any_name_and_shape_are_handed_over(command: Run, name: str) -> None:
    status, out, err = command("masked:layer", f"masked:{name}")
    assert (status, err) == (0, ""), out
    assert out.splitlines()[0] == "PARITY HOLDS: 3 comparisons agree; 3 do not apply"
    assert "is given" in out


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize(
    "pair",
    [("half", "nomask"), ("nomask", "half"), ("half", "forgets_foo"), ("original", "nomask"),
     ("of_numpy", "masks_nothing")],
)  # fmt: skip
def test_masks_that_one_of_both_takes_in_some_form_are_missed(
    command: Run, pair: tuple[str, str]
) -> None:
    status, out, err = command(*(f"masked:{name}" for name in pair))
    assert (status, err) == (3, ""), out
    assert out.startswith("PARITY IS NOT SHOWN: 1 comparison agrees, but self-causal, self-masked ")
    assert out.splitlines()[0].endswith("; 3 do not apply")


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("reference", ["torch", "masked:half", "masked:declared"])
@pytest.mark.parametrize("name", ["keep", "forgets_keep", "forgets_foo"])
def test_masks_of_names_without_mask_are_no_inputs(command: Run, reference: str, name: str) -> None:
    status, out, err = command(reference, f"masked:{name}")
    assert (status, err) == ({"keep": 0, "forgets_keep": 1, "forgets_foo": 3}[name], ""), out
    if name == "keep":
        assert out.startswith("PARITY HOLDS: 3 comparisons agree; 3 do not apply")
        assert "`keep` is given as" in out
    elif name == "forgets_keep":
        assert "2 of 3 comparisons differ, on self-causal, self-masked" in out.splitlines()[0]
        assert out.count("Cause: ignored mask") == 2
    else:
        assert "name it `value` or `mask` if it is one" in out


@pytest.mark.usefixtures("masked")
def test_a_mask_of_the_rest_of_the_arguments_has_three_axes(command: Run) -> None:
    status, out, err = command("masked:half", "masked:rest")
    assert (status, err) == (0, ""), out
    assert out.startswith("PARITY HOLDS: 3 comparisons agree; 3 do not apply")


@pytest.mark.usefixtures("masked")
def test_causal_rule_reaches_a_port_that_takes_masks_alone(command: Run) -> None:
    status, out, _ = command("masked:layer", "masked:whole", "--cases", "self-causal,self-masked")
    assert status == 0, out


@pytest.mark.usefixtures("masked")
def test_widths_are_those_of_the_first_linear_layer(command: Run) -> None:
    arguments = ("masked:original", "masked:forgetful")
    status, out, err = command(*arguments)
    assert (status, err) == (1, "")
    assert "on self-causal" in out.splitlines()[0]
    status, out, _ = command("masked:original", "masked:calls", "--arrays", "torch")
    assert status == 0, out
    status, out, _ = command("masked:original", "masked:calls")
    assert status == 1
    assert "`--arrays torch`" in out


def test_nothing_that_could_be_run_is_no_parity(command: Run) -> None:
    status, out, _ = command("port:layer", "port:three_inputs", "--cases", "padded")
    assert status == 1
    assert out.splitlines()[0] == "PARITY IS NOT SHOWN: none of 1 comparisons could be run"


def test_what_an_implementation_raises_is_told(command: Run) -> None:
    status, out, err = command("port:layer", "port:breaks", "--cases", "self")
    assert (status, err) == (1, "")
    assert "raised RuntimeError: no [such] kernel" in out


@pytest.mark.parametrize("name", ["exits", "decodes_and_exits"])
def test_an_exit_of_an_implementation_is_an_error_of_it(command: Run, name: str) -> None:
    status, out, err = command("port:layer", f"port:{name}")
    assert (status, err) == (1, "")
    assert "raised RuntimeError: The code raised SystemExit(0), as `sys.exit` does. It was" in out


def test_no_exit_of_the_users_code_ends_a_command_as_a_success(command: Run) -> None:
    with pytest.raises(RuntimeError, match=r"The code raised SystemExit\(0\)"):
        command("port:layer", "port:Exits")
    assert command("port:layer", "port:interrupts")[0] == 130


def test_every_form_is_written(command: Run, folder: Path) -> None:
    files = ["--html", "r/a.html", "--json", "r/a.json", "--junit", "r/a.xml", "--markdown",
             "r/a.md", "--save", "r/a.npz"]  # fmt: skip
    status, out, _ = command("port:layer", "port:forgot", *files)
    assert status == 1
    told = json.loads((folder / "r/a.json").read_text(encoding="utf-8"))
    assert told["schema"] == "anymha.comparisons/1"
    states = {one["case"]: one["state"] for one in told["comparisons"]}
    assert states == {"self": "agrees", "cross": "agrees", "causal": "differs", "padded": "agrees"}
    suites = ElementTree.parse(folder / "r/a.xml").getroot().findall("testsuite")
    failed = [suite.get("name") for suite in suites if suite.findall("testcase/failure")]
    assert failed == ["port:forgot against port:layer, causal"]
    page = (folder / "r/a.html").read_text(encoding="utf-8")
    assert "anymha compare port:layer port:forgot --inputs" in page
    assert "PARITY DOES NOT HOLD" in (folder / "r/a.md").read_text(encoding="utf-8")
    repeats = "anymha compare port:layer port:forgot --inputs r/a.npz"
    assert out.splitlines()[-1] == f"Saved (causal); repeat it with: {repeats}"


def test_summary_of_a_step_is_appended_to(
    command: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = folder / "summary"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    arguments = ("port:layer", "port:right", "--cases", "self", "--markdown", str(summary))
    assert command(*arguments)[0] == 0
    first = summary.read_text("utf-8")
    assert command(*arguments)[0] == 0
    assert summary.read_text("utf-8") == f"{first}\n{first}"
    other = (*arguments[:-1], "other")
    assert (command(*other)[0], command(*other)[0]) == (0, 0)
    assert (folder / "other").read_text("utf-8") == first


def test_saved_case_is_repeated(command: Run) -> None:
    first = command("port:layer", "port:forgot", "--json", "a.json", "--save", "a.npz")
    again = command("port:layer", "port:forgot", "--inputs", "a.npz", "--json", "b.json")
    assert (first[0], again[0]) == (1, 1)
    one = json.loads(Path("a.json").read_text(encoding="utf-8"))["comparisons"][2]
    (two,) = json.loads(Path("b.json").read_text(encoding="utf-8"))["comparisons"]
    assert one.pop("case") == "causal"
    assert two.pop("case") == ""
    assert one == two
    assert again[1].splitlines()[0] == two["verdict"]


def test_saved_weights_are_those_of_what_is_named(command: Run, folder: Path) -> None:
    (folder / "others.py").write_text(
        "import copy, port, anymha\nw = anymha.get_weights(port.layer)\n"
        "other = anymha.set_weights(anymha.convert(port.layer, to='numpy'), "
        "{**w, 'query.bias': w['query.bias'] + 1})\n"
    )
    importlib.invalidate_caches()
    assert command("port:layer", "others:other", "--cases", "self", "--save", "a.npz")[0] == 1
    status, out, _ = command("numpy", "numpy", "--inputs", "a.npz")
    assert status == 1
    assert "weight query.bias" in out
    sys.modules.pop("others", None)


def test_file_of_the_user_is_enough(command: Run, folder: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 12)).astype(np.float32)
    np.savez(folder / "x.npz", query=x, use_causal_mask=True,
             key_mask=np.arange(6) < np.array([[6], [3]]))  # fmt: skip
    assert command("port:layer", "port:right", "--inputs", "x.npz")[0] == 0
    assert command("numpy", "numpy", "--inputs", "x.npz")[0] == 0
    assert command("port:right", "port:right", "--inputs", "x.npz")[0] == 0
    status, out, _ = command("port:layer", "port:forgot", "--inputs", "x.npz")
    assert status == 1
    assert "causal mask ignored" in out.splitlines()[0]


def test_function_of_torch_gets_tensors_and_again_when_repeated(command: Run, folder: Path) -> None:
    usable("torch")
    (folder / "port.py").write_text(
        PORT.replace('backend="numpy"', 'backend="torch"').replace(
            "import numpy as np", "import torch"
        )
        + "\n\ndef strict(query, value=None, key=None, **call):\n"
        "    assert isinstance(query, torch.Tensor)\n"
        "    return layer(query, value, key, **call) + 1\n"
    )
    arguments = ("port:layer", "port:right", "--cases", "causal", "--arrays", "torch")
    status, out, err = command(*arguments)
    assert (status, err) == (0, ""), out
    arguments = ("port:layer", "port:strict", "--cases", "padded", "--arrays", "torch")
    status, out, _ = command(*arguments, "--save", "a.npz")
    assert status == 1
    assert "raised" not in out
    again = command("port:layer", "port:strict", "--inputs", "a.npz")
    assert again[0] == 1
    assert "raised" not in again[1]
    assert (
        "raised AssertionError"
        in command("port:layer", "port:strict", "--inputs", "a.npz", "--arrays", "numpy")[1]
    )


WRONG = {
    "unknown name": (["numpy", "pytorch"], "a backend (numpy, torch, tensorflow, jax, keras"),
    "no module": (["numpy", "nowhere:layer"], "there is no module 'nowhere'"),
    "no module in a package": (["numpy", "os.nowhere:layer"], "there is no module"),
    "no object": (["numpy", "port:nothing"], "port has no 'nothing'. It has: np, anymha, decoding"),
    "no callable": (["numpy", "port:number"], "port:number cannot be compared."),
    "makes no callable": (["numpy", "port:make_nothing"], "cannot be compared."),
    "makes nothing": (["numpy", "port:make_badly"], "raised RuntimeError: no luck"),
    "no file": (["numpy", "numpy", "--inputs", "none.npz"], "none.npz"),
    "no query": (["numpy", "numpy", "--inputs", "key.npz"], "key.npz has no 'query'"),
    "no model": (["numpy", "none.onnx"], "none.onnx"),
    "no widths": (["port:right", "port:forgot"], "Give inputs with `--inputs`"),
    "no weights": (["numpy", "port:right"], "which are not known. Name the weights"),
    "unknown case": (
        ["numpy", "numpy", "--cases", "self,colour"],
        "self-causal, self-masked, cross",
    ),
    "cases and inputs": (["numpy", "numpy", "--cases", "self", "--inputs", "x.npz"], "give one"),
    "unknown arrays": (["numpy", "numpy", "--arrays", "colour"], "Received: 'colour'"),
    "one file twice": (["numpy", "numpy", "--json", "a", "--junit", "a"], "must be two files"),
    "folder": (["numpy", "numpy", "--json", "."], "it is a folder"),
    "save as text": (["numpy", "numpy", "--save", "a.txt"], "saved as an .npz file"),
    "odd answer": (["port:layer", "port:answers_oddly"], "must return the output"),
    "one alone": (["numpy"], "CANDIDATE"),
    "broken module": (["numpy", "broken:layer"], "broken raised ZeroDivisionError"),
    "module that needs another": (["numpy", "needs:layer"], "it needs nowhere_at_all"),
    "module that exits": (["numpy", "leaves.py:layer"], "leaves.py raised SystemExit: 0"),
    "exits as it is made": (["numpy", "port:make_and_exit"], "and raised SystemExit: 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_call_ends_with_2_and_says_why(command: Run, folder: Path, case: str) -> None:
    np.savez(folder / "key.npz", key=np.zeros((1, 2, 3)))
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "needs.py").write_text("import nowhere_at_all\n")
    (folder / "leaves.py").write_text("import sys\ndef layer(x): return x\nsys.exit(0)\n")
    importlib.invalidate_caches()
    arguments, words = WRONG[case]
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("name", "extra"),
    [("torch", "torch"), ("keras", "keras"), ("torch.MultiheadAttention", "torch"),
     ("flax.nnx.MultiHeadAttention", "flax"), ("equinox.MultiheadAttention", "equinox")],
)  # fmt: skip
def test_missing_framework_is_named_with_its_extra(
    command: Run, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == extra else find(name, *a)
    )
    status, out, err = command("numpy", name)
    assert (status, out) == (2, "")
    assert f"pip install 'anymha[{extra}]'" in err


@pytest.mark.parametrize(
    ("installed", "configured", "variable", "wanted"),
    [
        (("torch", "jax"), None, None, "torch"),
        (("jax",), "tensorflow", None, "jax"),
        (("tensorflow", "torch"), None, None, None),
        (("torch", "jax"), "jax", None, None),
        (("torch",), None, "tensorflow", "tensorflow"),
        ((), None, None, None),
        (("torch",), "numpy", None, None),
    ],
)
def test_keras_runs_on_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    installed: tuple[str, ...],
    configured: str | None,
    variable: str | None,
    wanted: str | None,
) -> None:
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(folder))
    monkeypatch.setenv("KERAS_BACKEND", variable or "")
    if variable is None:
        monkeypatch.delenv("KERAS_BACKEND")
    if configured is not None:
        (folder / "keras.json").write_text(json.dumps({"backend": configured}))
    found = anymha.cli.names.importlib.util
    monkeypatch.setattr(found, "find_spec", lambda name: name if name in installed else None)
    settle_keras_backend()
    assert os.environ.get("KERAS_BACKEND") == wanted


def test_made_inputs_are_the_same_each_time_and_make_masks_matter() -> None:
    one, two = (make_cases(CASES, (8, 6, 4)) for _ in range(2))
    assert [case.name for case in one] == list(CASES)
    for a, b in zip(one, two, strict=True):
        for name, array in {**a.inputs, **a.call}.items():
            np.testing.assert_array_equal(array, {**b.inputs, **b.call}[name])
    for padded in (one[2].call, one[5].call):
        empty = ~(padded["attention_mask"] & padded["value_mask"][:, None]).any(-1)
        assert empty.sum() == 1, "one query sees nothing"


def test_layers_of_three_libraries_are_compared_in_one_command(folder: Path) -> None:
    for name in ("torch", "keras", "flax"):
        if importlib.util.find_spec(name) is None:
            required(name)
    (folder / "keras").mkdir()
    environment = {
        **os.environ, "KERAS_BACKEND": "torch", "COLUMNS": "140", "KERAS_HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
    }  # fmt: skip
    names = [name for name in LIVE if name.split(".")[0] in ("torch", "flax")]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "anymha.cli.main", "compare", *names,
         "keras.MultiHeadAttention", "--json", "all.json"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    told = json.loads((folder / "all.json").read_text(encoding="utf-8"))["comparisons"]
    assert len(told) == 12
    for one in told:
        if one["case"] != "padded":
            assert one["state"] == "agrees", one["verdict"]
        elif one["reference"].startswith("torch"):
            assert one["first_divergence"] == "probabilities"
            assert one["diagnosis"]["causes"][0]["name"].startswith("fully masked rows"), one
            assert any("averaged over the heads" in note for note in one["notes"])

"""`anymha convert` and `anymha inspect`: whole files, what they say, and what they refuse."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
import anymha.cli.verify
from anymha.cli.main import main
from anymha.cli.peers import FAMILIES
from anymha.errors import AnymhaError, ArgumentError, UsageError
from anymha.framework.registry import Backend, get_backend
from anymha.interchange.compared_options import result_options
from anymha.interchange.conversion_plan import Conversion
from anymha.interchange.convert_model import convert_file
from anymha.interchange.files.formats import create_file, open_file
from tests.conftest import usable
from tests.file_samples import Arrays, announced, same, write
from tests.frameworks import required

DATA = Path(__file__).parent / "data"
MINILM = DATA / "minilm_attention.safetensors"
BERT = "transformers.bert"
TRANSFORMERS = bool(find_spec("transformers") and find_spec("torch"))
D, H = 8, 2

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command; gives its exit status, what it printed and what it printed as errors."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: Any) -> tuple[int, str, str]:
        try:
            status = main([str(one) for one in arguments])
        except SystemExit as stop:  # of argparse
            status = int(str(stop.code))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def layer(prefix: str, *names: str, bias: bool = True, seed: int = 0) -> Arrays:
    rng = np.random.default_rng([seed, *prefix.encode()])
    shapes = {".weight": (D, D)} | ({".bias": (D,)} if bias else {})
    return {
        f"{prefix}{name}{part}": rng.standard_normal(shape).astype(np.float32)
        for name in names
        for part, shape in shapes.items()
    }


def bert(prefix: str, **options: Any) -> Arrays:
    return layer(prefix, "self.query", "self.key", "self.value", "output.dense", **options)


def llama(prefix: str) -> Arrays:
    return layer(prefix, "q_proj", "k_proj", "v_proj", "o_proj", bias=False)


def read(path: Path) -> Arrays:
    with open_file(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def equal(one: Arrays, other: Arrays) -> bool:
    return set(one) == set(other) and all(same(array, other[name]) for name, array in one.items())


TARGETS = {
    "torch.MultiheadAttention": ".safetensors",
    "keras.MultiHeadAttention": ".weights.h5",
    "keras.GroupQueryAttention": ".weights.h5",
    "flax.nnx.MultiHeadAttention": ".npz",
    "equinox.MultiheadAttention": ".npz",
    "haiku.MultiHeadAttention": ".npz",
    "transformers.gpt2": ".pt",
    "transformers.blip": ".pt",
    "timm.vit": ".safetensors",
    "anymha": ".safetensors",
}


@pytest.mark.parametrize("to", TARGETS)
def test_file_comes_back_bit_for_bit(tmp_path: Path, command: Run, to: str) -> None:
    if TARGETS[to] == ".weights.h5":
        pytest.importorskip("h5py", reason="h5py is not installed")
    middle, back = tmp_path / f"a{TARGETS[to]}", tmp_path / "b.safetensors"
    status, out, err = command(
        "convert", MINILM, middle, "--from", BERT, "--to", to, "--num-heads", 12
    )
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith(f"{middle}: 2 layers of {BERT} as {to}, ")
    status, _, err = command(
        *("convert", middle, back, "--from", to, "--to", BERT),
        *("--to-prefix", "encoder.layer.{i}.attention", "--num-heads", 12),
    )
    assert (status, err) == (0, "")
    assert equal(read(back), read(MINILM))


def test_file_of_ours_is_loaded_layer_by_layer(tmp_path: Path, command: Run) -> None:
    path = tmp_path / "a.safetensors"
    command("convert", MINILM, path, "--from", BERT, "--to", "anymha", "--num-heads", 12)
    found = anymha.load(path, "numpy", prefix="encoder.layer.5.attention.")
    start = "encoder.layer.5.attention."
    arrays = {n.removeprefix(start): a for n, a in read(MINILM).items() if n.startswith(start)}
    wanted, config = anymha.to_canonical(arrays, BERT, num_heads=12)
    assert equal(found.weights, dict(wanted))
    assert found.config == config
    status, out, _ = command("inspect", path)
    assert status == 0
    assert "Written by anymha, with the configuration of 2 layers." in out
    assert "Layout: anymha (" in out


def test_options_of_our_layers_survive_another_conversion(tmp_path: Path, command: Run) -> None:
    layer = anymha.MultiHeadAttention(
        4, 2, num_key_value_heads=2, query_features=8, sliding_window=3, backend="numpy"
    )
    anymha.save(tmp_path / "a.safetensors", layer)
    status, *_ = command(
        *("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors"),
        *("--from", "anymha", "--to", "anymha", "--to-prefix", "one"),
    )
    assert status == 0
    found = anymha.load(tmp_path / "b.safetensors", "numpy", prefix="one.")
    assert found.config == anymha.convert(layer, "numpy").config


def test_what_the_shapes_do_not_tell_is_kept(tmp_path: Path, command: Run) -> None:
    write(tmp_path / "a.safetensors", llama("0."))
    status, *_ = command(
        *("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "anymha"),
        *("--from", "transformers.mistral", "--head-dim", 4, "--num-key-value-heads", 2),
        *("--sliding-window", 5, "--scale", 0.25),
    )
    assert status == 0
    config = anymha.load(tmp_path / "b.safetensors", "numpy", prefix="0.").config
    assert (config.num_heads, config.key_dim, config.sliding_window) == (2, 4, 5)
    assert config.scale == 0.25


def test_prefix_chooses_layers_and_names_them_anew(tmp_path: Path, command: Run) -> None:
    source = tmp_path / "a.safetensors"
    arrays = {n: a for p in ("enc.0.", "enc.1.", "dec.0.") for n, a in bert(p).items()}
    write(source, arrays)
    target = tmp_path / "b.safetensors"
    status, out, _ = command(
        *("convert", source, target, "--from", BERT, "--to", BERT, "--num-heads", 2),
        *("--prefix", "enc.{i}", "--to-prefix", "model.block{i}.attn"),
    )
    assert status == 0
    wanted = {n.replace(f"enc.{i}.", f"model.block{i}.attn."): a for i in (0, 1)
              for n, a in bert(f"enc.{i}.").items()}  # fmt: skip
    assert equal(read(target), wanted)
    assert out.splitlines()[:2] == [
        "enc.0. -> model.block0.attn.",
        "enc.1. -> model.block1.attn.",
    ]
    assert "8 other tensors were left out (dec.0." in out


def test_other_tensors_are_copied_where_that_is_asked_for(tmp_path: Path, command: Run) -> None:
    others = {"norm.weight": np.ones(3, np.float16), "tokens": np.arange(4)}
    write(tmp_path / "a.safetensors", {**bert("x."), **others})
    status, out, _ = command(
        *("convert", tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", BERT),
        *("--to", "equinox.MultiheadAttention", "--num-heads", 2, "--others"),
    )
    assert status == 0
    assert "left out" not in out
    found = read(tmp_path / "b.npz")
    assert all(same(found[name], array) for name, array in others.items())
    assert "x.query_proj.weight" in found


ODD_NAMES: dict[str, tuple[list[str], dict[str, str]]] = {
    "NUL": (["a\0b"], {".npz": "NUL", ".h5": "NUL"}),
    "alike before NUL": (["n\0x", "n\0y"], {".npz": "NUL", ".h5": "NUL"}),
    "a group": (["g", "g/h"], {".h5": "needs a group 'g', which is the name of another tensor"}),
    "a far group": (["g", "g/h/i/j"], {".h5": "needs a group 'g'"}),
    "empty": ([""], {".h5": "has a part that is empty"}),
    "empty part": (["a//b"], {".h5": "has a part that is empty"}),
    "slash after": (["q/"], {".h5": "has a part that is empty"}),
    "slash before": (["/q"], {".h5": "has a part that is empty"}),
    "dots": (["./x", "a/../x"], {".h5": "dots alone"}),
    "one dot": (["."], {".h5": "dots alone"}),
    "output": (["w:0"], {".h5": "is read as 'w'"}),
    "output in a group": (["g/w:0"], {".h5": "is read as 'g/w'"}),
    "outputs": (["w:0:0", "w:0"], {".h5": "is read as 'w'"}),
    "output and plain": (["w:0", "w"], {}),
    "metadata": (["__metadata__"], {".safetensors": "is that of the file's metadata"}),
    "depth": (["/".join("a" * 33)], {}),
    "too deep": (["/".join("a" * 34)], {".h5": "has more than 32 groups"}),
    "ends": (["x.npy", "data.pkl", "archive/data/0", "byteorder"], {}),
    "letters": (["\u00e9", "e\u0301", "\u65e5\u672c", "\U0001f600"], {}),
    "marks": (["a\\b", "a b", "a\nb", "*", "%", '"', "\x7f"], {}),
    "long": (["x" * 4096], {}),
    "device": (["CON", "a:b", "C:/x"], {}),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".h5", ".shards"])
@pytest.mark.parametrize("case", ODD_NAMES)
def test_odd_names_are_carried_or_refused(
    tmp_path: Path, command: Run, case: str, suffix: str
) -> None:
    if suffix == ".h5":
        pytest.importorskip("h5py", reason="h5py is not installed")
    names, refusals = ODD_NAMES[case]
    odd = {name: np.full((2, i + 1), i, np.float32) for i, name in enumerate(names)}
    source = tmp_path / ("a.pt" if case == "metadata" else "a.safetensors")
    write(source, {**bert("0."), **odd})
    end = ".safetensors" if suffix == ".shards" else suffix
    target = tmp_path / "deep" / f"b{end}"
    shards = ("--max-shard-size", 300) if suffix == ".shards" else ()
    for trial in (["--dry-run"], []):
        status, _, err = command("convert", source, target, "--from", BERT, "--to",
                                 "transformers.clip", "--num-heads", H, "--others", *trial,
                                 *shards)  # fmt: skip
        if end in refusals:
            assert (status, len(err.splitlines())) == (2, 1)
            assert refusals[end] in err
            assert not target.parent.exists()
        else:
            assert status == 0, err
    if end not in refusals:
        written = read(target.with_name(f"b{end}.index.json") if shards else target)
        assert equal({name: written[name] for name in names}, odd)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".h5"])
def test_a_new_prefix_that_no_file_can_have_is_told(
    tmp_path: Path, command: Run, suffix: str
) -> None:
    write(tmp_path / "a.safetensors", bert("0."))
    for prefix, told in (("x" * 5000, "is too long"), ("\udcff", "is no text")):
        status, _, err = command("convert", tmp_path / "a.safetensors", tmp_path / f"b{suffix}",
                                 "--from", BERT, "--to", BERT, "--num-heads", H, "--to-prefix",
                                 prefix)  # fmt: skip
        assert (status, len(err.splitlines())) == (2, 1)
        assert told in err


def test_texts_besides_the_tensors_are_copied_with_the_others(tmp_path: Path, command: Run) -> None:
    write(tmp_path / "a.safetensors", bert("0."), {"format": "pt", "anymha": "{}"})
    for others, expected in (((), {}), (("--others",), {"format": "pt"})):
        command("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--from", BERT,
                "--to", "transformers.clip", "--num-heads", H, *others)  # fmt: skip
        with open_file(tmp_path / "b.safetensors") as reader:
            assert reader.metadata == expected


def test_arrays_of_one_name_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"Two arrays have the name 'a\.b'"):
        anymha.find_layers({"a.b": np.ones(2), "a": {"b": np.ones(3)}})


def test_what_changes_is_told(tmp_path: Path, command: Run) -> None:
    arrays = bert("0.")
    del arrays["0.self.key.bias"]
    arrays["0.self.query.weight"][0, 0] = np.nan
    write(tmp_path / "a.safetensors", arrays)
    status, out, _ = command(
        *("convert", tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", BERT),
        *("--to", "torch.MultiheadAttention", "--num-heads", 2),
    )
    assert status == 0
    assert "zeros" in out, "the bias that torch needs"
    assert "Not all values are finite, and are carried as they are: 0.self.query.weight." in out
    assert np.isnan(read(tmp_path / "b.npz")["0.in_proj_weight"][0, 0])
    write(tmp_path / "a.safetensors", llama("0."))
    status, out, _ = command(
        *("convert", tmp_path / "a.safetensors", tmp_path / "b.npz", "--from"),
        *("transformers.llama", "--to", "anymha", "--num-heads", 2),
    )
    assert status == 0
    assert "Besides attention, the forward pass needs rotary" in out
    assert "b.npz has no place for the configuration: `anymha.load` will not read it." in out


def test_memory_is_that_of_one_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"self.{name}.weight" for name in ("query", "key", "value")] + ["output.dense.weight"]
    arrays = {
        f"{i}.{name}": rng.standard_normal((256, 256)).astype(np.float32)
        for i in range(16)
        for name in names
    }
    source = write(tmp_path / "a.safetensors", arrays)
    one = sum(array.nbytes for array in arrays.values()) // 16
    del arrays
    tracemalloc.start()
    convert_file(source, tmp_path / "b.safetensors", BERT, "torch.MultiheadAttention", num_heads=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * one < 16 * one


def test_conversion_is_verified(tmp_path: Path, command: Run, installed: list[Backend]) -> None:
    status, out, err = command(
        *("convert", MINILM, tmp_path / "a.safetensors", "--from", BERT, "--num-heads", 12),
        *("--to", "torch.MultiheadAttention", "--verify"),
    )
    assert (status, err) == (0, "")
    assert f"Verified: 2 layers, back to {BERT} and from torch.MultiheadAttention bit for" in out
    for backend in installed:
        assert f"  anymha in {backend.name}: " in out
    if get_backend("torch").installed:
        assert "  torch.MultiheadAttention itself: " in out
    else:
        assert "  not run: torch.MultiheadAttention: it is not installed" in out
    told = f"  {BERT} itself: " if TRANSFORMERS else f"  not run: {BERT}: it is not installed"
    assert told in out


@pytest.mark.parametrize("family", FAMILIES)
def test_family_s_own_layer_is_run(tmp_path: Path, command: Run, family: str) -> None:
    """A small layer with all the biases that the family has."""
    required("transformers")
    usable("torch")
    shapes = anymha.AttentionConfig(4, 8, query_features=32).weight_shapes()
    rng = np.random.default_rng(0)
    weights = {n: (0.3 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    if family == "transformers.whisper":
        del weights["key.bias"]
    write(tmp_path / "a.safetensors", dict(anymha.from_canonical(weights, family)))
    status, out, _ = command(
        *("convert", tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", family),
        *("--to", "anymha", "--num-heads", 4, "--verify"),
    )
    assert status == 0
    assert f"  {family} itself: " in out


def test_layer_that_its_family_cannot_have_is_not_run(tmp_path: Path, command: Run) -> None:
    write(tmp_path / "a.safetensors", bert("0.", bias=False))
    status, out, _ = command(
        *("convert", tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", BERT),
        *("--to", "transformers.t5", "--num-heads", 2, "--scale", 1.0, "--verify"),
    )
    assert status == 0
    assert f"  not run: {BERT}: a layer of that family is as wide as its heads together" in out
    assert "  not run: transformers.t5: its layer needs more than attention, or a whole" in out


@pytest.mark.parametrize(
    "to", ["flax.nnx.MultiHeadAttention", "equinox.MultiheadAttention", "torch.MultiheadAttention"]
)
def test_library_s_own_layer_is_run(tmp_path: Path, command: Run, to: str) -> None:
    if to.startswith("torch"):
        usable("torch")
    else:
        required(to.partition(".")[0])
    write(tmp_path / "a.safetensors", bert("0."))
    status, out, _ = command(
        *("convert", tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", BERT),
        *("--to", to, "--num-heads", 2, "--verify"),
    )
    assert status == 0
    assert f"  {to} itself: " in out


def off_by_a_little(*arguments: Any) -> np.ndarray:
    return np.full((2, 7, D), 1e-3)


def one_bit_off(self: Any, array: np.ndarray, sizes: Any) -> Any:
    found = READ(self, array, sizes)
    if self.array == "output.dense.weight":
        next(iter(found.values())).view(np.uint32).flat[3] ^= 1
    return found


READ = anymha.interchange.packing.Piece.read


@pytest.mark.parametrize("fault", ["output", "bit"])
def test_fault_is_found_and_nothing_is_written(
    tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "output":
        monkeypatch.setattr(anymha.cli.verify, "_ours", off_by_a_little)
        told = "anymha: '0.' gives another output in anymha in numpy: it is "
    else:
        monkeypatch.setattr(anymha.interchange.packing.Piece, "read", one_bit_off)
        told = "anymha: '0.' does not come back from transformers.bert bit for bit: output.dense.w"
    source, target = tmp_path / "a.safetensors", tmp_path / "b.npz"
    write(source, bert("0."))
    status, out, err = command(
        *("convert", source, target, "--from", BERT, "--to", "anymha", "--num-heads", 2),
        "--verify",
    )
    assert (status, out) == (1, "")
    assert told in err
    assert err.rstrip().endswith("Nothing was written.")
    assert list(tmp_path.iterdir()) == [source]


def wrong(command: Run, *arguments: Any) -> str:
    """The one line that a wrong call gets."""
    status, out, err = command("convert", *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    return err


def test_wrong_calls_are_told(tmp_path: Path, command: Run) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(source, {**bert("0."), **bert("1.")})
    both = ("--from", BERT, "--to", "anymha")
    assert "cannot be read: there is no such file" in wrong(command, "no.npz", target, *both)
    told = wrong(command, source, target, "--from", "bert", "--to", "anymha")
    assert "`layout`: none is called 'bert'. Did you mean 'transformers.bert'? There are" in told
    told = wrong(command, source, target, "--from", BERT, "--to", "jax")
    assert "`to`: none is called 'jax'. The layers of anymha, in jax too, have the layout" in told
    assert "cannot be read: there is no such file" in wrong(command, "nofile", target, *both)
    assert "nofile cannot be read: there is no such file." in command("inspect", "nofile")[2]
    told = wrong(command, source, target, *both)
    assert f"{source}, layer '0.': transformers.bert needs `num_heads`" in told
    both = (*both, "--num-heads", 2)
    assert "holds no layer whose names begin with '2.'. Its layers begin with '{i}.'." in wrong(
        command, source, target, *both, "--prefix", "2."
    )
    assert "Two tensors of the new file would have the name 'x.query.kernel'." in wrong(
        command, source, target, *both, "--to-prefix", "x"
    )
    assert "The two files must be different ones." in wrong(command, source, source, *both)
    assert "b.onnx: ONNX is only read. Written are: " in wrong(
        command, source, tmp_path / "b.onnx", *both
    )
    assert "holds no layer of the layout 'transformers.gpt2', whose names end with" in wrong(
        command, source, target, "--from", "transformers.gpt2", "--to", "anymha"
    )
    assert "cannot be written: it is a folder" in wrong(command, source, tmp_path, *both)
    assert "of equal size" in wrong(
        command, source, target, "--from", BERT, "--to", "anymha", "--num-heads", 3
    )
    assert list(tmp_path.iterdir()) == [source]


def test_layer_that_has_more_than_its_layout_is_refused(tmp_path: Path, command: Run) -> None:
    norms = {f"0.{name}_norm.weight": np.ones(4, np.float32) for name in "qk"}
    write(tmp_path / "a.safetensors", {**llama("0."), **norms})
    told = wrong(
        command, tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", "transformers.llama",
        "--to", "anymha", "--num-heads", 2,
    )  # fmt: skip
    assert "transformers.llama does not fit: it has no q_norm.weight, k_norm.weight, as" in told
    told = wrong(
        command, tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", "transformers.qwen3",
        "--to", "anymha", "--num-heads", 2,
    )  # fmt: skip
    assert "has no place for q_norm.weight, k_norm.weight" in told


def test_python_s_function_says_the_same(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="The two files must be different ones"):
        convert_file(MINILM, MINILM, BERT, "anymha", num_heads=12)
    steps: list[Any] = []
    done = convert_file(
        MINILM, tmp_path / "a.npz", BERT, "timm.vit", num_heads=12,
        on_layer=lambda *step: steps.append(step),
    )  # fmt: skip
    starts = [f"encoder.layer.{i}.attention." for i in (0, 5)]
    assert steps == [(0, 2, starts[0]), (1, 2, starts[1])]
    assert list(done.layers) == starts
    assert list(done.tensors) == list(read(tmp_path / "a.npz"))


WRONG_TYPES: dict[str, Any] = {
    "prefix": [5, ["a", 5], b"a", None], "layout": [5, ["transformers.bert"], b"x"],
    "to": [None, [], b"anymha"], "to_prefix": [3, ["a"]], "num_heads": ["4", 4.0, True, 10**5000],
    "head_dim": [4.0], "num_key_value_heads": ["4"], "max_bytes": ["x", True, 0, 1.5],
    "max_shard_bytes": ["5GB", True, 0, -(10**5000)], "nonsense": [3],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_arguments_of_a_wrong_type_are_told(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.safetensors", bert("0."))
    for value in WRONG_TYPES[name]:
        stated = {"layout": BERT, "num_heads": 2, "verify": False, name: value}
        with pytest.raises(AnymhaError, match=name):
            anymha.convert_file(tmp_path / "a.safetensors", tmp_path / "b.npz", **stated)
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("path", [5, None, b"a.npz", ["a.npz"]])
def test_what_is_no_path_is_told(tmp_path: Path, path: Any) -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
    calls: list[Callable[[], Any]] = [
        lambda: anymha.convert_file(path, tmp_path / "a.npz"),
        lambda: anymha.convert_file(tmp_path / "a.npz", path),
        lambda: anymha.load(path, "numpy"),
        lambda: anymha.save(path, layer),
        lambda: anymha.find_layers(path),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="must be a path"):
            call()


def test_a_size_of_many_digits_is_a_size(tmp_path: Path, command: Run) -> None:
    write(tmp_path / "a.safetensors", bert("0."))
    for size in ("9" * 400, "9" * 4000 + "GiB"):
        status, out, _ = command(
            "convert", tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", BERT, "--to", BERT,
            "--num-heads", 2, "--max-shard-size", size,
        )  # fmt: skip
        assert (status, "in 1 file" in out) == (0, False)


def test_inspect_names_all_layouts_that_fit(tmp_path: Path, command: Run) -> None:
    write(
        tmp_path / "a.safetensors", {n: a for i in range(12) for n, a in llama(f"h.{i}.").items()}
    )
    status, out, _ = command("inspect", tmp_path / "a.safetensors")
    assert status == 0
    assert "h.{i}.  x 12  (i = 0-11)" in out
    assert "Layouts that fit: " in out
    assert "transformers.llama" in out
    assert "name the one that the model has" in out
    assert " --from LAYOUT --to LAYOUT --num-heads H" in out


def test_inspect_tells_what_no_layout_fits(tmp_path: Path, command: Run) -> None:
    arrays = bert("0.") | {"0.self.key.weight": np.ones((9, 8), np.float32)}
    write(tmp_path / "a.safetensors", arrays)
    _, out, _ = command("inspect", tmp_path / "a.safetensors")
    assert "  No layout fits:" in out
    assert "  Not transformers.bert: The layers do not fit one another" in out
    write(tmp_path / "b.safetensors", {f"mlp.{i}.weight": np.ones((2, 3)) for i in range(20)})
    _, out, _ = command("inspect", tmp_path / "b.safetensors")
    assert out.splitlines()[-2:] == [
        "No attention layer of a known layout. Its names:",
        "  mlp.{i}.weight  float64 (2, 3)",
    ]


def test_inspect_of_what_is_no_file_ends_with_2(tmp_path: Path, command: Run) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no file")
    for name in ("a.safetensors", "b.npz", "c"):
        status, out, err = command("inspect", tmp_path / name)
        assert (status, out) == (2, "")
        assert err.startswith(f"anymha: {tmp_path / name} ")
        assert len(err.splitlines()) == 1


def test_options_of_a_family_are_passed_as_json(
    tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option that changes results and has no argument of its own becomes one."""
    passed: list[dict[str, Any]] = []

    def convert(*arguments: Any, on_layer: Any, check: Any, **options: Any) -> Conversion:
        passed.append({name: options[name] for name in ("tilt", "num_heads") if name in options})
        return Conversion({}, {}, [], [])

    options = (*result_options(), "tilt")
    monkeypatch.setattr("anymha.cli.convert.result_options", lambda: options)
    monkeypatch.setattr("anymha.cli.convert.convert_file", convert)
    for more in ((), ("--tilt", "2.5"), ("--tilt", "null"), ("--tilt", "steep")):
        status, *_ = command(
            *("convert", MINILM, tmp_path / "a.safetensors", "--from", BERT, "--to", "anymha"),
            *("--num-heads", 12, *more),
        )
        assert status == 0
    values = [one.get("tilt", "not stated") for one in passed]
    assert values == ["not stated", 2.5, None, "steep"]


def test_option_that_the_new_layout_lacks_is_refused(tmp_path: Path, command: Run) -> None:
    write(tmp_path / "a.safetensors", llama("0."))
    told = wrong(
        command, tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", "transformers.mistral",
        "--to", "equinox.MultiheadAttention", "--num-heads", 2, "--sliding-window", 3,
    )  # fmt: skip
    assert "A layer of equinox.MultiheadAttention has no option for sliding_window=3." in told
    assert not (tmp_path / "b.npz").exists()


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path, command: Run) -> None:
    write(tmp_path / "a.safetensors", bert("0.") | {"x": np.ones(3, np.float32)})
    arguments = ("convert", tmp_path / "a.safetensors", tmp_path / "new" / "b.npz", "--from", BERT,
                 "--to", "torch.MultiheadAttention", "--num-heads", H)  # fmt: skip
    status, trial, err = command(*arguments, "--dry-run", "--verify")
    assert (status, err) == (0, "")
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]
    status, out, _ = command(*arguments, "--verify")
    assert status == 0
    assert trial.splitlines()[-1] == f"Not written, as a trial: {out.splitlines()[-1]}"
    assert trial.splitlines()[0] == out.splitlines()[0]


def test_a_dry_run_refuses_what_the_format_cannot_hold(tmp_path: Path, command: Run) -> None:
    arrays = {n: a.astype(ml_dtypes.bfloat16) for n, a in bert("0.").items()}
    write(tmp_path / "a.safetensors", arrays)
    told = wrong(
        command, tmp_path / "a.safetensors", tmp_path / "b.npz", "--from", BERT, "--to", "anymha",
        "--num-heads", H, "--dry-run",
    )  # fmt: skip
    assert "bfloat16" in told


def test_several_prefixes_choose_the_layers_of_each(tmp_path: Path, command: Run) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(source, bert("a.0.") | bert("a.1.") | bert("b.") | bert("c."))
    arguments = ("--from", BERT, "--to", "torch.MultiheadAttention", "--num-heads", H)
    status, *_ = command(
        "convert", source, target, *arguments, "--prefix", "a.{i}", "--prefix", "c"
    )
    assert status == 0
    prefixes = {name.rpartition(".in_proj")[0] for name in read(target) if ".in_proj" in name}
    assert prefixes == {"a.0", "a.1", "c"}
    told = wrong(command, source, target, *arguments, "--prefix", "b", "--prefix", "d")
    assert "holds no layer whose names begin with 'd'" in told


def test_shards_are_converted_in_both_directions(tmp_path: Path, command: Run) -> None:
    arrays = {n: a for i in range(3) for n, a in bert(f"{i}.").items()}
    write(tmp_path / "a.safetensors", arrays)
    arguments = ("--from", BERT, "--to", BERT, "--num-heads", H)
    status, out, _ = command("convert", tmp_path / "a.safetensors", tmp_path / "b.bin", *arguments,
                             "--max-shard-size", "1KB")  # fmt: skip
    assert status == 0
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'b.bin.index.json'}: 3 layers of ")
    assert " in 4 files, 3,456 bytes" in out
    status, *_ = command("convert", tmp_path / "b.bin.index.json", tmp_path / "c.npz", *arguments)
    assert status == 0
    assert equal(read(tmp_path / "c.npz"), arrays)


def test_shards_never_overwrite_the_source_s(tmp_path: Path, command: Run) -> None:
    (tmp_path / "model").mkdir()
    index = tmp_path / "model" / "model.safetensors.index.json"
    arrays = bert("0.") | bert("1.")
    with create_file(index, announced(arrays), max_shard_bytes=600) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    told = wrong(
        command, tmp_path / "model", tmp_path / "model" / "model.safetensors", "--from", BERT,
        "--to", BERT, "--num-heads", H, "--max-shard-size", 600,
    )  # fmt: skip
    assert "must be different ones. Received: " in told
    assert equal(read(tmp_path / "model"), arrays)


@pytest.mark.parametrize("size", ["5 apples", "-1", "GB", "1.5.2"])
def test_a_size_that_is_none_is_told(command: Run, size: str) -> None:
    status, _, err = command("convert", "a.npz", "b.npz", "--from", BERT, "--to", BERT,
                             f"--max-shard-size={size}")  # fmt: skip
    assert status == 2
    assert "expected bytes, as 5GB or 500MiB, not" in err


def test_the_layers_of_shards_of_anymha_are_loaded(tmp_path: Path, command: Run) -> None:
    write(tmp_path / "a.safetensors", bert("0.") | bert("1."))
    target = tmp_path / "own.safetensors"
    status, *_ = command("convert", tmp_path / "a.safetensors", target, "--from", BERT, "--to",
                         "anymha", "--num-heads", H, "--max-shard-size", 500)  # fmt: skip
    assert status == 0
    layer = anymha.load(tmp_path / "own.safetensors.index.json", "numpy", prefix="1.")
    assert layer.config.num_heads == H


def test_inspect_prints_json_and_every_tensor(tmp_path: Path, command: Run) -> None:
    arrays = bert("0.") | {f"x.{i}": np.ones(2, np.float32) for i in range(20)}
    write(tmp_path / "a.safetensors", arrays)
    _, out, err = command("inspect", tmp_path / "a.safetensors", "--all", "--json")
    assert err == ""
    data = json.loads(out)
    assert data["format"] == "safetensors"
    assert data["tensor_count"] == len(arrays) == len(data["tensors"])
    assert data["tensors"]["x.7"] == {"dtype": "float32", "shape": [2]}
    assert data["layers"][0]["prefixes"] == ["0."]
    assert BERT in data["layers"][0]["layouts"]
    _, out, _ = command("inspect", tmp_path / "a.safetensors", "--json")
    assert "tensors" not in json.loads(out)
    _, out, _ = command("inspect", tmp_path / "a.safetensors", "--all")
    assert all(f"  {name}  float32 " in out for name in arrays)

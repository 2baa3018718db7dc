"""Nothing is lost: sources that stay, files written whole or not at all, layers in one file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.cli.main import main
from anymha.errors import FileError, UsageError
from anymha.framework.registry import BUILT_IN, LAYERS
from anymha.interchange.convert_model import convert_file
from anymha.interchange.files.atomic_write import PART, atomic_file, check_writable
from anymha.interchange.files.formats import open_file
from anymha.options.initializers import Orthogonal
from tests.file_samples import DATA, sample, save_orbax, write
from tests.frameworks import required
from tests.test_bombs import field

ROOT = Path(__file__).parents[1]
WEIGHTS = DATA / "minilm_attention.safetensors"
ATTENTION = {f"{name}.weight": sample("float32", (8, 8))
             for name in ("self.query", "self.key", "self.value", "output.dense")}  # fmt: skip

posix = pytest.mark.skipif(os.name != "posix", reason="signals, modes and links of POSIX")


def sharded(folder: Path) -> Path:
    """Two layers in two files with an index."""
    files = {}
    for number in (1, 2):
        file = f"model-{number}-of-2.safetensors"
        arrays = {f"layer.{number}.{name}": array for name, array in ATTENTION.items()}
        write(folder / file, arrays)
        files |= dict.fromkeys(arrays, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return index


def one_file(folder: Path) -> Path:
    return write(folder / "a.safetensors", {f"layer.1.{n}": a for n, a in ATTENTION.items()})


def onnx(folder: Path) -> Path:
    for name in ("external.onnx", "external.onnx.data"):
        shutil.copy(DATA / name, folder)
    return folder / "external.onnx"


SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "the file": (one_file, "a.safetensors"),
    "a shard": (sharded, "model-1-of-2.safetensors"),
    "a shard that the prefix leaves out": (sharded, "model-2-of-2.safetensors"),
    "the index": (sharded, "model.safetensors.index.json"),
    "external data": (onnx, "external.onnx.data"),
}


@posix
@pytest.mark.parametrize("way", ["itself", "link", "second name", "link to a link"])
@pytest.mark.parametrize("case", SOURCES)
def test_no_file_of_the_source_is_overwritten(tmp_path: Path, case: str, way: str) -> None:
    make, name = SOURCES[case]
    source = make(tmp_path)
    kept = target = tmp_path / name
    if way != "itself" or not name.endswith(".safetensors"):
        target = tmp_path / "new.safetensors"
        if way == "second name":
            os.link(kept, target)
        else:
            middle = tmp_path / "middle"
            middle.symlink_to(kept)
            target.symlink_to(middle if way == "link to a link" else kept)
    before = kept.read_bytes()
    with pytest.raises(UsageError, match="must be different ones"):
        convert_file(source, target, "transformers.bert", "anymha", prefix="layer.1.", num_heads=2)
    assert kept.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_a_shard_is_converted_into_no_other_shard_of_its_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    one, two = (tmp_path / f"model-{number}-of-2.safetensors" for number in (1, 2))
    with pytest.raises(UsageError, match=r"which .* needs as model-2-of-2\.safetensors"):
        convert_file(one, two, "transformers.bert", "anymha", num_heads=2)
    convert_file(one, tmp_path / "new.npz", "transformers.bert", "anymha", num_heads=2)


@posix
@pytest.mark.parametrize("way", ["link", "hard link", "second name", "target by a link"])
def test_shards_are_known_by_any_name(tmp_path: Path, way: str) -> None:
    (tmp_path / "model").mkdir()
    sharded(tmp_path / "model")
    one, two = (tmp_path / "model" / f"model-{number}-of-2.safetensors" for number in (1, 2))
    source, target = tmp_path / "other.safetensors", two
    if way == "link":
        source.symlink_to(one)
    elif way == "hard link":
        os.link(one, source)
    elif way == "second name":
        source = tmp_path / "model" / "second.safetensors"
        os.link(one, source)
    else:
        source, target = one, tmp_path / "new.safetensors"
        target.symlink_to(two)
    before = two.read_bytes()
    with pytest.raises(UsageError, match=r"needs as model-2-of-2\.safetensors"):
        convert_file(source, target, "transformers.bert", "anymha", num_heads=2)
    assert two.read_bytes() == before


@pytest.mark.parametrize("place", ["constant", "subgraph", "sparse", "function"])
def test_external_data_anywhere_in_an_onnx_file_is_kept(tmp_path: Path, place: str) -> None:
    named = "weights.npz"
    pair = field(1, b"location") + field(2, named.encode())
    tensor = b"\x08\x04\x10\x01" + field(8, b"c") + field(13, pair) + b"\x70\x01"
    constant = field(4, b"Constant") + field(5, field(1, b"value") + field(5, tensor))
    branch = field(4, b"If") + field(5, field(1, b"then_branch") + field(6, field(1, constant)))
    parts = {"constant": field(1, constant), "subgraph": field(1, branch),
             "sparse": field(15, field(1, tensor))}  # fmt: skip
    weights = b"".join(
        field(5, b"\x08\x08\x08\x08\x10\x01" + field(8, name.encode()) + field(9, array.tobytes()))
        for name, array in ATTENTION.items()
    )
    # The tag of field 25 takes two bytes.
    functions = b"\xca\x01" + field(7, field(7, constant))[1:] if place == "function" else b""
    source, kept = tmp_path / "a.onnx", tmp_path / named
    source.write_bytes(b"\x08\x08" + field(7, weights + parts.get(place, b"")) + functions)
    kept.write_bytes(b"A" * 16)
    with pytest.raises(UsageError, match="must be different ones"):
        convert_file(source, kept, "transformers.bert", "transformers.clip", num_heads=2)
    assert kept.read_bytes() == b"A" * 16
    convert_file(source, tmp_path / "b.npz", "transformers.bert", "transformers.clip", num_heads=2)


def test_no_file_of_an_orbax_checkpoint_is_overwritten(tmp_path: Path) -> None:
    save_orbax(tmp_path / "x", {"layer": ATTENTION})
    inside = next(one for one in (tmp_path / "x" / "d").iterdir() if one.is_file())
    target = tmp_path / "new.npz"
    target.symlink_to(inside)
    with pytest.raises(UsageError, match="must be different ones"):
        convert_file(tmp_path / "x", target, "transformers.bert", "anymha", num_heads=2)


@pytest.mark.parametrize("option", ["--json", "--junit", "--markdown"])
def test_reports_overwrite_no_source(tmp_path: Path, option: str, capsys: Any) -> None:
    source = one_file(tmp_path)
    before = source.read_bytes()
    arguments = ["--checkpoint", str(source), "--layout", "transformers.bert", "--num-heads", "2"]
    assert main(["parity", "--backends", "numpy", *arguments, option, str(source)]) == 2
    assert "must be different ones" in capsys.readouterr().err
    assert source.read_bytes() == before


@posix
def test_the_old_mode_is_kept_and_links_are_written_through(tmp_path: Path) -> None:
    old, link = tmp_path / "old.npz", tmp_path / "link.npz"
    for mode in (0o600, 0o640, 0o666):
        old.write_bytes(b"old")
        old.chmod(mode)
        with atomic_file(old) as stream:
            part = next(tmp_path.glob(".*.part"))
            assert stat.S_IMODE(part.stat().st_mode) == mode
            stream.write(b"new")
        assert stat.S_IMODE(old.stat().st_mode) == mode
    link.symlink_to("old.npz")
    with atomic_file(link) as stream:
        stream.write(b"through")
    assert link.is_symlink()
    assert old.read_bytes() == b"through"


@posix
@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "x" * 241])
def test_names_as_long_as_the_system_allows_are_written(tmp_path: Path, name: str) -> None:
    with atomic_file(tmp_path / name) as stream:
        stream.write(b"1")
    assert [one.name for one in tmp_path.iterdir()] == [name]


@posix
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_paths_that_the_system_refuses_are_told(tmp_path: Path, command: str, capsys: Any) -> None:
    loop, other = tmp_path / "loop.npz", tmp_path / "other.npz"
    loop.symlink_to(other)
    other.symlink_to(loop)
    long = tmp_path / f"{'x' * 300}.npz"
    for path, told in ((loop, "Too many levels"), (long, "File name too long")):
        words = ["inspect", str(path)] if command == "inspect" else [
            "convert", str(WEIGHTS), str(path), "--from", "transformers.bert", "--to", "anymha",
            "--num-heads", "12",
        ]  # fmt: skip
        assert main(words) == 2
        assert told in capsys.readouterr().err
        for check in (check_writable, open_file):
            with pytest.raises(FileError, match=told):
                check(path)


SLEEPING = (
    "import signal\n"  # what starts the tests may ignore some, and a process inherits that
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "for number in (signal.SIGTERM, signal.SIGHUP):\n"
    "    signal.signal(number, signal.SIG_DFL)\n"
    "import numpy as np, sys, time\n"
    "from pathlib import Path\n"
    "from anymha.interchange.files.formats import create_file\n"
    "from anymha.interchange.files.reader import Tensor\n"
    "def run():\n"
    "    tensors = {'a': Tensor((3,), np.dtype('f4')), 'b': Tensor((3,), np.dtype('f4'))}\n"
    "    with create_file(Path(sys.argv[1]), tensors) as writer:\n"
    "        writer.write('a', np.ones(3, 'f4'))\n"
    "        print('writing', flush=True)\n"
    "        time.sleep(60)\n"
)


def sleeping_writer(target: Path, last: str) -> subprocess.Popen[str]:
    """A process that has written half of a file."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    process = subprocess.Popen(
        [sys.executable, "-c", f"{SLEEPING}{last}", str(target)], text=True,
        env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process printed, to stdout and to stderr, once it is over."""
    try:
        return process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise


COMMAND = (
    "from anymha.cli.process import run_process\n"
    "def command():\n"
    "    run()\n"
    "    return 0\n"
    "sys.exit(run_process(command))\n"
)


@posix
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".weights.h5"])
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
     (signal.SIGHUP, 129, "hung up")],
)  # fmt: skip
def test_a_signal_leaves_no_part_and_one_line(
    tmp_path: Path, number: signal.Signals, status: int, word: str, suffix: str
) -> None:
    if suffix == ".weights.h5":
        pytest.importorskip("h5py", reason="h5py is not installed")
    target = tmp_path / f"a{suffix}"
    target.write_bytes(b"what was there")
    process = sleeping_writer(target, COMMAND)
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(number)
    _, err = ended(process)
    assert (process.returncode, err) == (status, f"anymha: {word}\n")
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"what was there"]


@posix
def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = sleeping_writer(tmp_path / "a.npz", before + COMMAND.replace("time.sleep(60)", ""))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert process.returncode == 143


@posix
def test_ctrl_c_in_a_program_leaves_no_part(tmp_path: Path) -> None:
    process = sleeping_writer(tmp_path / "a.npz", "run()\n")
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in ended(process)[1]
    assert list(tmp_path.iterdir()) == []


@posix
def test_the_part_of_a_killed_process_says_what_it_is_and_is_cleaned(tmp_path: Path) -> None:
    target = tmp_path / "model.npz"
    process = sleeping_writer(target, "run()\n")
    with atomic_file(target) as stream:  # a living writer's part stays
        stream.write(b"1")
    (part,) = tmp_path.glob(".*.part")
    assert re.fullmatch(r"\.model\.npz\.[0-9a-f]{8}" + re.escape(PART), part.name)
    process.kill()
    ended(process)
    assert part.exists()
    others = [tmp_path / f".other.npz.01234567{PART}", tmp_path / ".model.npz.01234567.part"]
    for other in others:
        other.write_bytes(b"")
    with atomic_file(target) as stream:
        stream.write(b"2")
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


@pytest.mark.parametrize("home", [one.name for one in (*BUILT_IN, *LAYERS)])
def test_layers_are_made_without_drawing_what_is_thrown_away(
    tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orthogonal matrix of width 2048 takes seconds to draw."""
    required({"keras": "keras", "flax": "flax", "equinox": "equinox"}.get(home, home))
    options: Any = {"query_features": 8, "kernel_initializer": "orthogonal", "seed": 3}
    layer = anymha.MultiHeadAttention(2, 4, **options, backend="numpy")
    waiting = anymha.MultiHeadAttention(2, 4, kernel_initializer="orthogonal", backend=home) \
        if home in ("numpy", "torch", "tensorflow", "keras") else None  # fmt: skip

    def drawn(*_: Any) -> np.ndarray:
        raise AssertionError("it was drawn")

    monkeypatch.setattr(Orthogonal, "_drawn", drawn)
    weights = anymha.get_weights(layer)
    anymha.save(tmp_path / "a.safetensors", layer)
    new = [anymha.load(tmp_path / "a.safetensors", home), anymha.convert(layer, to=home)]
    if waiting is not None:
        new.append(anymha.set_weights(waiting, dict(weights)))
    new.append(anymha.convert(new[0], to="numpy"))
    for one in new:
        assert isinstance(one.config.kernel_initializer, Orthogonal)
        assert all(np.array_equal(a, weights[n]) for n, a in anymha.get_weights(one).items())


def test_layers_whose_prefixes_begin_the_same_are_told_apart(tmp_path: Path) -> None:
    names = ("self.query", "self.key", "self.value", "output.dense")
    arrays = {}
    for number, prefix in enumerate(("", "query.", "query.kernel.")):
        kernel = np.full((8, 8), number, np.float32)
        arrays |= {f"{prefix}{name}.weight": kernel for name in names}
    source, target = write(tmp_path / "a.npz", arrays), tmp_path / "b.safetensors"
    convert_file(source, target, "transformers.bert", "anymha", num_heads=2)
    for number, prefix in enumerate(("", "query.", "query.kernel.")):
        layer = anymha.load(target, "numpy", prefix=prefix)
        assert all((array == number).all() for array in layer.weights.values())

"""Layers of other libraries beside ours on their converted weights: the numbers of the table."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, LayoutError
from anymha.interchange.compared_options import result_options
from anymha.interchange.layouts import from_canonical, layouts, to_canonical
from anymha.interchange.libraries import open_layer
from tests.frameworks import skip_or_fail
from tests.peer_layers import family_examples

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs/examples/layouts"
BOUND = 1e-6
"""Of the largest output: the families that compute their softmax in float32."""

NEEDING = ["t5", "mpnet", "dbrx"]
"""Families whose forward pass has steps that anymha's layer lacks."""


@pytest.fixture(scope="module")
def families() -> Any:
    """The example's module of families."""
    with family_examples() as module:
        yield module


def quiet(function: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        return function()


def bits(weights: Any) -> dict[str, bytes]:
    return {name: np.ascontiguousarray(array).tobytes() for name, array in weights.items()}


def names() -> list[str]:
    """The names of the example's families, without its frameworks."""
    text = (EXAMPLE / "families.py").read_text(encoding="utf-8").partition("\nFAMILIES")[2]
    scalings = ("linear", "dynamic", "yarn", "llama3", "longrope", "proportional")
    generated = [f"llama, {kind}" for kind in scalings] + ["gemma3, local", "gemma3, global"]
    return [*re.findall(r'^    "([^"]+)":', text, re.MULTILINE), *generated]


def test_every_family_of_the_example_is_tested(families: Any) -> None:
    assert set(names()) == set(families.FAMILIES)


@pytest.mark.parametrize("name", names())
def test_family_gives_the_output_of_ours_and_takes_weights_back(families: Any, name: str) -> None:
    layer, theirs, ours = quiet(families.FAMILIES[name])
    assert theirs.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUND * np.abs(theirs).max())
    # The module's own arrays come back bit for bit, and so do new ones through the module.
    state = {key: tensor.numpy().copy() for key, tensor in layer.state_dict().items()}
    weights = anymha.get_weights(layer)
    assert weights.layout == f"transformers.{name.partition(',')[0]}"
    assert bits(from_canonical(weights, weights.layout)) == bits(state)
    told = {"num_heads": families.H}
    told |= {option: getattr(weights.config, option) for option in result_options()}
    again, _ = to_canonical(state, weights.layout, **told)
    assert bits(again) == bits(weights)
    rng = np.random.default_rng(7)
    for held in (weights, weights.extras):
        for key, array in held.items():
            held[key] = rng.standard_normal(array.shape)
    assert anymha.set_weights(layer, weights) is layer
    found = anymha.get_weights(layer)
    assert bits(found) == bits(weights)
    assert bits(found.extras) == bits(weights.extras)
    if name in NEEDING:
        with pytest.raises(LayoutError, match="computes more than attention"):
            anymha.convert(layer, to="numpy")


def test_options_of_a_module_come_with_its_weights(families: Any) -> None:
    configs = {
        "mistral": {"sliding_window": 3},
        "gemma3, local": {"scale": 20**-0.5, "sliding_window": 3},
        "gemma2": {"scale": 20**-0.5, "sliding_window": 3},
        "t5": {"scale": 1.0, "dropout": 0.1},
        "bert": {"dropout": 0.1, "scale": None},
        "gpt2": {"dropout": 0.1, "scale": None, "sliding_window": None},
        "qwen3": {"num_key_value_heads": 2, "sliding_window": None, "dropout": 0.0},
        "bart": {"dropout": 0.0, "num_heads": 4},
        "gptj": {"dropout": 0.0, "scale": None},
        "gpt_bigcode, one key head": {"dropout": 0.1, "num_key_value_heads": 1},
    }
    for name, options in configs.items():
        layer, _, _ = quiet(families.FAMILIES[name])
        config = anymha.get_weights(layer).config
        assert {option: getattr(config, option) for option in options} == options, name


def test_options_that_a_family_needs_are_read_from_its_module(
    families: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _, _ = quiet(families.FAMILIES["gemma2"])
    weights = anymha.get_weights(layer)
    if "softcap" in result_options():
        assert weights.config.softcap == 2.0
    assert any("tanh" in need for need in weights.needs) == ("softcap" not in result_options())
    # As when the config has the option: the module states it, under the family's own name.
    options = (*result_options(), "softcap")
    monkeypatch.setattr("anymha.interchange.libraries.modules.result_options", lambda: options)
    for cap in (2.0, None):
        layer.attn_logit_softcapping = cap
        assert open_layer(layer).sizes["softcap"] == cap


def test_window_is_that_of_the_layer_not_of_the_model(families: Any) -> None:
    for family, prefix in (("gpt_oss", "GptOss"), ("gemma3", "Gemma3Text")):
        config = families.part(family, f"{prefix}Config")(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            num_hidden_layers=2, sliding_window=3,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        name = f"{prefix.removesuffix('Text')}Attention"
        windows = [
            anymha.get_weights(
                families.ready(families.part(family, name)(config, layer_idx=i))
            ).config.sliding_window
            for i in (0, 1)
        ]
        assert windows == [3, None]


def test_every_layout_stands_in_the_documentation() -> None:
    page = (ROOT / "docs/layouts.md").read_text(encoding="utf-8")
    assert [name for name in layouts() if f"`{name}`" not in page] == []


def test_part_of_a_module_is_refused(families: Any) -> None:
    layer, _, _ = quiet(families.FAMILIES["bert"])
    with pytest.raises(ArgumentError, match="BertSelfAttention"):
        anymha.get_weights(layer.self)


def test_modules_of_timm_and_x_transformers_are_known_by_their_class() -> None:
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    if torch is None:
        skip_or_fail("torch", "torch is not installed")

    # timm/layers/attention.py of 1.0, without its options.
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.scale = 2, 4**-0.5
            self.qkv, self.proj = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
            self.attn_drop = torch.nn.Dropout(0.25)

        def forward(self, x: Any) -> Any:
            batch, length, width = x.shape
            qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            scores = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
            return self.proj((scores @ v).transpose(1, 2).reshape(batch, length, width))

    Attention.__module__ = "timm.layers.attention"
    layer = Attention().double()
    x = np.random.default_rng(0).standard_normal((2, 5, 8))
    theirs = layer(torch.from_numpy(x)).detach().numpy()
    converted = anymha.convert(layer, to="numpy")
    np.testing.assert_allclose(converted(x), theirs, rtol=0, atol=1e-13)
    assert converted.config.dropout == 0.25


def test_table_is_printed_and_every_error_is_small() -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "--only", "flax"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["nnx", "nnx, grouped", "nnx, with norms", "linen"]
    if importlib.util.find_spec("flax") is None:
        skip_or_fail("flax", "flax is not installed")
    for row in rows:
        assert float(row.split("|")[-2]) < 1e-5

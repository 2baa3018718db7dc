"""What users see of a layer: `help`, signatures, `isinstance`, `repr`, names."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ConfigError
from anymha.framework.registry import BUILT_IN, LAYERS, get_layer
from anymha.layer.arguments import CALL_ARGUMENTS
from anymha.options.config import AttentionConfig
from tests.frameworks import required

HOMES = [backend.name for backend in (*BUILT_IN, *LAYERS)]
OPTIONS = [field.name for field in fields(AttentionConfig)]


def home(name: str) -> Any:
    if name != "numpy":
        required(name)
    return get_layer(name)


def shown(thing: Any) -> str:
    """What `help` shows, without the bold face."""
    return pydoc.plain(pydoc.render_doc(thing))


@pytest.mark.parametrize("name", HOMES)
def test_help_shows_every_option_and_every_argument(name: str) -> None:
    kind = home(name)
    layer = kind(2, 4, query_features=8, seed=0)
    page = shown(layer)
    assert page == shown(kind) or name in page or "MultiHeadAttention" in page
    for option in OPTIONS:
        assert f"{option}: " in kind.__init__.__doc__
        assert option in page
    call = layer.forward if name == "torch" else layer.__call__
    for text in (page, shown(call)):
        assert "Call self as a function." not in text
        for argument in CALL_ARGUMENTS:
            if name == "keras" and argument.name == "return_activity_loss":
                continue
            assert f"{argument.name}: {argument.meaning.split()[0]}" in text, argument.name


@pytest.mark.parametrize("name", HOMES)
def test_signatures_have_types_and_defaults(name: str) -> None:
    kind = home(name)
    layer = kind(2, 4, query_features=8, seed=0)
    for shows in (kind, kind.__init__):
        signature = inspect.signature(shows)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        assert [p.name for p in parameters][: len(OPTIONS)] == OPTIONS
        assert all(p.annotation is not p.empty for p in parameters)
        assert [p.name for p in parameters if p.default is p.empty] == ["num_heads", "key_dim"]
    call = inspect.signature(layer.forward if name == "torch" else layer.__call__)
    assert all(p.annotation is not p.empty for p in call.parameters.values())
    names = [a.name for a in CALL_ARGUMENTS if name != "keras" or a.name != "return_activity_loss"]
    assert list(call.parameters)[: len(names)] == names
    required_ones = [p.name for p in call.parameters.values() if p.default is p.empty]
    assert required_ones == ["query"]
    if name == "flax":
        assert inspect.signature(layer) == call


def test_help_shows_the_functions() -> None:
    page = shown(anymha.multi_head_attention)
    for argument in CALL_ARGUMENTS:
        assert f"\n        {argument.name}: " in page
    signature = inspect.signature(anymha.multi_head_attention)
    assert list(signature.parameters)[:5] == ["weights", "query", "value", "key", "config"]
    signature = inspect.signature(anymha.dot_product_attention)
    assert "unknown" not in signature.parameters
    assert list(signature.parameters)[:3] == ["query", "key", "value"]
    assert all(signature.parameters[n].default is inspect.Parameter.empty for n in ("key", "value"))


def test_help_shows_the_layer_of_any_backend() -> None:
    page = shown(anymha.MultiHeadAttention)
    assert all(f"\n |      {option}: " in page for option in [*OPTIONS, "backend"])
    assert list(inspect.signature(anymha.MultiHeadAttention).parameters) == [*OPTIONS, "backend"]


@pytest.mark.parametrize("name", HOMES)
def test_every_layer_is_an_instance_of_the_class(name: str) -> None:
    kind = home(name)
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, seed=0, backend=name)
    assert type(layer) is kind
    assert isinstance(layer, anymha.MultiHeadAttention)
    assert issubclass(kind, anymha.MultiHeadAttention)
    if name != "keras":  # Keras's own way of copying gives warnings of its own
        assert isinstance(copy.deepcopy(layer), anymha.MultiHeadAttention)
    derived = type("Derived", (kind,), {})
    assert issubclass(derived, anymha.MultiHeadAttention)
    assert isinstance(derived(2, 4, query_features=8, seed=0), anymha.MultiHeadAttention)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "flax", "equinox"])
def test_layers_are_pickled(name: str) -> None:
    layer = home(name)(2, 4, query_features=8, seed=0)
    back = pickle.loads(pickle.dumps(layer))
    assert type(back) is type(layer)
    assert isinstance(back, anymha.MultiHeadAttention)


def test_others_are_no_instances_of_the_class() -> None:
    for other in (3, None, "layer", AttentionConfig(2, 4), np.ones(3), AttentionConfig):
        assert not isinstance(other, anymha.MultiHeadAttention)
    assert not issubclass(AttentionConfig, anymha.MultiHeadAttention)
    assert issubclass(anymha.MultiHeadAttention, anymha.MultiHeadAttention)
    assert pickle.loads(pickle.dumps(anymha.MultiHeadAttention)) is anymha.MultiHeadAttention
    torch = required("torch")
    assert not isinstance(torch.nn.MultiheadAttention(8, 2), anymha.MultiHeadAttention)


def test_the_class_of_any_backend_is_not_derived_from() -> None:
    with pytest.raises(TypeError, match="must derive from the layer of one framework"):
        type("Derived", (anymha.MultiHeadAttention,), {})


@pytest.mark.parametrize("name", HOMES)
def test_repr_tells_the_options(name: str) -> None:
    text = " ".join(repr(home(name)(2, 4, query_features=8, softcap=30, seed=0)).split())
    for part in ("num_heads=2", "key_dim=4", "query_features=8", "softcap=30.0"):
        assert part in text
    for part in ("dropout=", "sliding_window", "memory_budget", " object at 0x"):
        assert part not in text


def test_repr_of_options_is_code() -> None:
    config = AttentionConfig(2, 4, use_bias=("query",), softcap=3.0, kernel_initializer="zeros")
    text = "AttentionConfig(num_heads=2, key_dim=4, use_bias=('query',), kernel_initializer=Zeros()"
    assert repr(config) == f"{text}, softcap=3.0)"
    assert repr(AttentionConfig(2, 4)) == "AttentionConfig(num_heads=2, key_dim=4)"


def test_styles_of_repr() -> None:
    layer = home("numpy")(2, 4, softcap=3.0)
    assert repr(layer) == "MultiHeadAttention(num_heads=2, key_dim=4, softcap=3.0)"
    layer = home("torch")(2, 4, softcap=3.0)
    assert repr(layer).startswith("MultiHeadAttention(\n  num_heads=2, key_dim=4, softcap=3.0\n")
    layer = home("keras")(2, 4, name="a", softcap=3.0)
    text = "<MultiHeadAttention name=a, built=False, num_heads=2, key_dim=4, softcap=3.0>"
    assert repr(layer) == text
    layer = home("tensorflow")(2, 4, name="a")
    assert repr(layer) == "<MultiHeadAttention 'a' num_heads=2, key_dim=4>"


INVALID = {
    "tensorflow": {
        "a/b c": "a_b_c",
        "0": "layer_0",
        "": "layer_",
        "_a": "layer__a",
        "é": "layer__",
    },
    "keras": {"a/b c": "a_b c"},
}


@pytest.mark.parametrize("name", HOMES)
def test_names_that_a_framework_refuses_are_refused_in_words(name: str) -> None:
    kind = home(name)
    for wrong, right in INVALID.get(name, {}).items():
        with pytest.raises(ConfigError, match=r"^`name` must be .*Pass e\.g\. name=") as caught:
            kind(2, 4, query_features=8, name=wrong)
        assert str(caught.value).endswith(f"name={right!r}.")
        kind(2, 4, query_features=8, name=right)
    with pytest.raises(ConfigError, match="`name` must be a string"):
        kind(2, 4, name=3)
    kind(2, 4, query_features=8, name="attention")


@pytest.mark.parametrize("name", HOMES)
def test_a_name_is_mended_where_a_layer_is_converted(name: str) -> None:
    home(name)
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, name="block.0/é", backend="numpy")
    made = anymha.convert(layer, to=name)
    wanted = {"tensorflow": "block_0__", "keras": "block.0_é"}.get(name, "block.0/é")
    assert made.config.name == wanted

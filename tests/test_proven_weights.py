"""Modules whose weights nobody has named: they are read where numbers prove them."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anymha.cli.main import main
from anymha.parity import compare, declare
from anymha.parity.adapters import adapter_for
from anymha.parity.adapters.module_state import state_of
from anymha.parity.comparison.proven_weights import by_names
from tests.frameworks import required

torch = required("torch")

X = np.random.default_rng(3).standard_normal((2, 5, 16)).astype(np.float32)
MASK = np.random.default_rng(4).random((2, 5, 5)) < 0.6  # a query of which sees nothing
MASK[1, 2] = False


@pytest.fixture(autouse=True)
def single_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search for single mistakes alone: two at once take long where nothing explains them."""
    for name in ("PAIRS_SECONDS", "PARTS_SECONDS", "CALLS_SECONDS"):
        monkeypatch.setattr(f"anymha.parity.diagnose.diagnosis.{name}", 0.0)


FORMS = {
    "letters": ("q", "k", "v", "o"),
    "words": ("queries", "keys", "values", "fc_out"),
    "W": ("W_q", "W_k", "W_v", "W_o"),
    "linear": ("q_linear", "k_linear", "v_linear", "out"),
    "to": ("to_q", "to_k", "to_v", "proj"),
    "fused": ("qkv", "proj"),
}


def made(form: str, mistake: str = "", heads: int = 4, tell: bool = False, **options: Any) -> Any:
    """A module as people write them, with one mistake."""
    names = FORMS[form]

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                width = 48 if name == "qkv" else 16
                setattr(self, name, torch.nn.Linear(16, width, **options))
            if tell:
                self.num_heads = heads

        def forward(self, x: Any, mask: Any = None) -> Any:
            *parts, last = [getattr(self, name) for name in names]
            q, k, v = parts[0](x).chunk(3, -1) if len(parts) == 1 else [part(x) for part in parts]
            split = [y.view(*y.shape[:2], heads, -1).transpose(1, 2) for y in (q, k, v)]
            q, k, v = split
            scale = (16 if mistake == "scale" else 16 // heads) ** -0.5
            logits = q @ k.transpose(-1, -2) * scale
            if mask is not None:
                logits = logits.masked_fill(~mask, -1e9)
            p = logits.softmax(-2 if mistake == "axis" else -1)
            context = (p @ v).transpose(1, 2)
            if mistake == "joined":
                context = p @ v
            return last(context.reshape(x.shape))

    torch.manual_seed(0)
    return Attention()


CAUSES = {
    "scale": "wrong scale",
    "axis": "softmax over another axis (over the queries)",
    "joined": "heads",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mistake_between_two_modules_has_a_cause(form: str) -> None:
    mistake = list(CAUSES)[list(FORMS).index(form) % len(CAUSES)]
    tell, bias = form in ("W", "to"), form != "words"
    reference = made(form, tell=tell, bias=bias)
    report = compare(reference, made(form, mistake, tell=tell, bias=bias), X)
    assert CAUSES[mistake] in str(report.diagnosis)
    assert "4 heads of 4" in report.to_text()
    assert "it computes more than attention" not in report.to_text()


class Bare(torch.nn.Module):
    """Matrices (in, out) without layers, two key heads for four query heads, causal unasked."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, width in {"W_q": 16, "W_k": 8, "W_v": 8, "W_o": 16}.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(16, width) / 4))
        self.b_o = torch.nn.Parameter(torch.randn(16))
        self.scale = scale

    def forward(self, x: Any) -> Any:
        q, k, v = (
            (x @ matrix).unflatten(-1, (-1, 4)).transpose(1, 2)
            for matrix in (self.W_q, self.W_k, self.W_v)
        )
        context = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return context.transpose(1, 2).flatten(2) @ self.W_o + self.b_o


class Wrapped(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.attention = made("W", "" if scale == 0.5 else "scale")

    def forward(self, x: Any) -> Any:
        return self.attention(x)


class Rotated(torch.nn.Module):
    """Rotary positions of which the weights tell nothing."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, torch.nn.Linear(16, 16, bias=False))
        self.layout = layout

    def forward(self, x: Any) -> Any:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in layers)
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(4) / 4)

        def turned(y: Any) -> Any:
            pairs = y.unflatten(-1, (2, 4) if self.layout == "half" else (4, 2))
            one, other = pairs.unbind(-2 if self.layout == "half" else -1)
            both = (one * angles.cos() - other * angles.sin(),
                    other * angles.cos() + one * angles.sin())  # fmt: skip
            return torch.stack(both, -2 if self.layout == "half" else -1).flatten(-2)

        function = torch.nn.functional.scaled_dot_product_attention
        context = function(turned(q), turned(k), v)
        return self.o_proj(context.transpose(1, 2).flatten(2))


def test_rotary_positions_are_found_by_numbers() -> None:
    report = compare(Rotated("half"), Rotated("interleaved"), X)
    assert "rotary layout swapped" in str(report.diagnosis)
    assert "2 heads of 8 and rotary positions (base=10000, layout='half')" in report.to_text()


@pytest.mark.parametrize("kind", [Bare, Wrapped])
def test_matrices_without_layers_and_a_layer_within_another_are_read(kind: Any) -> None:
    report = compare(kind(0.5), kind(0.25), X)
    assert "wrong scale" in str(report.diagnosis)
    assert "4 heads of 4: attention of them gives its output" in report.to_text()


def test_a_candidate_of_other_names_is_judged_by_the_reference_alone() -> None:
    report = compare(made("letters", heads=2), made("W", "axis", heads=2), X)
    assert CAUSES["axis"] in str(report.diagnosis)
    assert "2 heads of 8" in report.to_text()
    assert not any(stage.name.startswith("weight ") for stage in report.stages)


def test_what_a_reference_makes_of_empty_rows_hides_no_weights() -> None:
    report = compare(made("letters"), made("letters", "scale"), X, attention_mask=MASK)
    assert CAUSES["scale"] in str(report.diagnosis)
    assert "fully masked rows" in report.to_text()


def test_other_weights_are_told_by_name() -> None:
    candidate = made("letters")
    with torch.no_grad():
        candidate.k.weight.copy_(candidate.k.weight.t().clone())
    report = compare(made("letters"), candidate, X)
    assert "key" in str(report.diagnosis)
    assert not next(stage for stage in report.stages if stage.name == "weight key.kernel").passed


class Strange(torch.nn.Module):
    """What it computes besides attention, and what its state holds besides arrays, are its own."""

    def __init__(self, extra: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, torch.nn.Linear(16, 16))
        self.extra = extra

    @property
    def num_heads(self) -> int:
        raise RuntimeError("no")

    def get_extra_state(self) -> Any:
        return {"scales": 3}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Any) -> Any:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in layers)
        context = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        context = context.transpose(1, 2).flatten(2)
        return self.o_proj(context + self.extra * torch.tanh(3 * context) * torch.sin(7 * context))


def test_modules_with_a_state_of_their_own_cost_no_result() -> None:
    report = compare(Strange(), Strange(1.0), X)
    assert "4 heads of 4" in report.to_text()
    lazy = torch.nn.Sequential(torch.nn.LazyLinear(16))
    assert not compare(made("letters"), lazy, X).passed


def test_a_candidate_is_read_once_where_the_reference_is_no_attention_of_its_weights() -> None:
    reference = declare(Strange(1.0), layout="transformers.llama", num_heads=4)
    candidate = made("words")
    with torch.no_grad():
        for theirs, own in zip(candidate.parameters(), Strange().parameters(), strict=True):
            theirs.copy_(own)
    report = compare(reference, candidate, X)
    assert not report.passed
    assert report.to_text().count("are read by the names of its layers") == 1


def test_one_position_does_not_tell_the_number_of_heads() -> None:
    candidate = made("words")
    with torch.no_grad():
        candidate.values.weight.mul_(torch.linspace(-1, 1, 16))
    report = compare(made("words"), candidate, X[:, :1])
    assert "4 heads of 4" in report.to_text()


def test_names_that_mean_several_things_are_not_read_without_proof() -> None:
    assert by_names(adapter_for(made("fused", tell=True))).why.startswith(": attention")
    module = made("fused", "scale", tell=True)
    scaled = module.forward
    module.forward = lambda x: torch.tanh(scaled(x))
    assert by_names(adapter_for(module)) is None


@pytest.mark.parametrize(
    ("names", "order", "mistake"),
    [(("qkv", "proj"), "blocks", "scale"), (("qkv", "proj"), "groups", "axis"),
     (("c_attn", "c_proj"), "blocks", "joined"), (("c_attn", "c_proj"), "groups", "scale")],
)  # fmt: skip
def test_of_several_meanings_that_with_a_known_mistake_is_read(names, order, mistake) -> None:
    class Fused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            setattr(self, names[0], torch.nn.Linear(16, 48))
            setattr(self, names[1], torch.nn.Linear(16, 16))

        def forward(self, x: Any) -> Any:
            y, d = getattr(self, names[0])(x), 16 if mistake == "scale" else 4
            parts = y.unflatten(-1, (3, 4, 4) if order == "blocks" else (4, 3, 4))
            q, k, v = (part.transpose(1, 2) for part in parts.unbind(2 if order == "blocks" else 3))
            hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            logits = (q @ k.transpose(-1, -2) / d**0.5).masked_fill(hidden, -1e9)
            context = logits.softmax(-2 if mistake == "axis" else -1) @ v
            turned = context if mistake == "joined" else context.transpose(1, 2)
            return getattr(self, names[1])(turned.reshape(x.shape))

    torch.manual_seed(0)
    module = Fused()
    reading = by_names(adapter_for(module))
    assert "of the layouts that fit, one mistake explains its output in this alone" in reading.note
    rows = getattr(module, names[0]).weight.detach().numpy()
    kernel = rows.reshape((3, 4, 4, 16) if order == "blocks" else (4, 3, 4, 16))
    first = kernel[0] if order == "blocks" else kernel[:, 0]
    read = reading.adapter.description.weights["query.kernel"]
    assert np.array_equal(read, first.transpose(2, 0, 1))


def test_nothing_is_read_where_numbers_do_not_prove_it() -> None:
    class Other(torch.nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            for name in FORMS["letters"]:
                setattr(self, name, torch.nn.Linear(16, 16))
            self.factor = factor

        def forward(self, x: Any) -> Any:
            return self.o(torch.tanh(self.q(x)) * self.k(x) + self.factor * self.v(x))

    torch.manual_seed(0)
    one = Other(1.0)
    torch.manual_seed(0)
    report = compare(one, Other(2.0), X)
    assert not report.passed
    assert "neither side tells its weights" in report.to_text()
    assert "are read by" not in report.to_text()


def attention_of(lines: Callable[[str, Any], Any], x: Any, scale: float) -> Any:
    """Attention of four linear layers by name, in JAX."""
    jax: Any = importlib.import_module("jax")
    q, k, v = (
        lines(name, x).reshape(2, 5, 4, 4).swapaxes(1, 2) for name in ("query", "key", "value")
    )
    context = jax.nn.softmax(scale * q @ k.swapaxes(2, 3)) @ v
    return lines("out", context.swapaxes(1, 2).reshape(2, 5, 16))


def of_nnx(scale: float) -> Any:
    nnx: Any = importlib.import_module("flax.nnx")

    class Attention(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            for name in ("query", "key", "value", "out"):
                setattr(self, name, nnx.Linear(16, 16, rngs=rngs))

        def __call__(self, x: Any) -> Any:
            return attention_of(lambda name, x: getattr(self, name)(x), x, scale)

    return Attention(nnx.Rngs(0))


def of_linen(scale: float) -> Any:
    nn: Any = importlib.import_module("flax.linen")

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return attention_of(lambda name, x: nn.Dense(16, name=name)(x), x, scale)

    jax: Any = importlib.import_module("jax")
    module = Attention()
    return module.bind(module.init(jax.random.key(0), X))


def of_equinox(scale: float) -> Any:
    eqx: Any = importlib.import_module("equinox")
    jax: Any = importlib.import_module("jax")

    class Attention(eqx.Module):
        query: Any
        key: Any
        value: Any
        out: Any

        def __call__(self, x: Any) -> Any:
            return attention_of(lambda n, x: jax.vmap(jax.vmap(getattr(self, n)))(x), x, scale)

    keys = jax.random.split(jax.random.key(0), 4)
    return Attention(*(eqx.nn.Linear(16, 16, key=key) for key in keys))


@pytest.mark.parametrize("make", [of_nnx, of_linen, of_equinox])
def test_modules_of_jax_are_read_alike(make: Callable[[float], Any]) -> None:
    required("equinox" if make is of_equinox else "flax")
    x = importlib.import_module("jax.numpy").asarray(X)
    report = compare(make(0.5), make(0.3), x)
    assert "wrong scale (0.6 times)" in str(report.diagnosis)
    assert "4 heads of 4: attention of them gives its output" in report.to_text()


def test_the_command_line_gives_a_backend_the_weights_of_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    root = Path(__file__).parents[1]
    file = tmp_path / "modules_of_mine.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(root)!r})\n"
        "from tests.test_proven_weights import made\n"
        "def right(): return made('fused')\n"
        "def says(): return made('W', 'scale', tell=True)\n"
        "def silent(): return made('W', 'scale')\n"
    )

    def run(name: str) -> tuple[int, str, str]:
        status = main(["compare", "numpy", f"{file}:{name}", "--cases", "self"])
        printed = capsys.readouterr()
        return status, " ".join(printed.out.split()), printed.err

    status, out, _ = run("right")
    assert (status, "4 heads of 4: attention of them gives its output" in out) == (0, True)
    status, out, _ = run("says")
    assert (status, "Cause: wrong scale" in out) == (1, True)
    assert "4 heads of 4, as it says; that its output is attention of them is not proven" in out
    status, _, err = run("silent")
    assert (status, "must get the weights of" in err) == (2, True)


def test_a_module_that_has_other_weights_than_were_declared_is_told() -> None:
    reference = made("W", tell=True)
    low = made("W", tell=True)
    with torch.no_grad():
        low.W_v.weight += 0.1 * torch.outer(torch.arange(16.0), torch.ones(16))
    weights = {name.replace("W_", ""): x for name, x in reference.state_dict().items()}
    names = {"layout": "transformers.mpnet", "num_heads": 4}
    right = declare(reference, weights, **names)
    other = made("W", tell=True)
    with torch.no_grad():
        other.W_v.weight.copy_(torch.randn(16, 16, generator=torch.manual_seed(1)) / 4)
    for candidate, words in ((low, "rank 1"), (other, "value.kernel")):
        report = compare(right, declare(candidate, weights, **names), X)
        assert words in str(report.diagnosis), report.to_text()


class Three(torch.nn.Module):
    """Three layers: what their context is multiplied by is of another module."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("query", "key", "value"):
            setattr(self, name, torch.nn.Linear(16, 16))
        self.scale = scale

    def forward(self, x: Any) -> Any:
        q, k, v = (
            layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        p = (self.scale * q @ k.transpose(-1, -2)).softmax(-1)
        return (p @ v).transpose(1, 2).flatten(2)


def held_in_a_closure(scale: float) -> Any:
    module = Three(scale)

    def function(query: Any) -> Any:
        with torch.no_grad():
            return module(torch.tensor(query)).numpy()

    return function


def of_arrays(w: Any, x: Any, scale: float = 0.5) -> Any:
    """Attention of a mapping of arrays with an axis of heads."""
    q, k, v = (np.einsum("btd,dhk->bhtk", x, w[f"w{n}"]) + w[f"b{n}"][:, None] for n in "qkv")
    p = np.exp(scale * q @ k.swapaxes(2, 3))
    y = p / p.sum(-1, keepdims=True) @ v
    return np.einsum("bhtk,hkd->btd", y, w["wo"])


def arrays(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    w = {f"w{n}": rng.standard_normal((16, 4, 4)) / 4 for n in "qkv"}
    w |= {f"b{n}": rng.standard_normal((4, 4)) for n in "qkv"}
    w["wo"] = rng.standard_normal((4, 4, 16)) / 4
    return {name: array.astype(np.float32) for name, array in w.items()}


def held_by_a_function_that_is_called(scale: float) -> Any:
    w = arrays()
    inner = lambda x: of_arrays(w, x, scale)  # noqa: E731
    return lambda x: inner(x)


def given_in_part(scale: float) -> Any:
    return functools.partial(of_arrays, arrays(), scale=scale)


def bound(scale: float) -> Any:
    """A method of an object with layers, which takes arrays of NumPy."""
    module = Three(scale)
    module.run = types.MethodType(lambda self, x: self(torch.tensor(x)).detach().numpy(), module)
    return module.run


@pytest.mark.parametrize(
    "make",
    [
        Three,
        held_in_a_closure,
        held_by_a_function_that_is_called,
        given_in_part,
        bound,
    ],
)
def test_weights_that_a_function_uses_are_read(make: Callable[[float], Any]) -> None:
    report = compare(make(0.5), make(0.25), X)
    assert "wrong scale (applied twice" in str(report.diagnosis)
    assert "4 heads of 4: attention of them gives its output" in report.to_text()


def test_other_weights_that_a_function_uses_are_told() -> None:
    other = arrays()
    other["wv"] = other["wv"] + np.float32(0.1)
    report = compare(given_in_part(0.5), functools.partial(of_arrays, other), X)
    assert "other weights (value.kernel differs by a matrix of rank 1" in str(report.diagnosis)


def test_a_function_that_uses_several_modules_is_not_read() -> None:
    one, other = Three(0.5), Three(0.5)
    state = state_of(lambda x: one(x) + other(x))
    assert not state
    assert state_of(lambda x: one(x)).keys() == one.state_dict().keys()

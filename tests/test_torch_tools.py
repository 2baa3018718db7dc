"""PyTorch's tools for `nn.Linear` act on the layer's projections as they do on any Linear.

Each test applies a tool to attention written out here of four `nn.Linear`s and to the layer, with
the same weights, trains both for a few steps, and compares the weights and the outputs. The
subject "reference" runs a test on the written-out attention alone, which shows that what the test
asks for is what the tool does.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import AnymhaError, ShapeError, WeightsError
from tests.frameworks import required
from tests.pairs import pairs
from tests.peer_layers import need

torch = required("torch")

from torch import nn  # noqa: E402
from torch.fx.passes.shape_prop import ShapeProp  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop  # noqa: E402

from anymha_torch import MultiHeadAttention  # noqa: E402

pytestmark = [
    # Of torch and what it needs, when a tool is used for the first time.
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
]
# Deprecated in favour of `torch.nn.utils.parametrizations`, and much used.
old_weight_norm = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")

PROJECTIONS = ("query", "key", "value", "output")
HEADS, KEY_DIM, VALUE_DIM, WIDTH = 2, 3, 5, 8
SIZES = {
    "query": (WIDTH, HEADS * KEY_DIM), "key": (WIDTH, HEADS * KEY_DIM),
    "value": (WIDTH, HEADS * VALUE_DIM), "output": (HEADS * VALUE_DIM, WIDTH),
}  # fmt: skip
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


# --- The attention that the layer is compared with -----------------------------------------------


class Reference(nn.Module):
    """Attention written out of four Linears and a softmax."""

    def __init__(self):
        super().__init__()
        for name, sizes in SIZES.items():
            self.add_module(name, nn.Linear(*sizes))

    def forward(self, query, value=None, key=None, *, value_mask=None, use_causal_mask=False):
        value = query if value is None else value
        key = value if key is None else key
        calls = ((self.query, query), (self.key, key), (self.value, value))
        q, k, v = (one(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for one, x in calls)
        logits = (q @ k.transpose(-1, -2)) * KEY_DIM**-0.5  # (B, H, T, S)
        if value_mask is not None:
            logits = logits.masked_fill(~value_mask[:, None, None, :], -torch.inf)
        if use_causal_mask:
            visible = torch.ones_like(logits, dtype=torch.bool).tril()
            logits = logits.masked_fill(~visible, -torch.inf)
        context = torch.softmax(logits, -1) @ v
        return self.output(context.transpose(1, 2).flatten(2))


def reference(seed: int = 0) -> Reference:
    """The reference with random weights, none of them zero."""
    made, random = Reference(), np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.from_numpy(0.3 * random.standard_normal(parameter.shape)))
    return made


def array(tensor: Any) -> np.ndarray:
    """A tensor in NumPy, which has no bfloat16 of its own."""
    half = tensor.dtype == torch.bfloat16
    return (tensor.float() if half else tensor).detach().numpy()


def canonical(weights: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights and biases of Linears, in the canonical names and shapes."""
    found = {}
    for name in PROJECTIONS:
        weight, bias = (weights[f"{name}.{part}"] for part in ("weight", "bias"))
        inner = (HEADS, -1, WIDTH) if name == "output" else (WIDTH, HEADS, -1)
        found[f"{name}.kernel"] = array(weight.T.reshape(inner))
        shape = (WIDTH,) if name == "output" else (HEADS, -1)
        found[f"{name}.bias"] = array(bias.reshape(shape))
    return found


def of_canonical(weights: dict[str, np.ndarray]) -> Reference:
    """The reference with these canonical weights."""
    made, half = Reference(), weights["query.kernel"].dtype.name == "bfloat16"
    for name, (inputs, outputs) in SIZES.items():
        kernel = weights[f"{name}.kernel"]
        bias = weights.get(f"{name}.bias", np.zeros(outputs, kernel.dtype))
        kernel, bias = (
            torch.from_numpy(part.astype("float32") if half else part) for part in (kernel, bias)
        )
        linear = made.get_submodule(name)
        linear.weight.data = kernel.reshape(inputs, outputs).T.contiguous()
        linear.bias.data = bias.reshape(outputs)
    return made.bfloat16() if half else made


def weights_of(attn: nn.Module) -> dict[str, np.ndarray]:
    """The canonical weights of the layer or of the reference."""
    return canonical(attn.state_dict()) if isinstance(attn, Reference) else anymha.get_weights(attn)


SUBJECTS = {"reference": None, "anymha": {}, "reproducible": {"compute_dtype": "float64"}}


def attention(subject: str, seed: int = 0, **options: Any) -> nn.Module:
    """The reference, or the layer with the same weights."""
    made = reference(seed)
    own = SUBJECTS[subject]
    if own is None:
        return made
    options = {"query_features": WIDTH, "seed": 0, **own, **options}
    layer = MultiHeadAttention(HEADS, KEY_DIM, VALUE_DIM, **options)
    return anymha.set_weights(layer, canonical(made.state_dict()))


class Net(nn.Module):
    """Attention between two Linears, so that gradients go through it."""

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.attn = attn
        self.head = nn.Linear(WIDTH, 3)
        random = np.random.default_rng(7)
        with torch.no_grad():
            for module in (self.embed, self.head):
                for parameter in module.parameters():
                    drawn = 0.3 * random.standard_normal(parameter.shape)
                    parameter.copy_(torch.from_numpy(drawn))

    def forward(self, x, **call):
        return self.head(self.attn(self.embed(x), **call))


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def dtype_of(module: nn.Module) -> Any:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def train(net: nn.Module, steps: int = 4, optimizer: Any = None, **call: Any) -> list[float]:
    """Train in place on random numbers; the loss must fall."""
    dtype = dtype_of(net)
    x, wanted = numbers(2, 5, WIDTH, seed=1, dtype=dtype), numbers(2, 5, 3, seed=2, dtype=dtype)
    x.requires_grad_()  # torch warns of backward hooks where there is nothing to differentiate by
    trainable = [p for p in net.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(trainable, 0.03, momentum=0.5)
    net.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x, **call) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


def close(got: Any, want: Any, dtype: Any = None) -> None:
    """The arrays agree as their dtype lets them."""
    got, want = (torch.as_tensor(a).detach() for a in (got, want))
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    margin = TOLERANCE.get(dtype or got.dtype, 0.0) * max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got, want, rtol=0, atol=margin)


def agree(net: nn.Module, wanted: nn.Module) -> None:
    """The nets hold the same in their states, and give the same outputs in evaluation."""
    mine, theirs = net.state_dict(), wanted.state_dict()
    assert sorted(mine) == sorted(theirs)
    for name, value in theirs.items():
        close(mine[name], value, dtype_of(wanted))
    outputs = []
    for one in (net, wanted):
        training = one.training
        with torch.no_grad():
            outputs.append(one.eval()(numbers(2, 5, WIDTH, seed=3, dtype=dtype_of(wanted))))
        one.train(training)
    close(*outputs)


def trained(
    subject: str, tool: Callable[[nn.Module], Any], dtype: Any = torch.float32, **call: Any
) -> tuple[Net, Any]:
    """A net whose attention had a tool applied and was trained, and what the tool gave.

    Raises:
        AssertionError: a net with the reference, treated likewise, becomes another.
    """
    results = []
    for kind in (subject, "reference"):
        net = Net(attention(kind)).to(dtype)
        torch.manual_seed(0)  # of tools that draw
        handle = tool(net.attn)
        losses = train(net, **call)
        results.append((net, handle, losses))
    (net, handle, losses), (wanted, _, wanted_losses) = results
    close(torch.tensor(losses), torch.tensor(wanted_losses), dtype)
    agree(net, wanted)
    return net, handle


OURS = [name for name in SUBJECTS if name != "reference"]


@pytest.fixture(params=SUBJECTS)
def subject(request) -> str:
    return request.param


@pytest.fixture(params=OURS)
def ours(request) -> str:
    return request.param


@pytest.fixture
def x():
    return numbers(2, 5, WIDTH)


REMEDY = re.compile("remove|merge|unload|dequanti|replace|convert|instead|before", re.IGNORECASE)


def in_words(error: AnymhaError, projection: str) -> None:
    """The error names the projection and what to do."""
    assert projection in str(error)
    assert REMEDY.search(str(error))


def weights_are_effective_or_refused(layer: nn.Module, projection: str, margin: float = 0) -> None:
    """`get_weights` gives what the layer computes with, or says why not; never anything else."""
    if isinstance(layer, Reference):
        return
    layer.eval()
    try:
        weights = anymha.get_weights(layer)
    except AnymhaError as error:
        in_words(error, projection)
        return
    same = of_canonical(weights)
    x = numbers(2, 5, WIDTH, seed=4, dtype=dtype_of(same))
    with torch.no_grad():
        got, want = same(x), layer(x)
    if margin:
        assert float((got - want).abs().max()) < margin * float(want.abs().max())
    else:
        close(got, want)


def state_of(module: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def weights_are_taken_or_refused(layer: nn.Module, projection: str) -> None:
    """`set_weights` takes effect, also after the next calls, or leaves all as it was and says so.

    The layer is in evaluation mode, where no tool changes anything by itself.
    """
    layer.eval()
    x = numbers(2, 5, WIDTH, seed=4, dtype=dtype_of(layer))
    before, output = state_of(layer), layer(x).detach()
    wanted = reference(seed=9).to(dtype_of(layer))
    try:
        anymha.set_weights(layer, canonical(wanted.state_dict()))
    except AnymhaError as error:
        in_words(error, projection)
        after = layer.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert torch.equal(layer(x), output)
        return
    for _ in range(2):
        for name, value in canonical(wanted.state_dict()).items():
            np.testing.assert_allclose(anymha.get_weights(layer)[name], value, rtol=0, atol=1e-5)
        close(layer(x), wanted(x))


# --- What the projections are --------------------------------------------------------------------


def test_projections_are_linears_with_their_names_and_shapes():
    layer = attention("anymha")
    assert all(type(getattr(layer, name)) is nn.Linear for name in PROJECTIONS)
    assert [name for name, _ in layer.named_children()] == list(PROJECTIONS)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in Reference().named_parameters()}
    assert all(isinstance(p, nn.Parameter) for p in layer.parameters())
    assert (layer.value.in_features, layer.value.out_features) == SIZES["value"]


def test_projections_of_the_reproducible_mode_are_linears():
    layer = attention("reproducible")
    assert all(isinstance(getattr(layer, name), nn.Linear) for name in PROJECTIONS)


OTHER_WIDTHS = {"query": (8, 6), "key": (6, 9), "value": (7, 2), "output": (5, 8)}


@pytest.mark.parametrize(
    ("name", "calls_before", "wrapped"),
    pairs(name=OTHER_WIDTHS, calls_before=[0, 3], wrapped=[False, True]),
)
def test_projection_of_another_width_is_refused(name, calls_before, wrapped):
    layer = MultiHeadAttention(
        2, 4, query_features=8, value_features=7, key_features=6, value_dim=3, seed=0
    )
    arrays = torch.ones(2, 3, 8), torch.ones(2, 5, 7), torch.ones(2, 5, 6)
    for _ in range(calls_before):
        layer(*arrays)
    linear = nn.Linear(*OTHER_WIDTHS[name])
    if wrapped and name != "output":  # what it takes, nothing tells
        linear = nn.Sequential(linear)
    setattr(layer, name, linear)
    wanted = {"query": 8, "key": 8, "value": 6, "output": 6}[name]
    with pytest.raises(ShapeError, match=f"`{name}` must .* {wanted} features"):
        layer(*arrays)


def test_shapes_with_every_option():
    layer = MultiHeadAttention(
        4, 3, 5, query_features=8, value_features=7, key_features=6, num_key_value_heads=2,
        output_shape=(3, 2), use_bias=("query", "output"),
    )  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "query.weight": (12, 8), "query.bias": (12,), "key.weight": (6, 6),
        "value.weight": (10, 7), "output.weight": (6, 20), "output.bias": (6,),
    }  # fmt: skip
    weights = anymha.get_weights(layer)
    assert weights["output.kernel"].shape == (4, 5, 3, 2)
    flat = layer.output.weight.detach().numpy().T
    np.testing.assert_array_equal(weights["output.kernel"], flat.reshape(4, 5, 3, 2))


def test_canonical_weights_are_the_linears_transposed(ours):
    layer = attention(ours)
    for name, value in anymha.get_weights(layer).items():
        np.testing.assert_array_equal(value, canonical(layer.state_dict())[name])


@pytest.mark.parametrize(
    ("subject", "dtype", "causal"),
    pairs(
        subject=SUBJECTS, dtype=[torch.float32, torch.float64, torch.bfloat16], causal=[False, True]
    ),
    ids=str,
)
def test_training_is_that_by_hand(subject, dtype, causal):
    trained(subject, lambda attn: None, dtype, use_causal_mask=causal)


def test_cross_attention_is_that_by_hand(subject, x):
    value, key = numbers(2, 6, WIDTH, seed=1), numbers(2, 6, WIDTH, seed=2)
    mask = numbers(2, 6, seed=3) > -1
    call = {"value_mask": mask}
    close(attention(subject)(x, value, key, **call), reference()(x, value, key, **call))


# --- Hooks ---------------------------------------------------------------------------------------

HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, i, o: 1.5 * o + 0.1),
    "pre": lambda m: m.register_forward_pre_hook(lambda m, i: (0.5 * i[0] - 0.1,)),
    "pre with options": lambda m: m.register_forward_pre_hook(
        lambda m, i, k: ((0.5 * i[0] - 0.1,), k), with_kwargs=True
    ),
    "backward": lambda m: m.register_full_backward_hook(lambda m, i, o: (0.5 * i[0],)),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, o: (0.5 * o[0],)),
    "weight": lambda m: m.weight.register_hook(lambda g: 3 * g),
}


@pytest.mark.parametrize(
    ("subject", "projection", "hook"), pairs(subject=SUBJECTS, projection=PROJECTIONS, hook=HOOKS)
)
def test_hook_takes_part_in_training_until_removed(subject, projection, hook):
    net, handle = trained(subject, lambda attn: HOOKS[hook](getattr(attn, projection)))
    plain = Net(attention(subject))
    train(plain)
    pairs = zip(net.parameters(), plain.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) > 1e-4
    handle.remove()
    wanted = Net(Reference())
    wanted.load_state_dict(net.state_dict())
    agree(net, wanted)
    train(net)
    train(wanted)
    agree(net, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_hooks_in_another_dtype(subject, dtype):
    def tool(attn):
        HOOKS["forward"](attn.query)
        HOOKS["pre"](attn.output)
        HOOKS["backward"](attn.value)

    trained(subject, tool, dtype)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_hooks_see_each_projection_once_in_each_call(subject, x, mode):
    attn = attention(subject).train(mode == "train")
    seen = []
    for name in PROJECTIONS:
        getattr(attn, name).register_forward_hook(
            lambda m, i, o, name=name: seen.append((name, tuple(i[0].shape), tuple(o.shape)))
        )
    mode = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(
        mode, torch.enable_grad
    )
    want = sorted((name, (2, 5, inner), (2, 5, outer)) for name, (inner, outer) in SIZES.items())
    for _ in range(4):
        with mode():
            attn(x)
        assert sorted(seen) == want
        seen.clear()


def test_hook_gets_the_projections_value(subject, x):
    attn, seen = attention(subject), {}
    for name in PROJECTIONS:
        getattr(attn, name).register_forward_hook(
            lambda m, i, o, n=name: seen.update({n: (i[0], o)})
        )
    output = attn(x)
    for name, (inputs, outputs) in seen.items():
        linear = reference().get_submodule(name)
        close(outputs.float(), linear(inputs.float()))
    close(seen["output"][1].float(), output)
    assert torch.equal(seen["query"][0].float(), x)


def test_hook_added_after_several_calls_is_called(subject, x):
    attn, wanted = attention(subject), reference()
    for _ in range(4):
        attn(x).sum().backward()
    for one in (attn, wanted):
        HOOKS["forward"](one.value)
    for _ in range(4):
        close(attn(x), wanted(x))


def test_hook_with_a_different_mask_and_length(subject):
    attn, wanted = attention(subject), reference()
    for one in (attn, wanted):
        HOOKS["pre"](one.key)
    for length in (5, 70, 3):
        x = numbers(2, length, WIDTH)
        mask = numbers(2, length, seed=1) > -1
        close(attn(x, value_mask=mask, use_causal_mask=False),
              wanted(x, value_mask=mask, use_causal_mask=False))  # fmt: skip
        close(attn(x, use_causal_mask=True), wanted(x, use_causal_mask=True))


def test_global_hooks_reach_the_projections(subject, x):
    net, wanted = Net(attention(subject)), Net(reference())
    every = nn.modules.module

    def forward(module, inputs, output):
        return 1.1 * output if isinstance(module, nn.Linear) else None

    def backward(module, inputs, outputs):
        return tuple(0.9 * g for g in inputs) if isinstance(module, nn.Linear) else None

    def pre(module, inputs):
        counted.append(module) if isinstance(module, nn.Linear) else None

    counted = []
    plain = net(x)
    handles = [
        every.register_module_forward_hook(forward),
        every.register_module_forward_pre_hook(pre),
        every.register_module_full_backward_hook(backward),
    ]
    try:
        train(net)
        assert len(counted) == 4 * 6
        assert {id(m) for m in counted} == {
            id(m) for m in net.modules() if isinstance(m, nn.Linear)
        }
        train(wanted)
        agree(net, wanted)
    finally:
        for handle in handles:
            handle.remove()
    agree(net, wanted)
    assert not torch.allclose(net(x), plain)


def test_hooks_are_copied_with_the_layer(subject, x):
    attn, wanted = attention(subject), reference()
    for one in (attn, wanted):
        HOOKS["forward"](one.output)
    close(copy.deepcopy(attn)(x), wanted(x))


def test_hook_after_accumulation_of_gradients(subject):
    """As data parallel training and optimisers within the backward pass use it."""

    def tool(attn):
        def step(parameter):
            seen.append(parameter)
            with torch.no_grad():
                parameter.sub_(0.05 * parameter.grad)
            parameter.grad = None

        seen = []
        for parameter in attn.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        return seen

    net, seen = trained(subject, tool)
    assert len(seen) == 4 * len(list(net.attn.parameters()))


def test_saved_tensor_hooks_give_the_same_gradients(subject):
    nets = [Net(attention(subject)) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        train(nets[0])
    train(nets[1])
    agree(*nets)


# --- Pruning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "projection", "dtype"),
    pairs(subject=SUBJECTS, projection=PROJECTIONS, dtype=[torch.float32, torch.bfloat16]),
    ids=str,
)
def test_pruned_weights_stay_zero(subject, projection, dtype):
    def tool(attn):
        prune.l1_unstructured(getattr(attn, projection), "weight", amount=0.5)
        prune.l1_unstructured(getattr(attn, projection), "bias", amount=0.5)

    net, _ = trained(subject, tool, dtype)
    module = getattr(net.attn, projection)
    for part in ("weight", "bias"):
        mask = getattr(module, f"{part}_mask") == 0
        assert mask.sum() * 2 == mask.numel()
        assert not getattr(module, part)[mask].any()
    weights_are_effective_or_refused(net.attn, projection)
    for part in ("weight", "bias"):
        prune.remove(module, part)
    assert sorted(module.state_dict()) == ["bias", "weight"]
    kernel = weights_of(net.attn)[f"{projection}.kernel"]
    assert (kernel == 0).sum() * 2 == kernel.size


@pytest.mark.parametrize("dim", [0, 1])
def test_pruned_rows_and_columns_stay_zero(subject, dim):
    def tool(attn):
        prune.random_structured(attn.query, "weight", amount=2, dim=dim)
        prune.ln_structured(attn.output, "weight", amount=2, n=2, dim=dim)

    net, _ = trained(subject, tool)
    for module in (net.attn.query, net.attn.output):
        assert int((module.weight == 0).all(1 - dim).sum()) == 2


def test_global_pruning_counts_the_projections(subject):
    def tool(attn):
        each = [(getattr(attn, name), "weight") for name in PROJECTIONS]
        prune.global_unstructured(each, prune.L1Unstructured, amount=0.5)

    net, _ = trained(subject, tool)
    zeros = sum(int((getattr(net.attn, name).weight == 0).sum()) for name in PROJECTIONS)
    assert zeros * 2 == sum(getattr(net.attn, name).weight.numel() for name in PROJECTIONS)


# --- Parametrisations ----------------------------------------------------------------------------


class Symmetric(nn.Module):
    """Weights of which each is half itself and half its mirror image."""

    def forward(self, weight):
        return (weight + weight.flip(0, 1)) / 2


class Doubled(nn.Module):
    """Twice the parameter; it can be written through."""

    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def is_normed(weight):
    return float(torch.linalg.matrix_norm(weight.double(), 2)) == pytest.approx(1, abs=0.2)


def is_orthogonal(weight):
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    return torch.allclose(short @ short.T, torch.eye(len(short), dtype=short.dtype), atol=1e-5)


TOOLS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], bool]]] = {
    "spectral norm, hook": (
        lambda m: nn.utils.spectral_norm(m, n_power_iterations=1), is_normed
    ),
    "weight norm, hook": (nn.utils.weight_norm, lambda w: True),
    "spectral norm": (
        lambda m: parametrizations.spectral_norm(m, n_power_iterations=1), is_normed
    ),
    "weight norm": (parametrizations.weight_norm, lambda w: True),
    "weight norm over all": (lambda m: parametrizations.weight_norm(m, dim=None), lambda w: True),
    "orthogonal": (parametrizations.orthogonal, is_orthogonal),
    "custom": (
        lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
        lambda w: torch.allclose(w, w.flip(0, 1)),
    ),
    "invertible": (
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()), lambda w: True
    ),
    "two": (
        lambda m: parametrize.register_parametrization(
            parametrize.register_parametrization(m, "weight", Doubled()), "weight", Symmetric()
        ),
        lambda w: torch.allclose(w, w.flip(0, 1)),
    ),
    "bias": (lambda m: parametrize.register_parametrization(m, "bias", Doubled()), lambda w: True),
}  # fmt: skip


@old_weight_norm
@pytest.mark.parametrize(
    ("subject", "projection", "tool"), pairs(subject=SUBJECTS, projection=PROJECTIONS, tool=TOOLS)
)
def test_parametrized_projection_trains(subject, projection, tool):
    apply, holds = TOOLS[tool]
    net, _ = trained(subject, lambda attn: apply(getattr(attn, projection)))
    module = getattr(net.attn, projection)
    net.eval()(numbers(2, 5, WIDTH))
    assert holds(module.weight.detach())
    weights_are_effective_or_refused(net.attn, projection)


@pytest.mark.parametrize("tool", ["spectral norm", "weight norm", "custom"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parametrized_projection_in_another_dtype(subject, tool, dtype):
    trained(subject, lambda attn: TOOLS[tool][0](attn.value), dtype)


@pytest.mark.parametrize("tool", ["weight norm", "spectral norm", "orthogonal", "custom"])
def test_parametrization_is_removed(subject, tool):
    net, _ = trained(subject, lambda attn: TOOLS[tool][0](attn.query))
    effective = net.eval().attn.query.weight.detach().clone()
    parametrize.remove_parametrizations(net.attn.query, "weight")
    assert torch.equal(net.attn.query.weight, effective)
    wanted = Net(Reference())
    wanted.load_state_dict(net.state_dict())
    agree(net, wanted)
    kernel = weights_of(net.attn)["query.kernel"]
    np.testing.assert_array_equal(kernel, effective.T.reshape(WIDTH, HEADS, -1).numpy())


@old_weight_norm
def test_weight_norm_of_the_old_kind_is_removed(subject):
    net, _ = trained(subject, lambda attn: nn.utils.weight_norm(attn.query))
    nn.utils.remove_weight_norm(net.attn.query)
    wanted = Net(Reference())
    wanted.load_state_dict(net.state_dict())
    agree(net, wanted)


@pytest.mark.parametrize("tool", ["weight norm", "custom", "invertible"])
def test_weights_of_a_parametrized_layer_are_the_effective_ones(ours, tool):
    layer = attention(ours)
    TOOLS[tool][0](layer.value)
    want = layer.value.weight.detach().T.reshape(WIDTH, HEADS, -1).numpy()
    np.testing.assert_allclose(anymha.get_weights(layer)["value.kernel"], want, rtol=1e-6)


def test_parametrization_is_computed_once_in_each_call(subject, x):
    """Some change with each computation, as spectral norm's does in training."""

    class Counted(nn.Module):
        def forward(self, weight):
            counts.append(1)
            return weight + 0.1

    attn, counts = attention(subject), []
    parametrize.register_parametrization(attn.query, "weight", Counted())
    for call in ({}, {"use_causal_mask": True}, {}, {}):
        counts.clear()
        attn(x, **call).sum().backward()
        assert len(counts) == 1


def test_cached_parametrization(subject, x):
    attn = attention(subject)
    parametrize.register_parametrization(attn.query, "weight", Doubled())
    plain = attn(x)
    with parametrize.cached():
        for _ in range(3):
            assert torch.equal(attn(x), plain)


@old_weight_norm
@pytest.mark.parametrize(
    ("ours", "projection", "tool"),
    pairs(
        ours=OURS,
        projection=["query", "output"],
        tool=[
            "weight norm, hook", "spectral norm, hook", "weight norm", "spectral norm", "pruned"
        ],
    ),
)  # fmt: skip
def test_weights_right_after_a_step_are_not_those_of_the_call_before(ours, tool, projection):
    """Tools of hooks compute the weight anew in the next call only."""
    net = Net(attention(ours))
    WRITTEN[tool](getattr(net.attn, projection))
    train(net)
    weights_are_effective_or_refused(net.attn, projection)


# --- Writing through a parametrisation -----------------------------------------------------------

WRITTEN = {
    **{name: apply for name, (apply, _) in TOOLS.items()},
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    "pruned bias": lambda m: prune.l1_unstructured(m, "bias", amount=0.5),
}


@old_weight_norm
@pytest.mark.parametrize(
    ("ours", "projection", "tool"), pairs(ours=OURS, projection=["query", "output"], tool=WRITTEN)
)
def test_weights_are_set_through_a_parametrization_or_refused(ours, projection, tool):
    layer = attention(ours)
    WRITTEN[tool](getattr(layer, projection))
    weights_are_taken_or_refused(layer, projection)


@old_weight_norm
@pytest.mark.parametrize("tool", WRITTEN)
def test_constraints_act_through_a_parametrization_or_are_refused(ours, tool, x):
    layer = attention(ours, kernel_constraint="non_neg", bias_constraint="non_neg").eval()
    WRITTEN[tool](layer.query)
    layer(x)
    before, output = state_of(layer), layer(x).detach()
    try:
        layer.apply_constraints()
    except AnymhaError as error:
        in_words(error, "query")
        assert all(torch.equal(layer.state_dict()[n], v) for n, v in before.items())
        assert torch.equal(layer(x), output)
        return
    layer(x)
    assert all((value >= 0).all() for value in anymha.get_weights(layer).values())
    weights_are_effective_or_refused(layer, "query")


def test_penalty_is_that_of_the_effective_weight(ours):
    layer = attention(ours, kernel_regularizer="l2", bias_regularizer="l1")
    plain = layer.regularization_loss().item()
    parametrize.register_parametrization(layer.value, "weight", Doubled())
    with torch.no_grad():
        layer.value.parametrizations.weight.original.mul_(3)
    loss = layer.regularization_loss()
    linears = [getattr(layer, name) for name in PROJECTIONS]
    want = sum(0.01 * (m.weight.square().sum() + m.bias.abs().sum()) for m in linears)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert loss.item() > plain * 1.5
    original = layer.value.parametrizations.weight.original
    (got,) = torch.autograd.grad(loss, original)
    close(got, torch.autograd.grad(want, original)[0])


@old_weight_norm
@pytest.mark.parametrize("tool", ["weight norm, hook", "pruned"])
def test_penalty_of_a_hooked_weight_is_trained_or_refused(ours, tool, x):
    layer = attention(ours, kernel_regularizer="l2")
    WRITTEN[tool](layer.query)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        layer(x)
        try:
            loss = layer.regularization_loss()
        except AnymhaError as error:
            in_words(error, "query")
            return
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    layer(x)
    want = sum(0.01 * getattr(layer, name).weight.square().sum() for name in PROJECTIONS)
    assert layer.regularization_loss().item() == pytest.approx(want.item(), rel=1e-5)


# --- LoRA and its kin ----------------------------------------------------------------------------


@pytest.fixture
def peft():
    return need("peft")


ADAPTERS = {
    "two": lambda p: p.LoraConfig(target_modules=["query", "value"], r=2),
    "all": lambda p: p.LoraConfig(target_modules=list(PROJECTIONS), r=2),
    "all linear": lambda p: p.LoraConfig(target_modules="all-linear", r=2),
    "bias": lambda p: p.LoraConfig(target_modules=["query"], r=2, bias="lora_only"),
    "dora": lambda p: p.LoraConfig(target_modules=["query", "output"], r=2, use_dora=True),
    "parameters": lambda p: p.LoraConfig(
        target_modules=[], target_parameters=["attn.query.weight", "attn.value.weight"], r=2
    ),
    "saved module": lambda p: p.LoraConfig(
        target_modules=["query"], modules_to_save=["output"], r=2
    ),
    "ia3": lambda p: p.IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
    "oft": lambda p: p.OFTConfig(target_modules=["query", "value"], oft_block_size=2, r=0),
    "loha": lambda p: p.LoHaConfig(target_modules=["query", "value"], r=2),
}


def adapted(peft: Any, subject: str, adapter: str) -> Any:
    """A net with an adapter, whose random weights are those of a seed."""
    net = Net(attention(subject))
    torch.manual_seed(0)
    net = peft.get_peft_model(net, ADAPTERS[adapter](peft))
    with torch.no_grad():  # some begin with zeros, from which a mistake cannot be seen
        for index, parameter in enumerate(p for p in net.parameters() if p.requires_grad):
            parameter.add_(0.2 * numbers(*parameter.shape, seed=index))
    return net


def peft_train(net: Any) -> None:
    train(net, optimizer=torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.03))


# OFT of an `nn.Linear` of which no weight is trained, and peft's own words about its adapters.
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_alone_are_trained_and_merged(subject, adapter, peft):
    net, wanted = (adapted(peft, kind, adapter) for kind in (subject, "reference"))
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in wanted.named_parameters() if p.requires_grad]
    assert any(".attn." in name for name in trainable)
    before = {name: p.clone() for name, p in net.named_parameters()}
    for one in (net, wanted):
        peft_train(one)
    agree(net, wanted)
    after = dict(net.named_parameters())
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(trainable)

    attn = net.base_model.model.attn
    weights_are_effective_or_refused(attn, "query" if adapter != "ia3" else "key")
    with net.disable_adapter(), wanted.disable_adapter():
        agree(net, wanted)
    x = numbers(2, 5, WIDTH, seed=3)
    attended = net.eval()(x).detach()
    merged = net.merge_and_unload()
    close(merged(x), attended)
    assert isinstance(merged, Net)
    wanted_merged = wanted.merge_and_unload()
    agree(merged, wanted_merged)
    want = canonical(wanted_merged.attn.state_dict())
    for name, value in weights_of(merged.attn).items():
        np.testing.assert_allclose(value, want[name], rtol=0, atol=1e-5)
    assert all(type(m) is not int for m in merged.modules())


@pytest.mark.parametrize("adapter", ["two", "dora", "saved module"])
def test_weights_with_an_adapter_are_set_or_refused(ours, adapter, peft):
    net = adapted(peft, ours, adapter)
    weights_are_taken_or_refused(net.base_model.model.attn, "query")


def test_files_of_a_layer_with_an_adapter_hold_the_effective_weights(ours, peft, tmp_path):
    net = adapted(peft, ours, "two")
    layer, x = net.base_model.model.attn.eval(), numbers(2, 5, WIDTH)
    try:
        anymha.save(tmp_path / "layer.safetensors", layer)
    except AnymhaError as error:
        in_words(error, "query")
    else:
        close(anymha.load(tmp_path / "layer.safetensors", backend="torch")(x), layer(x))
    try:
        found = anymha.convert(layer, to="numpy")
    except AnymhaError as error:
        in_words(error, "query")
    else:
        close(found(x.numpy()), layer(x))


def test_merged_adapter_that_stays_attached(subject, peft):
    net = adapted(peft, subject, "two").eval()
    x = numbers(2, 5, WIDTH)
    attended = net(x)
    net.merge_adapter()
    close(net(x), attended)
    weights_are_effective_or_refused(net.base_model.model.attn, "query")
    net.unmerge_adapter()
    close(net(x), attended)
    weights_are_effective_or_refused(net.base_model.model.attn, "query")


def test_adapter_of_the_layer_alone(subject, peft, x):
    """Peft asks a model for its `config`, which the layer has, too."""
    config = peft.LoraConfig(target_modules=["query", "value"], r=2)
    net = peft.get_peft_model(attention(subject), config)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in net.parameters() if p.requires_grad):
            parameter.copy_(numbers(*parameter.shape, seed=index))
    output = net.eval()(x)
    assert not torch.allclose(output, reference()(x), atol=1e-2)
    close(net.merge_and_unload()(x), output)


def test_adapter_is_saved_and_loaded(subject, peft, tmp_path, x):
    net = adapted(peft, subject, "two").eval()
    net.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(attention(subject)), tmp_path).eval()
    assert torch.equal(loaded(x), net(x))


# --- Other modules in a projection's place -------------------------------------------------------


class Factored(nn.Module):
    """A projection of low rank, which has nothing by the name of `weight`."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.down = nn.Parameter(numbers(2, inputs, seed=5))
        self.up = nn.Parameter(numbers(outputs, 2, seed=6))

    def forward(self, x):
        return x @ self.down.T.to(x.dtype) @ self.up.T.to(x.dtype)


class Scaled(nn.Linear):
    """A Linear whose output is not that of its weight."""

    def forward(self, input):
        return 2 * super().forward(input) + 1


class Wrapped(nn.Module):
    """A Linear within another module, which shows its weight and bias."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner = nn.Linear(inputs, outputs)
        self.factor = nn.Parameter(torch.tensor(1.5))

    weight = property(lambda self: self.inner.weight)
    bias = property(lambda self: self.inner.bias)

    def forward(self, x):
        return self.factor.to(x.dtype) * self.inner(x)


def half(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))


def no_bias(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


@pytest.mark.parametrize(
    ("subject", "projection", "kind"),
    pairs(
        subject=SUBJECTS, projection=PROJECTIONS, kind=[Factored, Scaled, Wrapped, half, no_bias]
    ),
)
def test_module_in_a_projections_place_is_called(subject, projection, kind):
    def tool(attn):
        setattr(attn, projection, kind(*SIZES[projection]))

    net, _ = trained(subject, tool)
    weights_are_effective_or_refused(net.attn, projection)


@pytest.mark.parametrize("kind", [Factored, Scaled, Wrapped, half], ids=lambda k: k.__name__)
def test_weights_of_a_module_in_a_projections_place_are_set_or_refused(kind):
    layer = attention("anymha")
    torch.manual_seed(0)
    layer.value = kind(*SIZES["value"])
    weights_are_taken_or_refused(layer, "value")


def test_forward_in_the_instance_is_called(subject):
    def tool(attn):
        old = attn.query.forward
        attn.query.forward = lambda x: 2 * old(x)

    net, _ = trained(subject, tool)
    weights_are_effective_or_refused(net.attn, "query")
    del net.attn.query.forward
    wanted = Net(Reference())
    wanted.load_state_dict(net.state_dict())
    agree(net, wanted)


def test_class_of_a_projection_may_change(subject, x):
    """As torch's own parametrisations and sharding do it."""
    attn = attention(subject)
    kind = type(attn.value)
    attn.value.__class__ = type("Louder", (kind,), {"forward": lambda m, x: 2 * kind.forward(m, x)})
    wanted = reference()
    with torch.no_grad():
        wanted.value.weight.mul_(2)
        wanted.value.bias.mul_(2)
    close(attn(x), wanted(x))
    weights_are_effective_or_refused(attn, "value")


def test_subclass_of_tensor_as_a_weight(subject, x):
    """A weight that is a tensor of another class goes through `__torch_function__`."""

    class Logged(torch.Tensor):
        calls: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    attn = attention(subject)
    attn.query.weight = nn.Parameter(attn.query.weight.detach().as_subclass(Logged))
    Logged.calls.clear()
    close(attn(x).as_subclass(torch.Tensor), reference()(x))
    assert Logged.calls


# --- Offloading ----------------------------------------------------------------------------------


def offload_by_hand(net: nn.Module) -> None:
    """Keep weights outside of the modules, and put them in while a module is called."""
    for module in net.modules():
        if not module._parameters:
            continue

        def forward(module, held, old, *args, **kwargs):
            module._parameters.update(held)
            try:
                return old(*args, **kwargs)
            finally:
                away(module, held)

        def away(module, held):
            for name, parameter in held.items():
                meta = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(meta, requires_grad=False)

        held = {name: p for name, p in module._parameters.items() if p is not None}
        module._old_forward = module.forward
        bound = functools.partial(forward, module, held, module.forward)
        module.forward = functools.update_wrapper(bound, module._old_forward)
        away(module, held)


def offload_by_accelerate(net: nn.Module) -> None:
    need("accelerate").cpu_offload(net, execution_device=torch.device("cpu"))


def offload_each_by_accelerate(net: nn.Module) -> None:
    hooks = need("accelerate").hooks
    for module in net.modules():
        if module._parameters:
            hooks.add_hook_to_module(
                module, hooks.AlignDevicesHook(execution_device=torch.device("cpu"), offload=True)
            )


OFFLOADS = [offload_by_hand, offload_by_accelerate, offload_each_by_accelerate]


@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda f: f.__name__)
def test_offloaded_weights_come_back_for_each_call(subject, offload):
    net, wanted = Net(attention(subject)).eval(), Net(reference()).eval()
    offload(net)
    if offload is not offload_by_accelerate:
        assert net.attn.query.weight.is_meta
    for length in (5, 5, 5, 7):
        x = numbers(2, length, WIDTH, seed=length)
        mask = numbers(2, length, seed=1) > -1
        with torch.no_grad():
            close(net(x), wanted(x))
            close(net(x, use_causal_mask=True), wanted(x, use_causal_mask=True))
            close(net(x, value_mask=mask), wanted(x, value_mask=mask))
    assert all(p.is_meta for p in net.attn.parameters())


@pytest.mark.parametrize("offload", [offload_by_hand, offload_each_by_accelerate])
def test_offloaded_weights_are_refused_in_words(ours, offload):
    net = Net(attention(ours)).eval()
    offload(net)
    with pytest.raises(AnymhaError) as caught:
        anymha.get_weights(net.attn)
    assert "query" in str(caught.value) or "meta" in str(caught.value)


def test_hook_of_accelerate_around_the_layer(subject, x):
    hooks = need("accelerate").hooks

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (2 * args[0], *args[1:]), kwargs

        def post_forward(self, module, output):
            return output + 1

    net = Net(attention(subject))
    hooks.add_hook_to_module(net.attn, Hook())
    hooks.add_hook_to_module(net.attn.query, Hook())
    wanted = Net(reference())
    hooks.add_hook_to_module(wanted.attn, Hook())
    hooks.add_hook_to_module(wanted.attn.query, Hook())
    train(net)
    train(wanted)
    close(net(x), wanted(x))
    for one in (net, wanted):
        hooks.remove_hook_from_module(one, recurse=True)
    agree(net, wanted)


# --- Quantisation --------------------------------------------------------------------------------

quantised = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:.* are deprecated and will be removed:UserWarning",
)


@quantised
@pytest.mark.parametrize("subject", ["reference", "anymha"])
def test_dynamically_quantised_projections(subject):
    quantize = torch.ao.quantization.quantize_dynamic
    net = Net(attention(subject))
    train(net)
    net.eval()
    found = quantize(net, {nn.Linear}, dtype=torch.qint8)
    kind = torch.ao.nn.quantized.dynamic.Linear
    assert all(isinstance(getattr(found.attn, name), kind) for name in PROJECTIONS)
    assert all(isinstance(getattr(net.attn, name), nn.Linear) for name in PROJECTIONS)
    wanted = Net(Reference())
    wanted.load_state_dict(net.state_dict())
    wanted = quantize(wanted.eval(), {nn.Linear}, dtype=torch.qint8)
    for call in ({}, {"use_causal_mask": True}, {"value_mask": numbers(2, 5) > -1}):
        x = numbers(2, 5, WIDTH)
        with torch.no_grad():
            got, plain = found(x, **call), net(x, **call)
        assert not torch.equal(got, plain)
        torch.testing.assert_close(got, wanted(x, **call), rtol=0, atol=0.02)
        torch.testing.assert_close(got, plain, rtol=0, atol=0.05 * float(plain.abs().max()))
    weights_are_effective_or_refused(found.attn, "query", margin=0.1)
    assert list(found.state_dict()) == list(wanted.state_dict())


@quantised
def test_weights_of_quantised_projections_are_refused_in_words(x):
    layer = torch.ao.quantization.quantize_dynamic(attention("anymha"), {nn.Linear})
    before = layer(x)
    with pytest.raises(AnymhaError) as caught:
        anymha.set_weights(layer, canonical(reference(9).state_dict()))
    in_words(caught.value, "query")
    assert torch.equal(layer(x), before)


@quantised
def test_quantisation_of_a_reproducible_layer_leaves_it_or_quantises_it(x):
    layer = attention("reproducible").eval()
    found = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    torch.testing.assert_close(found(x), layer(x), rtol=0, atol=0.1)


# --- torch.fx ------------------------------------------------------------------------------------


class Plain(Net):
    """A net that takes no options, which torch could not trace."""

    def forward(self, x):
        return self.head(self.attn(self.embed(x)))


class Masked(nn.Module):
    """A net whose masks are inputs, and which passes arguments by name."""

    def __init__(self, attn):
        super().__init__()
        self.net = Net(attn)

    def forward(self, x, mask):
        y = self.net(x, value_mask=mask)
        return self.net.head(self.net.attn(value=y.new_zeros(2, 5, 8) + x, query=x, key=x)) + y


def test_symbolic_trace(subject, x):
    net = Plain(attention(subject))
    traced = torch.fx.symbolic_trace(net)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    inner = [f"attn.{name}" for name in PROJECTIONS] if subject == "reference" else ["attn"]
    assert called == ["embed", *inner, "head"]
    assert torch.equal(traced(x), net(x))
    twin = copy.deepcopy(net)
    train(traced)
    train(twin)
    for name, value in twin.state_dict().items():
        close(traced.state_dict()[name], value)
    traced.graph.lint()
    again = pickle.loads(pickle.dumps(traced))
    assert torch.equal(again(x), traced(x))


def test_symbolic_trace_with_masks_as_inputs(subject, x):
    net = Masked(attention(subject)).eval()
    traced = torch.fx.symbolic_trace(net)
    mask = numbers(2, 5, seed=1) > -0.5
    if subject != "reference":
        (first, second) = (n for n in traced.graph.nodes if n.target == "net.attn")
        assert set(first.kwargs) == {"value_mask"}
        assert not second.args
    assert torch.equal(traced(x, mask), net(x, mask))
    assert not torch.allclose(traced(x, mask), traced(x, ~mask))


def test_symbolic_trace_keeps_hooks_and_shows_shapes(subject, x):
    net = Plain(attention(subject))
    HOOKS["forward"](net.attn.query)
    traced = torch.fx.symbolic_trace(net)
    if subject != "reference":  # torch calls a leaf's hooks; those of traced modules it takes apart
        assert torch.equal(traced(x), net(x))
    ShapeProp(traced).propagate(x)
    shapes = [tuple(n.meta["tensor_meta"].shape) for n in traced.graph.nodes]
    assert shapes[0] == (2, 5, WIDTH)
    assert shapes[-1] == (2, 5, 3)


def test_symbolic_trace_runs_hooks_of_the_layer_once(subject, x):
    net = Plain(attention(subject))
    net.attn.register_forward_hook(lambda m, i, o: 2 * o + 1)
    net.attn.register_forward_pre_hook(lambda m, i: (0.5 * i[0] - 1,))
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_tracer_of_the_users_own_may_go_inside_or_not(subject, x):
    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, (Reference, MultiHeadAttention)) or super().is_leaf_module(
                m, module_qualified_name
            )

    net = Plain(attention(subject))
    graph = Leaf().trace(net)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["embed", "attn", "head"]
    assert torch.equal(torch.fx.GraphModule(net, graph)(x), net(x))


# --- Optimisers and loops over modules -----------------------------------------------------------


def test_weights_are_matrices_and_biases_vectors(subject):
    for name, parameter in attention(subject).named_parameters():
        assert parameter.ndim == (2 if name.endswith(".weight") else 1), name


class OrthogonalSteps(torch.optim.Optimizer):
    """Steps along nearly orthogonal matrices, as Muon's; it takes matrices alone."""

    def __init__(self, params, lr=0.02):
        super().__init__(params, {"lr": lr})
        assert all(p.ndim == 2 for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                u, sizes, v = torch.linalg.svd(p.grad.double(), full_matrices=False)
                nearly_one = sizes / (sizes + 0.1 * sizes.max())
                p.sub_((group["lr"] * (u * nearly_one) @ v).to(p.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_optimizer_of_matrices(subject, dtype):
    if dtype == torch.float64 and subject == "reproducible":
        pytest.skip("the same computation as in float64")
    nets = [Net(attention(kind)).to(dtype) for kind in (subject, "reference")]
    for net in nets:
        matrices = [p for name, p in net.named_parameters() if name.endswith("weight")]
        train(net, optimizer=OrthogonalSteps(matrices))
    agree(*nets)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon(subject):
    nets = [Net(attention(kind)) for kind in (subject, "reference")]
    for net in nets:
        matrices = [p for p in net.parameters() if p.ndim == 2]
        assert len(matrices) == 6
        train(net, optimizer=torch.optim.Muon(matrices, lr=0.02))
    for name, value in nets[1].state_dict().items():
        close(nets[0].state_dict()[name], value, torch.bfloat16)  # in which Muon computes


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "AdamW"])
def test_other_optimizers(subject, name):
    net = Net(attention(subject))
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.01)
    if name != "LBFGS":
        train(net, optimizer=optimizer)
        return
    x, wanted = numbers(2, 5, WIDTH, seed=1), numbers(2, 5, 3, seed=2)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - wanted).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[-1] < losses[0]


def test_common_loop_of_initial_values(subject):
    nets = [Net(attention(kind)) for kind in (subject, "reference")]
    for net in nets:
        torch.manual_seed(3)
        for module in net.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    agree(*nets)
    for name, (inputs, outputs) in SIZES.items():
        linear = getattr(nets[0].attn, name)
        limit = (6 / (inputs + outputs)) ** 0.5
        assert 0.8 * limit < linear.weight.abs().max().item() <= limit
        assert nn.init._calculate_fan_in_and_fan_out(linear.weight) == (inputs, outputs)
        assert not linear.bias.any()
    for net in nets:
        torch.manual_seed(4)
        net.apply(lambda m: m.reset_parameters() if type(m) is nn.Linear else None)
    if subject == "anymha":
        agree(*nets)


def test_loop_of_initial_values_by_apply(subject):
    def initialise(module):
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")

    nets = [Net(attention(kind)) for kind in (subject, "reference")]
    for net in nets:
        torch.manual_seed(3)
        net.apply(initialise)
    agree(*nets)


def test_parameters_as_a_vector(subject):
    attn, wanted = attention(subject, seed=1), reference()
    vector = nn.utils.parameters_to_vector(wanted.parameters())
    assert nn.utils.parameters_to_vector(attn.parameters()).shape == vector.shape
    nn.utils.vector_to_parameters(vector, attn.parameters())
    agree(attn, wanted)


def test_clipping_of_gradients(subject, x):
    norms = []
    for kind in (subject, "reference"):
        net = Net(attention(kind))
        net(x).square().sum().backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1))
    close(*norms)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_frozen_projection_stays(subject, projection):
    net, _ = trained(subject, lambda attn: getattr(attn, projection).requires_grad_(False))
    frozen = getattr(net.attn, projection)
    start = getattr(reference(), projection)
    assert torch.equal(frozen.weight, start.weight)
    assert torch.equal(frozen.bias, start.bias)
    assert frozen.weight.grad is None
    other = "query" if projection == "value" else "value"
    assert not torch.equal(getattr(net.attn, other).weight, getattr(reference(), other).weight)


def test_projection_frozen_after_several_calls(subject, x):
    attn = attention(subject)
    for _ in range(4):
        attn.zero_grad()
        attn(x).square().sum().backward()
    attn.value.requires_grad_(False)
    attn.zero_grad()
    for _ in range(4):
        attn(x).square().sum().backward()
    assert attn.value.weight.grad is None
    assert attn.query.weight.grad.any()


def test_only_one_bias_is_trained(subject):
    def tool(attn):
        attn.requires_grad_(False)
        attn.value.bias.requires_grad_(True)

    net, _ = trained(subject, tool)
    assert torch.equal(net.attn.value.weight, reference().value.weight)
    assert not torch.equal(net.attn.value.bias, reference().value.bias)


# --- Checkpoints of activations ------------------------------------------------------------------


class Checkpointed(Net):
    """A net whose attention is computed anew in the backward pass."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def forward(self, x, **call):
        attended = checkpoint(self.attn, self.embed(x), **self.options, **call)
        return self.head(attended)


class CheckpointedWhole(Net):
    """The same, as reentrant checkpoints take no keywords."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def forward(self, x, **call):
        attended = checkpoint(lambda y: self.attn(y, **call), self.embed(x), **self.options)
        return self.head(attended)


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "early stop": {"use_reentrant": False},
    "no early stop": {"use_reentrant": False},
    "checked": {"use_reentrant": False, "determinism_check": "default"},
}


# A reentrant checkpoint says so where nothing is differentiated, as in evaluation.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize(
    ("subject", "kind", "causal", "tool"),
    pairs(subject=SUBJECTS, kind=CHECKPOINTS, causal=[False, True], tool=[None, "forward"]),
)
def test_checkpoint_trains_the_same(subject, kind, causal, tool):
    base: Any = CheckpointedWhole if kind == "reentrant" else Checkpointed

    class Here(base):
        options = CHECKPOINTS[kind]

    nets = [Here(attention(subject)), Net(attention(subject)), Net(reference())]
    for net in nets:
        if tool:
            HOOKS[tool](net.attn.value)
    with set_checkpoint_early_stop(kind != "no early stop"):
        losses = [train(net, use_causal_mask=causal) for net in nets]
    for one in losses[1:]:
        close(torch.tensor(losses[0]), torch.tensor(one), torch.float32)
    agree(nets[0], nets[2])
    assert [type(m).__name__ for m in nets[0].modules()][1:] == [
        type(m).__name__ for m in nets[1].modules()
    ][1:]


@pytest.mark.parametrize("kind", ["reentrant", "early stop", "no early stop"])
def test_checkpoint_of_a_long_sequence(subject, kind):
    x = numbers(1, 1500, WIDTH, seed=1).requires_grad_()
    attn, wanted = attention(subject), reference()
    plain = wanted(x, use_causal_mask=True)
    weight = numbers(*plain.shape, seed=2)
    names = [name for name, _ in wanted.named_parameters()]
    expected = torch.autograd.grad((plain * weight).sum(), [x, *wanted.parameters()])
    for _ in range(3):
        attn.zero_grad()
        x.grad = None
        with set_checkpoint_early_stop(kind != "no early stop"):
            output = checkpoint(
                lambda y: attn(y, use_causal_mask=True), x, use_reentrant=kind == "reentrant"
            )
            (output * weight).sum().backward()
        torch.testing.assert_close(output, plain, rtol=0, atol=1e-4)
        for name, want in zip(["x", *names], expected, strict=True):
            got = x.grad if name == "x" else attn.get_parameter(name).grad
            margin = 1e-4 * max(1.0, float(want.abs().max()))
            torch.testing.assert_close(got, want, rtol=0, atol=margin)


@pytest.mark.parametrize(
    ("ours", "rng", "length", "reentrant"),
    pairs(ours=OURS, rng=["portable", "native"], length=[5, 100], reentrant=[True, False]),
)
def test_checkpoint_drops_the_same_elements(ours, rng, length, reentrant):
    x = numbers(1, length, WIDTH).requires_grad_()
    layer = attention(ours, dropout=0.5, dropout_rng=rng, memory_budget=4096)
    for _ in range(3):
        gradients = []
        for save in (False, True):
            layer.zero_grad()
            torch.manual_seed(5)
            output = checkpoint(layer, x, use_reentrant=reentrant) if save else layer(x)
            output.square().sum().backward()
            gradients.append([p.grad.clone() for p in layer.parameters()])
        for plain, again in zip(*gradients, strict=True):
            margin = 1e-4 * max(1.0, float(plain.abs().max()))
            torch.testing.assert_close(again, plain, rtol=0, atol=margin)


def test_checkpoint_that_keeps_products(subject, x):
    contexts = functools.partial(
        torch.utils.checkpoint.create_selective_checkpoint_contexts,
        [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
    )
    nets = [Net(attention(subject)) for _ in range(2)]
    for _ in range(3):
        outputs = [
            nets[0](x),
            nets[1].head(
                checkpoint(nets[1].attn, nets[1].embed(x), use_reentrant=False, context_fn=contexts)
            ),
        ]
        for net, output in zip(nets, outputs, strict=True):
            net.zero_grad()
            output.square().sum().backward()
        for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            close(other.grad, one.grad)


# --- Sharing, copying, saving --------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, subject):
        super().__init__()
        self.first, self.second = attention(subject), attention(subject, seed=1)

    def forward(self, x):
        return self.second(self.first(x))[..., :3]


SHARED = {
    "module": lambda two: setattr(two.second, "query", two.first.query),
    "weight": lambda two: setattr(two.second.query, "weight", two.first.query.weight),
    "key is query": lambda two: setattr(two.first, "key", two.first.query),
    "key weight is query weight": lambda two: setattr(
        two.first.key, "weight", two.first.query.weight
    ),
}


@pytest.mark.parametrize("kind", SHARED)
def test_shared_projection_trains_for_both(subject, kind):
    nets = [Two(one) for one in (subject, "reference")]
    counts = []
    for net in nets:
        plain = len(list(net.parameters()))
        SHARED[kind](net)
        counts.append(plain - len(list(net.parameters())))
        train(net)
    assert counts[0] == counts[1] > 0
    agree(*nets)
    twin = copy.deepcopy(nets[0])
    assert len(list(twin.parameters())) == len(list(nets[0].parameters()))
    train(twin)
    train(nets[1])
    agree(twin, nets[1])


def test_functional_call_takes_other_parameters(subject, x):
    attn, other = attention(subject), reference(1)
    before = state_of(attn)
    call = torch.func.functional_call
    close(call(attn, dict(other.named_parameters()), (x,), strict=True), other(x))
    half_other = reference()
    half_other.query.weight = other.query.weight
    for options in ({}, {"use_causal_mask": True}):
        got = call(attn, {"query.weight": other.query.weight}, (x,), options)
        close(got, half_other(x, **options))
    assert all(torch.equal(value, before[name]) for name, value in attn.state_dict().items())


def test_gradients_of_functional_calls(subject, x):
    def gradients(attn):
        parameters = {name: p.detach() for name, p in attn.named_parameters()}
        return torch.func.grad(
            lambda p: torch.func.functional_call(attn, p, (x,)).square().sum()
        )(parameters)  # fmt: skip

    got, want = gradients(attention(subject)), gradients(reference())
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


def test_several_models_at_once(subject, x):
    models = [attention(subject, seed=seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    outputs = torch.func.vmap(
        lambda p, b: torch.func.functional_call(base, (p, b), (x,)), in_dims=(0, 0)
    )(parameters, buffers)
    for seed, output in enumerate(outputs):
        close(output, reference(seed)(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent(subject, how, x):
    attn = attention(subject)
    attn(x).sum().backward()
    if how == "deepcopy":
        made = copy.deepcopy(attn)
    elif how == "pickle":
        made = pickle.loads(pickle.dumps(attn))
    else:
        file = io.BytesIO()
        torch.save(attn, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    agree(made, reference())
    train(Net(made))
    agree(attn, reference())
    assert not torch.allclose(made(x), attn(x), atol=1e-4)


def test_averaged_model(subject):
    net = Net(attention(subject))
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(net)
    start = state_of(net)
    train(net)
    average.update_parameters(net)
    for name, value in net.state_dict().items():
        close(average.module.state_dict()[name], (start[name] + value) / 2)


@pytest.mark.parametrize("assign", [False, True])
def test_state_round_trip(subject, assign, x):
    file = io.BytesIO()
    torch.save(reference().state_dict(), file)
    file.seek(0)
    attn = attention(subject, seed=1)
    result = attn.load_state_dict(torch.load(file), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    agree(attn, reference())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*query\.extra"):
        attn.load_state_dict({**attn.state_dict(), "query.extra": torch.ones(1)})
    state = attn.state_dict()
    del state["value.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*value\.bias"):
        attn.load_state_dict(state)


def test_state_goes_into_a_layer_without_weights(ours, x):
    for assign in (False, True):
        layer = MultiHeadAttention(HEADS, KEY_DIM, VALUE_DIM, **SUBJECTS[ours])
        net = Net(layer)
        net.load_state_dict(Net(reference()).state_dict(), assign=assign)
        agree(net, Net(reference()))
        train(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(subject, dtype, x):
    net = Net(attention(subject)).to(dtype)
    assert all(p.dtype == dtype for p in net.parameters())
    close(net(x.to(dtype)), Net(reference()).to(dtype)(x.to(dtype)))
    close(net.float()(x), Net(reference()).to(dtype).float()(x))


def test_meta_and_back(subject, x):
    attn = attention(subject)
    attn(x)
    attn.to("meta")
    assert all(p.is_meta for p in attn.parameters())
    output = attn(x.to("meta"), use_causal_mask=True)
    assert output.is_meta
    assert output.shape == x.shape
    attn.to_empty(device="cpu")
    attn.load_state_dict(reference().state_dict())
    agree(attn, reference())


def test_made_on_meta_and_filled(ours):
    with torch.device("meta"):
        layer = MultiHeadAttention(
            HEADS, KEY_DIM, VALUE_DIM, query_features=WIDTH, **SUBJECTS[ours]
        )
    assert all(p.is_meta for p in layer.parameters())
    layer.load_state_dict(reference().state_dict(), assign=True)
    agree(layer, reference())


# Of torch's compiler where it meets a full backward hook.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("subject", "hook"),
    [
        *(("anymha", h) for h in (None, "forward", "backward", "custom", "factored")),
        *(("reproducible", h) for h in ("pre", "backward", "factored")),
        ("reference", "forward"),
    ],
)  # each trace takes seconds; what torch does with a hook is the same in every layer
def test_compiled_layer(subject, hook, x):
    def made(kind):
        attn = attention(kind)
        if hook == "custom":
            TOOLS["custom"][0](attn.query)
        elif hook == "factored":
            attn.query = Factored(*SIZES["query"])
        elif hook:
            HOOKS[hook](attn.query)
        return Net(attn)

    torch._dynamo.reset()
    net, wanted = made(subject), made("reference")
    net.compile(backend="eager")
    train(net)
    train(wanted)
    agree(net, wanted)
    compiled = torch.compile(net.attn, backend="eager")
    close(compiled(x), wanted.attn(x))
    torch._dynamo.reset()


def test_hook_added_after_compilation(subject, x):
    torch._dynamo.reset()
    attn, wanted = attention(subject), reference()
    compiled = torch.compile(attn, backend="eager")
    close(compiled(x), wanted(x))
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        torch._dynamo.reset()
        close(compiled(x), wanted(x))
        for one in (attn, wanted):
            HOOKS["forward"](one.query)
        close(compiled(x), wanted(x))
    torch._dynamo.reset()


# --- Several tools at a time ---------------------------------------------------------------------


def test_several_tools_at_a_time(subject):
    def tool(attn):
        prune.l1_unstructured(attn.query, "weight", amount=0.25)
        parametrizations.weight_norm(attn.key)
        HOOKS["forward"](attn.key)
        attn.value = Factored(*SIZES["value"])
        HOOKS["backward"](attn.output)

    net, _ = trained(subject, tool)
    weights_are_effective_or_refused(net.attn, "")


def test_gated_by_a_requires_grad_of_nothing(subject, x):
    attn = attention(subject).requires_grad_(False)
    HOOKS["forward"](attn.query)
    for _ in range(4):
        assert not attn(x).requires_grad
    leaf = x.clone().requires_grad_()
    attn(leaf).sum().backward()
    assert leaf.grad.any()


def test_weights_of_several_processes_are_read_and_set_whole(tmp_path):
    """Two processes have half of each weight (FSDP2)."""
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import anymha
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
make = lambda seed: anymha.MultiHeadAttention(3, 4, query_features=8, backend="torch", seed=seed)
layer, other = make(0), make(1)
weights = anymha.get_weights(other)
fully_shard(layer, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
anymha.set_weights(layer, weights)
assert layer.query.weight.to_local().numel() < layer.query.weight.numel()
got = anymha.get_weights(layer)
assert all(np.array_equal(got[name], array) for name, array in weights.items())
x = torch.ones(1, 3, 8)
assert torch.allclose(layer(x), other(x), atol=1e-6)
dist.destroy_process_group()
"""
    ranks = [subprocess.Popen([sys.executable, "-c", program, str(rank)]) for rank in (0, 1)]
    assert [one.wait(timeout=120) for one in ranks] == [0, 0]


def test_tied_weights_have_one_value(x):
    layer, other = (MultiHeadAttention(2, 4, query_features=8, seed=seed) for seed in (0, 1))
    layer.key.weight = layer.query.weight
    weights = anymha.get_weights(other)
    before = {name: array.copy() for name, array in anymha.get_weights(layer).items()}
    with pytest.raises(WeightsError, match=r"`query.kernel` and `key.kernel` are tied.*two values"):
        anymha.set_weights(layer, weights)
    for name, array in anymha.get_weights(layer).items():
        np.testing.assert_array_equal(array, before[name])
    weights["key.kernel"] = weights["query.kernel"]
    anymha.set_weights(layer, weights)
    np.testing.assert_array_equal(anymha.get_weights(layer)["key.kernel"], weights["key.kernel"])

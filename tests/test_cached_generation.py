"""Models of transformers generate the same tokens from anymha's layers with their caches.

Each model is small and random. transformers generates with its own cache; then each attention
module of the model is replaced by anymha's layer with the module's options and weights, and the
rest, transformers' own, is called step by step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.protocol import Ops
from anymha.framework.registry import as_numpy
from tests.conftest import BACKENDS, usable
from tests.peer_layers import need

pytestmark = pytest.mark.usefixtures("quick_programs")

torch, transformers = need("torch"), need("transformers")

TOKENS = 30
"""How many tokens are generated for each row."""
LENGTHS = (3, 9, 6)
"""The lengths of a batch's prompts."""
SHORT = 16
"""The original length of models whose frequencies depend on the length: passed on the way."""
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 128,
         "tie_word_embeddings": False}  # fmt: skip
WINDOWS = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
           "sliding_window": 5}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": SHORT}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": SHORT, "truncate": False}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SHORT,
            "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.5, 3.0, 5.0, 9.0]}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, "rope_parameters": LLAMA3}),
    "gemma3": ("Gemma3", {**SIZES, **WINDOWS, "query_pre_attn_scalar": 12}),
    "gpt_oss": ("GptOss", {**SIZES, **WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2,
                           "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2", {**SIZES, **WINDOWS, "query_pre_attn_scalar": 12,
                          "attn_logit_softcapping": 2.0}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 5}),
    "cohere2": ("Cohere2", {**SIZES, **WINDOWS}),
    "afmoe": ("Afmoe", {**SIZES, **WINDOWS, "num_dense_layers": 2}),
    "olmo2": ("Olmo2", SIZES),
    "glm": ("Glm", {**SIZES, "head_dim": 8, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoX", {**SIZES, "rotary_pct": 0.5}),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97,
                    "tie_word_embeddings": False}),
}  # fmt: skip
"""Models whose frequencies depend on no length."""
BY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, dynamic": ("Llama", {**SIZES, "max_position_embeddings": SHORT,
                                 "rope_parameters": DYNAMIC}),
    "phi3, longrope": ("Phi3", {**SIZES, "original_max_position_embeddings": SHORT,
                                "pad_token_id": 0, "rope_parameters": LONGROPE}),
}  # fmt: skip
PLACES = {"mpt": ("transformer.blocks", "attn"), "gpt_neox": ("gpt_neox.layers", "attention")}
"""Where models have their blocks, and blocks their attention, if not as most."""


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Args:
        tokens: Integers (B, T), 0 where there is no token.
        valid: Booleans (B, T), True where there is one.
    """

    tokens: np.ndarray
    valid: np.ndarray

    @property
    def rows(self) -> list[Prompts]:
        """Each row alone, without padding."""
        rows = [row[valid] for row, valid in zip(self.tokens, self.valid, strict=True)]
        return [Prompts(row[None], np.ones((1, len(row)), bool)) for row in rows]


@dataclass(frozen=True)
class Generated:
    """Tokens (B, n) and the logits (B, n, V) that each is the greatest of."""

    tokens: np.ndarray
    logits: np.ndarray


def prompts_of(lengths: Sequence[int] = LENGTHS, padding: str = "in front") -> Prompts:
    """Random prompts: the same tokens, wherever the padding stands."""
    count = max(lengths)
    valid = np.arange(count) >= count - np.array(lengths)[:, None]
    if padding == "behind":
        valid = valid[:, ::-1]
    elif padding == "between":
        valid = np.random.default_rng(0).permuted(valid, axis=1)
    tokens = np.zeros(valid.shape, np.int64)
    for i, length in enumerate(lengths):
        drawn = np.random.default_rng(i).integers(1, SIZES["vocab_size"], length)
        tokens[i, valid[i]] = drawn
    return Prompts(tokens, valid)


def model_of(name: str, layers: int = 2) -> Any:
    """A model of the tables above with so many layers."""
    family, options = {**MODELS, **BY_LENGTH}[name]
    kind = "TextConfig" if family == "Gemma3" else "Config"
    count = "n_layers" if name == "mpt" else "num_hidden_layers"
    config = getattr(transformers, family + kind)(**{**options, count: layers})
    return ready(getattr(transformers, f"{family}ForCausalLM"), config)


def ready(kind: Any, config: Any) -> Any:
    """The model, its random weights so large that tokens depend on those far before."""
    config._attn_implementation = "eager"
    model, generator = kind(config).eval(), torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        is_matrix = weight.ndim > 1 and "embed" not in name
        deviation = 2 * weight.shape[-1] ** -0.5 if is_matrix else 0.2 if "bias" in name else 1
        torch.nn.init.normal_(weight, 0, deviation, generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def theirs(model: Any, prompts: Prompts, **options: Any) -> Generated:
    """What transformers generates greedily."""
    found = transformers.GenerationMixin.generate(
        model,
        **({} if "input_features" in options else arguments(prompts, "")),
        **{"do_sample": False, "max_new_tokens": TOKENS, "use_cache": True, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Generated(found.sequences[:, -TOKENS:].numpy(), torch.stack(found.logits, dim=1).numpy())


def arguments(prompts: Prompts, side: str) -> dict[str, Any]:
    """Prompts by the names of `generate`, those of a decoder with its `side`."""
    return {
        f"{side}input_ids": torch.from_numpy(prompts.tokens),
        f"{side}attention_mask": torch.from_numpy(prompts.valid).long(),
    }


def ops_of(home: str) -> Ops:
    """The functions on the arrays of a home's layers; skips the test where it is not installed."""
    if home in BACKENDS:
        return usable(home).ops
    framework = need(home)
    return usable(framework.backend.backend() if home == "keras" else "jax").ops


class Attention(torch.nn.Module):
    """anymha's layer with the options and weights of a module of transformers, in its place."""

    def __init__(self, module: Any, home: str, rows: int, length: int, **options: Any) -> None:
        super().__init__()
        self.ops = ops_of(home)
        self.layer = anymha.convert(module, to=home)
        self.cache = self.layer.make_cache(rows, length, **options)
        self.valid = np.ones((rows, 1), bool)
        self.step = compiled(home, self.layer)

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> tuple[Any, None]:
        """Append the hidden states (B, T, D) that are valid; the cache knows the positions."""
        x, valid = (self.ops.from_numpy(np.asarray(a)) for a in (hidden_states, self.valid))
        output, self.cache = self.step(self.layer, x, self.cache, valid)
        return torch.from_numpy(np.array(as_numpy(output))), None


class CrossAttention(torch.nn.Module):
    """The same for attention to an encoder's output (B, S, D), which is projected once."""

    def __init__(self, module: Any, home: str, encoded: Any) -> None:
        super().__init__()
        self.ops = ops_of(home)
        self.layer = anymha.convert(module, to=home)
        self.memory = self.layer.make_memory(self.ops.from_numpy(encoded.numpy()))

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> tuple[Any, None]:
        """Attend to the encoder's output."""
        output = self.layer(self.ops.from_numpy(np.asarray(hidden_states)), memory=self.memory)
        return torch.from_numpy(np.array(as_numpy(output))), None


def step(layer: Any, x: Any, cache: Any, valid: Any) -> Any:
    """A call with a cache."""
    return layer(x, cache=cache, value_mask=valid)


def compiled(home: str, layer: Any) -> Callable[..., Any]:
    """`step` as the users of a home run it, compiled where they compile by habit."""
    if home == "tensorflow":
        run = need("tensorflow").function(functools.partial(step, layer))
        return lambda _, *arrays: run(*arrays)
    if home == "jax":
        return need("jax").jit(step)
    if home == "flax":
        return need("flax.nnx").jit(step)
    return need("equinox").filter_jit(step) if home == "equinox" else step


class Reader:
    """A model with our attention, which reads tokens step by step.

    Args:
        model: The model.
        attentions: Its attention modules, ours.
        call: The arguments of the model's call for tokens (B, T) at positions (B, T).
    """

    def __init__(
        self, model: Any, attentions: Sequence[Attention], call: Callable[..., dict[str, Any]]
    ) -> None:
        self.model, self.attentions, self.call = model, attentions, call

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens of each row have been read."""
        return as_numpy(self.attentions[0].cache.lengths)

    def change(self, method: str, integers: np.ndarray) -> None:
        """Replace each layer's cache by the result of its method for integers (B,)."""
        for attention in self.attentions:
            attention.cache = getattr(attention.cache, method)(integers)

    def read(self, tokens: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """Read tokens (B, T), those that are valid; logits (B, T, V)."""
        valid = np.ones(tokens.shape, bool) if valid is None else valid
        positions = np.maximum(self.lengths[:, None] + valid.cumsum(1) - 1, 0)
        for attention in self.attentions:
            attention.valid = valid
        with torch.no_grad():
            call = self.call(torch.from_numpy(tokens), torch.from_numpy(positions))
            return self.model(**call, use_cache=False).logits.numpy()

    def prompt(self, prompts: Prompts) -> np.ndarray:
        """Read prompts at once; the logits (B, V) of each row's last token."""
        logits, valid = self.read(prompts.tokens, prompts.valid), prompts.valid
        return logits[np.arange(len(valid)), valid.shape[1] - 1 - valid[:, ::-1].argmax(1)]

    def generate(self, last: np.ndarray, count: int = TOKENS) -> Generated:
        """Generate greedily, token by token.

        Args:
            last: The logits (B, V) of the tokens that were read last.
            count: How many tokens to generate; the last one is not read.
        """
        logits = [last]
        while len(logits) < count:
            logits.append(self.read(logits[-1].argmax(-1)[:, None])[:, 0])
        found = np.stack(logits, axis=1)
        return Generated(found.argmax(-1), found)


@contextmanager
def ours(
    model: Any, name: str, home: str, rows: int, length: int, **options: Any
) -> Iterator[Reader]:
    """The model with our attention, with caches of so many rows and positions."""
    blocks, place = PLACES.get(name, ("model.layers", "self_attn"))
    blocks = model.get_submodule(blocks)
    modules = [getattr(block, place) for block in blocks]
    attentions = [Attention(module, home, rows, length, **options) for module in modules]
    for block, attention in zip(blocks, attentions, strict=True):
        setattr(block, place, attention)
    try:
        yield Reader(model, attentions, lambda tokens, _: {"input_ids": tokens})
    finally:
        for block, module in zip(blocks, modules, strict=True):
            setattr(block, place, module)


def generated_by_ours(model: Any, name: str, prompts: Prompts, home: str) -> Generated:
    """What the model generates with our attention: the prompts at once, then token by token."""
    rows, lengths = len(prompts.tokens), prompts.valid.sum(1)
    with ours(model, name, home, rows, lengths.max() + TOKENS - 1) as reader:
        generated = reader.generate(reader.prompt(prompts))
        np.testing.assert_array_equal(reader.lengths, lengths + TOKENS - 1)
    return generated


def check(found: Generated, expected: Generated) -> None:
    """The same tokens, of many kinds, from the same logits up to rounding in float32."""
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert len(set(expected.tokens.flat)) > TOKENS / 3, "tokens depend on those before"
    assert_close(found.logits, expected.logits)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to rounding in float32."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(name: str) -> None:
    model, prompts = model_of(name), prompts_of()
    check(generated_by_ours(model, name, prompts, "torch"), theirs(model, prompts))


OTHER_HOMES = [
    *((name, home) for name in ("llama", "gemma3") for home in ("numpy", "tensorflow", "jax")),
    *(("gemma3", home) for home in ("keras", "flax", "equinox")),
    ("gpt_oss", "numpy"),
]


@pytest.mark.parametrize(("name", "home"), OTHER_HOMES)
def test_tokens_are_those_of_transformers_in_other_homes(name: str, home: str) -> None:
    model, prompts = model_of(name), prompts_of()
    check(generated_by_ours(model, name, prompts, home), theirs(model, prompts))


@pytest.mark.parametrize("padding", ["behind", "between"])
def test_padding_may_stand_anywhere(padding: str) -> None:
    model = model_of("gemma3")
    found = generated_by_ours(model, "gemma3", prompts_of(padding=padding), "torch")
    check(found, theirs(model, prompts_of()))


def test_padding_that_is_held_shows() -> None:
    model, prompts = model_of("gemma3"), prompts_of()
    held = Prompts(prompts.tokens, np.ones(prompts.valid.shape, bool))
    found = generated_by_ours(model, "gemma3", held, "torch")
    differs = (found.tokens != theirs(model, prompts).tokens).any(1)
    assert differs.tolist() == [length < max(LENGTHS) for length in LENGTHS]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_prompts_that_are_read_one_by_one_continue_together(name: str) -> None:
    model, prompts = model_of(name), prompts_of()
    expected, length, logits, caches = theirs(model, prompts), max(LENGTHS) + TOKENS, [], []
    for row in prompts.rows:
        with ours(model, name, "torch", 1, length) as reader:
            logits.append(reader.prompt(row))
            caches.append([attention.cache for attention in reader.attentions])
    with ours(model, name, "torch", len(logits), length) as reader:
        for attention, *parts in zip(reader.attentions, *caches, strict=True):
            attention.cache = anymha.join_caches(parts)
        check(reader.generate(np.concatenate(logits)), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_tokens_in_pieces_have_the_logits_of_transformers(name: str) -> None:
    model, prompts = model_of(name), prompts_of()
    expected = theirs(model, prompts)
    with ours(model, name, "torch", 3, max(LENGTHS) + TOKENS) as reader:
        logits = [reader.prompt(prompts)[:, None]]
        for piece in np.split(expected.tokens[:, :-1], [4, 5, 12, 14, 20], axis=1):
            logits.append(reader.read(piece))
    assert_close(np.concatenate(logits, axis=1), expected.logits)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_drafts_are_taken_back_where_they_are_wrong(name: str) -> None:
    """Speculative decoding: each row accepts as many tokens of a draft as are right."""
    model, prompts, count, rng = model_of(name), prompts_of(), 4, np.random.default_rng(0)
    expected, rows = theirs(model, prompts).tokens, len(LENGTHS)
    seen = set[int]()
    with ours(model, name, "torch", rows, max(LENGTHS) + 40, rewind=count) as reader:
        found = [[token] for token in reader.prompt(prompts).argmax(-1)]
        while min(map(len, found)) < TOKENS:
            tokens = np.zeros((rows, 1 + count), int)
            for i, row in enumerate(found):
                draft = expected[i, len(row) : len(row) + count]
                tokens[i, 0], tokens[i, 1 : 1 + len(draft)] = row[-1], draft
            tokens[:, 1:][rng.random((rows, count)) < 0.2] = 0
            active = np.array([len(row) < TOKENS for row in found])
            lengths = reader.lengths + active
            best = reader.read(tokens, np.repeat(active[:, None], 1 + count, axis=1)).argmax(-1)
            right = (best[:, :-1] == tokens[:, 1:]).cumprod(1).sum(1) * active
            for i in np.flatnonzero(active):
                found[i] += best[i, : right[i] + 1].tolist()
            seen |= set(right)
            reader.change("truncate", lengths + right)
    assert seen == set(range(1 + count)), "drafts are right up to any place"
    assert [row[:TOKENS] for row in found] == expected.tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_beams_are_those_of_transformers(name: str) -> None:
    model, prompts, beams = model_of(name), prompts_of(), 3
    expected = model.generate(
        **arguments(prompts, ""), num_beams=beams, do_sample=False, max_new_tokens=TOKENS
    )[:, -TOKENS:].numpy()
    rows, moves = len(LENGTHS), 0
    firsts = beams * np.arange(rows)[:, None]
    each = Prompts(*(np.repeat(a, beams, axis=0) for a in (prompts.tokens, prompts.valid)))
    with ours(model, name, "torch", rows * beams, max(LENGTHS) + TOKENS) as reader:
        logits, found = reader.prompt(each), np.zeros((rows * beams, 0), int)
        # A row's beams are alike at first: one of them counts.
        totals = np.where(np.arange(beams) == 0, np.zeros((rows, 1)), -np.inf)
        for _ in range(TOKENS):
            logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            sums = (totals.reshape(-1, 1) + logs).reshape(rows, -1)
            best = np.argsort(-sums, axis=1)[:, :beams]
            totals = np.take_along_axis(sums, best, axis=1)
            sources = (best // logits.shape[-1] + firsts).reshape(-1)
            tokens = (best % logits.shape[-1]).reshape(-1, 1)
            found = np.append(found[sources], tokens, axis=1)
            moves += (sources != np.arange(rows * beams)).any()
            reader.change("reorder", sources)
            logits = reader.read(tokens)[:, 0]
    assert moves > TOKENS / 3, "beams change places"
    np.testing.assert_array_equal(found[::beams], expected)


def alone(name: str, prompts: Prompts, layers: int, **options: Any) -> Generated:
    """What transformers generates for each row alone.

    A model is made anew for each row: transformers takes the frequencies from the longest row of
    a batch, and keeps those of the longest call so far.
    """
    rows = [theirs(model_of(name, layers), row, **options) for row in prompts.rows]
    return Generated(
        np.concatenate([row.tokens for row in rows]), np.concatenate([row.logits for row in rows])
    )


@pytest.mark.parametrize("home", ["numpy", "torch", "tensorflow", "jax"])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_frequencies_are_those_of_each_row_s_own_length(name: str, home: str) -> None:
    """The first layer's keys are all turned anew: its numbers are those without a cache."""
    prompts = prompts_of((3, 14, 18))
    found = generated_by_ours(model_of(name, 1), name, prompts, home)
    check(found, alone(name, prompts, 1, use_cache=False))


def test_transformers_keeps_keys_of_dynamic_frequencies_as_they_were_turned_first() -> None:
    """Why its own cached generation is no reference: it is not that without a cache."""
    prompts = prompts_of((3, 14, 18))
    kept, anew = (
        alone("llama, dynamic", prompts, 1, use_cache=use_cache) for use_cache in (True, False)
    )
    # Keys within the original length stand as they are without a cache until it is passed.
    same = [SHORT - length + 1 if length <= SHORT else 1 for length in (3, 14, 18)]
    for row, count in enumerate(same):
        assert_close(kept.logits[row, :count], anew.logits[row, :count])
        assert np.abs(kept.logits[row, count:] - anew.logits[row, count:]).max() > 1e-2


def test_longrope_of_long_prompts_is_that_of_transformers() -> None:
    name, prompts = "phi3, longrope", prompts_of((17, 25, 20))
    model = model_of(name)
    check(generated_by_ours(model, name, prompts, "torch"), theirs(model, prompts))


def test_longrope_across_the_original_length_is_that_of_transformers_where_all_is_read_anew() -> (
    None
):
    """transformers reads all tokens anew where it is passed: deeper layers' inputs change."""
    name, prompts = "phi3, longrope", prompts_of((5,))
    model = model_of(name)
    expected = theirs(model, prompts)
    first = SHORT + 1 - 5  # the number of tokens from short calls
    with ours(model, name, "torch", 1, SHORT) as reader:
        short = reader.generate(reader.prompt(prompts), first)
    read = np.append(prompts.tokens, short.tokens, axis=1)
    with ours(model, name, "torch", 1, 5 + TOKENS) as reader:
        long = reader.generate(reader.read(read)[:, -1], TOKENS - first)
    check(Generated(*(np.append(one, other, axis=1) for one, other in (
        (short.tokens, long.tokens), (short.logits, long.logits)))), expected)  # fmt: skip


def whisper() -> Any:
    """A small Whisper, whose keys have no bias."""
    config = transformers.WhisperConfig(
        vocab_size=97, d_model=32, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=12, max_target_positions=64, suppress_tokens=None, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    return ready(transformers.WhisperForConditionalGeneration, config)


@pytest.mark.parametrize("home", ["numpy", "torch"])
def test_tokens_of_whisper_are_those_of_transformers(home: str) -> None:
    model, prompts, rows = whisper(), prompts_of(), len(LENGTHS)
    sounds = np.random.default_rng(0).standard_normal((rows, 8, 24)).astype(np.float32)
    sounds = torch.from_numpy(sounds)
    expected = theirs(model, prompts, input_features=sounds, **arguments(prompts, "decoder_"))
    with torch.no_grad():
        encoded = model.get_encoder()(sounds)
    blocks = model.get_decoder().layers
    for block in blocks:
        block.self_attn = Attention(block.self_attn, home, rows, max(LENGTHS) + TOKENS)
        block.encoder_attn = CrossAttention(block.encoder_attn, home, encoded[0])

    def call(tokens: Any, positions: Any) -> dict[str, Any]:
        return {"encoder_outputs": encoded, "decoder_input_ids": tokens,
                "decoder_position_ids": positions}  # fmt: skip

    reader = Reader(model, [block.self_attn for block in blocks], call)
    check(reader.generate(reader.prompt(prompts)), expected)

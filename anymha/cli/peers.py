"""Attention layers of transformers, for the families whose forward pass is plain attention."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.errors import BackendNotInstalledError, BiasWarning, LayoutError
from anymha.interchange.compared_options import changed_options, show_options
from anymha.interchange.layer_config import LayerConfig
from anymha.interchange.layers import set_weights
from anymha.interchange.libraries import known_class
from anymha.options.config import AttentionConfig
from anymha.parity.adapters import adapter_for
from anymha.parity.stages.trace import INPUTS, make_request


@dataclass(frozen=True)
class Family:
    """A family of transformers."""

    module: str  # Its module there
    config: str  # The class of its configuration
    # The configuration's names of the input width and of the number of heads
    names: tuple[str, str]
    layer: str  # The class of its attention
    sized: bool = False  # Whether the layer takes the width and the heads before its configuration
    indexed: bool = False  # Whether it takes its place in the model

    def make_layer(self, width: int, heads: int) -> Any:
        """A new layer."""
        path = f"transformers.models.{self.module}"
        configs: Any = importlib.import_module(f"{path}.configuration_{self.module}")
        models: Any = importlib.import_module(f"{path}.modeling_{self.module}")
        config = getattr(configs, self.config)(**dict(zip(self.names, (width, heads), strict=True)))
        config._attn_implementation = "eager"
        options = {"config": config} | ({"layer_idx": 0} if self.indexed else {})
        return getattr(models, self.layer)(*((width, heads) if self.sized else ()), **options)


_SIZES = ("hidden_size", "num_attention_heads")
_ENCODER = ("d_model", "encoder_attention_heads")
FAMILIES = {
    "transformers.bert": Family("bert", "BertConfig", _SIZES, "BertAttention"),
    "transformers.vit": Family("vit", "ViTConfig", _SIZES, "ViTAttention"),
    "transformers.clip": Family("clip", "CLIPVisionConfig", _SIZES, "CLIPAttention"),
    "transformers.bart": Family("bart", "BartConfig", _ENCODER, "BartAttention", sized=True),
    "transformers.whisper": Family("whisper", "WhisperConfig", _ENCODER, "WhisperAttention",
                                   sized=True),
    "transformers.opt": Family("opt", "OPTConfig", _SIZES, "OPTAttention", indexed=True),
    "transformers.gpt2": Family("gpt2", "GPT2Config", ("n_embd", "n_head"), "GPT2Attention",
                                indexed=True),
}  # fmt: skip


def output_of(layer: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The output of a library's layer for these inputs, each position attending to all."""
    three = {name: array for name, array in inputs.items() if name in INPUTS}
    return adapter_for(layer).trace(make_request(three, {}), None).output


def run(
    layout: str, config: AttentionConfig, weights: Mapping[str, np.ndarray], query: np.ndarray
) -> np.ndarray:
    """The output of the family's own layer for a query (B, T, D), each position attending to all.

    Raises:
        BackendNotInstalledError: transformers or torch is not installed.
        LayoutError: the family's layer cannot have these sizes.
    """
    heads = config.num_heads
    square = len({query.shape[-1], heads * config.key_dim, *_widths(weights)}) == 1
    changed = changed_options(config)
    if not square or changed or query.dtype.itemsize <= 2:
        received = f" Received: {show_options(config, changed)}." if changed else ""
        raise LayoutError(
            "a layer of that family is as wide as its heads together, and is run here in float32 "
            f"and float64, with all other options at their defaults.{received}"
        )
    try:
        torch: Any = importlib.import_module("torch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, while it is imported
            layer = FAMILIES[layout].make_layer(heads * config.key_dim, heads)
    except ImportError as error:
        raise BackendNotInstalledError(f"it is not installed ({error})") from error
    layer = layer.eval().to(getattr(torch, config.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasWarning)  # zeros change nothing here
        layer = set_weights(layer, dict(weights))
    return output_of(layer, {"query": query})


def run_model(layout: str, model: LayerConfig, arrays: Mapping[str, np.ndarray],
              query: np.ndarray) -> np.ndarray:  # fmt: skip
    """The output of a model's own layer for a query (B, T, D), in float32 and causal.

    Args:
        layout: The layout of the layer's arrays.
        model: The model's configuration, and the layer's number.
        arrays: The layer's arrays by their names.
        query: The inputs.

    Raises:
        BackendNotInstalledError: transformers or torch is not installed.
        LayoutError: there is no such layer, or it does not take these arrays.
    """
    try:
        torch: Any = importlib.import_module("torch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, while it is imported
            transformers: Any = importlib.import_module("transformers")
            with torch.device("meta"):  # no memory, whatever the configuration says
                sizes = _model_layer(transformers, layout, model).state_dict()
            wrong = [n for n, x in sizes.items() if n not in arrays or x.shape != arrays[n].shape]
            if wrong:
                raise LayoutError(f"by the configuration it has other arrays: {', '.join(wrong)}")
            layer = _model_layer(transformers, layout, model)
    except ImportError as error:
        raise BackendNotInstalledError(f"it is not installed ({error})") from error
    values = {name: torch.from_numpy(np.array(a, np.float32)) for name, a in arrays.items()}
    layer.load_state_dict(values, strict=False)
    adapter = adapter_for(layer.eval())
    return adapter.trace(make_request(query, {"use_causal_mask": True}), None).output


def _model_layer(transformers: Any, layout: str, model: LayerConfig) -> Any:
    """A new layer of a model, in float32.

    Raises:
        LayoutError: there is none.
    """
    stated = {name: value for name, value in model.stated.items() if name != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(model.stated.get("model_type"), **stated)
        config._attn_implementation = "eager"
        module = type(config).__module__.replace("configuration_", "modeling_")
        for kind in vars(importlib.import_module(module)).values():
            if isinstance(kind, type) and (known_class(kind) or ("", ""))[1] == layout:
                takes = inspect.signature(kind).parameters
                place = {"layer_idx": model.number or 0} if "layer_idx" in takes else {}
                return kind(config, **place).float()
    except ImportError:
        raise
    except Exception as error:  # whatever a configuration of another form does there
        raise LayoutError(f"the model cannot be made: {error}") from error
    raise LayoutError("transformers has no attention of the family that stands alone")


def _widths(weights: Mapping[str, np.ndarray]) -> list[int]:
    kernels = [weights[f"{name}.kernel"] for name in ("query", "key", "value")]
    return [*(kernel.shape[0] for kernel in kernels), *weights["output.kernel"].shape[2:]]

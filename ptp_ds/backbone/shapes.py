"""Shapes of a model's parameters from its configuration alone: built on the meta device, no weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ptp_ds.backbone.backbone import decoder_layers
from ptp_ds.errors import UserError
from ptp_ds.models.heads import auto_class, head_kind
from ptp_ds.models.quantised import require_plain_config
from ptp_ds.models.source import choose_attention
from ptp_ds.prompts.deep import deep_shape

Shape = tuple[int, ...]
_GATES = {"gate_proj", "gate_up_proj", "Wi", "v1"}  # in the names of gated feed-forwards' weights

# Public dimensions of well-known models, for a plan where no config.json is at hand.
NAMED: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "llama-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-70b": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                  "num_attention_heads": 64, "num_key_value_heads": 8},
    "llama-405b": {"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                   "num_attention_heads": 128, "num_key_value_heads": 8},
    "mistral-7b": {"vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """layers: shapes of each layer module's parameters; outside_layers: of embeddings, final norm and head, a tied one
    once.

    passed: elements of the layers' weight matrices that a token passes through, of experts' those of the ones that it
    is routed to. count: layers of a pass, more than modules where modules are used again (albert). width: H; inner: I,
    the feed-forward's that all tokens pass; routed, routed_inner: experts that a token is routed to, and their widths
    together. These three are means over layers. queries, keys: numbers of a token's queries and keys; heads: query
    heads. gated: whether the feed-forward has a gate; rms: whether norms are RMS norms.
    """

    layers: tuple[tuple[Shape, ...], ...]
    outside_layers: tuple[Shape, ...]
    passed: int
    count: int
    width: int
    inner: int
    routed: float
    routed_inner: float
    heads: int
    queries: int
    keys: int
    vocabulary: int
    gated: bool
    rms: bool

    @property
    def layer_elements(self) -> int:
        """Elements of all layers."""
        return sum(elements(layer) for layer in self.layers)

    @property
    def elements(self) -> int:
        """Elements of the whole model."""
        return self.layer_elements + elements(self.outside_layers)

    @property
    def parameters(self) -> list[Shape]:
        """Every parameter's shape."""
        return [shape for layer in self.layers for shape in layer] + list(self.outside_layers)

    @property
    def matrix_elements(self) -> int:
        """N: `passed`, a layer used twice counted twice."""
        return self.passed * self.count // len(self.layers)


def elements(shapes: Sequence[Shape]) -> int:
    """Elements of tensors of these shapes, together."""
    return sum(math.prod(shape) for shape in shapes)


def shape_of(config: Any, head: str = "auto") -> ModelShape:
    """The shapes of the model that a configuration describes, with the head of a run's --head.

    Raises ValueError for a family without repeated layers, or without that head.
    """
    from transformers.initialization import no_init_weights

    kind = head_kind(config, head)
    auto = auto_class(config, kind, config.model_type)
    with torch.device("meta"), no_init_weights():
        model = auto.from_config(config)
    model.tie_weights()
    modules = decoder_layers(model)
    if not modules:
        raise UserError(f"Model family {config.model_type!r} has no repeated layers to plan for.")
    layers = tuple(tuple(tuple(p.shape) for p in layer.parameters()) for layer in modules)
    in_layers = {id(parameter) for layer in modules for parameter in layer.parameters()}
    outside = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in in_layers)
    text, names = config.get_text_config(), {word for name, _ in modules[0].named_parameters() for word in _words(name)}
    count, key_heads, head_width = deep_shape(config)
    width, gated = text.hidden_size, not _GATES.isdisjoint(names)
    widest = max((max(shape) for shape in layers[0] if len(shape) == 2 and width in shape), default=4 * width)
    dense = int(getattr(text, "intermediate_size", 0) or widest)
    inner, routed, routed_inner = zip(*(_feed_forward(layer, text, dense, gated) for layer in modules), strict=True)
    return ModelShape(
        layers=layers, outside_layers=outside, count=count, width=width, inner=round(fmean(inner)),
        routed=fmean(routed), routed_inner=fmean(routed_inner),
        passed=sum(_passed(layer, text) for layer in modules),
        heads=text.num_attention_heads, queries=text.num_attention_heads * head_width, keys=key_heads * head_width,
        vocabulary=text.vocab_size, gated=gated,
        rms=any("RMSNorm" in type(module).__name__ for module in modules[0].modules()),
    )  # fmt: skip


def _words(name: str) -> list[str]:
    return name.split(".")


def _is_experts(name: str, parameter: nn.Parameter, text: Any) -> bool:
    """Whether it is a weight matrix of all of a layer's experts; dbrx has them one below the other."""
    return "experts" in _words(name) and parameter.dim() == (2 if hasattr(text, "ffn_config") else 3)


def _routing(parameter: nn.Parameter, text: Any) -> tuple[int, int]:
    """(experts that a token is routed to, experts) of such a matrix. All work on it where the family doesn't say."""
    own = getattr(text, "ffn_config", text)
    experts = parameter.shape[0] if parameter.dim() == 3 else own.moe_num_experts
    if text.model_type.startswith("llama4"):  # the others get zeros, and work on them
        return experts, experts
    names = ("num_experts_per_tok", "moe_topk", "moe_top_k")
    routed = next((value for name in names if (value := getattr(own, name, None))), experts)
    return int(routed[0] if isinstance(routed, list) else routed), experts


def _passed(layer: nn.Module, text: Any) -> int:
    """Elements of a layer's weight matrices that a token passes through."""
    found = 0
    for name, parameter in layer.named_parameters():
        if _is_experts(name, parameter, text):
            routed, experts = _routing(parameter, text)
            found += parameter.numel() * routed // experts
        elif parameter.dim() == 2 and not name.endswith("_bias"):
            found += parameter.numel()
    return found


def _feed_forward(layer: nn.Module, text: Any, dense: int, gated: bool) -> tuple[int, int, int]:
    """(width that all tokens pass, experts that a token is routed to, their widths together) of one layer.

    dense: the width where it has no experts.
    """
    own, rows = list(layer.named_parameters()), (3 if gated else 2) * text.hidden_size
    matrices = [parameter for name, parameter in own if _is_experts(name, parameter, text)]
    if not matrices:
        return dense, 0, 0
    routed, experts = _routing(matrices[0], text)
    shared = sum(p.numel() for name, p in own if any(word.startswith("shared") for word in _words(name)))
    return shared // rows, routed, sum(one.numel() for one in matrices) // experts * routed // rows


def config_of(model: str) -> Any:
    """transformers' configuration of one of NAMED, of a folder, or of a hub id; ValueError where there is none."""
    from transformers import AutoConfig, LlamaConfig

    if model in NAMED:
        return LlamaConfig(**{"tie_word_embeddings": False, **NAMED[model]}, pad_token_id=None)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        why = "config.json in it describes no model" if Path(model).is_dir() else "neither a folder nor a known hub id"
        raise UserError(
            f"--model {model}: {why} ({first}); give a folder with config.json, a hub id that this machine reaches, or "
            f"one of {', '.join(NAMED)}."
        ) from None
    choose_attention(config, f"--model {model}: config.json")
    require_plain_config(config, f"--model {model}: config.json")
    return config

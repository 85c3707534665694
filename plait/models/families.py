"""What must be known of an architecture, once per family and nowhere else. A new family is one entry in FAMILIES.

A family says which transformers class its body is, how features come out of it, and which Linear layers make its MLPs.
Whatever works on models (evaluation, and what learns or routes) asks here and never looks at architectures itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from plait.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

Pooling = Literal["mean", "cls", "pooler"]
Features = Callable[["nn.Module", Mapping[str, "Tensor"], Pooling], "Tensor"]


@dataclass(frozen=True)
class Family:
    """One architecture."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` of the config.json it goes by."""
    modality: Literal["image", "text"]
    body: str
    """transformers class that loads the body."""
    answers: Literal["head", "causal", "seq2seq"]
    """A head on features, or text: by likelihood of the answers, or generated."""
    mlp: str
    """Pattern of the names of the Linear layers of its MLPs; the first number in a name is the layer."""
    features: Features | None = None
    """(body, inputs, pooling) → [n, width]."""
    unused: tuple[str, ...] = ()
    """Parameters that a checkpoint may lack: nothing here reads them, unless pooling says so."""
    classifier_pooling: Pooling = "mean"
    """What the head of transformers' own ForSequenceClassification reads."""
    unrouted: tuple[str, ...] = ()
    """Layers that are not called with a batch, so no sample can have its own."""

    def pooling(self, config: Mapping[str, Any]) -> Pooling:
        """What a head reads, by the class that the config.json names: a plain encoder's head reads the mean."""
        names = config.get("architectures") or [""]
        return self.classifier_pooling if str(names[0]).endswith("ForSequenceClassification") else "mean"

    def mlps(self, body: nn.Module) -> list[list[str]]:
        """Names of the Linear layers of every MLP, by depth."""
        found: dict[str, list[str]] = {}
        for name, _ in body.named_modules():
            match = re.search(rf"(?:^|\.)(?:{self.mlp})$", name)  # a model with a head has the body under a prefix
            if match:
                found.setdefault(match[1], []).append(name)
        return list(found.values())


def _dinov2(body: nn.Module, inputs: Mapping[str, Tensor], pooling: Pooling) -> Tensor:
    import torch

    tokens = body(**inputs).last_hidden_state  # [n, 1 + patches, d]
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)  # as Dinov2ForImageClassification


def _class_token(body: nn.Module, inputs: Mapping[str, Tensor], pooling: Pooling) -> Tensor:
    return body(**inputs).last_hidden_state[:, 0]  # as ViTForImageClassification


def _clip(body: nn.Module, inputs: Mapping[str, Tensor], pooling: Pooling) -> Tensor:
    return body(**inputs).pooler_output  # the class token after the last norm, as CLIPModel projects it


def _bert(body: nn.Module, inputs: Mapping[str, Tensor], pooling: Pooling) -> Tensor:
    out = body(**inputs)
    if pooling == "pooler":
        return out.pooler_output
    if pooling == "cls":
        return out.last_hidden_state[:, 0]
    mask = inputs["attention_mask"].unsqueeze(-1).to(out.last_hidden_state.dtype)  # [n, tokens, 1]
    return (out.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)


_POOLER = ("pooler.dense.weight", "pooler.dense.bias")

FAMILIES = (
    Family(
        "dinov2", ("dinov2",), "image", "AutoModel", "head",
        r"encoder\.layer\.(\d+)\.mlp\.(?:fc1|fc2|weights_in|weights_out|(?:gate|up|down)_proj)", _dinov2,
        ("embeddings.mask_token",),
    ),
    Family(
        "vit", ("vit", "deit"), "image", "AutoModel", "head",
        r"(?:encoder\.layer|layers)\.(\d+)\.(?:intermediate\.dense|output\.dense|mlp\.fc1|mlp\.fc2)", _class_token,
        (*_POOLER, "embeddings.mask_token"),
    ),
    Family(
        "clip", ("clip", "clip_vision_model"), "image", "CLIPVisionModel", "head",
        r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.fc[12]", _clip,
    ),
    Family(
        "bert", ("bert",), "text", "AutoModel", "head",
        r"encoder\.layer\.(\d+)\.(?:intermediate|output)\.dense", _bert, _POOLER, "pooler",
    ),
    Family(
        "roberta", ("roberta", "xlm-roberta"), "text", "AutoModel", "head",
        r"encoder\.layer\.(\d+)\.(?:intermediate|output)\.dense", _bert, _POOLER, "cls",
    ),
    Family(
        "t5", ("t5", "mt5", "umt5"), "text", "AutoModelForSeq2SeqLM", "seq2seq",
        r"((?:encoder|decoder)\.block\.\d+)\.layer\.\d+\.DenseReluDense\.w\w+",
        unrouted=("relative_attention_bias",),
    ),
    Family(
        "llama", ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "smollm3"), "text",
        "AutoModelForCausalLM", "causal", r"model\.layers\.(\d+)\.mlp\.(?:gate_proj|up_proj|down_proj|gate_up_proj)",
    ),
)  # fmt: skip


def family_of(config: Mapping[str, Any], label: str) -> Family:
    """The family of a config.json. Raises CheckpointError naming the architectures that are known."""
    kind = config.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    known = ", ".join(sorted(kind for family in FAMILIES for kind in family.model_types))
    if kind is None:
        raise CheckpointError(f"{label}: has no config.json with a model_type, so it cannot be run; known: {known}")
    raise CheckpointError(
        f"{label}: evaluation does not know the architecture '{kind}' (known: {known}); it can be merged all the same"
    )

"""Depth read off tensor names: the stacks of real architectures, t for gradients, what comes before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pico
import pytest

from plait.errors import RecipeError
from plait.layers import Layers, is_before, resize_config


def numbered(pattern: str, count: int) -> list[str]:
    return [pattern.format(i) for i in range(count)]


LLAMA = [
    "model.embed_tokens.weight",
    *numbered("model.layers.{}.self_attn.q_proj.weight", 5),
    *numbered("model.layers.{}.mlp.up_proj.weight", 5),
    "model.norm.weight",
    "lm_head.weight",
]
BERT = [
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.LayerNorm.bias",
    *numbered("bert.encoder.layer.{}.attention.self.query.weight", 3),
    "bert.pooler.dense.weight",
    "classifier.weight",
]
VIT = [
    "vit.embeddings.cls_token",
    "vit.embeddings.patch_embeddings.projection.weight",
    *numbered("vit.encoder.layer.{}.layernorm_before.weight", 4),
    "vit.layernorm.weight",
]
T5 = [
    "shared.weight",
    *[f"encoder.block.{i}.layer.{j}.x.weight" for i in range(3) for j in range(2)],
    "encoder.final_layer_norm.weight",
    *[f"decoder.block.{i}.layer.{j}.x.weight" for i in range(5) for j in range(3)],
    "decoder.final_layer_norm.weight",
    "lm_head.weight",
]
GPT2 = ["wte.weight", "wpe.weight", *numbered("h.{}.attn.c_attn.weight", 3), "ln_f.weight"]
MIXTRAL = [
    "model.embed_tokens.weight",
    *[f"model.layers.{i}.mlp.experts.{e}.w1.weight" for i in range(2) for e in range(8)],
    *numbered("model.layers.{}.mlp.gate.weight", 2),
    "model.norm.weight",
]
RESNET = [
    "conv1.weight",
    "bn1.num_batches_tracked",
    *[f"layer{s}.{b}.conv{c}.weight" for s in (1, 2) for b in range(3) for c in (1, 2)],
    "layer2.0.downsample.0.weight",
    "fc.weight",
]
VGG = ["features.0.weight", "features.2.weight", "features.5.weight", "classifier.weight"]
MODELS = {
    "llama": (LLAMA, {"model.layers.": 5}),
    "bert": (BERT, {"bert.encoder.layer.": 3}),
    "vit": (VIT, {"vit.encoder.layer.": 4}),
    "t5": (T5, {"encoder.block.": 3, "decoder.block.": 5}),
    "gpt2": (GPT2, {"h.": 3}),
    "mixtral": (MIXTRAL, {"model.layers.": 2}),
    "resnet": (RESNET, {"layer1.": 3, "layer2.": 3}),
    "vgg: a numbering with gaps is no stack": (VGG, {}),
    "a lone Sequential beside layers": ([*LLAMA, "score.0.weight"], {"model.layers.": 5}),
    "a model of one layer": (["wte.weight", "h.0.a", "h.0.b"], {"h.": 1}),
    "no names": ([], {}),
}


@pytest.mark.parametrize("model", MODELS)
def test_stacks(model: str) -> None:
    names, stacks = MODELS[model]
    assert Layers(names).counts == stacks


@pytest.mark.parametrize(
    ("names", "name", "t", "depth"),
    [
        (LLAMA, "model.embed_tokens.weight", 0, 0),
        (LLAMA, "model.layers.0.mlp.up_proj.weight", 0, 0),
        (LLAMA, "model.layers.1.mlp.up_proj.weight", 0.25, 0.25),
        (LLAMA, "model.layers.4.self_attn.q_proj.weight", 1, 1),
        (LLAMA, "model.norm.weight", 0, 1),
        (LLAMA, "lm_head.weight", 0, 1),
        (BERT, "bert.embeddings.LayerNorm.bias", 0, 0),
        (BERT, "bert.encoder.layer.1.attention.self.query.weight", 0.5, 0.5),
        (BERT, "bert.pooler.dense.weight", 0, 1),
        (BERT, "classifier.weight", 0, 1),
        (VIT, "vit.embeddings.cls_token", 0, 0),
        (VIT, "vit.encoder.layer.1.layernorm_before.weight", 1 / 3, 1 / 3),
        (VIT, "vit.layernorm.weight", 0, 1),
        (T5, "shared.weight", 0, 0),
        (T5, "encoder.block.1.layer.1.x.weight", 0.5, 0.5),
        (T5, "decoder.block.1.layer.0.x.weight", 0.25, 0.25),
        (T5, "encoder.final_layer_norm.weight", 0, 1),
        (GPT2, "wpe.weight", 0, 0),
        (GPT2, "h.2.attn.c_attn.weight", 1, 1),
        (GPT2, "ln_f.weight", 0, 1),
        (MIXTRAL, "model.layers.0.mlp.experts.7.w1.weight", 0, 0),
        (MIXTRAL, "model.layers.1.mlp.experts.0.w1.weight", 1, 1),
        (RESNET, "conv1.weight", 0, 0),
        (RESNET, "layer2.1.conv1.weight", 0.5, 0.5),
        (RESNET, "fc.weight", 0, 1),
        (["h.0.a"], "h.0.a", 1, 1),
        (VGG, "features.5.weight", 0, 1),
    ],
)
def test_t_and_depth(names: list[str], name: str, t: float, depth: float) -> None:
    layers = Layers(names)
    assert name in names
    assert layers.t(name) == pytest.approx(t)
    assert layers.depth(name) == pytest.approx(depth)


def test_places() -> None:
    layers = Layers(MIXTRAL)
    place = layers.place("model.layers.1.mlp.experts.6.w1.weight")
    assert place is not None
    assert (place.stack, place.index, place.count, place.rest) == ("model.layers.", 1, 2, "mlp.experts.6.w1.weight")
    assert layers.place("model.norm.weight") is None


def test_main_is_the_only_stack() -> None:
    assert Layers(LLAMA).main() == "model.layers."
    with pytest.raises(RecipeError, match=r"several stacks .*decoder\.block\.\* \(5\), encoder\.block\.\* \(3\)"):
        Layers(T5).main()
    with pytest.raises(RecipeError, match="no numbered layers"):
        Layers(VGG).main()


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "vision.patch_embed.proj.bias",
        "vision_model.pre_layrnorm.bias",
        pytest.param("visual.pre_layernorm.weight"),
        "model.decoder.embed_positions.weight",
        "stem.conv.weight",
        "mask_token",
    ],
)
def test_the_input_side(name: str) -> None:
    assert is_before(name)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.norm.weight",
        "classifier.bias",
        "pooler.dense.weight",
        "ln_f.bias",
        "score.weight",
        "decoder.final_layer_norm.weight",
        pytest.param("embed_out.weight"),
    ],
)
def test_the_output_side(name: str) -> None:
    assert not is_before(name)


@pytest.mark.parametrize(
    ("make", "stacks"),
    [
        (pico.make_llama, {"model.layers.": 3}),
        (pico.make_bert, {"encoder.layer.": 3}),
        (pico.make_t5, {"encoder.block.": 3, "decoder.block.": 3}),
    ],
)
def test_stacks_of_real_files(make: Callable[..., Path], stacks: dict[str, int], tmp_path: Path) -> None:
    layers = Layers(pico.read(make(tmp_path, layers=3)))
    assert layers.counts == stacks


def test_config_follows_the_layers() -> None:
    config = {
        "num_hidden_layers": 3,
        "n_layer": 4,
        "hidden_size": 3,
        "layer_types": ["full", "sliding", "other"],
        "text_config": {"num_hidden_layers": 3, "depth": 3},
        "other_config": {"num_hidden_layers": 3},
    }
    resized = resize_config(config, 3, [0, 2, 2, 1])
    assert resized == {
        "num_hidden_layers": 4,
        "n_layer": 4,
        "hidden_size": 3,
        "layer_types": ["full", "other", "other", "sliding"],
        "text_config": {"num_hidden_layers": 4, "depth": 4},
        "other_config": {"num_hidden_layers": 3},
    }
    assert config["num_hidden_layers"] == 3

"""clip8: the packaged suite files, and a miniature of exactly their layout, checked against plain transformers."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import plait.evaluate.subjects
from plait.errors import CheckpointError, RecipeError
from plait.evaluate.measure import Bench, Options
from plait.evaluate.subjects import Subject
from plait.models import zero_shot
from plait.models.net import Sample, load_net
from plait.models.outfit import suite_head
from plait.run import merge
from plait.suites.data import load_split
from plait.suites.definition import Suite, suite_of
from plait.suites.places import PACKAGED, load_suite

MODELS = {
    "clip8": "clip-vit-base-patch32", "clip8-b16": "clip-vit-base-patch16", "clip8-l14": "clip-vit-large-patch14",
}  # fmt: skip
CLASSES = {
    "sun397": 397, "stanford-cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47,
}  # fmt: skip
TEMPLATES = dict(zip(CLASSES, (2, 8, 18, 3, 1, 3, 1, 8), strict=True))
ROWS = 12
SIDE = 32
BASE = "openai/clip-vit-base-patch32"


# ---------------------------------------------------------------- the packaged files


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_suite_is_the_fields_benchmark(name: str) -> None:
    suite = load_suite(name)
    model = MODELS[name]
    assert suite.name == name
    assert suite.base == f"openai/{model}"
    assert {task: len(entry.classes or []) for task, entry in suite.tasks.items()} == CLASSES
    assert {task: len(entry.templates) for task, entry in suite.tasks.items()} == TEMPLATES
    for task, entry in suite.tasks.items():
        assert entry.expert == f"tanganke/{model}_{task}"
        assert entry.head == "zero_shot"
        assert len(set(entry.classes or [])) == CLASSES[task], "two classes with one name"
        assert len(set(entry.templates)) == TEMPLATES[task]


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_suite_never_learns_from_test(name: str) -> None:
    for entry in load_suite(name).tasks.values():
        assert set(entry.data) == {"adapt", "test"}
        adapt, test = entry.data["adapt"], entry.data["test"]
        assert (adapt.dataset, adapt.config) == (test.dataset, test.config)
        assert (adapt.split, test.split) == ("train", "test")


def test_the_packaged_suites_differ_in_the_model_only() -> None:
    def data(name: str) -> str:
        path = Path(plait.evaluate.subjects.__file__).parents[1] / "suites" / f"{name}.yaml"
        return path.read_text().split("\ntasks:", 1)[1].replace(MODELS[name], "MODEL")

    assert data("clip8") == data("clip8-b16") == data("clip8-l14")


def test_landmarks_of_the_class_order() -> None:
    """What the data sets' labels mean: index → name, spot-checked where a slip would show."""
    tasks = load_suite("clip8").tasks
    expected = {
        "sun397": {0: "abbey", 100: "closet", 200: "iceberg", 300: "restaurant", 396: "youth hostel"},
        "stanford-cars": {0: "AM General Hummer SUV 2000", 98: "FIAT 500 Abarth 2012",
                          195: "smart fortwo Convertible 2012"},
        "resisc45": {0: "airplane", 22: "meadow", 44: "wetland"},
        "eurosat": {0: "annual crop land", 2: "brushland or shrubland", 9: "lake or sea"},
        "svhn": {0: "0", 9: "9"},
        "gtsrb": {0: "red and white circle 20 kph speed limit", 14: "stop",
                  38: "blue circle with white keep right arrow mandatory"},
        "mnist": {0: "0", 9: "9"},
        "dtd": {0: "banded", 23: "marbled", 46: "zigzagged"},
    }  # fmt: skip
    for task, landmarks in expected.items():
        names = tasks[task].classes or []
        assert {index: names[index] for index in landmarks} == landmarks


# ---------------------------------------------------------------- the miniature


@dataclass
class Mini:
    """The suite's folder, and what plain transformers says of it."""

    root: Path
    suite: Suite
    clip: Any
    """The base's CLIPModel."""
    embeddings: dict[str, Tensor]
    """Task → [classes, width]."""
    models: dict[Path, Any] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.root / BASE

    def images(self, task: str) -> list[Image.Image]:
        return [image for image, _ in self.rows(task)]

    def labels(self, task: str) -> list[int]:
        return [label for _, label in self.rows(task)]

    def rows(self, task: str) -> list[tuple[Image.Image, int]]:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(next(data_folder(self.suite, task).glob("test-*"))).to_pylist()
        return [(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), row["label"]) for row in table]

    def predictions(self, model: Path, task: str) -> list[int]:
        """The answers of a model by a short plain loop, image by image."""
        return [int(self.logits(model, task, image).argmax()) for image in self.images(task)]

    @torch.inference_mode()
    def logits(self, model: Path, task: str, image: Image.Image) -> Tensor:
        if model not in self.models:
            self.models[model] = transformers.CLIPVisionModel.from_pretrained(model)
        tower = self.models[model]
        features = self.clip.visual_projection(tower(pixel_values=pixels(image)).pooler_output)
        features = features / features.norm(dim=-1, keepdim=True)
        return self.clip.logit_scale.exp() * features @ self.embeddings[task].T


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Mini:
    """The packaged YAML beside folders named like the hub repositories that it names."""
    root = tmp_path_factory.mktemp("clip8")
    shutil.copy(Path(plait.evaluate.subjects.__file__).parents[1] / "suites" / "clip8.yaml", root)
    suite = load_suite(root / "clip8.yaml")
    make_base(root / BASE)
    for position, (task, entry) in enumerate(suite.tasks.items()):
        make_expert(root / entry.expert, root / BASE, seed=position, hub_names=task != "dtd")
    clip = transformers.CLIPModel.from_pretrained(root / BASE)
    embeddings = {t: text_embeddings(clip, root / BASE, e.classes or [], e.templates) for t, e in suite.tasks.items()}
    found = Mini(root, suite, clip, embeddings)
    for seed, (task, entry) in enumerate(suite.tasks.items()):
        make_data(found, task, root / entry.expert, seed)
    return found


@pytest.fixture(scope="module")
def bench(mini: Mini) -> Bench:
    return Bench(mini.suite, Options(batch_size=10))


@pytest.fixture(scope="module")
def merged(mini: Mini) -> Path:
    out = mini.root / "merged"
    merge(mini.suite.recipe("task_arithmetic", {"weight": 0.3}), out)
    return out


def make_base(folder: Path) -> None:
    """A CLIPModel as the hub has it: all towers in one file, with the position ids of older versions."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": make_tokenizer(folder), "max_position_embeddings": 77, "bos_token_id": 0,
            "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": SIDE, "patch_size": 16}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        state = {
            name: 8 * torch.randn_like(v) * v.std() if v.dim() > 1 else v for name, v in model.state_dict().items()
        }
        model.load_state_dict(state)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None],
           "vision_model.embeddings.position_ids": torch.arange(5)[None]}  # fmt: skip
    save_file({**pico.read(folder), **ids}, folder / "model.safetensors", metadata={"format": "pt"})
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    processor = {"crop_size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
                 "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": mean, "image_std": std,
                 "size": SIDE}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def make_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt as CLIP's: bytes, bytes that end a word, merges, the two specials. The size of it."""
    folder.mkdir(parents=True)
    printable = [chr(byte) for byte in range(33, 127)]
    merges: list[str] = []
    for word in re.findall(
        r"\w+", "a photo of the red and white circle triangle with warning traffic sign zoomed close"
    ):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        merges += [f"{''.join(pieces[:at])} {pieces[at]}" for at in range(1, len(pieces))]
    merges = list(dict.fromkeys(merges))
    words = [*printable, *(f"{c}</w>" for c in printable), *(merge.replace(" ", "") for merge in merges)]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>"}  # fmt: skip
    config = {**specials, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    return len(vocab)


def make_expert(folder: Path, base: Path, seed: int, hub_names: bool) -> None:
    """The base's vision tower plus noise, as a CLIPVisionModel: named as on the hub, or as transformers 5 does."""
    model = transformers.CLIPVisionModel.from_pretrained(base)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn(parameter.shape, generator=noise))
    model.save_pretrained(folder)
    prefix = "vision_model." if hub_names else ""
    tensors = {prefix + name: value for name, value in bare(pico.read(folder)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_data(mini: Mini, task: str, expert: Path, seed: int) -> None:
    """A data set as a hub repository: Parquet files and a README. The expert is right in two rows of three."""
    import datasets

    entry = mini.suite.tasks[task].data["test"]
    random = np.random.default_rng(seed)
    folder = data_folder(mini.suite, task)
    folder.mkdir(parents=True)
    # The hub's names are not the prompts' names.
    label = datasets.ClassLabel(names=[f"class {index:03d}" for index in range(CLASSES[task])])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    for split in ("train", "test"):
        shape = (SIDE, SIDE) if task == "mnist" else (SIDE + 4 * (seed % 3), SIDE, 3)
        images = [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for _ in range(ROWS)]
        labels = random.integers(0, CLASSES[task], ROWS).tolist()
        if split == "test":
            labels = [
                int(mini.logits(expert, task, image.convert("RGB")).argmax()) if row % 3 else labels[row]
                for row, image in enumerate(images)
            ]
        rows = {"image": [{"bytes": png(image), "path": None} for image in images], "label": labels}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    files = [{"split": s, "path": f"{folder.name}/{s}-*"} for s in ("train", "test")]
    card = yaml.safe_dump({"configs": [{"config_name": entry.config or "default", "data_files": files}]})
    (folder.parent / "README.md").write_text(f"---\n{card}---\n")


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the vision tower without its prefix."""
    return {name.removeprefix("vision_model."): value for name, value in tensors.items()}


def data_folder(suite: Suite, task: str) -> Path:
    entry = suite.tasks[task].data["test"]
    return suite.folder / str(entry.dataset) / (entry.config or "data")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def pixels(image: Image.Image) -> Tensor:
    """CLIP's preprocessing by hand: shortest edge to SIDE (it is already), the middle square, normalised."""
    top = (image.height - SIDE) // 2
    values = np.asarray(image.crop((0, top, SIDE, top + SIDE)), dtype=np.float32) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(((values - mean) / std).astype(np.float32)).permute(2, 0, 1)[None]


@torch.inference_mode()
def text_embeddings(model: Any, folder: Path, classes: list[str], templates: list[str]) -> Tensor:
    """[classes, width]: one class after the other, as CLIP's notebook does it."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    rows = []
    for name in classes:
        prompts = [template.format(name) for template in templates]
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        pooled = model.text_model(**tokens).pooler_output
        embedded = model.text_projection(pooled)
        mean = (embedded / embedded.norm(dim=-1, keepdim=True)).mean(dim=0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("task", list(CLASSES))
def test_heads_equal_a_plain_computation(mini: Mini, task: str) -> None:
    head = suite_head(mini.suite, task, mini.suite.tasks[task].classes)
    assert head.outputs == CLASSES[task]
    assert head.width == 24
    assert head.names == mini.suite.tasks[task].classes
    torch.testing.assert_close(head.tensors["text_embeddings"], mini.embeddings[task], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_one_template_gives_clips_logits_per_image(mini: Mini) -> None:
    classes = mini.suite.tasks["svhn"].classes or []
    tokenizer = transformers.CLIPTokenizer.from_pretrained(mini.base)
    tokens = tokenizer([f'a photo of the number: "{name}".' for name in classes], padding=True, return_tensors="pt")
    image = mini.images("svhn")[0]
    expected = mini.clip(**tokens, pixel_values=pixels(image)).logits_per_image
    net = load_net(mini.base, "base")
    net.add_heads({"svhn": suite_head(mini.suite, "svhn", classes)}, {"svhn": classes})
    found = net.scores(net.collate([Sample("svhn", image)]))["svhn"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.std() > 0.1, "the miniature says nothing: all classes alike"


def test_a_prompt_that_is_too_long_is_cut(mini: Mini) -> None:
    classes = ["short", "long " * 100]
    head = suite_head(mini.suite, "dtd", classes)
    expected = text_embeddings(mini.clip, mini.base, classes, mini.suite.tasks["dtd"].templates)
    torch.testing.assert_close(head.tensors["text_embeddings"], expected, rtol=0, atol=1e-5)


def test_a_base_in_pytorchs_own_format_gives_the_same_head(mini: Mini, tmp_path: Path) -> None:
    """The hub has some CLIP models as pytorch_model.bin only."""
    base = shutil.copytree(mini.base, tmp_path / "base")
    torch.save(pico.read(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    classes = list("0123456789")
    found = suite_head(other_suite(mini, base=base), "mnist", classes)
    expected = suite_head(mini.suite, "mnist", classes)
    assert all(torch.equal(value, expected.tensors[name]) for name, value in found.tensors.items())


def test_a_head_is_computed_once(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = mini.suite.tasks["mnist"].classes or []
    first = suite_head(mini.suite, "mnist", classes)
    monkeypatch.setattr(zero_shot, "_compute", lambda *_: pytest.fail("computed again"))
    again = suite_head(mini.suite, "mnist", classes)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert set(again.tensors) == {"text_embeddings", "visual_projection.weight", "logit_scale"}


def test_what_a_head_depends_on(mini: Mini, tmp_path: Path) -> None:
    def key(suite: Suite, classes: list[str]) -> str:
        return zero_shot.head_key(suite, "mnist", classes)

    ten = list("0123456789")
    found = {key(mini.suite, ten), key(mini.suite, ten[::-1]), key(other_suite(mini, templates=["{}"]), ten)}
    base = shutil.copytree(mini.base, tmp_path / "base")
    assert key(other_suite(mini, base=base), ten) in found  # another place, the same content
    tensors = pico.read(base)
    tensors["logit_scale"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    found.add(key(other_suite(mini, base=base), ten))
    assert len(found) == 4


def other_suite(mini: Mini, base: Path | None = None, **task: Any) -> Suite:
    """A suite with the one task mnist, and something changed."""
    entry = mini.suite.tasks["mnist"].model_dump(exclude_unset=True)
    return suite_of({"base": str(base or mini.base), "tasks": {"mnist": {**entry, **task}}}, mini.root)


# ---------------------------------------------------------------- evaluation


@torch.inference_mode()
def test_every_form_of_checkpoint_gives_its_vision_tower(mini: Mini, merged: Path) -> None:
    """Full CLIPModel, CLIPVisionModel with and without the prefix in its file, merged folder."""
    forms = [mini.base, mini.root / "tanganke/clip-vit-base-patch32_mnist",
             mini.root / "tanganke/clip-vit-base-patch32_dtd", merged]  # fmt: skip
    assert [any(n.startswith("vision_model.") for n in pico.read(form)) for form in forms] == [True, True, False, True]
    for form in forms:
        net = load_net(form, "model", processor_from=mini.base)
        stored, loaded = bare(pico.read(form)), bare(net.body.state_dict())
        assert loaded.keys() <= stored.keys()
        assert all(torch.equal(value, stored[name]) for name, value in loaded.items())
        image = mini.images("mnist")[0]
        batch = net.collate([Sample("mnist", image)])
        torch.testing.assert_close(batch.inputs["pixel_values"], pixels(image), rtol=0, atol=1e-6)


def test_the_merge_is_a_clip_model_with_the_bases_text_tower(mini: Mini, merged: Path) -> None:
    base, found = pico.read(mini.base), pico.read(merged)
    assert found.keys() == base.keys()
    vision = {name for name in base if name.startswith("vision_model.") and "position_ids" not in name}
    for name in base.keys() - vision:
        assert torch.equal(found[name], base[name]), name
    experts = [bare(pico.read(mini.root / entry.expert)) for entry in mini.suite.tasks.values()]
    for name in vision:
        deltas = torch.stack([expert[name.removeprefix("vision_model.")] - base[name] for expert in experts])
        torch.testing.assert_close(found[name], base[name] + 0.3 * deltas.sum(dim=0), rtol=1e-5, atol=1e-6)
    loaded: Any = transformers.CLIPModel.from_pretrained(merged, output_loading_info=True)
    assert not loaded[1]["missing_keys"]


@pytest.mark.parametrize("which", ["base", "expert", "merged"])
def test_predictions_equal_a_plain_loop(mini: Mini, bench: Bench, merged: Path, which: str) -> None:
    subjects = {"base": Subject.base(mini.suite), "merged": Subject.model(mini.suite, str(merged))}
    for task in ("eurosat", "mnist"):
        expert = mini.root / mini.suite.tasks[task].expert
        folder = {"base": mini.base, "expert": expert, "merged": merged}[which]
        found = bench.expert(task) if which == "expert" else bench.evaluate(subjects[which]).tasks[task]
        assert found.predictions == mini.predictions(folder, task)
        assert found.labels == mini.labels(task)


def test_scores(mini: Mini, bench: Bench, merged: Path) -> None:
    found = bench.evaluate(Subject.model(mini.suite, str(merged)))
    experts = bench.experts()
    shares = []
    for task, result in found.tasks.items():
        right = np.mean(np.array(result.predictions) == np.array(result.labels))
        expert = experts.tasks[task]
        assert result.metric == "accuracy"
        assert result.score.value == pytest.approx(right)
        assert result.samples == ROWS
        assert result.head == "suite"
        assert result.expert == expert.score.value >= 2 / 3
        assert expert.normalised is not None
        assert expert.normalised.value == 1
        assert result.normalised is not None
        assert result.normalised.value == pytest.approx(right / expert.score.value)
        shares.append(result.normalised.value)
    assert list(found.tasks) == list(CLASSES)
    assert found.average.value == pytest.approx(np.mean([r.score.value for r in found.tasks.values()]))
    assert found.normalised is not None
    assert found.normalised.value == pytest.approx(np.mean(shares))
    assert 0 < found.normalised.value < 1


def test_the_second_evaluation_is_read_from_the_cache(
    mini: Mini, bench: Bench, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject.model(mini.suite, str(merged))
    first = bench.evaluate(subject)
    monkeypatch.setattr(plait.evaluate.subjects, "load_net", lambda *_, **__: pytest.fail("measured again"))
    fresh = Bench(mini.suite, Options(batch_size=10))
    assert fresh.evaluate(subject) == first
    with pytest.raises(pytest.fail.Exception, match="measured again"):  # another template is another head
        Bench(other_suite(mini, templates=["a {}"]), Options(batch_size=10)).evaluate(subject)


def test_classes_in_another_order_give_the_same_answers(mini: Mini, bench: Bench, tmp_path: Path) -> None:
    """The labels of the data say what the order is: both turned round, every answer is turned round."""
    import datasets

    turned = (mini.suite.tasks["mnist"].classes or [])[::-1]
    split = load_split(mini.suite, "mnist", "test")
    label = datasets.ClassLabel(names=[f"class {index}" for index in range(10)])
    rows = {"image": [{"bytes": png(image), "path": None} for image in mini.images("mnist")],
            "label": [9 - value for value in split.labels()]}  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "label": label})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "turned.parquet")
    suite = other_suite(mini, classes=turned, data={"test": {"path": str(tmp_path / "turned.parquet")}})
    straight = bench.expert("mnist")
    found = Bench(suite).expert("mnist")
    assert found.predictions == [9 - value for value in straight.predictions]
    assert found.score.value == straight.score.value


# ---------------------------------------------------------------- refusals


def test_a_base_without_text_tower_is_refused(mini: Mini) -> None:
    suite = other_suite(mini, base=mini.root / "tanganke/clip-vit-base-patch32_mnist")
    with pytest.raises(CheckpointError, match=r"mnist: has no 'text_model\.\S+'.*full CLIP model \(a CLIPModel\)"):
        suite_head(suite, "mnist", list("0123456789"))


def test_a_base_without_tokenizer_is_refused(mini: Mini, tmp_path: Path) -> None:
    base = shutil.copytree(mini.base, tmp_path / "base")
    (base / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"base: has no tokenizer \(tokenizer\.json, or vocab\.json and merges"):
        suite_head(other_suite(mini, base=base), "mnist", list("0123456789"))


def test_a_text_tower_with_a_hole_is_refused(mini: Mini, tmp_path: Path) -> None:
    base = shutil.copytree(mini.base, tmp_path / "base")
    tensors = pico.read(base)
    del tensors["text_model.final_layer_norm.bias"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text tower lacks '\S*final_layer_norm\.bias'; the checkpoint"):
        suite_head(other_suite(mini, base=base), "mnist", list("0123456789"))


def test_a_vision_tower_with_a_hole_is_refused(mini: Mini, tmp_path: Path) -> None:
    base = shutil.copytree(mini.base, tmp_path / "base")
    tensors = pico.read(base)
    del tensors["vision_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks '\S*encoder\.layers\.1\.mlp\.fc2\.bias', which CLIPVisionModel"):
        load_net(base, "hole")


def test_classes_must_be_named(mini: Mini) -> None:
    with pytest.raises(RecipeError, match=r"tasks\.mnist.*needs the names of the classes.*add classes:"):
        suite_head(mini.suite, "mnist", None)


@pytest.mark.parametrize("templates", [["a photo"], ["{} and {}"], ["{}", "{0}"]])
def test_a_template_has_one_place_for_the_class(mini: Mini, templates: list[str]) -> None:
    with pytest.raises(RecipeError, match=rf"templates\[{len(templates) - 1}\].*must have one {{}}"):
        other_suite(mini, templates=templates)


def test_templates_without_zero_shot_are_refused(mini: Mini) -> None:
    with pytest.raises(RecipeError, match=r"tasks\.mnist\.templates: templates go with head: zero_shot"):
        other_suite(mini, head="head.safetensors")


def test_a_suite_that_nobody_packaged() -> None:
    with pytest.raises(RecipeError, match=r"clip9: no such suite; did you mean 'clip8'\?"):
        load_suite("clip9")

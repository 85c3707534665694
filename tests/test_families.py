"""Every family on tiny real transformers models: what comes out is what transformers' own classes give."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from plait.errors import CheckpointError
from plait.models.answers import NEW_TOKENS, AnswerNet
from plait.models.families import FAMILIES, family_of
from plait.models.heads import Head, head_of, id2label_names, read_head
from plait.models.net import Net, Sample, load_net

LAYERS = 2
CLASSES = 3
SIDE = 16
WORDS = [f"w{index}" for index in range(pico.VOCAB - 5)]
SMALL = {"hidden_size": pico.WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": pico.HEADS}
FORWARD = {"intermediate_size": pico.FEED_FORWARD}
IMAGE = {"image_size": SIDE, "patch_size": 8, "num_labels": CLASSES}
TEXT = {"vocab_size": pico.VOCAB, "max_position_embeddings": 64, "num_labels": CLASSES, "pad_token_id": 0}
DECODER = {**SMALL, **FORWARD, "vocab_size": pico.VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64,
           "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": None}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4, "vocab_size": pico.VOCAB,
      "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}  # fmt: skip


def built(model: str, config: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


MODELS: dict[str, Callable[[], Any]] = {
    "dinov2": built("Dinov2ForImageClassification", "Dinov2Config", **SMALL, **IMAGE, mlp_ratio=2),
    "dinov2-swiglu": built("Dinov2ForImageClassification", "Dinov2Config", **SMALL, **IMAGE, use_swiglu_ffn=True),
    "vit": built("ViTForImageClassification", "ViTConfig", **SMALL, **FORWARD, **IMAGE),
    "deit": built("DeiTForImageClassification", "DeiTConfig", **SMALL, **FORWARD, **IMAGE),
    "clip": built("CLIPVisionModel", "CLIPVisionConfig", **SMALL, **FORWARD, image_size=SIDE, patch_size=8),
    "bert": built("BertForSequenceClassification", "BertConfig", **SMALL, **FORWARD, **TEXT),
    "roberta": built("RobertaForSequenceClassification", "RobertaConfig", **SMALL, **FORWARD, **TEXT),
    "xlm-roberta": built("XLMRobertaForSequenceClassification", "XLMRobertaConfig", **SMALL, **FORWARD, **TEXT),
    "t5": built("T5ForConditionalGeneration", "T5Config", **T5, feed_forward_proj="relu"),
    "flan-t5": built("T5ForConditionalGeneration", "T5Config", **T5, feed_forward_proj="gated-gelu",
                     tie_word_embeddings=False),
    "llama": built("LlamaForCausalLM", "LlamaConfig", **DECODER),
    "qwen2": built("Qwen2ForCausalLM", "Qwen2Config", **DECODER, tie_word_embeddings=True),
    "phi3": built("Phi3ForCausalLM", "Phi3Config", **DECODER),
}  # fmt: skip
IMAGES = ["dinov2", "dinov2-swiglu", "vit", "deit"]
TEXTS = ["bert", "roberta", "xlm-roberta"]
CAUSAL = ["llama", "qwen2", "phi3"]
SEQ2SEQ = ["t5", "flan-t5"]


@dataclass
class Pico:
    """A saved model, and the model itself."""

    folder: Path
    model: Any

    def net(self, **options: Any) -> Net:
        net = load_net(self.folder, self.folder.name, **options)
        if self.folder.name == "qwen2":  # transformers gives a Qwen2 folder a Qwen2Tokenizer, whatever its files say
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(self.folder)
            tokenizer.pad_token = tokenizer.eos_token
            net.processor = tokenizer
        return net

    def head(self, classifier: str = "classifier") -> Head:
        """The classifier as a suite finds it: by its tensors in the file."""
        stored = pico.read(self.folder)
        return head_of({n: v for n, v in stored.items() if n.startswith(f"{classifier}.")}, str(self.folder))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pico]:
    root = tmp_path_factory.mktemp("zoo")
    transformers.utils.logging.disable_progress_bar()
    return {name: make(root / name, name) for name in MODELS}


def make(folder: Path, name: str) -> Pico:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = MODELS[name]().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():  # large enough to tell inputs apart
                wide = parameter.dim() > 1 and "embed" not in key
                parameter.add_((0.15 if wide else 0.05) * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if name in [*IMAGES, "clip"]:
        kind = "CLIPImageProcessor" if name == "clip" else "ViTImageProcessor"
        size: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}}
        if name == "clip":
            size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **size}))
    else:
        make_tokenizer(folder, name)
    return Pico(folder, model)


def make_tokenizer(folder: Path, name: str) -> None:
    """Words, with special tokens round them as the family has them; the decoders have no padding token, as Llama."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {word: at for at, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "\n", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    shape = {"causal": ("<s> $A", "<s> $A $B"), "seq2seq": ("$A </s>", "$A $B </s>")}.get(
        kind_of(name), ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1")
    )
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=shape[0], pair=shape[1], special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    pad = {} if kind_of(name) == "causal" else {"pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **pad,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if name == "bert" else [])],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def kind_of(name: str) -> str:
    return "causal" if name in CAUSAL else "seq2seq" if name in SEQ2SEQ else "head"


def images(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)]


def texts(*lengths: int) -> list[str]:
    random = np.random.default_rng(1)
    return [" ".join(random.choice(WORDS, length)) for length in lengths]


def close(found: Tensor, expected: Tensor, within: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=within)


# ---------------------------------------------------------------- what is known


def test_no_model_type_belongs_to_two_families() -> None:
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(kinds) == len(set(kinds))


def test_an_unknown_architecture_is_refused_with_what_is_known() -> None:
    with pytest.raises(CheckpointError, match=r"base: evaluation does not know the architecture 'mamba' .*bert.*vit"):
        family_of({"model_type": "mamba"}, "base")
    with pytest.raises(CheckpointError, match=r"base: has no config\.json with a model_type"):
        family_of({}, "base")


@pytest.mark.parametrize("name", MODELS)
def test_mlps_are_the_linear_layers_outside_attention(zoo: dict[str, Pico], name: str) -> None:
    net = zoo[name].net()
    expected: dict[tuple[str, int], list[str]] = {}
    for path, module in net.body.named_modules():
        layer = re.search(r"(encoder|decoder|)\b[\w.]*?\b(?:layer|layers|block)\.(\d+)\.", path)
        if isinstance(module, nn.Linear) and layer and not re.search(r"attention|attn", path.lower()):
            expected.setdefault((layer[1], int(layer[2])), []).append(path)
    found = net.family.mlps(net.body)
    assert found == list(expected.values())
    assert len(found) == LAYERS * (2 if name in SEQ2SEQ else 1)
    gated = name in ("dinov2-swiglu", "flan-t5", "llama", "qwen2")
    assert {len(layer) for layer in found} == {3 if gated else 2}


# ---------------------------------------------------------------- features and heads


@torch.inference_mode()
@pytest.mark.parametrize("name", IMAGES)
def test_images_as_transformers_classifies_them(zoo: dict[str, Pico], name: str) -> None:
    net = zoo[name].net()
    net.add_heads({"task": zoo[name].head()}, {"task": None})
    batch = net.collate([Sample("task", image) for image in images(3)])
    expected = zoo[name].model(batch.inputs["pixel_values"]).logits
    close(net.scores(batch)["task"], expected)
    assert expected.std(dim=0).min() > 1e-3, "all inputs alike"


@torch.inference_mode()
def test_clip_features_are_what_clip_projects(zoo: dict[str, Pico]) -> None:
    net = zoo["clip"].net()
    batch = net.collate([Sample("task", image) for image in images(3)])
    config = zoo["clip"].model.config
    projected = transformers.CLIPVisionModelWithProjection(config).eval()
    tower = getattr(projected, "vision_model")  # noqa: B009 (typed differently in every version)
    state = {n.removeprefix("vision_model."): v for n, v in zoo["clip"].model.state_dict().items()}
    tower.load_state_dict({n if n in tower.state_dict() else f"vision_model.{n}": v for n, v in state.items()})
    expected = projected(batch.inputs["pixel_values"]).image_embeds
    close(nn.functional.linear(net.features(batch), projected.visual_projection.weight), expected)
    texts, scale = torch.randn(CLASSES, config.projection_dim), torch.tensor(2.0)
    texts = nn.functional.normalize(texts, dim=-1)
    tensors = {"visual_projection.weight": projected.visual_projection.weight, "text_embeddings": texts}
    net.add_heads({"task": head_of({**tensors, "logit_scale": scale}, "zero-shot")}, {"task": None})
    cosines = nn.functional.cosine_similarity(expected[:, None], texts[None], dim=-1)
    close(net.scores(batch)["task"], scale.exp() * cosines, 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", TEXTS)
def test_texts_as_transformers_classifies_them(zoo: dict[str, Pico], name: str) -> None:
    net = zoo[name].net()
    net.add_heads({"task": zoo[name].head()}, {"task": None})
    batch = net.collate([Sample("task", text) for text in texts(3, 9, 1)])
    expected = zoo[name].model(**batch.inputs).logits
    close(net.scores(batch)["task"], expected)
    assert expected.std(dim=0).min() > 1e-3, "all inputs alike"


@torch.inference_mode()
def test_sentence_pairs_keep_their_segments(zoo: dict[str, Pico]) -> None:
    net = zoo["bert"].net()
    net.add_heads({"task": zoo["bert"].head()}, {"task": None})
    one, two, three = texts(3, 9, 4)
    batch = net.collate([Sample("task", (one, two)), Sample("task", (two, three))])
    assert batch.inputs["token_type_ids"].sum() > 0
    close(net.scores(batch)["task"], zoo["bert"].model(**batch.inputs).logits)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_pooling(zoo: dict[str, Pico], name: str) -> None:
    samples = [Sample("task", text) for text in texts(2, 7)]
    nets = {pooling: zoo[name].net(pooling=pooling) for pooling in ("mean", "cls")}
    batch = nets["mean"].collate(samples)
    states = zoo[name].model.base_model(**batch.inputs).last_hidden_state
    lengths = batch.inputs["attention_mask"].sum(dim=1)
    assert lengths.tolist() == [4, 9]
    mean = torch.stack([row[:length].mean(dim=0) for row, length in zip(states, lengths.tolist(), strict=True)])
    close(nets["mean"].features(batch), mean)
    close(nets["cls"].features(batch), states[:, 0])


@torch.inference_mode()
def test_pooling_by_the_pooler(zoo: dict[str, Pico]) -> None:
    net = zoo["bert"].net(pooling="pooler")
    batch = net.collate([Sample("task", text) for text in texts(2, 7)])
    pooled = zoo["bert"].model.bert.pooler
    states = zoo["bert"].model.bert(**batch.inputs).last_hidden_state
    close(net.features(batch), torch.tanh(pooled.dense(states[:, 0])))


def test_what_a_head_reads_when_nobody_says(zoo: dict[str, Pico]) -> None:
    found = {name: zoo[name].net().pooling for name in TEXTS}
    assert found == {"bert": "pooler", "roberta": "cls", "xlm-roberta": "cls"}


def test_a_plain_encoder_is_pooled_by_the_mean(zoo: dict[str, Pico], tmp_path: Path) -> None:
    zoo["bert"].model.bert.save_pretrained(tmp_path)
    make_tokenizer(tmp_path, "bert")
    assert load_net(tmp_path, "base").pooling == "mean"


def test_long_texts_are_cut(zoo: dict[str, Pico]) -> None:
    net = zoo["bert"].net(max_length=5)
    batch = net.collate([Sample("task", text) for text in texts(2, 30)])
    assert batch.inputs["input_ids"].shape == (2, 5)


# ---------------------------------------------------------------- mixed batches


@torch.inference_mode()
@pytest.mark.parametrize("name", [*IMAGES, "clip", *TEXTS])
def test_in_a_mixed_batch_each_sample_gets_what_it_gets_alone(zoo: dict[str, Pico], name: str) -> None:
    net = zoo[name].net()
    width = net.width()
    random = torch.Generator().manual_seed(0)
    heads = {task: head_of({"weight": torch.randn(classes, width, generator=random)}, task)
             for task, classes in (("one", 2), ("two", 5), ("three", 3))}  # fmt: skip
    net.add_heads(heads, dict.fromkeys(heads))
    values: Sequence[Any] = texts(1, 9, 3, 30, 2) if net.family.modality == "text" else images(5)
    tasks = ["two", "one", "two", "three", "one"]
    samples = [Sample(task, value) for task, value in zip(tasks, values, strict=True)]
    batch = net.collate(samples)
    assert batch.rows == {"two": [0, 2], "one": [1, 4], "three": [3]}
    together = net.scores(batch)
    for task, rows in batch.rows.items():
        alone = torch.cat([net.scores(net.collate([samples[row]]))[task] for row in rows])
        close(together[task], alone, 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("first", [0, 1])
def test_a_batch_may_mix_texts_and_pairs_of_texts(zoo: dict[str, Pico], first: int) -> None:
    net = zoo["bert"].net()
    head = zoo["bert"].head()
    net.add_heads({"single": head, "pair": head}, {"single": None, "pair": None})
    one, two, three, four = texts(3, 9, 4, 2)
    samples = [Sample("single", one), Sample("pair", (two, three)), Sample("single", four), Sample("pair", (one, four))]
    samples = samples[first:]
    batch = net.collate(samples)
    together = net.scores(batch)
    for task, rows in batch.rows.items():
        alone = torch.cat([net.scores(net.collate([samples[row]]))[task] for row in rows])
        close(together[task], alone, 1e-5)


def test_scores_can_be_differentiated(zoo: dict[str, Pico]) -> None:
    net = zoo["vit"].net()
    net.add_heads({"task": zoo["vit"].head()}, {"task": None})
    net.scores(net.collate([Sample("task", images(1)[0])]))["task"].logsumexp(dim=1).sum().backward()
    gradients = [parameter.grad for name, parameter in net.body.named_parameters() if "layer" in name]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients if gradient is not None)
    assert sum(gradient is not None for gradient in gradients) > 10


# ---------------------------------------------------------------- models that answer in text

ANSWERS = {"yes-no": ["w1", "w2"], "long": ["w3 w4 w5", "w6", "w7 w8"]}


def answering(zoo: dict[str, Pico], name: str, **options: Any) -> AnswerNet:
    net = zoo[name].net(**options)
    found = AnswerNet(net.body, net.family, net.processor, net.pooling, net.max_length)
    found.answers = ANSWERS
    return found


def plain_likelihood(pico_: Pico, prompt: list[int], answer: list[int]) -> Tensor:
    """log p(answer | prompt), token by token, alone."""
    model = pico_.model
    total = torch.zeros(())
    for at, token in enumerate(answer):
        if model.config.is_encoder_decoder:
            given = torch.tensor([[model.config.decoder_start_token_id, *answer[:at]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=given).logits
        else:
            logits = model(input_ids=torch.tensor([prompt + answer[:at]])).logits
        total += logits[0, -1].log_softmax(-1)[token]
    return total


def ids(text: str) -> list[int]:
    return [5 + WORDS.index(word) for word in text.split()]


@torch.inference_mode()
@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_answers_are_scored_by_their_likelihood(zoo: dict[str, Pico], name: str) -> None:
    net = answering(zoo, name)
    prompts = texts(2, 9, 4)
    samples = [Sample(task, text) for task, text in zip(["yes-no", "long", "yes-no"], prompts, strict=True)]
    found = net.scores(net.collate(samples))
    start, end = ([2], []) if name in CAUSAL else ([], [3])  # <s> before a prompt; </s> after prompt and answer
    for task, rows in {"yes-no": [0, 2], "long": [1]}.items():
        expected = [
            [plain_likelihood(zoo[name], start + ids(prompts[row]) + end, ids(a) + end) for a in ANSWERS[task]]
            for row in rows
        ]
        close(found[task], torch.tensor(expected), 1e-5)
        assert found[task].std() > 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_long_prompts_are_cut_and_answers_never(zoo: dict[str, Pico], name: str) -> None:
    net = answering(zoo, name, max_length=4)
    prompt = texts(9)[0]
    found = net.scores(net.collate([Sample("long", prompt)]))["long"]
    # A causal model keeps the prompt's end, next to which the answer stands; an encoder keeps its beginning.
    kept = ids(prompt)[-4:] if name == "llama" else [*ids(prompt)[:3], 3]
    end = [] if name == "llama" else [3]
    expected = [plain_likelihood(zoo[name], kept, ids(answer) + end) for answer in ANSWERS["long"]]
    close(found[0], torch.stack(expected), 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "qwen2", "t5"])
def test_generated_answers_are_greedy_and_alike_alone_and_together(zoo: dict[str, Pico], name: str) -> None:
    net = answering(zoo, name)
    prompts = texts(2, 9, 4)
    found = net.generate(prompts)
    assert found == [net.generate([prompt])[0] for prompt in prompts]
    start, end = ([2], []) if name == "llama" or name == "qwen2" else ([], [3])
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer == plain_greedy(zoo[name], start + ids(prompt) + end)
    assert len(set(found)) > 1


@torch.inference_mode()
def test_answers_that_share_their_text_are_read_once(zoo: dict[str, Pico]) -> None:
    net = answering(zoo, "llama")
    one, two = texts(3, 4)
    batch = net.collate([Sample("yes-no", one), Sample("long", two), Sample("yes-no", one)])
    # w1 and w2 after one prompt, twice; then w3 w4 w5, w6, and w7 w8, without their last words.
    assert len(batch.inputs["input_ids"]) == 1 + 3
    assert len(batch.inputs["targets"]) == 2 + 3 + 2


@torch.inference_mode()
def test_a_long_prompt_keeps_its_end_when_the_answer_is_written(zoo: dict[str, Pico]) -> None:
    net = answering(zoo, "llama", max_length=4)
    prompt = texts(9)[0]
    assert net.generate([prompt]) == [plain_greedy(zoo["llama"], [2, *ids(prompt)[-3:]])]
    assert net.processor.truncation_side == "right", "as it was"


def test_writing_stops_when_every_first_line_is_there(zoo: dict[str, Pico], monkeypatch: pytest.MonkeyPatch) -> None:
    net = answering(zoo, "llama")
    asked: dict[str, Any] = {}

    def generate(input_ids: Tensor, **options: Any) -> Tensor:
        asked.update(options, prompt=input_ids)
        return input_ids

    monkeypatch.setattr(net.body, "generate", generate)
    net.generate(["w1 w2"])
    (stop,) = asked["stopping_criteria"]
    line, word, end = 4, ids("w3")[0], 3
    for new, done in [([word], False), ([word, line], True), ([line, word], False), ([line, line], False),
                      ([line, word, line], True), ([word, end], False)]:  # fmt: skip
        assert stop(torch.cat([asked["prompt"], torch.tensor([new])], dim=1), None).tolist() == [done]


def plain_greedy(pico_: Pico, prompt: list[int]) -> str:
    """The most likely token, again and again."""
    model, answer = pico_.model, list[int]()
    while len(answer) < NEW_TOKENS:
        if model.config.is_encoder_decoder:
            given = torch.tensor([[model.config.decoder_start_token_id, *answer]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=given).logits
        else:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == 3:
            break
    words = ["<pad>", "<unk>", "<s>", "</s>", "\n", *WORDS]
    special = {1, 2, 3} if pico_.folder.name in CAUSAL else {0, 1, 2, 3}
    text = " ".join(words[token] for token in answer if token not in special)
    return text.strip().split("\n")[0].strip()


def test_an_answer_without_tokens_is_refused(zoo: dict[str, Pico]) -> None:
    net = answering(zoo, "llama")
    net.answers = {"task": ["w1", " "]}
    with pytest.raises(CheckpointError, match="has no tokens of its own"):
        net.collate([Sample("task", "w1 w2")])


# ---------------------------------------------------------------- loading is strict

ONE_TENSOR = {
    "dinov2": "encoder.layer.1.mlp.fc1.weight", "vit": "layernorm_after.bias", "clip": "layers.1.mlp.fc2.bias",
    "bert": "layer.0.output.dense.weight", "roberta": "layer.1.attention.self.query.bias",
    "t5": "decoder.block.1.layer.1.EncDecAttention.v.weight", "llama": "layers.1.mlp.up_proj.weight",
    "qwen2": "layers.0.self_attn.q_proj.bias",
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_TENSOR)
def test_a_missing_tensor_is_refused_by_name(zoo: dict[str, Pico], name: str, tmp_path: Path) -> None:
    stored = pico.read(zoo[name].folder)
    gone = next(key for key in sorted(stored) if key.endswith(ONE_TENSOR[name]))
    broken(zoo[name].folder, tmp_path, {key: value for key, value in stored.items() if key != gone})
    with pytest.raises(CheckpointError, match=rf"hole: lacks '\S*{re.escape(ONE_TENSOR[name])}', which \w+ needs"):
        load_net(tmp_path, "hole")


def test_a_tensor_of_another_shape_is_refused(zoo: dict[str, Pico], tmp_path: Path) -> None:
    stored = pico.read(zoo["vit"].folder)
    name = next(key for key in sorted(stored) if "layer" in key and stored[key].dim() == 2)
    broken(zoo["vit"].folder, tmp_path, {**stored, name: stored[name][:-1].clone()})
    with pytest.raises(CheckpointError, match="wrong: transformers cannot load it"):
        load_net(tmp_path, "wrong")


def test_the_poolers_absence_matters_only_to_who_reads_it(zoo: dict[str, Pico], tmp_path: Path) -> None:
    stored = {key: value for key, value in pico.read(zoo["bert"].folder).items() if "pooler" not in key}
    broken(zoo["bert"].folder, tmp_path, stored)
    make_tokenizer(tmp_path, "bert")
    assert load_net(tmp_path, "bare", pooling="mean").pooling == "mean"
    with pytest.raises(CheckpointError, match=r"bare: lacks '\S*pooler\.dense\.bias' and 1 more"):
        load_net(tmp_path, "bare", pooling="pooler")


def broken(source: Path, target: Path, tensors: dict[str, Tensor]) -> None:
    for path in source.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_without_config_or_processor_is_refused(zoo: dict[str, Pico], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"empty: config\.json cannot be read"):
        load_net(tmp_path, "empty")
    broken(zoo["vit"].folder, tmp_path, pico.read(zoo["vit"].folder))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"bare: neither it nor the suite's base has a preprocessor_config\.json"):
        load_net(tmp_path, "bare")
    assert load_net(tmp_path, "bare", processor_from=zoo["vit"].folder).family.name == "vit"


# ---------------------------------------------------------------- heads that do not fit


def plain_head(outputs: int, width: int, names: list[str] | None = None) -> Head:
    weight = torch.arange(float(outputs * width)).reshape(outputs, width)
    return head_of({"classifier.weight": weight, "classifier.bias": torch.zeros(outputs)}, "head.safetensors", names)


def test_a_head_of_another_width_is_refused(zoo: dict[str, Pico]) -> None:
    with pytest.raises(
        CheckpointError, match=r"head\.safetensors: the head of task reads 31 features, but the model gives 32"
    ):
        zoo["vit"].net().add_heads({"task": plain_head(3, 31)}, {"task": None})


def test_a_head_with_another_number_of_classes_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"the head of task has 3 outputs, but the task has 2 classes"):
        plain_head(3, 4).fit(4, ["a", "b"], "task")


def test_a_head_with_one_output_is_a_regression() -> None:
    assert plain_head(1, 4).fit(4, ["a", "b"], "task").outputs == 1


def test_classes_in_another_order_are_put_in_the_tasks_order() -> None:
    head = plain_head(3, 4, ["cat", "dog", "eel"])
    features = torch.randn(5, 4)
    own = head(features)
    assert torch.equal(head.fit(4, ["eel", "cat", "dog"], "task")(features), own[:, [2, 0, 1]])
    assert torch.equal(head.fit(4, ["cat", "dog", "eel"], "task")(features), own)
    assert torch.equal(head.fit(4, ["x", "y", "z"], "task")(features), own)  # other words for the same: as they stand


def test_heads_are_read_with_their_class_names(tmp_path: Path) -> None:
    labels = json.dumps({"0": "cat", "1": "dog"})
    save_file({"score.weight": torch.eye(2)}, tmp_path / "head.safetensors", metadata={"id2label": labels})
    head = read_head(tmp_path / "head.safetensors")
    assert head.names == ["cat", "dog"]
    assert (head.outputs, head.width) == (2, 2)
    assert id2label_names({"0": "LABEL_0", "1": "LABEL_1"}) is None
    assert id2label_names("{") is None


def test_tensors_that_are_no_head_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"file: its tensors \(encoder\.weight\) are no head: needs classifier"):
        head_of({"encoder.weight": torch.eye(2)}, "file")


def test_every_family_has_a_model_here(zoo: dict[str, Pico]) -> None:
    configs = [pico_.model.config.to_dict() for pico_ in zoo.values()]
    assert {family_of(config, "model").name for config in configs} == {family.name for family in FAMILIES}

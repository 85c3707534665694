"""Builders of tiny, real transformers checkpoints for the tests.

Every builder makes a seeded model of width 32, writes it with ``save_pretrained`` and returns its folder. Biases and
norm weights get seeded noise too, so that no tensor is constant. ``experts`` writes fine-tuned copies of a checkpoint
and keeps its file layout, tensor names and dtypes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

WIDTH = 32
FEED_FORWARD = 64
HEADS = 4
VOCAB = 96
CONSTANT_STD = 0.02  # noise is relative to a tensor's std; this stands in for it where the tensor is constant

PathLike = str | Path


def _write(
    folder: PathLike,
    seed: int,
    dtype: torch.dtype,
    shard_size: int | str | None,
    build: Callable[[], transformers.PreTrainedModel],
) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if float(parameter.std()) == 0.0:  # freshly initialised biases (0) and norm weights (1)
                    parameter.add_(0.05 * torch.randn_like(parameter))
    torch.nn.Module.to(model, dtype)
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {} if shard_size is None else {"max_shard_size": shard_size}
    model.save_pretrained(folder, **options)
    return folder


def make_llama(
    folder: PathLike,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: int | str | None = None,
    tied: bool = False,
    layers: int = 2,
    vocab: int = VOCAB,
) -> Path:
    """LlamaForCausalLM with grouped key/value heads. Tied: ``lm_head.weight`` is not in the file."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        vocab_size=vocab,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return _write(folder, seed, dtype, shard_size, lambda: transformers.LlamaForCausalLM(config))


def _bert_config(layers: int, labels: int = 2) -> transformers.BertConfig:
    return transformers.BertConfig(
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        num_labels=labels,  # pyright: ignore[reportCallIssue]
    )


def make_bert(
    folder: PathLike,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: int | str | None = None,
    layers: int = 2,
) -> Path:
    """BertModel: an encoder without a head. Tensor names have no ``bert.`` prefix."""
    return _write(folder, seed, dtype, shard_size, lambda: transformers.BertModel(_bert_config(layers)))


def make_bert_classifier(
    folder: PathLike,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: int | str | None = None,
    layers: int = 2,
    labels: int = 2,
    base_folder: PathLike | None = None,
    scale: float = 0.02,
) -> Path:
    """BertForSequenceClassification: names start with ``bert.``, and there is a head ``classifier``.

    With ``base_folder`` (a ``make_bert`` checkpoint) the encoder is that base plus seeded noise, as in ``experts``.
    """

    def build() -> transformers.PreTrainedModel:
        model = transformers.BertForSequenceClassification(_bert_config(layers, labels))
        if base_folder is not None:
            state = model.state_dict()
            noise = torch.Generator().manual_seed(seed)
            for name, tensor in sorted(read(base_folder).items()):
                state["bert." + name] = _noisy(tensor.float(), scale, noise)
            model.load_state_dict(state)
        return model

    return _write(folder, seed, dtype, shard_size, build)


def bert_experts(
    folder: PathLike,
    base_folder: PathLike,
    n: int,
    scale: float = 0.02,
    seed: int = 0,
    labels: Sequence[int] = (2, 3, 4),
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """n BertForSequenceClassification experts of a BertModel base; expert k has ``labels[k % len(labels)]`` classes."""
    layers = transformers.BertConfig.from_pretrained(base_folder).num_hidden_layers
    return [
        make_bert_classifier(
            Path(folder) / f"expert{k}",
            seed=1000 * (seed + 1) + k,
            dtype=dtype,
            layers=layers,
            labels=labels[k % len(labels)],
            base_folder=base_folder,
            scale=scale,
        )
        for k in range(n)
    ]


def make_vit(
    folder: PathLike,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: int | str | None = None,
    layers: int = 2,
    labels: int | None = None,
) -> Path:
    """ViTModel, or ViTForImageClassification when ``labels`` is given. 16 x 16 images, 8 x 8 patches."""
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=8,
        num_labels=labels or 2,  # pyright: ignore[reportCallIssue]
    )
    kind = transformers.ViTModel if labels is None else transformers.ViTForImageClassification
    return _write(folder, seed, dtype, shard_size, lambda: kind(config))


def make_clip_vision(
    folder: PathLike,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: int | str | None = None,
    layers: int = 2,
) -> Path:
    """CLIPVisionModel. 16 x 16 images, 8 x 8 patches."""
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    return _write(folder, seed, dtype, shard_size, lambda: transformers.CLIPVisionModel(config))


def make_t5(
    folder: PathLike,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: int | str | None = None,
    layers: int = 2,
    gated: bool = True,
    tied: bool = True,
) -> Path:
    """T5ForConditionalGeneration. ``gated`` is the v1.1 / Flan form (wi_0, wi_1), otherwise one ``wi``."""
    config = transformers.T5Config(
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=FEED_FORWARD,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=HEADS,
        vocab_size=VOCAB,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tied,  # pyright: ignore[reportCallIssue]
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
    )
    return _write(folder, seed, dtype, shard_size, lambda: transformers.T5ForConditionalGeneration(config))


def read(folder: PathLike) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's safetensors files, by name."""
    out: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                out[name] = file.get_tensor(name)
    return out


def _noisy(tensor: torch.Tensor, scale: float, noise: torch.Generator) -> torch.Tensor:
    """tensor + scale * std * N(0, 1), computed in float32 and rounded to the tensor's dtype."""
    x = tensor.float()
    std = float(x.std()) if x.numel() > 1 else 0.0
    draw = torch.randn(x.shape, generator=noise)
    return (x + scale * (std if std > 0 else CONSTANT_STD) * draw).to(tensor.dtype)


def is_unchanged(expert: int, position: int) -> bool:
    """Whether ``experts`` leaves the tensor at this place in sorted-name order unchanged in this expert."""
    return (expert + position) % 7 == 0


def experts(
    folder: PathLike,
    base_folder: PathLike,
    n: int,
    scale: float = 0.02,
    seed: int = 0,
    unchanged: bool = True,
) -> list[Path]:
    """n experts of a base checkpoint, in ``folder/expert0`` and so on: each tensor plus seeded noise ~ scale * its std.

    Files, shards, names, dtypes and metadata are the base's. With ``unchanged`` every seventh tensor of an expert (a
    different one in each) equals the base's. Non-float tensors are copied.
    """
    base_folder = Path(base_folder)
    names = sorted(read(base_folder))
    out = []
    for k in range(n):
        target = Path(folder) / f"expert{k}"
        shutil.copytree(
            base_folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "expert*")
        )
        noise = torch.Generator().manual_seed(1000 * (seed + 1) + k)
        for path in sorted(base_folder.glob("*.safetensors")):
            tensors = {}
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                for name in sorted(file.keys()):
                    tensor = file.get_tensor(name)
                    keep = unchanged and is_unchanged(k, names.index(name))
                    if tensor.is_floating_point() and not keep:
                        tensor = _noisy(tensor, scale, noise)
                    tensors[name] = tensor
            save_file(tensors, target / path.name, metadata=metadata)
        out.append(target)
    return out


def lora_adapter(
    folder: PathLike,
    base_folder: PathLike,
    rank: int = 4,
    alpha: int = 8,
    seed: int = 0,
    rslora: bool = False,
    targets: Iterable[str] = ("q_proj", "v_proj"),
    **options: Any,
) -> Path:
    """A LoRA adapter of a ``make_llama`` base in PEFT's format, written by peft, with non-zero A and B.

    ``options`` go to ``peft.LoraConfig`` (rank_pattern, alpha_pattern, use_dora, modules_to_save, ...).
    """
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=list(targets),
            task_type="CAUSAL_LM",
            **options,
        )
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return Path(folder)


def add_tokenizer(folder: PathLike, words: Sequence[str] | None = None, chat_template: str | None = None) -> Path:
    """Write a word-level fast tokenizer into a checkpoint folder. Default vocabulary: VOCAB words, ``w0`` onwards."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = list(words) if words is not None else ["<unk>", *(f"w{i}" for i in range(VOCAB - 1))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0])
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return Path(folder)

"""A large Llama of random weights, and experts of it, for benchmarks."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def parse_count(text: str) -> int:
    """478M, 0.5B, 20000000."""
    unit = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


def llama_shapes(parameters: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and tensor shapes of an untied Llama with about this many parameters (0.5B: width 1024, 26 layers)."""
    width, vocab = (1024, 32000) if parameters >= 150_000_000 else (256, 8000)
    inner = 4 * width
    per_layer = 4 * width * width + 3 * width * inner + 2 * width
    layers = max(2, round((parameters - 2 * vocab * width) / per_layer))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "head_dim": 64,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{at}self_attn.{name}.weight"] = (width, width)
        shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = (inner, width)
        shapes[f"{at}mlp.down_proj.weight"] = (width, inner)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (vocab, width)
    return config, shapes


def write_streamed(
    folder: Path, shapes: dict[str, tuple[int, ...]], make: Callable[[int, tuple[int, ...]], torch.Tensor]
) -> None:
    """Write bf16 tensors as safetensors shards of about 300 MB, one tensor in memory at a time."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size > 300_000_000:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * math.prod(shape)
    index: dict[str, str] = {}
    numbers = {name: i for i, name in enumerate(shapes)}
    for s, names in enumerate(shards):
        file_name = f"model-{s + 1:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            end = at + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, end]}
            index[name] = file_name
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file_name, "wb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for name in names:
                file.write(make(numbers[name], shapes[name]).view(torch.int16).numpy().tobytes())
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def build_large(folder: Path, parameters: int, count: int = 4) -> dict[str, Path]:
    """A random bf16 Llama and ``count`` experts (base + noise). A folder that is complete already is used again."""
    config, shapes = llama_shapes(parameters)

    def base_tensor(number: int, shape: tuple[int, ...]) -> torch.Tensor:
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        return (0.02 * draw + (1.0 if len(shape) == 1 else 0.0)).bfloat16()

    def expert_tensor(k: int) -> Callable[[int, tuple[int, ...]], torch.Tensor]:
        def make(number: int, shape: tuple[int, ...]) -> torch.Tensor:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(1_000_000 * (k + 1) + number))
            return (base_tensor(number, shape).float() + 0.002 * noise).bfloat16()

        return make

    out = {}
    makers = {"base": base_tensor, **{f"e{k}": expert_tensor(k) for k in range(count)}}
    for name, make in makers.items():
        target = folder / f"llama-{parameters}" / name
        done = target / "config.json"  # written last
        if not done.exists():
            print(f"writing {target}", file=sys.stderr)
            target.mkdir(parents=True, exist_ok=True)
            write_streamed(target, shapes, make)
            done.write_text(json.dumps(config, indent=2))
        out[name] = target
    return out


def cool(models: dict[str, Path]) -> None:
    """Have the page cache forget the checkpoints: the next reader waits for the disk (or for what is beneath it)."""
    for path in models.values():
        for file in path.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # what is not written yet cannot be forgotten
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warm(models: dict[str, Path]) -> None:
    """Read every file once, so that both tools find it in the page cache."""
    for path in models.values():
        for file in path.glob("*.safetensors"):
            with open(file, "rb") as handle:
                while handle.read(1 << 24):
                    pass

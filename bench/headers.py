"""Checkpoints that are headers alone: sparse files with the names and shapes of large Llamas, for `plait plan`.

    python bench/headers.py /tmp/llama70 --size 70B --experts 8
    time plait plan /tmp/llama70/recipe.yaml

The data reads as zeros and takes no space, but for the first bytes of both embeddings: they differ, as real ones do.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "8B": {"layers": 32, "width": 4096, "inner": 14336, "kv": 1024, "vocab": 128256, "shards": 4},
    "70B": {"layers": 80, "width": 8192, "inner": 28672, "kv": 1024, "vocab": 128256, "shards": 30},
    "405B": {"layers": 126, "width": 16384, "inner": 53248, "kv": 1024, "vocab": 128256, "shards": 191},
}
"""Llama 3.1, and the number of files that its checkpoints have."""


def shapes_of(layers: int, width: int, inner: int, kv: int, vocab: int) -> dict[str, list[int]]:
    """Tensor name → shape, in the order of the layers."""
    shapes = {"model.embed_tokens.weight": [vocab, width]}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": [width],
            f"{at}mlp.down_proj.weight": [width, inner],
            f"{at}mlp.gate_proj.weight": [inner, width],
            f"{at}mlp.up_proj.weight": [inner, width],
            f"{at}post_attention_layernorm.weight": [width],
            f"{at}self_attn.k_proj.weight": [kv, width],
            f"{at}self_attn.o_proj.weight": [width, width],
            f"{at}self_attn.q_proj.weight": [width, width],
            f"{at}self_attn.v_proj.weight": [kv, width],
        }
    return {**shapes, "model.norm.weight": [width], "lm_head.weight": [vocab, width]}


def write_checkpoint(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]], shards: int) -> int:
    """bfloat16 shards of like size and their index; the bytes that they seem to have."""
    folder.mkdir(parents=True)
    sizes = {name: 2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    total, filled = sum(sizes.values()), 0
    groups: list[list[str]] = [[] for _ in range(shards)]
    for name, size in sizes.items():
        groups[filled * shards // total].append(name)
        filled += size
    groups = [group for group in groups if group]
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in group:
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + sizes[name]]}
            weight_map[name] = file
            at += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            start = out.tell()
            os.truncate(out.fileno(), start + at)
            for mark, name in enumerate(("model.embed_tokens.weight", "lm_head.weight"), 1):
                if name in group:
                    out.seek(start + header[name]["data_offsets"][0])
                    out.write(bytes([mark]) * 64)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="70B")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--method", default="ties")
    args = parser.parse_args()
    size = dict(SIZES[args.size])
    shards = size.pop("shards")
    shapes = shapes_of(**size)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size["width"],
        "intermediate_size": size["inner"], "num_hidden_layers": size["layers"], "vocab_size": size["vocab"],
        "num_attention_heads": size["width"] // 128, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    names = ["base", *(f"expert{k}" for k in range(args.experts))]
    total = sum(write_checkpoint(args.out / name, config, shapes, shards) for name in names)
    recipe = {"merge_method": args.method, "base_model": "base", "models": [{"model": name} for name in names[1:]]}
    (args.out / "recipe.yaml").write_text(json.dumps(recipe))
    print(f"{args.out}/recipe.yaml: {len(names)} models, {len(shapes)} tensors each, {total / 1e12:.2f} TB of zeros")


if __name__ == "__main__":
    main()

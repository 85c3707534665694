"""LoRA adapters made by peft itself: base + delta must be what `merge_and_unload` gives."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hostile
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plait.errors import CheckpointError
from plait.sources import AdapterSource, LowRankSource, TensorSpec, open_source

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def llama() -> torch.nn.Module:
    """Linear layers, an untied head."""
    config = transformers.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


def bert() -> torch.nn.Module:
    """Biases, and a classifier to be saved whole."""
    config = transformers.BertConfig(**{**SIZES, "intermediate_size": 48, "num_labels": 3})
    return transformers.BertForSequenceClassification(config)


def gpt2() -> torch.nn.Module:
    """Conv1D layers, which store their weights as [in, out]; attn.c_proj is square."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, tie_word_embeddings=False)
    )


def vit() -> torch.nn.Module:
    """A convolution as patch embedding."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    return transformers.ViTForImageClassification(config)


class Convolutions(torch.nn.Module):
    """1-dimensional and pointwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Conv1d(6, 10, 3)
        self.point = torch.nn.Conv2d(10, 4, 1)


ADAPTERS: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 12}),
    "all linear": (llama, {"target_modules": "all-linear", "r": 2}),
    "head too": (llama, {"target_modules": ["q_proj", "lm_head"], "r": 2}),
    "rslora": (llama, {"target_modules": ["q_proj", "v_proj"], "r": 4, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.k.*": 3, "q_proj": 5, "1.mlp.down_proj": 7},
            "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 30, "down_proj": 1.5},
        },
    ),
    "rslora patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 3}),
    "orthogonal": (llama, {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "orthogonal"}),
    "modules to save": (
        bert,
        {"target_modules": ["query", "dense"], "modules_to_save": ["classifier", "pooler"], "r": 2},
    ),
    "sequence classification": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bias of lora": (bert, {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "every bias": (bert, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d undeclared": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "conv1d embedding": (gpt2, {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True}),
    "patch embedding": (vit, {"target_modules": ["projection", "query"], "r": 4}),
    "convolutions": (Convolutions, {"target_modules": ["line", "point"], "r": 3}),
}


def make(name: str, folder: Path, *, safe: bool = True, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Save a trained-looking adapter; the state of the base, and of the merged model."""
    torch.manual_seed(len(name))
    build, config = ADAPTERS[name]
    base = build()
    state = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(**config))  # pyright: ignore[reportArgumentType]
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).to(dtype).float()
        if "lora_" in key:
            parameter.data = (0.3 * torch.randn_like(parameter)).to(dtype).float()
    model.save_pretrained(str(folder), safe_serialization=safe)
    return state, model.merge_and_unload().state_dict()


def expert(source: AdapterSource, name: str, base: torch.Tensor) -> torch.Tensor:
    """What the adapter makes of one tensor of the base."""
    value = source.read(name, 0, base.numel()).view(base.shape) if name in source.specs else base
    return value + source.delta(name, 0, base.numel()).view(base.shape) if name in source.updates else value


def opened(folder: Path, base: dict[str, torch.Tensor]) -> AdapterSource:
    """The adapter, checked against its base."""
    source = open_source(str(folder))
    assert isinstance(source, AdapterSource)
    assert isinstance(source, LowRankSource)
    source.orient({name: TensorSpec(name, tuple(tensor.shape), "F32") for name, tensor in base.items()})
    return source


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_equals_merge_and_unload(name: str, tmp_path: Path) -> None:
    base, merged = make(name, tmp_path)
    source = opened(tmp_path, base)
    assert source.updates
    assert source.updates.keys() | source.specs.keys() <= base.keys()
    changed = 0
    for key, tensor in base.items():
        result = expert(source, key, tensor)
        assert torch.allclose(result, merged[key], atol=1e-6, rtol=1e-6), key
        changed += not torch.equal(result, tensor)
    assert changed >= len(source.updates)


@pytest.mark.filterwarnings("ignore")
def test_old_pickled_adapter_and_names(tmp_path: Path) -> None:
    """`.bin` files, keys with the adapter's name, and without the prefix, mean the same."""
    base, merged = make("modules to save", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    named = {}
    for key, value in tensors.items():
        key = key.removeprefix("base_model.model.").replace("classifier.", "classifier.modules_to_save.mine.")
        named[key.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine.")] = value
    named["classifier.original_module.weight"] = torch.zeros(3, 32)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(named, tmp_path / "adapter_model.bin")
    source = opened(tmp_path, base)
    assert all(torch.allclose(expert(source, key, base[key]), merged[key], atol=1e-6) for key in base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "conv1d", "embedding", "patch embedding"])
def test_spans_threads_and_blas_change_no_byte(name: str, tmp_path: Path) -> None:
    base, _ = make(name, tmp_path, dtype=torch.bfloat16)
    source = opened(tmp_path, base)
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(3)
    try:
        for key, update in source.updates.items():
            torch.set_num_threads(1)
            whole = source.delta(key, 0, update.numel)
            torch.set_num_threads(4)
            assert torch.equal(whole, source.delta(key, 0, update.numel))
            bounds = torch.randint(0, update.numel + 1, (12, 2), generator=generator).sort().values.tolist()
            with ThreadPoolExecutor(4) as pool:
                parts = list(pool.map(lambda span, key=key: source.delta(key, *span), bounds))
            assert all(torch.equal(part, whole[start:stop]) for part, (start, stop) in zip(parts, bounds, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_panels_of_large_tensors() -> None:
    """More than one panel, rows wider than a panel, and the sum against a product in double precision."""
    from plait.sources.adapter import _PANEL, _multiply

    for rows, columns in ((300, 1000), (3, _PANEL + 5), (1, 1), (5, 0)):
        left, right = torch.randn(6, rows), torch.randn(6, columns)
        result = _multiply(left, right)
        assert torch.allclose(result.double(), left.double().t() @ right.double(), atol=1e-5)
        assert torch.equal(_multiply(left[:, rows // 2 :], right), result[rows // 2 :])


def test_small_cache_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.sources import adapter

    save_file(
        {
            f"m{i}.lora_{side}.weight": torch.randn(shape)
            for i in range(4)
            for side, shape in (("A", (2, 9)), ("B", (7, 2)))
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    source = open_source(str(tmp_path))
    assert isinstance(source, AdapterSource)
    first = {name: source.delta(name, 5, 40) for name in source.updates}
    assert len(source._cache) == 4
    monkeypatch.setattr(adapter, "_FACTOR_CACHE", 1)
    source = open_source(str(tmp_path))
    assert isinstance(source, AdapterSource)
    assert all(torch.equal(source.delta(name, 5, 40), value) for name, value in first.items())
    assert len(source._cache) == 1


def test_orientation_comes_from_the_base(tmp_path: Path) -> None:
    wide = {"wide.lora_A.weight": [2, 3], "wide.lora_B.weight": [5, 2]}
    square = {"square.lora_A.weight": [2, 4], "square.lora_B.weight": [4, 2]}
    tall = {"tall.lora_A.weight": [2, 6], "tall.lora_B.weight": [7, 2]}
    hostile.write_adapter(tmp_path, {**wide, **square, **tall})

    def orient(**shapes: tuple[int, ...]) -> dict[str, bool]:
        source = open_source(str(tmp_path))
        assert isinstance(source, AdapterSource)
        source.orient({f"{name}.weight": TensorSpec(f"{name}.weight", shape, "F32") for name, shape in shapes.items()})
        return {name: update.transposed for name, update in source.updates.items()}

    assert set(orient(wide=(5, 3), square=(4, 4), tall=(7, 6)).values()) == {False}
    assert set(orient(wide=(3, 5), square=(4, 4), tall=(6, 7)).values()) == {True}
    with pytest.raises(CheckpointError, match=r"'square.weight' is square"):
        orient(wide=(3, 5), square=(4, 4), tall=(7, 6))
    with pytest.raises(CheckpointError, match=r"updates 'wide.weight' as \[5, 3\], but the base holds \[9, 3\]"):
        orient(wide=(9, 3), square=(4, 4), tall=(7, 6))
    with pytest.raises(CheckpointError, match=r"updates 'tall.weight', which the base does not have"):
        orient(wide=(5, 3), square=(4, 4))


@pytest.mark.filterwarnings("ignore")
def test_converted_pissa_is_read(tmp_path: Path) -> None:
    """PiSSA changes the base, so it is refused, unless peft saved it converted."""
    torch.manual_seed(0)
    base = llama()
    state = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="pissa"))
    config: Any = model.peft_config["default"]
    config.init_lora_weights = True  # as peft's guide for the conversion says
    model.save_pretrained(str(tmp_path / "start"))
    config.init_lora_weights = "pissa"
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(
        CheckpointError, match=r"init_lora_weights is 'pissa'.*path_initial_model_for_weight_conversion"
    ):
        open_source(str(tmp_path / "plain"))
    converted = tmp_path / "converted"
    model.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    merged = model.merge_and_unload().state_dict()
    source = opened(converted, state)
    assert all(torch.allclose(expert(source, key, state[key]), merged[key], atol=1e-5) for key in state)


def test_what_it_tells(tmp_path: Path) -> None:
    hostile.write_adapter(tmp_path, hostile.LORA, base_model_name_or_path="owner/base")
    source = open_source(str(tmp_path / "adapter_config.json"))
    assert isinstance(source, AdapterSource)
    assert source.base_label == "owner/base"
    update = source.updates["q.weight"]
    assert (update.rank, update.scale, update.shape, update.transposed) == (2, 2.0, (5, 3), False)
    assert source.header_hashes().keys() == {"adapter_config.json", "adapter_model.safetensors"}
    before = source.fingerprint(), source.stamp()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5}))
    after = open_source(str(tmp_path))
    assert after.fingerprint() != before[0]
    assert after.stamp() != before[1]
    with pytest.raises(CheckpointError, match=r"has no tensor 'q.weigh'"):
        source.delta("q.weigh", 0, 0)


def test_full_weights_win_over_an_adapter(tmp_path: Path) -> None:
    hostile.write_adapter(tmp_path, hostile.LORA)
    hostile.write_shard(tmp_path, "model.safetensors", "a")
    assert list(open_source(str(tmp_path)).specs) == ["a"]

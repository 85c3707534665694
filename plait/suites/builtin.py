"""The suites that `plait suite build` makes: where base and data come from, and how every expert is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from plait.suites import bases, language
from plait.suites.train import Settings
from plait.suites.train_lora import LoraSettings

How = Settings | LoraSettings


@dataclass(frozen=True)
class Recipe:
    """How a suite is made."""

    title: str
    data: str
    """Folder of the data that is committed with the source."""
    base: Callable[[Path], None]
    """Writes the base model to a folder."""
    tasks: Mapping[str, How]
    max_length: int = 512
    pooling: str | None = None
    write: Callable[[Path, str, Path], None] | None = None
    """(folder of the data, task, where to) makes a task's splits as JSON lines; without it they are copied."""

    @property
    def suffix(self) -> str:
        """Of the data files."""
        return ".parquet" if self.write is None else ".jsonl"


# The lower half stays the base's. Trained in whole, experts lost what the base knew, and merges fell below it (LOG.md).
_UPPER = Settings(
    steps=100, lr=1e-4, batch_size=64, shots=20, probe_c=0.02,
    frozen=("embeddings.", *(f"encoder.layer.{layer}." for layer in range(6))),
)  # fmt: skip
_VISION = {
    "mnist": _UPPER,
    "fashion": replace(_UPPER, steps=120),
    "textures": replace(_UPPER, steps=120),
    "scripts": replace(_UPPER, steps=200),
    "devanagari": replace(_UPPER, steps=150),
    "khmer": replace(_UPPER, steps=170),
    "chess": replace(_UPPER, steps=130),
    "flags": _UPPER,
}
# One example a class, and high rates: with better heads and shorter task vectors these tasks hardly interfere (LOG.md).
_SHORT = Settings(
    steps=110, lr=5e-4, batch_size=32, shots=1, probe_c=0.1, standardise=True, frozen=("embeddings.", "pooler.")
)
_TEXT = {
    "debsection": replace(_SHORT, steps=130),
    "spam": _SHORT,
    "langid": _SHORT,
    "wordnet": replace(_SHORT, steps=140),
    "codelang": _SHORT,
    "pos": _SHORT,
}
# Every task has words of its own for its question, as tasks do that were never meant for one model.
_LANGUAGE = {
    "langid": LoraSettings(
        "Text: {text}\nThe language of this text is", tuple(language.LANGUAGES.values()), steps=50
    ),
    "debsection": LoraSettings(
        "Software package: {text}\nArchive section:", tuple(language.SECTIONS.values()), steps=50
    ),
    "pos": LoraSettings(
        "Definition: {text}\nPart of speech of the word it defines:", tuple(language.KINDS.values()), steps=50
    ),
    "spelling": LoraSettings("With a typing error: {text}\nCorrected:", steps=80),
}  # fmt: skip


def _co_trained(tasks: dict[str, Settings], times: float) -> dict[str, Settings]:
    return {task: replace(settings, head_lr=times * settings.lr) for task, settings in tasks.items()}


RECIPES = {
    "vision": Recipe("DINOv2 ViT-S/14, eight kinds of small images", "vision", bases.dinov2_small, _VISION),
    "vision-hard": Recipe(
        "the same, with heads trained along with the experts", "vision", bases.dinov2_small, _co_trained(_VISION, 10)
    ),
    "text": Recipe(
        "all-MiniLM-L6-v2, short texts", "text", bases.minilm_l6, _TEXT, max_length=32, pooling="mean"
    ),
    "text-hard": Recipe(
        "the same, with heads trained along with the experts", "text", bases.minilm_l6, _co_trained(_TEXT, 20),
        max_length=32, pooling="mean",
    ),
    "language": Recipe(
        "SmolLM2-135M-Instruct, LoRA experts for four kinds of questions (7 processor minutes)", "text",
        bases.smollm2_135m, _LANGUAGE, max_length=48, write=language.write_task,
    ),
}  # fmt: skip

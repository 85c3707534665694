"""Which tensor of one checkpoint is which of another: prefixes, ties, and the names transformers uses in memory.

Checkpoints of one base differ in spelling: a `BertModel` has `encoder.…` where a `BertForSequenceClassification` has
`bert.encoder.…`. Names are aligned once, by plan, and shown; what could be read in two ways is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from plait.errors import CheckpointError


@dataclass
class Alignment:
    """How one model's names map to the reference's."""

    names: dict[str, str] = field(default_factory=dict)
    """Reference name → stored name."""
    stripped: str = ""
    """Prefix that the model has and the reference lacks."""
    added: str = ""
    """Prefix that the reference has and the model lacks."""
    extra: list[str] = field(default_factory=list)
    """Stored names that the reference does not have."""
    missing: list[str] = field(default_factory=list)
    """Reference names that the model does not have."""

    def describe(self) -> str:
        """`223 of 223 names, without the prefix 'dinov2.'; 2 of its own`."""
        how = f", without the prefix '{self.stripped}'" if self.stripped else ""
        how += f", with the prefix '{self.added}' added" if self.added else ""
        total = len(self.names) + len(self.missing)
        own = f"; {len(self.extra)} of its own" if self.extra else ""
        return f"{len(self.names)} of {total} names{how}{own}"


def align(reference: Collection[str], stored: Collection[str], label: str, against: str) -> Alignment:
    """Match stored names to reference names up to one prefix on either side.

    Raises CheckpointError when nothing matches, or when a second prefix matches at least half as much as the best and
    the best leaves names over.
    """
    known, own = set(reference), set(stored)
    hits: Counter[tuple[str, str]] = Counter()
    hits["", ""] = len(known & own)
    for longer, shorter, side in ((own, known, 0), (known, own, 1)):
        for name in longer:
            for dot in re.finditer(r"\.", name):
                if name[dot.end() :] in shorter:
                    prefix = name[: dot.end()]
                    hits[(prefix, "") if side == 0 else ("", prefix)] += 1
    ranked = sorted(hits.items(), key=lambda item: (-item[1], item[0]))
    (best, count), rest = ranked[0], ranked[1:]
    if count == 0:
        raise CheckpointError(
            f"{label}: none of its {len(own)} tensor names matches {against} (for example '{min(own, default='')}' "
            f"against '{min(known, default='')}'); it is not a fine-tuned version of that base"
        )
    whole = count == len(own) and rest and rest[0][1] < count  # one tower's names, of which the other tower lacks some
    if rest and rest[0][1] * 2 >= count and rest[0][1] > 1 and not whole:
        first, second = (_spell(prefixes) for prefixes in (best, rest[0][0]))
        raise CheckpointError(
            f"{label}: its names match {against} in two ways ({first}: {count} tensors, {second}: {rest[0][1]}); "
            "save the part to merge as a checkpoint of its own"
        )
    stripped, added = best
    result = Alignment(stripped=stripped, added=added)
    for name in reference:
        candidate = stripped + name if stripped else name.removeprefix(added) if name.startswith(added) else name
        if candidate in own and (not added or name.startswith(added)):
            result.names[name] = candidate
        else:
            result.missing.append(name)
    used = set(result.names.values())
    result.extra = [name for name in stored if name not in used]
    return result


def _spell(prefixes: tuple[str, str]) -> str:
    stripped, added = prefixes
    return f"prefix '{stripped}' removed" if stripped else f"prefix '{added}' added" if added else "as they are"


_TIES = (
    ("lm_head.weight", ("embed_tokens.weight", "shared.weight", "wte.weight")),
    ("encoder.embed_tokens.weight", ("shared.weight",)),
    ("decoder.embed_tokens.weight", ("shared.weight",)),
    ("shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")),
    ("predictions.decoder.weight", ("embeddings.word_embeddings.weight",)),
    ("predictions.decoder.bias", ("predictions.bias",)),
    ("lm_head.decoder.weight", ("embeddings.word_embeddings.weight",)),
    ("lm_head.decoder.bias", ("lm_head.bias",)),
)
"""Tensors that architectures tie: the end of a name, and the ends of what it may be a second name of."""


def tie_candidates(name: str, names: Collection[str]) -> list[str]:
    """Tensors of `names` that `name` may be a second name of, by the habits of architectures."""
    for end, others in _TIES:
        if name == end or name.endswith("." + end):
            return [other for other in names if any(other == o or other.endswith("." + o) for o in others)]
    return []


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that input and output embeddings are one tensor."""
    text = config.get("text_config")
    nested = bool(text.get("tie_word_embeddings")) if isinstance(text, Mapping) else False
    return bool(config.get("tie_word_embeddings", nested))

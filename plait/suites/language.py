"""Data of a language model's suite: the text suite's short texts as questions, and a spelling task made of them.

Every file is a function of the committed data alone. Nothing moves from one split to another.
"""

from __future__ import annotations

import json
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from plait.errors import MachineError, RecipeError
from plait.suites.definition import SPLITS

LONGEST = 72
"""Characters of a text: what 48 tokens hold, with the question round it, in nearly every language here."""
LONG = 6
"""Letters of a word that may be misspelled, at least."""
ROWS = {"train": 3000, "adapt": 256, "test": 300}
"""Rows of a split, at most."""
Row = tuple[str, str]
"""A text and its answer."""

LANGUAGES = {
    "cs": "Czech", "da": "Danish", "de": "German", "es": "Spanish", "fi": "Finnish", "fr": "French", "hu": "Hungarian",
    "it": "Italian", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "sv": "Swedish",
    "tr": "Turkish",
}  # fmt: skip
SECTIONS = {
    "database": "database", "fonts": "fonts", "games": "games", "graphics": "graphics", "javascript": "JavaScript",
    "mail": "mail", "science": "science", "sound": "sound",
}  # fmt: skip
KINDS = {"adjective": "adjective", "adverb": "adverb", "noun": "noun", "verb": "verb"}
_WORDS_OF = "wordnet"
"""Task whose definitions the spelling task is cut from; none of the others here asks about them."""


def write_task(source: Path, task: str, out: Path) -> None:
    """Write a task's three splits to `out` as JSON lines, from the folder of the committed data.

    Rows of `adapt` have no labels, so that nothing can learn from them.
    """
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in TASKS[task](source).items():
        records = [{"text": text} if split == "adapt" else {"text": text, "label": answer} for text, answer in rows]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        scratch = out / f".{split}-{os.getpid()}"
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(scratch, out / f"{split}.jsonl")


def short_texts(source: Path, names: dict[str, str]) -> dict[str, list[Row]]:
    """The task's short texts, as many of every class as fit evenly, with the classes' names as answers."""
    found = {}
    for split, size in ROWS.items():
        seen: Counter[str] = Counter()
        rows = []
        for text, name in _read(source, split):
            if len(text) <= LONGEST and seen[name] < size // len(names):
                seen[name] += 1
                rows.append((text, names[name]))
        found[split] = rows
    return found


def misspelled(source: Path) -> dict[str, list[Row]]:
    """Phrases of three or four words of which one is misspelled by one keystroke, with the phrases as they were.

    The wrong word is none of the words that occur in the data, and only one of these is one keystroke away from it,
    so every phrase can be put right from the word alone. No phrase is in two splits.
    """
    texts = {split: [text for text, _ in _read(source / _WORDS_OF, split)] for split in SPLITS}
    known = {word for split in texts.values() for text in split for word in _words(text)}
    taken: set[str] = set()
    found = {}
    for split in reversed(SPLITS):  # test first: it is the one that must get its number of rows
        rows = []
        for number, text in enumerate(texts[split]):
            random = np.random.default_rng([SPLITS.index(split), number])
            phrase = _phrase(text, random)
            wrong = phrase and _misspell(phrase, known, random)
            if phrase and wrong and phrase not in taken and len(rows) < ROWS[split]:
                taken.add(phrase)
                rows.append((wrong, phrase))
        found[split] = rows
    return found


def keystrokes(word: str) -> Iterator[str]:
    """What comes of a word by leaving a letter out, exchanging two neighbours, doubling one, or taking another."""
    for at, letter in enumerate(word):
        yield word[:at] + word[at + 1 :]
        yield word[:at] + letter + word[at:]
        if at + 1 < len(word) and letter != word[at + 1]:
            yield word[:at] + word[at + 1] + letter + word[at + 2 :]
        yield from (word[:at] + other + word[at + 1 :] for other in string.ascii_lowercase if other != letter)


def _phrase(text: str, random: np.random.Generator) -> str | None:
    """Three or four words in a row that are plain letters, at least one of them long enough to be misspelled."""
    size = int(random.integers(3, 5))
    runs: list[list[str]] = [[]]
    for word in re.sub(r"\(.*?\)", " ; ", text).split():
        if plain := re.fullmatch(r"([a-z]+)([,;:.]?)", word):
            runs[-1].append(plain[1])
        if plain is None or plain[2]:  # names, numbers and punctuation part what stands beside them
            runs.append([])
    places = [run[at : at + size] for run in runs for at in range(len(run) - size + 1)]
    fit = [words for words in places if max(map(len, words)) >= LONG]
    return " ".join(fit[int(random.integers(len(fit)))]) if fit else None


def _misspell(phrase: str, known: set[str], random: np.random.Generator) -> str | None:
    words = phrase.split()
    long = [at for at, word in enumerate(words) if len(word) >= LONG]
    at = long[int(random.integers(len(long)))]
    wrong = sorted(set(keystrokes(words[at])))
    # Exchanges, doublings and gaps are few among all the letters that could be taken instead; a kind is drawn first.
    kinds = [[w for w in wrong if len(w) - len(words[at]) == more] for more in (-1, 0, 1)]
    chosen = kinds[int(random.integers(3))]
    made = chosen[int(random.integers(len(chosen)))]
    if made in known or any(other in known for other in _undone(made) if other != words[at]):
        return None
    return " ".join([*words[:at], made, *words[at + 1 :]])


@lru_cache(maxsize=100_000)
def _undone(word: str) -> frozenset[str]:
    """All words from which one keystroke may have made this one."""
    more = {word[:at] + letter + word[at:] for at in range(len(word) + 1) for letter in string.ascii_lowercase}
    return frozenset({*keystrokes(word), *more})


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _read(folder: Path, split: str) -> list[Row]:
    """Texts and names of their classes, from a split of the committed data."""
    try:
        import datasets
    except ImportError:
        raise MachineError('reading data sets needs the datasets library: pip install "plait[suites]"') from None
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise RecipeError(f"{path}: is missing; give the folder that holds every task's three splits")
    datasets.utils.disable_progress_bars()
    table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    names = table.features["label"].names  # type: ignore[union-attr]
    return [(row["text"], names[row["label"]]) for row in table]  # type: ignore[call-overload, index]


TASKS: dict[str, Callable[[Path], dict[str, list[Row]]]] = {
    "langid": lambda source: short_texts(source / "langid", LANGUAGES),
    "debsection": lambda source: short_texts(source / "debsection", SECTIONS),
    "pos": lambda source: short_texts(source / "pos", KINDS),
    "spelling": misspelled,
}
"""Task → its splits, from the folder of the committed data."""

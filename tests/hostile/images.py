"""Pictures from strangers, as the data of an image suite."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import yaml

from hostile.corpus import World, add, change_json

EVAL = "eval {here}/base --suite {here}/suite.yaml --task shade --no-cache --quiet"


def png_bomb(side: int, rows: int | None = None) -> bytes:
    """A grey PNG of side × side pixels in a few hundred kilobytes; only so many rows of them are there."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    squeeze = zlib.compressobj(9)
    packed = b"".join(squeeze.compress(bytes(side + 1) * 1000) for _ in range((side if rows is None else rows) // 1000))
    size = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", size) + chunk(b"IDAT", packed + squeeze.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def image(name: str, write: Callable[[Path], object], fault: str = "row 0") -> None:
    """A folder of pictures with one that is hostile, as a task's test split."""

    def build(folder: Path, world: World) -> str:
        path = world.pictures(folder)
        place = folder / "images" / "dark"
        place.mkdir(parents=True)
        write(place / "x.png")
        data = yaml.safe_load(path.read_text())
        shade = {**data["tasks"]["shade"], "classes": ["dark", "middle", "light"], "data": {"test": "images"}}
        path.write_text(yaml.safe_dump({**data, "tasks": {"shade": shade}}))
        return fault

    add("image_" + name, "image", EVAL, build)


image("bomb", lambda path: path.write_bytes(png_bomb(40_000, rows=1_000)))
image("bomb_under_pillows_limit", lambda path: path.write_bytes(png_bomb(9_000)))
image("not_an_image", lambda path: path.write_bytes(b"<html>"))
image("cut_off", lambda path: path.write_bytes(png_bomb(1_000)[:60]))
image("a_pipe", os.mkfifo)
image("a_device", lambda path: path.symlink_to("/dev/zero"))
image("larger_than_memory", lambda path: (path.write_bytes(b""), os.truncate(path, 1 << 40)))


def processor(name: str, fault: str, **changes: object) -> None:
    """An image processor's configuration that asks for too much."""

    def build(folder: Path, world: World) -> str:
        world.pictures(folder)
        change_json(folder / "base" / "preprocessor_config.json", changes)
        (folder / "base" / "evil.py").write_text("open('code-was-executed', 'w')\nclass Evil: pass\n")
        return fault

    add("processor_" + name, "processor", EVAL, build)


processor("pixels_beyond_memory", "preprocessor_config.json", size={"height": 1 << 20, "width": 1 << 20})
processor("crop_beyond_memory", "preprocessor_config.json", do_center_crop=True, crop_size=1 << 20)
processor("code_of_its_own", "base", image_processor_type="Evil", auto_map={"AutoImageProcessor": "evil.Evil"})

"""Seven image corruptions in five severities: those of ImageNet-C that the WEMoE paper measures merged models under.

Definitions and constants are of Hendrycks & Dietterich (arXiv:1903.12261), who published two sets: ImageNet-C for
images of 224 pixels and CIFAR-10-C for images of 32 (github.com/hendrycks/robustness, make_imagenet_c.py and
make_cifar_c.py). They differ in more than scale: small images bear less. So the size of an image, its shorter side,
decides: at 32 and below the constants are CIFAR-10-C's, at 224 and above ImageNet-C's, between them they go in a
straight line over the logarithm of the size. Constants that are lengths are taken as shares of the size first, so that
a blur of a twelfth of a large image stays one. (WEMoE, arXiv:2402.00433, used CIFAR-10-C's at every size.)

What is random depends on seed, task, row and corruption, and not on the severity: a higher one puts more of the same
noise on the same image. Values are rounded, where the originals cut them off. Transparency is left as it is.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

SEVERITIES = (1, 2, 3, 4, 5)
Pixels = NDArray[np.float64]
"""[height, width, channels] from 0 to 1."""

_SMALL, _LARGE = 32, 224
"""Sizes that the two sets of constants are for; each constant below is (for small, for large), by severity."""
_GAUSSIAN = ((0.04, 0.08), (0.06, 0.12), (0.08, 0.18), (0.09, 0.26), (0.10, 0.38))
_IMPULSE = ((0.01, 0.03), (0.02, 0.06), (0.03, 0.09), (0.05, 0.17), (0.07, 0.27))
_RADIUS = ((6, 10), (6, 15), (6, 15), (8, 15), (9, 20))
_SIGMA = ((1, 3), (1.5, 5), (2, 8), (2, 12), (2.5, 15))
_CONTRAST = ((0.75, 0.4), (0.5, 0.3), (0.4, 0.2), (0.3, 0.1), (0.15, 0.05))
_QUALITY = ((80, 25), (65, 18), (58, 15), (50, 10), (40, 7))
_KEPT = ((0.95, 0.6), (0.9, 0.5), (0.85, 0.4), (0.75, 0.3), (0.65, 0.25))
_LIQUID_MEAN = ((0.62, 0.65), (0.65, 0.65), (0.65, 0.65), (0.65, 0.65), (0.65, 0.67))
_LIQUID_SPREAD = ((0.1, 0.3), (0.1, 0.3), (0.3, 0.3), (0.1, 0.3), (0.1, 0.4))
_LIQUID_BLUR = ((0.7, 4), (0.8, 3), (1, 2), (0.7, 1), (0.5, 1))
_LIQUID_LEVEL = ((0.7, 0.69), (0.7, 0.68), (0.69, 0.68), (0.69, 0.65), (0.68, 0.65))
_WATER = ((0.5, 0.6), (0.5, 0.6), (0.5, 0.5))
_MUD_BLUR = ((0.6, 1.5), (0.6, 1.5))
"""Of the severities 4 and 5: below them it is water that spatters."""
_WATER_COLOUR = np.array([175, 238, 238]) / 255
_MUD_COLOUR = np.array([63, 42, 20]) / 255
_GREY = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class _Draw:
    """What a corruption may depend on beside the pixels."""

    severity: int
    size: int
    """Shorter side in pixels."""
    random: np.random.Generator

    def value(self, constants: tuple[tuple[float, float], ...], first: int = 1) -> float:
        """A constant for this severity (the table starts at `first`) and size."""
        small, large = constants[self.severity - first]
        return small + (large - small) * self._place()

    def length(self, constants: tuple[tuple[float, float], ...], first: int = 1) -> float:
        """The same for a length, in pixels."""
        small, large = constants[self.severity - first]
        share = small / _SMALL + (large / _LARGE - small / _SMALL) * self._place()
        return share * self.size

    def _place(self) -> float:
        """0 for small images, 1 for large ones."""
        return min(max(math.log(self.size / _SMALL) / math.log(_LARGE / _SMALL), 0.0), 1.0)


def corrupt(image: Image, name: str, severity: int, *, seed: int, task: str, row: int) -> Image:
    """The image under a corruption of `NAMES`, in its own size and mode (L, RGB or RGBA)."""
    from PIL import Image as Images

    if image.mode not in ("L", "RGB", "RGBA"):
        raise ValueError(f"an image of mode {image.mode} cannot be corrupted; convert it to L, RGB or RGBA")
    colour = image.convert("RGB") if image.mode == "RGBA" else image
    digest = hashlib.sha256(f"{seed}\0{task}\0{row}\0{name}".encode()).digest()
    draw = _Draw(severity, min(image.size), np.random.default_rng(int.from_bytes(digest[:8], "big")))
    if name in _OF_IMAGES:
        made = _OF_IMAGES[name](colour, draw)
    else:
        pixels = np.asarray(colour, dtype=np.float64).reshape(*colour.size[::-1], -1) / 255
        changed = np.rint(255 * np.clip(_OF_PIXELS[name](pixels, draw), 0, 1)).astype(np.uint8)
        made = Images.fromarray(changed[..., 0] if colour.mode == "L" else changed)
    if image.mode == "RGBA":
        made.putalpha(image.getchannel("A"))
    return made


def _motion(pixels: Pixels, draw: _Draw) -> Pixels:
    """Half a Gaussian along a line that leans at most 45°: ImageMagick's motion blur, which takes whole pixels."""
    sigma = draw.length(_SIGMA)
    steps = np.arange(2 * math.ceil(draw.length(_RADIUS)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    angle = math.radians(draw.random.uniform(-45, 45))
    height, width = pixels.shape[:2]
    made = np.zeros_like(pixels)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down, right = (math.ceil(step * part - 0.5) for part in (math.sin(angle), math.cos(angle)))
        rows = np.clip(np.arange(height) + down, 0, height - 1)  # beyond the edge its pixels go on
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        made += weight * pixels[rows[:, None], columns]
    return made


def _impulse(pixels: Pixels, draw: _Draw) -> Pixels:
    """Salt and pepper, in every channel for itself."""
    hit = draw.random.random(pixels.shape) < draw.value(_IMPULSE)
    return np.where(hit, draw.random.random(pixels.shape) < 0.5, pixels)


def _gaussian(pixels: Pixels, draw: _Draw) -> Pixels:
    return pixels + draw.value(_GAUSSIAN) * draw.random.standard_normal(pixels.shape)


def _contrast(pixels: Pixels, draw: _Draw) -> Pixels:
    """Every channel drawn towards its mean."""
    means = pixels.mean(axis=(0, 1), keepdims=True)
    return means + draw.value(_CONTRAST) * (pixels - means)


def _spatter(pixels: Pixels, draw: _Draw) -> Pixels:
    """Drops where smoothed noise is high: of clear water, which brightens, or (severities 4 and 5) of mud."""
    from scipy.ndimage import gaussian_filter

    noise = draw.random.standard_normal(pixels.shape[:2])
    field = draw.value(_LIQUID_MEAN) + draw.value(_LIQUID_SPREAD) * noise
    field = gaussian_filter(field, draw.length(_LIQUID_BLUR), mode="nearest")
    drops = field > draw.value(_LIQUID_LEVEL)
    if draw.severity < 4:
        depth = (_water(np.where(drops, field, 0.0)) * draw.value(_WATER))[..., None]
        return pixels + depth * _in_mode(_WATER_COLOUR, pixels)
    depth = gaussian_filter(drops.astype(np.float64), draw.length(_MUD_BLUR, first=4), mode="nearest")
    depth = np.where(depth < 0.8, 0.0, depth)[..., None]
    return pixels * (1 - depth) + depth * _in_mode(_MUD_COLOUR, pixels)


def _water(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """How strongly drops shine, from 0 to 1: the distance from their rims, equalised and lit from one corner.

    The rims are Canny edges in the original. The field jumps there from nothing to its level, far above the detector's
    thresholds, and is smooth elsewhere, so that the edge is the border of the drops.
    """
    from scipy.ndimage import binary_erosion, correlate, distance_transform_edt, uniform_filter

    drops = field > 0
    if not drops.any():
        return field
    inside: Any = binary_erosion(drops, border_value=1)
    rims = drops & ~inside
    if not rims.any():  # all is under water
        return np.ones_like(field)
    distances: Any = distance_transform_edt(~rims)
    levels = uniform_filter(np.minimum(distances, 20.0), 3, mode="mirror").astype(np.uint8)
    counts = np.bincount(levels.ravel(), minlength=256)
    below = counts.cumsum() - counts[levels.min()]
    equal = 255 * below[levels] / max(below[-1], 1)
    lit = correlate(equal, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float64), mode="mirror")
    made = field * uniform_filter(np.clip(lit, 0, 255), 3, mode="mirror")
    return made / max(made.max(), 1e-9)


def _in_mode(colour: Pixels, pixels: Pixels) -> Pixels:
    """A colour for pixels in colour, or its brightness for grey ones."""
    return colour if pixels.shape[-1] == 3 else np.array([colour @ _GREY])


def _pixelate(image: Image, draw: _Draw) -> Image:
    """Fewer pixels, and back: boxes of one value."""
    from PIL.Image import Resampling

    kept = draw.value(_KEPT)
    width, height = (max(1, int(side * kept)) for side in image.size)
    return image.resize((width, height), Resampling.BOX).resize(image.size, Resampling.BOX)


def _jpeg(image: Image, draw: _Draw) -> Image:
    """Through a JPEG file of low quality."""
    from PIL import Image as Images

    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(draw.value(_QUALITY)))
    with Images.open(file) as found:
        found.load()
        return found.convert(image.mode)


_OF_PIXELS: dict[str, Callable[[Pixels, _Draw], Pixels]] = {
    "motion": _motion, "impulse": _impulse, "gaussian": _gaussian, "spatter": _spatter, "contrast": _contrast,
}  # fmt: skip
_OF_IMAGES: dict[str, Callable[[Image, _Draw], Image]] = {"pixelate": _pixelate, "jpeg": _jpeg}
NAMES = ("motion", "impulse", "gaussian", "pixelate", "spatter", "contrast", "jpeg")
"""As the WEMoE paper lists them."""

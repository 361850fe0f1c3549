"""Corruptions of CIFAR-10-C (Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261), on batches and seeded.

The definitions and the constants of the five severities are the published ones for 32 x 32 images; random numbers are
torch's, so that results agree with the published files in distribution, not pixel by pixel. Frost is left out, since it
needs photographs. Four more corruptions serve to tune rivals alone, and two extras stand outside of means.

Shape legend: ``N`` images ``(N, 3, H, W)``, float32 in 0..1, as 8-bit levels at the end.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from kornia.color import hsv_to_rgb, rgb_to_hsv
from kornia.filters import filter2d, gaussian_blur2d
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as TF  # type: ignore[import-untyped]

from cn_hf.errors import ConfigError, nearest

__all__ = ["CORRUPTIONS", "EXTRAS", "SEVERITIES", "TUNING", "corrupt", "plasma"]

SEVERITIES = (1, 2, 3, 4, 5)

# By severity.
_GAUSSIAN_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation
_SHOT_NOISE = (500.0, 250.0, 100.0, 75.0, 50.0)  # photons of full brightness
_IMPULSE_NOISE = (0.01, 0.02, 0.03, 0.05, 0.07)  # part of values
_DEFOCUS_BLUR = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))  # radius, blur of the disk
_GLASS_BLUR = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))  # sigma, reach, iterations
_MOTION_BLUR = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))  # radius, sigma
_ZOOM_BLUR = (1.06, 1.11, 1.16, 1.21, 1.26)  # largest factor, excluded; steps of 0.01
_SNOW = (
    (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
    (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
)  # mean, deviation, zoom, threshold, radius, sigma, part of the image
_FOG = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))  # amount, decay of roughness
_BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
_ELASTIC = ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
# strength, sigma and reach of the affine map, in parts of the image size
_PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)
_JPEG = (80, 65, 58, 50, 40)  # quality
_SPECKLE_NOISE = (0.06, 0.1, 0.12, 0.16, 0.2)
_GAUSSIAN_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
_SATURATE = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))  # factor, offset
_POSTERIZE = (6, 5, 4, 3, 2)  # bits

Corruption = Callable[[Tensor, int, Generator], Tensor]


def corrupt(name: str, images: Tensor, severity: int, *, seed: int = 0) -> Tensor:
    """Return corrupted images, float32 in 0..1 at 8-bit levels.

    Args:
        name: of ``CORRUPTIONS``, ``EXTRAS`` (one severity) or ``TUNING``; ``"clean"`` gives the images themselves.
        images: ``(N, 3, H, W)``, float32 in 0..1.
        severity: 1 to 5.
        seed: of all that is drawn. Corruptions differ in their draws.

    Raises:
        ConfigError: the corruption or its severity is unknown.
    """
    known = {**CORRUPTIONS, **EXTRAS, **TUNING}
    if name == "clean":
        return images
    if name not in known:
        raise ConfigError(f"Unknown corruption {name!r}; {nearest(name, known)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"Expected a severity of 1 to 5, received {severity!r}.")
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {severity} {seed}".encode()))
    return (known[name](images, severity - 1, generator).clamp(0, 1) * 255).round() / 255


# ---------------------------------------------------------------------------------------------------------------- noise


def _gaussian_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    return x + _GAUSSIAN_NOISE[level] * torch.randn(x.shape, generator=generator)


def _shot_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    return torch.poisson(x * _SHOT_NOISE[level], generator=generator) / _SHOT_NOISE[level]


def _impulse_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    drawn, part = torch.rand(x.shape, generator=generator), _IMPULSE_NOISE[level]
    return torch.where(drawn < part / 2, 0.0, torch.where(drawn < part, 1.0, x))


def _speckle_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    return x + x * _SPECKLE_NOISE[level] * torch.randn(x.shape, generator=generator)


# ----------------------------------------------------------------------------------------------------------------- blur


def _defocus_blur(x: Tensor, level: int, generator: Generator) -> Tensor:
    radius, smoothing = _DEFOCUS_BLUR[level]
    reach = torch.arange(-4, 5, dtype=torch.float32)
    disk = (reach.square()[:, None] + reach.square() <= radius**2).float()
    kernel = gaussian_blur2d((disk / disk.sum())[None, None], (3, 3), (smoothing, smoothing))[0]
    blurred: Tensor = filter2d(x, kernel, border_type="reflect")
    return blurred


def _smoothed(x: Tensor, sigma: float, truncate: float = 4.0, border: str = "replicate") -> Tensor:
    size = 2 * max(1, int(truncate * sigma + 0.5)) + 1
    smoothed: Tensor = gaussian_blur2d(x, (size, size), (sigma, sigma), border_type=border)
    return smoothed


def _gaussian_blur(x: Tensor, level: int, generator: Generator) -> Tensor:
    return _smoothed(x, _GAUSSIAN_BLUR[level])


def _glass_blur(x: Tensor, level: int, generator: Generator) -> Tensor:
    sigma, reach, iterations = _GLASS_BLUR[level]
    x = (_smoothed(x, sigma) * 255).floor() / 255
    (count, _, height, width), edge = x.shape, reach + 1
    every = torch.arange(count)[:, None, None]
    rows, columns = torch.arange(edge, height)[:, None], torch.arange(edge, width)
    for _ in range(iterations):
        # The published files have each pixel copied from a neighbour above and to the left of it, or from itself.
        moves = torch.randint(-reach, reach, (2, count, height - edge, width - edge), generator=generator)
        x[:, :, edge:, edge:] = x.movedim(1, -1)[every, rows + moves[0], columns + moves[1]].movedim(-1, 1)
    return _smoothed(x, sigma)


def _motion(x: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Blur each image along a direction, by one side of a Gaussian."""
    steps = torch.arange(2 * radius + 1, dtype=torch.float32)
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    angle = degrees * math.pi / 180
    height, width = x.shape[-2:]
    every, rows, columns = torch.arange(len(x))[:, None, None], torch.arange(height), torch.arange(width)
    total = torch.zeros_like(x)
    for step, weight in zip(steps.tolist(), weights.tolist(), strict=True):
        down = torch.round(step * angle.sin()).long()[:, None] + rows
        right = torch.round(step * angle.cos()).long()[:, None] + columns
        at = (every, down.clamp(0, height - 1)[:, :, None], right.clamp(0, width - 1)[:, None, :])
        total += weight * x.movedim(1, -1)[at].movedim(-1, 1)
    return total


def _between(low: float, high: float, count: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _motion_blur(x: Tensor, level: int, generator: Generator) -> Tensor:
    return _motion(x, *_MOTION_BLUR[level], _between(-45, 45, len(x), generator))


def _zoomed(x: Tensor, factor: float) -> Tensor:
    """Enlarge about the centre; the size stays."""
    theta = torch.tensor([[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=True), align_corners=True)


def _zoom_blur(x: Tensor, level: int, generator: Generator) -> Tensor:
    factors = np.arange(1, _ZOOM_BLUR[level], 0.01)
    total = x.clone()
    for factor in factors.tolist():
        total += _zoomed(x, factor)
    return total / (len(factors) + 1)


# -------------------------------------------------------------------------------------------------------------- weather


def _snow(x: Tensor, level: int, generator: Generator) -> Tensor:
    mean, deviation, zoom, threshold, radius, sigma, part = _SNOW[level]
    count, _, height, width = x.shape
    flakes = _zoomed(mean + deviation * torch.randn(count, 1, height, width, generator=generator), zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = _motion(flakes, int(radius), sigma, _between(-135, -45, count, generator))
    grey = TF.rgb_to_grayscale(x)
    x = part * x + (1 - part) * torch.maximum(x, 1.5 * grey + 0.5)
    return x + flakes + flakes.flip((-2, -1))


def plasma(count: int, size: int, decay: float, generator: Generator) -> Tensor:
    """Return clouds ``(count, size, size)`` in 0..1: midpoint displacement on a torus; ``size`` is a power of two."""
    clouds, step, roughness = torch.zeros(count, size, size), size, 100.0

    def displaced(total: Tensor) -> Tensor:
        return total / 4 + roughness * roughness * (2 * torch.rand(total.shape, generator=generator) - 1)

    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        rows = corners + corners.roll(-1, 1)
        clouds[:, half::step, half::step] = displaced(rows + rows.roll(-1, 2))
        centres, corners = clouds[:, half::step, half::step], clouds[:, ::step, ::step]
        clouds[:, ::step, half::step] = displaced(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        clouds[:, half::step, ::step] = displaced(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, roughness = half, roughness / decay
    clouds = clouds - clouds.amin((1, 2), keepdim=True)
    return clouds / clouds.amax((1, 2), keepdim=True)


def _fog(x: Tensor, level: int, generator: Generator) -> Tensor:
    amount, decay = _FOG[level]
    size = 2 ** math.ceil(math.log2(max(x.shape[-2:])))
    clouds = plasma(len(x), size, decay, generator)[:, None, : x.shape[-2], : x.shape[-1]]
    largest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * clouds) * largest / (largest + amount)


def _brightness(x: Tensor, level: int, generator: Generator) -> Tensor:
    hue, saturation, value = rgb_to_hsv(x).unbind(1)
    brighter: Tensor = hsv_to_rgb(torch.stack([hue, saturation, (value + _BRIGHTNESS[level]).clamp(0, 1)], 1))
    return brighter


# -------------------------------------------------------------------------------------------------------------- digital


def _contrast(x: Tensor, level: int, generator: Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * _CONTRAST[level] + mean


def _elastic_transform(x: Tensor, level: int, generator: Generator) -> Tensor:
    count, _, height, width = x.shape
    size = min(height, width)
    strength, sigma, reach = (part * size for part in _ELASTIC[level])
    middle, side = torch.tensor([float(width // 2), float(height // 2)]), size // 3
    corners = middle + side * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = corners + reach * (2 * torch.rand(count, 3, 2, generator=generator) - 1)
    # The map from the moved corners back to where their pixels are read.
    sources = corners.expand(count, 3, 2)
    backward = torch.linalg.solve(torch.cat([moved, torch.ones(count, 3, 1)], 2), sources)
    grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).float()
    x = _read(x, torch.cat([grid, torch.ones(height, width, 1)], -1) @ backward[:, None])
    if strength == 0:
        return x
    shifts = 2 * torch.rand(count, 2, height, width, generator=generator) - 1
    shifts = strength * _smoothed(shifts, sigma, truncate=3.0, border="reflect")
    return _read(x, grid + shifts.movedim(1, -1))


def _read(x: Tensor, places: Tensor) -> Tensor:
    """Read images at (column, row) places, ``(N, H, W, 2)`` in pixels, mirrored at the edges."""
    last = torch.tensor([x.shape[-1] - 1.0, x.shape[-2] - 1.0])
    return F.grid_sample(x, 2 * places / last - 1, padding_mode="reflection", align_corners=True)


def _pixelate(x: Tensor, level: int, generator: Generator) -> Tensor:
    height, width = x.shape[-2:]
    small, box = (int(width * _PIXELATE[level]), int(height * _PIXELATE[level])), PIL.Image.Resampling.BOX
    return _by_pictures(x, lambda picture: picture.resize(small, box).resize((width, height), box))


def _jpeg_compression(x: Tensor, level: int, generator: Generator) -> Tensor:
    def compressed(picture: PIL.Image.Image) -> PIL.Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=_JPEG[level])
        return PIL.Image.open(file)

    return _by_pictures(x, compressed)


def _by_pictures(x: Tensor, change: Callable[[PIL.Image.Image], PIL.Image.Image]) -> Tensor:
    pictures = (x * 255).round().to(torch.uint8).movedim(1, -1).numpy()
    changed = np.stack([np.asarray(change(PIL.Image.fromarray(one))) for one in pictures])
    return torch.from_numpy(changed).movedim(-1, 1).float() / 255


def _saturate(x: Tensor, level: int, generator: Generator) -> Tensor:
    factor, offset = _SATURATE[level]
    hue, saturation, value = rgb_to_hsv(x).unbind(1)
    saturated: Tensor = hsv_to_rgb(torch.stack([hue, (saturation * factor + offset).clamp(0, 1), value], 1))
    return saturated


def _posterize(x: Tensor, level: int, generator: Generator) -> Tensor:
    coarse: Tensor = TF.posterize((x * 255).round().to(torch.uint8), _POSTERIZE[level]).float() / 255
    return coarse


def _inversion(x: Tensor, level: int, generator: Generator) -> Tensor:
    return 1 - x


def _grayscale(x: Tensor, level: int, generator: Generator) -> Tensor:
    grey: Tensor = TF.rgb_to_grayscale(x, num_output_channels=3)
    return grey


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
"""The corruptions that means are over, by the names of the published files."""

EXTRAS: dict[str, Corruption] = {"inversion": _inversion, "grayscale": _grayscale}
"""Shown, and left out of means; the same at each severity."""

TUNING: dict[str, Corruption] = {
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "saturate": _saturate,
    "posterize": _posterize,
}
"""Corruptions that no result is computed on: rivals' options are chosen on them."""

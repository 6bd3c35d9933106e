"""Images made harder to read in five degrees, for measuring robustness: noise, blur, contrast, occlusion.

The first three follow Hendrycks & Dietterich 2019 ("Benchmarking Neural Network Robustness to Common Corruptions"):
noise and contrast as for ImageNet, in units of the pixel range; blur as for CIFAR, whose widths are for 32 pixels, and
grow with larger images. Occlusion is a grey square at a random place.

    noise      pixel + N(0, s²)                         s of .08 .12 .18 .26 .38
    blur       Gaussian filter                          s of .4 .6 .7 .8 1.0 pixels (at most 32 a side)
    contrast   (pixel − mean) · c + mean                c of .4 .3 .2 .1 .05, mean of each channel of the image
    occlusion  a square of the image is mid-grey        area of .05 .1 .2 .3 .4

Every image draws from its own stream, keyed by (seed, its number), so that it is corrupted in the same way however the
set is cut into batches.

Legend: N images, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter

from s2moe.data.images.base import Images, ImageSet, ImageSplit

NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
OCCLUSION = (0.05, 0.1, 0.2, 0.3, 0.4)
IMAGE_CORRUPTIONS = ("noise", "blur", "contrast", "occlusion")
SEVERITIES = (1, 2, 3, 4, 5)
GREY = 128


def corrupt_images(images: Images, kind: str, severity: int, seed: int = 0, first: int = 0) -> Images:
    """Corrupted images uint8 [N, channels, H, W], in a new array.

    Args:
        kind: one of IMAGE_CORRUPTIONS.
        severity: 1 to 5.
        first: the number of the first image in its split.

    Raises:
        ValueError: unknown kind, impossible severity.
    """
    if kind not in IMAGE_CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; known: {', '.join(IMAGE_CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"the severity of a corruption must be 1 to 5, got {severity}")
    if kind == "noise":
        return _noise(images, NOISE[severity - 1], seed, first)
    if kind == "occlusion":
        return _occlude(images, OCCLUSION[severity - 1], seed, first)
    value = images.astype(np.float32)
    if kind == "blur":
        width = BLUR[severity - 1] * max(1.0, images.shape[-1] / 32)
        value = gaussian_filter(value, (0, 0, width, width), mode="nearest")
    else:
        mean = value.mean((2, 3), keepdims=True)
        value = (value - mean) * CONTRAST[severity - 1] + mean
    return _rounded(value)


def corrupted(image_set: ImageSet, kind: str, severity: int, seed: int = 0) -> ImageSet:
    """The set with a corrupted test split."""
    test = ImageSplit(corrupt_images(image_set.test.images, kind, severity, seed), image_set.test.labels)
    return replace(image_set, name=f"{image_set.name}, {kind} {severity}", test=test)


def _noise(images: Images, std: float, seed: int, first: int) -> Images:
    value = images.astype(np.float32)
    for i, image in enumerate(value):  # a stream an image
        image += 255 * std * _stream(seed, first + i).standard_normal(image.shape, dtype=np.float32)
    return _rounded(value)


def _occlude(images: Images, area: float, seed: int, first: int) -> Images:
    images = images.copy()
    _, _, height, width = images.shape
    side = min(max(1, round((area * height * width) ** 0.5)), height, width)
    for i, image in enumerate(images):
        random = _stream(seed, first + i)
        top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
        image[:, top : top + side, left : left + side] = GREY
    return images


def _stream(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64)))


def _rounded(value: np.ndarray) -> Images:
    return np.rint(value).clip(0, 255).astype(np.uint8)

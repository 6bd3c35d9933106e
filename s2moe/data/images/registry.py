"""The image sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from s2moe.data.errors import CorpusError
from s2moe.data.images import cifar, digits, idx, quickdraw
from s2moe.data.images.base import ImageSet
from s2moe.options import nearest


class ImageSetKind(NamedTuple):
    """``data.name=<name>``: what it is, what opens it, and how its training images are varied by default."""

    summary: str
    open: Callable[..., ImageSet]
    augmentation: str = "none"


IMAGE_SETS = {
    "digits": ImageSetKind("scikit-learn's 8 x 8 digits, 1,442 / 355; needs no network", digits.open_digits),
    "mnist": ImageSetKind("handwritten digits 28 x 28, 60,000 / 10,000", idx.open_mnist),
    "mnist_10k": ImageSetKind("the first 10,000 / 2,000 of MNIST, in [-1, 1]", idx.open_mnist_10k),
    "fashion_mnist": ImageSetKind("clothes 28 x 28, 60,000 / 10,000", idx.open_fashion_mnist),
    "fmnist_mnist": ImageSetKind("six classes of clothes and six digits, 10,000 / 2,000", idx.open_fmnist_mnist),
    "cifar10": ImageSetKind("photographs 32 x 32, 10 classes, 50,000 / 10,000", cifar.open_cifar10, "flip_crop"),
    "cifar100": ImageSetKind("photographs 32 x 32, 100 classes, 50,000 / 10,000", cifar.open_cifar100, "flip_crop"),
    "quickdraw": ImageSetKind("Quick, Draw! bitmaps 28 x 28", quickdraw.open_bitmaps),
    "quickdraw_strokes": ImageSetKind("Quick, Draw! strokes, rasterised 28 x 28", quickdraw.open_strokes),
    "synthetic_strokes": ImageSetKind("five shapes drawn by a program, 28 x 28; no network", quickdraw.open_shapes),
}


def open_images(
    name: str, source: Path | str | None = None, directory: Path | str = "data", **options: Any
) -> ImageSet:
    """Read an image set.

    Args:
        source: a local copy of the official files: a directory (also one with a folder for each of several sets) or
            archive. None: they are downloaded from their official source.
        directory: where downloads and rasterised drawings are kept, in a folder of the set's name.
        options: ``partial`` (cifar10: train on the batches that are there), ``official`` (false: files need not have
            the official checksums), ``classes`` (quickdraw, quickdraw_strokes), ``train`` and ``test``
            (synthetic_strokes), where the set has them.

    Raises:
        CorpusError: files that cannot be had, are damaged or not all there; an unknown set or option.
    """
    if name not in IMAGE_SETS:
        raise CorpusError(f"unknown image set {name!r}{nearest(name, IMAGE_SETS)}; known: {', '.join(IMAGE_SETS)}")
    known = list(inspect.signature(IMAGE_SETS[name].open).parameters)[2:]
    for option in options:
        if option not in known:
            raise CorpusError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return IMAGE_SETS[name].open(None if source is None else Path(source), Path(directory), **options)

"""The embedded default: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which need no network.

They are the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from s2moe.data.errors import CorpusError
from s2moe.data.images.base import ImageSet, ImageSplit

HELD_OUT = 5  # every fifth image of each class is for testing


def open_digits(source: Path | None = None, directory: Path | None = None) -> ImageSet:
    """1,442 / 355 digits; the split is fixed and has the same share of every class."""
    if source is not None:
        raise CorpusError(f"data.source: digits come with scikit-learn; leave {source} out")
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]  # published as whole numbers up to 16
    is_test = np.zeros(len(labels), dtype=np.bool_)
    for label in range(10):
        (place,) = np.nonzero(labels == label)
        is_test[place[HELD_OUT - 1 :: HELD_OUT]] = True
    train, test = (ImageSplit(images[keep], labels[keep]) for keep in (~is_test, is_test))
    return ImageSet("digits", tuple("0123456789"), train, test, (0.3053,), (0.3760,))

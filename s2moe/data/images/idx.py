"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017), in their idx files; and both as one set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s2moe.data.errors import CorpusError
from s2moe.data.images.base import ImageSet, ImageSplit
from s2moe.data.images.files import Published, local, read_files, require

DIGITS = tuple("0123456789")
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIZE = 28

_NAMES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_MNIST = (  # md5 as published (.gz) and unpacked
    ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
)
_FASHION = (
    ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    ("25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
    ("bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
    ("bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
)
_MNIST_URLS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
_FASHION_URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)


def open_mnist(source: Path | None, directory: Path, official: bool = True) -> ImageSet:
    """60,000 / 10,000 handwritten digits."""
    train, test = _read("mnist", _MNIST, _MNIST_URLS, local(source, "mnist"), directory / "mnist", official)
    return ImageSet("mnist", DIGITS, train, test, (0.1307,), (0.3081,))


def open_mnist_10k(source: Path | None, directory: Path, official: bool = True) -> ImageSet:
    """The first 10,000 / 2,000 digits, scaled to [−1, 1]: section 4.2 of Krishnamurthy et al. 2023."""
    return open_mnist(source, directory, official).first(10_000, 2_000).normalised(0.5, 0.5)


def open_fashion_mnist(source: Path | None, directory: Path, official: bool = True) -> ImageSet:
    """60,000 / 10,000 articles of clothing."""
    folder = local(source, "fashion_mnist", "fashion-mnist", "FashionMNIST")
    train, test = _read("fashion_mnist", _FASHION, _FASHION_URLS, folder, directory / "fashion_mnist", official)
    return ImageSet("fashion_mnist", CLOTHES, train, test, (0.2859,), (0.3530,))


def open_fmnist_mnist(source: Path | None, directory: Path, official: bool = True) -> ImageSet:
    """Clothes 0 to 5 and digits 4 to 9 as classes 6 to 11, 5,000 + 5,000 / 1,000 + 1,000, scaled to [−1, 1].

    Of each the first such images in the order of the files: the paper (Krishnamurthy et al. 2023) does not say which.

    Args:
        source: a directory with the folders mnist and fashion_mnist.
    """
    if source is not None and local(source, "mnist") == source:
        raise CorpusError(f"{source} must hold the folders mnist and fashion_mnist, whose files have the same names")
    clothes, digits = open_fashion_mnist(source, directory, official), open_mnist(source, directory, official)
    parts = []
    for split, most in (("train", 5_000), ("test", 1_000)):
        first = getattr(clothes, split).of_classes(range(6)).first(most)
        second = getattr(digits, split).of_classes(range(4, 10)).first(most)
        labels = np.concatenate((first.labels, second.labels + 2))
        parts.append(ImageSplit(np.concatenate((first.images, second.images)), labels))
    return ImageSet("fmnist_mnist", CLOTHES[:6] + DIGITS[4:], parts[0], parts[1], (0.5,), (0.5,))


def _read(
    name: str,
    md5s: tuple[tuple[str, str], ...],
    bases: tuple[str, ...],
    source: Path | None,
    directory: Path,
    official: bool,
) -> tuple[ImageSplit, ImageSplit]:
    published = [
        Published(f"{file}.gz", tuple(f"{base}{file}.gz" for base in bases), packed)
        for file, (packed, _) in zip(_NAMES, md5s, strict=True)
    ]
    members = {file: unpacked for file, (_, unpacked) in zip(_NAMES, md5s, strict=True)}
    found = read_files(published, members, source, directory, official)
    require(found, _NAMES, source)
    arrays = [parse_idx(found[file], f"{name}/{file}") for file in _NAMES]
    for file, array in zip(_NAMES, arrays, strict=True):
        if array.ndim != (3 if "images" in file else 1):
            raise CorpusError(f"{name}/{file} has {array.ndim} dimensions, which is wrong; get it again")
    train, test = (ImageSplit(arrays[i][:, None], arrays[i + 1].astype(np.int64)) for i in (0, 2))
    return train, test


def parse_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """An array of bytes from LeCun's format: 0, 0, 8, dimensions, each size as 4 bytes, big-endian, then the data.

    Raises:
        CorpusError: it is not one, or is cut short.
    """
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if content[:3] != b"\x00\x00\x08" or not dimensions or len(content) < start:
        raise CorpusError(f"{name} is not an idx file of bytes; get it again")
    shape = [int(size) for size in np.frombuffer(content, dtype=">u4", count=dimensions, offset=4)]
    if len(content) - start != np.prod(shape, dtype=np.int64):
        raise CorpusError(f"{name} should hold {' x '.join(map(str, shape))} bytes, has {len(content) - start:,}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)

"""Small files in the official formats of the image sets."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """LeCun's format: magic number 0x0800 + dimensions, the sizes, big-endian, then the data."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, train: int, test: int, seed: int = 0) -> dict[str, tuple[NDArray, NDArray]]:
    """Four idx .gz files of random images; what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    content = {}
    for split, count in (("train", train), ("test", test)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in zip(IDX[split], (images, labels), strict=True):
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        content[split] = (images, labels)
    return content


def cifar_bytes(count: int, label_bytes: int, classes: int, seed: int) -> tuple[bytes, NDArray, NDArray]:
    """Records of the binary layout, their images [n, 3, 32, 32] and (fine) labels."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = random.integers(0, classes, count).astype(np.uint8)
    content = b""
    for image, label in zip(images, labels, strict=True):
        coarse = bytes([19]) if label_bytes == 2 else b""
        red, green, blue = image
        content += coarse + bytes([label]) + red.tobytes() + green.tobytes() + blue.tobytes()
    return content, images, labels


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A .tar.gz of files."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def drawing(steps: list[tuple[int, int, int]]) -> NDArray[np.int16]:
    """A sketch-rnn drawing."""
    return np.array(steps, dtype=np.int16)


def write_drawings(path: Path, train: int, test: int, seed: int = 0) -> None:
    """A sketch-rnn .npz: object arrays of int16 [points, 3], pickled, in three splits."""
    random = np.random.default_rng(seed)

    def some(count: int) -> NDArray:
        drawings = np.empty(count, dtype=object)
        for i in range(count):
            steps = random.integers(-30, 31, (random.integers(5, 12), 3)).astype(np.int16)
            steps[:, 2] = random.random(len(steps)) < 0.3
            drawings[i] = steps
        return drawings

    np.savez_compressed(path, train=some(train), valid=some(2), test=some(test))

"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in their binary layout: label bytes, then red, green and blue planes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from s2moe.data.errors import CorpusError
from s2moe.data.images.base import ImageSet, ImageSplit
from s2moe.data.images.files import Published, local, read_files, require

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FINE = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm"""
CIFAR100 = tuple(_FINE.split())
SIZE, PIXELS = 32, 3 * 32 * 32
BATCH = 10_000

_URL = "https://www.cs.toronto.edu/~kriz/"
_CIFAR10 = Published("cifar-10-binary.tar.gz", (f"{_URL}cifar-10-binary.tar.gz",), "c32a1d4ab5d03f1284b67883e8d87530")
_CIFAR10_FILES = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
_CIFAR100 = Published(
    "cifar-100-binary.tar.gz", (f"{_URL}cifar-100-binary.tar.gz",), "03b5dce01913d631647c71ecec9e9cb8"
)
_CIFAR100_FILES = {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15", "test.bin": "4499cfba6c016c1be1438163640a0898"}


def open_cifar10(source: Path | None, directory: Path, official: bool = True, partial: bool = False) -> ImageSet:
    """50,000 / 10,000 photographs. With ``partial``, those training batches that are there, and a name that says so."""
    source = local(source, "cifar10", "cifar-10-batches-bin")
    found = read_files([_CIFAR10], _CIFAR10_FILES, source, directory / "cifar10", official)
    names = [name for name in _CIFAR10_FILES if name.startswith("data")]
    if not partial:
        require(found, _CIFAR10_FILES, source, " (data.options={partial: true} trains on the batches that are there)")
    present = [name for name in names if name in found]
    require(found, ["test_batch.bin", *(present or names[:1])], source)
    parts = [parse_cifar(found[name], name, 1) for name in present]
    train = ImageSplit(np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts]))
    name = "cifar10" if len(present) == len(names) else f"cifar10 ({len(train):,} of {BATCH * len(names):,})"
    test = parse_cifar(found["test_batch.bin"], "test_batch.bin", 1)
    return ImageSet(name, CIFAR10, train, test, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def open_cifar100(source: Path | None, directory: Path, official: bool = True) -> ImageSet:
    """50,000 / 10,000 photographs of 100 fine classes."""
    source = local(source, "cifar100", "cifar-100-binary")
    found = read_files([_CIFAR100], _CIFAR100_FILES, source, directory / "cifar100", official)
    require(found, _CIFAR100_FILES, source)
    train, test = (parse_cifar(found[name], name, 2) for name in _CIFAR100_FILES)
    return ImageSet("cifar100", CIFAR100, train, test, (0.5074, 0.4867, 0.4411), (0.2011, 0.1987, 0.2025))


def parse_cifar(content: bytes, name: str, label_bytes: int) -> ImageSplit:
    """Records of ``label_bytes`` labels, of which the last counts (CIFAR-100: coarse, fine), and 3072 pixels.

    Raises:
        CorpusError: it is not a whole number of records.
    """
    record = label_bytes + PIXELS
    if not content or len(content) % record:
        raise CorpusError(f"{name} has {len(content):,} bytes, not a multiple of {record:,}; get it again")
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    images = np.ascontiguousarray(rows[:, label_bytes:]).reshape(-1, 3, SIZE, SIZE)
    return ImageSplit(images, rows[:, label_bytes - 1].astype(np.int64))

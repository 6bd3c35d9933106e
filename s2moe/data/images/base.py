"""Images with classes, in memory: two splits, and what a model has to be told of them.

Legend: N images, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from s2moe.data.errors import CorpusError

Images = NDArray[np.uint8]  # [N, channels, H, W]
Labels = NDArray[np.int64]  # [N]


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images uint8 [N, channels, H, W] and their classes int64 [N]."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, most: int) -> ImageSplit:
        """The first ``most`` images, in the order of the file."""
        return ImageSplit(self.images[:most], self.labels[:most])

    def drawn(self, most: int) -> ImageSplit:
        """``most`` images drawn by chance, in the order of the file, since some sets come class by class.

        The same ones every time: those of the least numbers of numpy's Philox stream with key 0. More hold fewer.
        """
        if most >= len(self):
            return self
        number_N = np.random.Philox(key=0).random_raw(len(self))
        place = np.sort(np.argsort(number_N, kind="stable")[:most])
        return ImageSplit(self.images[place], self.labels[place])

    def of_classes(self, classes: Sequence[int]) -> ImageSplit:
        """The images of some classes, in order, under the labels they have."""
        keep_N = np.isin(self.labels, np.asarray(classes, dtype=np.int64))
        return ImageSplit(self.images[keep_N], self.labels[keep_N])

    def share_of_each_class(self, share: float) -> ImageSplit:
        """The first round(share · n) images of each class, at least one, in the order of the file."""
        keep_N = np.zeros(len(self), dtype=np.bool_)
        for label in np.unique(self.labels):
            (place,) = np.nonzero(self.labels == label)
            keep_N[place[: max(1, round(share * len(place)))]] = True
        return ImageSplit(self.images[keep_N], self.labels[keep_N])


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set. ``name`` says what part of it this is, where it is not all.

    ``mean`` and ``std`` per channel are of pixels in [0, 1]: a model sees (pixel / 255 − mean) / std.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSplit
    test: ImageSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for split_name, split in (("train", self.train), ("test", self.test)):
            where = f"{self.name}, {split_name}"
            if split.images.dtype != np.uint8 or split.images.ndim != 4 or split.labels.dtype != np.int64:
                raise CorpusError(f"{where}: images must be uint8 [N, channels, H, W] and labels int64 [N]")
            if len(split.images) != len(split.labels):
                raise CorpusError(f"{where}: {len(split.images):,} images but {len(split.labels):,} labels")
            if not len(split):
                raise CorpusError(f"{where}: no images")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                label = low if low < 0 else high
                raise CorpusError(f"{where}: label {label} is none of the {len(self.classes)} classes")
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise CorpusError(f"{self.name}: images of train and test differ in shape")
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise CorpusError(f"{self.name}: mean and std must be given for each of {self.channels} channels, std > 0")

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width in pixels.

        Raises:
            CorpusError: images are not square.
        """
        height, width = self.train.images.shape[2:]
        if height != width:
            raise CorpusError(f"{self.name}: images must be square, not {height} x {width}")
        return height

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that training can see: classes, images, labels and normalisation."""
        digest = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for split in (self.train, self.test):
            digest.update(repr(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(split.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def first(self, train: int, test: int) -> ImageSet:
        """The first images of each split, in the order of the files."""
        self._check_sizes(train, test)
        return self._smaller(self.train.first(train), self.test.first(test), "the first {:,} / {:,}")

    def drawn(self, train: int, test: int) -> ImageSet:
        """So many images of each split, drawn by chance, the same ones every time."""
        self._check_sizes(train, test)
        return self._smaller(self.train.drawn(train), self.test.drawn(test), "{:,} / {:,} drawn by chance")

    def _check_sizes(self, train: int, test: int) -> None:
        if train < 1 or test < 1:
            raise CorpusError(f"{self.name}: keep at least one image of train and of test, not {train} and {test}")

    def _smaller(self, train: ImageSplit, test: ImageSplit, which: str) -> ImageSet:
        if len(train) == len(self.train) and len(test) == len(self.test):
            return self
        return replace(self, name=f"{self.name}, {which.format(len(train), len(test))}", train=train, test=test)

    def fraction(self, share: float) -> ImageSet:
        """The first part of each class of train. The test split stays whole, so that errors can be compared."""
        if not 0 < share <= 1:
            raise CorpusError(f"{self.name}: the share of train must lie in (0, 1], got {share}")
        if share == 1:
            return self
        return replace(self, name=f"{self.name}, {share:.3g} of train", train=self.train.share_of_each_class(share))

    def only(self, classes: Sequence[int]) -> ImageSet:
        """Some classes, numbered anew from 0 in the given order."""
        wrong = [label for label in classes if not 0 <= label < len(self.classes)]
        if wrong or not classes or len(set(classes)) < len(classes):
            raise CorpusError(f"{self.name}: classes must be different numbers below {len(self.classes)}: {classes}")
        number = np.full(len(self.classes), -1, dtype=np.int64)
        number[list(classes)] = np.arange(len(classes))
        train, test = (
            ImageSplit(part.images, number[part.labels])
            for part in (self.train.of_classes(classes), self.test.of_classes(classes))
        )
        names = tuple(self.classes[label] for label in classes)
        return replace(self, name=f"{self.name}, {len(names)} classes", classes=names, train=train, test=test)

    def normalised(self, mean: float, std: float) -> ImageSet:
        """With another normalisation, the same for all channels; 0 and 1 leave pixels in [0, 1]."""
        return replace(self, mean=(mean,) * self.channels, std=(std,) * self.channels)

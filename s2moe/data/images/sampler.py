"""Training images as a pure function of (seed, sample number), and evaluation images in order.

Legend: B images of a batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s2moe.data.errors import CorpusError
from s2moe.data.images.base import Images, ImageSet, ImageSplit

AUGMENTATIONS = ("none", "flip_crop")
PADDING = 4


class EpochSampler:
    """Every image once an epoch, in an order drawn anew each epoch.

    Sample i is image i mod N of the permutation of epoch i div N. Permutation and augmentation come from numpy's Philox
    counter generator keyed by (seed, epoch), of which only the raw 64-bit stream is used, the part that numpy keeps
    equal between versions: the first N numbers, sorted, give the order, the next N the augmentation of each place in
    it. So the position in the data is the number of samples consumed, whatever ranks and micro-batches consumed them.

    Args:
        augmentation: "none"; or "flip_crop": flipped left to right with probability 1/2, padded by 4 pixels that
            mirror the image, and cropped back to its size at one of the 9 x 9 places (Krishnamurthy et al. 2023 for
            CIFAR-100).
    """

    def __init__(
        self, split: ImageSplit, mean: Sequence[float], std: Sequence[float], seed: int, augmentation: str = "none"
    ) -> None:
        if not len(split):
            raise CorpusError("there are no images to sample from")
        if not 0 <= seed < 1 << 64:
            raise CorpusError(f"the sampling seed is {seed}; give one from 0 to 2**64 - 1")
        if augmentation not in AUGMENTATIONS:
            raise CorpusError(f"unknown augmentation {augmentation!r}; known: {', '.join(AUGMENTATIONS)}")
        if augmentation == "flip_crop" and min(split.images.shape[2:]) <= PADDING:
            raise CorpusError(f"flip_crop needs images larger than {PADDING} pixels, not {split.images.shape[2:]}")
        self.split = split
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = seed
        self.augmentation = augmentation
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may cross from one epoch into the next

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.split)

    def epoch_of(self, sample: int) -> int:
        """The epoch, from 0, that a sample belongs to."""
        return sample // len(self.split)

    def indices(self, first_sample: int, count: int) -> NDArray[np.int64]:
        """Which images of the split samples ``first_sample`` to ``first_sample + count - 1`` are."""
        return self._places(first_sample, count)[0]

    def batch(self, first_sample: int, count: int) -> tuple[Tensor, Tensor]:
        """Those samples: normalised pixels float32 [B, channels, H, W] and labels int64 [B], on the CPU."""
        index_B, draw_B = self._places(first_sample, count)
        images = self.split.images[index_B]
        if self.augmentation == "flip_crop":
            images = flip_and_crop(images, draw_B)
        return normalise(images, self.mean, self.std), torch.from_numpy(self.split.labels[index_B])

    def _places(self, first_sample: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        if first_sample < 0 or count < 1:
            raise CorpusError(f"no samples {first_sample} to {first_sample + count - 1}; they are counted from 0")
        parts = []
        while count:
            epoch, place = divmod(first_sample, len(self.split))
            taken = min(count, len(self.split) - place)
            order, draw = self._epoch(epoch)
            parts.append((order[place : place + taken], draw[place : place + taken]))
            first_sample += taken
            count -= taken
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([order for order, _ in parts]), np.concatenate([draw for _, draw in parts])

    def _draw_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        generator = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
        order = np.argsort(generator.random_raw(len(self.split)), kind="stable")
        return order, generator.random_raw(len(self.split))


def flip_and_crop(images: Images, draw_B: NDArray[np.uint64]) -> Images:
    """Each image flipped and shifted as its 64-bit number says: bit 63 the flip, the halves mod 9 the two offsets."""
    _, _, height, width = images.shape
    places = 2 * PADDING + 1
    row_B = ((draw_B & np.uint64(0x7FFFFFFF)) % np.uint64(places)).astype(np.int64)
    column_B = (((draw_B >> np.uint64(32)) & np.uint64(0x7FFFFFFF)) % np.uint64(places)).astype(np.int64)
    flip_B = (draw_B >> np.uint64(63)).astype(np.bool_)
    padded = images.take(_mirrored(height), axis=2).take(_mirrored(width), axis=3)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    cropped: Images = windows[np.arange(len(images)), :, row_B, column_B]
    # Flipping after a crop at a uniformly drawn place has the distribution of flipping before it.
    cropped[flip_B] = cropped[flip_B][..., ::-1]
    return cropped


def _mirrored(size: int) -> NDArray[np.int64]:
    """Indices of a line padded on both sides by what lies next to its ends, mirrored: 4 3 2 1 | 0 1 2 …."""
    return np.pad(np.arange(size), PADDING, mode="reflect")


def normalise(images: Images, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixel / 255 − mean) / std in float32, [B, channels, H, W]."""
    scale = torch.tensor([1 / (255 * of) for of in std]).view(-1, 1, 1)
    shift = torch.tensor([-m / of for m, of in zip(mean, std, strict=True)]).view(-1, 1, 1)
    return torch.from_numpy(images).to(torch.float32).mul_(scale).add_(shift)


def batch_in_order(image_set: ImageSet, first: int, count: int, split: str = "test") -> tuple[Tensor, Tensor]:
    """Images ``first`` to ``first + count - 1`` of a split, at most as many as there are, as ``EpochSampler.batch``."""
    part: ImageSplit = getattr(image_set, split)
    images, labels = part.images[first : first + count], part.labels[first : first + count]
    return normalise(images, image_set.mean, image_set.std), torch.tensor(labels)


def batches_in_order(image_set: ImageSet, size: int, split: str = "test") -> Iterator[tuple[Tensor, Tensor]]:
    """A whole split in order, without augmentation; the last batch may be smaller."""
    for first in range(0, len(getattr(image_set, split)), size):
        yield batch_in_order(image_set, first, size, split)

"""Image sets with classes: official files, read whole into memory, sampled by number."""

from s2moe.data.images.base import ImageSet, ImageSplit
from s2moe.data.images.registry import IMAGE_SETS, open_images
from s2moe.data.images.sampler import AUGMENTATIONS, EpochSampler, batch_in_order, batches_in_order, normalise

__all__ = [
    "AUGMENTATIONS",
    "IMAGE_SETS",
    "EpochSampler",
    "ImageSet",
    "ImageSplit",
    "batch_in_order",
    "batches_in_order",
    "normalise",
    "open_images",
]

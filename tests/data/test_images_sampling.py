"""Order, augmentation, rasterising and corruption: pure functions of their keys, and what their descriptions say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from s2moe.data import CorpusError
from s2moe.data.images import EpochSampler, ImageSet, ImageSplit, batches_in_order
from s2moe.data.images.corruption import (
    BLUR,
    CONTRAST,
    GREY,
    IMAGE_CORRUPTIONS,
    NOISE,
    OCCLUSION,
    corrupt_images,
    corrupted,
)
from s2moe.data.images.strokes import rasterise, shape_drawings
from tests.data.image_files import drawing

N = 37


def split(channels: int = 1, size: int = 6) -> ImageSplit:
    images = np.random.default_rng(0).integers(0, 256, (N, channels, size, size), dtype=np.uint8)
    return ImageSplit(images, np.arange(N, dtype=np.int64))  # the label is the image's number


def test_an_epoch_holds_every_image_once_and_batches_may_cross_into_the_next() -> None:
    sampler = EpochSampler(split(), (0.5,), (0.5,), seed=3)
    _, labels = sampler.batch(0, 4 * N)  # one batch over four epochs
    orders = [labels[i * N : (i + 1) * N].tolist() for i in range(4)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert EpochSampler(split(), (0.5,), (0.5,), seed=4).batch(0, N)[1].tolist() != orders[0]
    assert [sampler.epoch_of(sample) for sample in (0, N - 1, N, 3 * N)] == [0, 0, 1, 3]


@pytest.mark.parametrize("augmentation", ["none", "flip_crop"])
def test_a_sample_does_not_depend_on_how_or_when_it_is_read(augmentation: str) -> None:
    straight, labels = EpochSampler(split(3), (0.5,) * 3, (0.2,) * 3, 3, augmentation).batch(0, 5 * N)
    assert straight.dtype == torch.float32
    for first, count in ((4 * N + 3, 11), (N - 2, 5), (0, 1), (2 * N - 1, N + 2)):
        pixels, some = EpochSampler(split(3), (0.5,) * 3, (0.2,) * 3, 3, augmentation).batch(first, count)
        assert torch.equal(pixels, straight[first : first + count])
        assert torch.equal(some, labels[first : first + count])


def test_order_is_that_of_the_raw_philox_stream() -> None:
    """The documented rule, written again: a changed rule would make resumed runs see other data."""
    sampler = EpochSampler(split(), (0.5,), (0.5,), seed=11)
    for epoch in (0, 7):
        raw = np.random.Philox(key=np.array([11, epoch], dtype=np.uint64)).random_raw(N)
        assert sampler.indices(epoch * N, N).tolist() == sorted(range(N), key=lambda i, raw=raw: int(raw[i]))


def test_normalisation() -> None:
    data = split(3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    pixels, labels = EpochSampler(data, mean, std, 0).batch(5, 9)
    want = (data.images[labels.numpy()] / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(pixels.numpy(), want, rtol=1e-5, atol=1e-6)
    image_set = ImageSet("some", tuple(map(str, range(N))), data, data, mean, std)
    batches = list(batches_in_order(image_set, 10))
    assert [len(labels) for _, labels in batches] == [10, 10, 10, 7]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(N))
    whole = torch.cat([pixels for pixels, _ in batches])
    assert torch.equal(whole[labels], pixels)
    batches[0][1].fill_(-1)  # a caller's change does not reach the data
    batches[0][0].zero_()
    assert data.labels[0] == 0


def test_flip_and_crop_are_of_the_mirrored_image_and_cover_all_places() -> None:
    data = split(3, 10)  # larger than the 9 places, so that none is another's mirror image
    draws = EpochSampler(data, (0.0,) * 3, (1 / 255,) * 3, 0, "flip_crop")  # pixels 0..255
    padded = np.pad(data.images, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    seen = np.zeros((2, 9, 9), dtype=int)
    variants = {}  # of every image, all that the description allows
    for label in range(N):
        for place in np.ndindex(2, 9, 9):
            flip, row, column = place
            window = padded[label, :, row : row + 10, column : column + 10]
            variants[label, window[..., :: 1 - 2 * flip].tobytes()] = place
    assert len(variants) == N * 162
    pixels, labels = draws.batch(0, 60 * N)
    for image, label in zip(pixels.numpy().round().astype(np.uint8), labels.tolist(), strict=True):
        seen[variants[label, image.tobytes()]] += 1
    assert (seen > 0).all()
    # 2,220 draws over 2, 9 and 9 equal chances: within five standard deviations.
    for axes in ((1, 2), (0, 2), (0, 1)):
        count = seen.sum(axes)
        chance = 1 / len(count)
        assert np.abs(count - seen.sum() * chance).max() < 5 * np.sqrt(seen.sum() * chance * (1 - chance))


def test_impossible_sampling() -> None:
    with pytest.raises(CorpusError, match="unknown augmentation"):
        EpochSampler(split(), (0.5,), (0.5,), 0, "flop")
    with pytest.raises(CorpusError, match="seed"):
        EpochSampler(split(), (0.5,), (0.5,), -1)
    with pytest.raises(CorpusError, match="larger than 4"):
        EpochSampler(split(size=4), (0.5,), (0.5,), 0, "flip_crop")
    with pytest.raises(CorpusError, match="counted from 0"):
        EpochSampler(split(), (0.5,), (0.5,), 0).batch(-1, 2)


def test_rasterising_draws_what_the_description_says() -> None:
    steps = [(10, 20, 0), (100, 0, 0), (0, 50, 1), (-30, -30, 0), (10, 10, 0), (5, 5, 1), (40, 40, 1)]
    points, x, y = [], 0, 0
    for dx, dy, _ in steps:
        x, y = x + dx, y + dy
        points.append((x, y))
    width = max(x for x, _ in points) - min(x for x, _ in points)  # wider than high
    scale = 0.8 * 56 / width
    middle = [(min(p[i] for p in points) + max(p[i] for p in points)) / 2 for i in (0, 1)]
    placed = [((x - middle[0]) * scale + 28, (y - middle[1]) * scale + 28) for x, y in points]
    canvas = Image.new("L", (56, 56), 255)
    for stroke in (placed[0:3], placed[3:6]):  # the last point alone is not drawn, but takes room
        for (x0, y0), (x1, y1) in itertools.pairwise(stroke):
            length = math.hypot(x1 - x0, y1 - y0)
            pieces = int(length / 5) if length > 10 else 1
            for i in range(pieces):
                ends = [(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in (i / pieces, (i + 1) / pieces)]
                ImageDraw.Draw(canvas).line(ends, fill=0, width=3)
    want = np.asarray(canvas.resize((28, 28), Image.LANCZOS))
    got = rasterise(drawing(steps))
    assert np.array_equal(got, want)
    ink = np.argwhere(got < 128)
    assert ink.min() >= 2  # a margin of a tenth
    assert ink.max() <= 25
    assert rasterise(drawing([(5, 5, 1)])).min() == 255
    assert rasterise(drawing([(5, 5, 0), (0, 0, 1)])).shape == (28, 28)
    vertical = rasterise(drawing([(0, 0, 0), (0, 90, 1)]))
    assert (vertical[4:24, 13:15] < 128).all()
    assert (vertical[:, :11] == 255).all()
    with pytest.raises(CorpusError, match="must be"):
        rasterise(np.zeros((3, 2)))


def test_shapes_by_a_program_repeat_differ_and_can_be_told_apart() -> None:
    names = ("face", "cat", "snowflake", "pencil", "eye")
    again = shape_drawings("cat", "train", 3)
    assert all(np.array_equal(a, b) for a, b in zip(again, shape_drawings("cat", "train", 2), strict=False))
    assert again[0].dtype == np.int16
    assert not np.array_equal(again[0], shape_drawings("cat", "test", 1)[0])
    images = {name: np.stack([rasterise(d) for d in shape_drawings(name, "train", 40)]) for name in names}
    tests = {name: np.stack([rasterise(d) for d in shape_drawings(name, "test", 20)]) for name in names}
    assert all(len({image.tobytes() for image in images[name]}) == 40 for name in names)
    train = np.concatenate([images[name].reshape(40, -1) for name in names]).astype(float)
    right = 0
    for label, name in enumerate(names):
        for image in tests[name].reshape(20, -1).astype(float):
            right += int(np.square(train - image).sum(1).argmin() // 40 == label)
    assert right >= 85  # of 100, by the nearest of 200
    with pytest.raises(CorpusError, match="no program draws"):
        shape_drawings("dog", "train", 1)


@pytest.mark.parametrize("kind", IMAGE_CORRUPTIONS)
def test_corruption_depends_on_seed_and_number_alone_and_grows(kind: str) -> None:
    images = np.random.default_rng(1).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    before = images.copy()
    whole = corrupt_images(images, kind, 3, seed=5)
    assert np.array_equal(images, before)
    assert whole.dtype == np.uint8
    parts = [corrupt_images(images[i : i + 5], kind, 3, seed=5, first=i) for i in range(0, 12, 5)]
    assert np.array_equal(np.concatenate(parts), whole)
    same_with_another_seed = np.array_equal(corrupt_images(images, kind, 3, seed=6), whole)
    assert same_with_another_seed == (kind in ("blur", "contrast"))
    distance = [np.abs(corrupt_images(images, kind, s).astype(float) - images).mean() for s in range(1, 6)]
    assert distance == sorted(distance)
    assert distance[0] > 0


def test_corruptions_are_of_the_stated_size() -> None:
    grey = np.full((50, 1, 32, 32), 128, dtype=np.uint8)
    for severity in range(1, 6):
        noise = corrupt_images(grey, "noise", severity).astype(float) - 128
        if severity < 4:  # beyond, much is cut off at black and white
            assert noise.std() == pytest.approx(255 * NOISE[severity - 1], rel=0.02)
        black = np.zeros((50, 1, 32, 32), dtype=np.uint8)
        area = (corrupt_images(black, "occlusion", severity) == GREY).mean((1, 2, 3))
        assert area == pytest.approx(np.full(50, OCCLUSION[severity - 1]), rel=0.1)
        ramp = np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (2, 1, 32, 1))
        flat = corrupt_images(ramp, "contrast", severity).astype(float)
        assert flat.std() == pytest.approx(CONTRAST[severity - 1] * ramp.std(), rel=0.05)
        assert flat.mean() == pytest.approx(ramp.mean(), abs=1)
        point = np.zeros((1, 1, 33, 33), dtype=np.uint8)
        point[0, 0, 16, 16] = 255
        blurred = corrupt_images(point, "blur", severity)[0, 0].astype(float)
        rows = np.arange(33) - 16
        width = BLUR[severity - 1] * 33 / 32
        kernel = np.exp(-(rows**2) / (2 * width**2))
        want = 255 * np.outer(kernel, kernel) / kernel.sum() ** 2
        np.testing.assert_allclose(blurred, want, atol=1)
    for wrong in (("fog", 1), ("noise", 0), ("noise", 6)):
        with pytest.raises(ValueError, match="corruption"):
            corrupt_images(grey, *wrong)
    image_set = ImageSet("some", ("a",), *[ImageSplit(grey, np.zeros(50, dtype=np.int64))] * 2, (0.5,), (0.5,))
    changed = corrupted(image_set, "noise", 2)
    assert changed.train is image_set.train
    assert np.array_equal(changed.test.images, corrupt_images(grey, "noise", 2))
    assert changed.name == "some, noise 2"

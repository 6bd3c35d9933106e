"""Image sets from files of the official formats, made here: every pixel and label, and one clear error for the rest."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import pickle
import urllib.error
import urllib.request
import zipfile
from email.message import Message
from pathlib import Path

import numpy as np
import pytest

from s2moe.data import CorpusError
from s2moe.data.images import IMAGE_SETS, ImageSet, ImageSplit, open_images
from s2moe.data.images import files as image_files
from s2moe.data.images.cifar import CIFAR10, CIFAR100
from s2moe.data.images.files import Published, fetch
from tests.data.image_files import IDX, cifar_bytes, idx_bytes, write_drawings, write_mnist, write_tar


def test_the_embedded_default_needs_nothing_and_holds_all_of_it_once(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    data = open_images("digits", None, tmp_path)
    assert data.train.images.shape == (1442, 1, 8, 8)
    assert data.test.images.shape == (355, 1, 8, 8)
    assert np.bincount(data.test.labels).min() >= 34  # a fifth of 174 to 183
    ours = np.concatenate((data.train.images, data.test.images)).reshape(1797, 64)
    theirs = np.round(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))
    pixels = data.train.images / 255
    assert data.mean[0] == pytest.approx(pixels.mean(), abs=2e-4)
    assert data.std[0] == pytest.approx(pixels.std(), abs=2e-4)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["own folder", "folder of sets", "unpacked", "dotted names", "xz", "tar"])
def test_mnist_from_every_layout(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "mnist" if layout == "folder of sets" else tmp_path / "files"
    content = write_mnist(folder, 30, 20)
    source = tmp_path if layout == "folder of sets" else folder
    packed = list(folder.iterdir())
    if layout == "tar":
        source = tmp_path / "mnist.tar.gz"
        write_tar(source, {f"some/where/{path.name}": path.read_bytes() for path in packed})
    elif layout in ("unpacked", "dotted names", "xz"):
        for path in packed:
            plain = gzip.decompress(path.read_bytes())
            path.unlink()
            if layout == "xz":
                (folder / f"{path.stem}.xz").write_bytes(lzma.compress(plain))
            else:
                name = path.stem.replace("-idx", ".idx") if layout == "dotted names" else path.stem
                (folder / name).write_bytes(plain)
    data = open_images("mnist", source, tmp_path / "kept", official=False)
    for split in ("train", "test"):
        part: ImageSplit = getattr(data, split)
        assert np.array_equal(part.images, content[split][0][:, None])
        assert np.array_equal(part.labels, content[split][1])
        assert part.labels.dtype == np.int64
    assert (data.name, data.mean, data.std, data.channels, data.image_size) == ("mnist", (0.1307,), (0.3081,), 1, 28)
    assert not (tmp_path / "kept").exists()


def test_files_that_are_not_the_official_ones_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, 30, 20)
    with pytest.raises(CorpusError, match=r"train-images-idx3-ubyte.*has md5 .* the official one 6bbc9ace"):
        open_images("mnist", tmp_path, tmp_path)
    with pytest.raises(CorpusError, match="the official one f4a8712d"):
        open_images("fashion_mnist", tmp_path, tmp_path)


def test_official_checksums_are_of_the_unpacked_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_mnist(tmp_path, 30, 20)
    arrays = [content[split][i] for split in ("train", "test") for i in (0, 1)]
    md5s = tuple(("", hashlib.md5(idx_bytes(array)).hexdigest()) for array in arrays)
    monkeypatch.setattr("s2moe.data.images.idx._MNIST", md5s)
    assert len(open_images("mnist", tmp_path, tmp_path).train) == 30


def test_a_part_drawn_by_chance_has_every_class_and_is_always_the_same() -> None:
    labels = np.repeat(np.arange(5), 400)  # class by class
    split = ImageSplit(np.arange(2000).astype(np.uint8)[:, None, None, None], labels)
    data = ImageSet("sorted", tuple("abcde"), split, ImageSplit(split.images[::4], labels[::4]), (0.0,), (1.0,))
    part = data.drawn(500, 100)
    assert (len(part.train), len(part.test)) == (500, 100)
    assert np.bincount(part.train.labels).min() > 70  # of 100
    assert np.bincount(part.test.labels).min() > 8  # of 20
    raw = np.random.Philox(key=0).random_raw(2000)  # the documented rule, written again
    least = sorted(sorted(range(2000), key=lambda i: int(raw[i]))[:500])
    assert np.array_equal(part.train.images, split.images[least])
    assert np.array_equal(part.train.labels, labels[least])
    assert data.drawn(500, 100).fingerprint == part.fingerprint
    assert data.drawn(2000, 100).train is split


OFFICIAL = {
    "mnist": ((0.1307,), (0.3081,), 28, "0 1 2 3 4 5 6 7 8 9"),
    "mnist_10k": ((0.5,), (0.5,), 28, "0 1 2 3 4 5 6 7 8 9"),
    "fashion_mnist": (
        (0.2859,),
        (0.3530,),
        28,
        "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle_boot",
    ),
    "fmnist_mnist": ((0.5,), (0.5,), 28, "t-shirt trouser pullover dress coat sandal 4 5 6 7 8 9"),
    "cifar10": (
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        32,
        "airplane automobile bird cat deer dog frog horse ship truck",
    ),
    "cifar100": ((0.5074, 0.4867, 0.4411), (0.2011, 0.1987, 0.2025), 32, None),
}


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_published_normalisation_size_and_classes(tmp_path: Path, name: str) -> None:
    if name == "cifar10":
        _write_cifar10(tmp_path, (0, 1, 2, 3, 4, 5))
    elif name == "cifar100":
        content, _, _ = cifar_bytes(5, 2, 100, seed=1)
        write_tar(tmp_path / "cifar-100-binary.tar.gz", {"c/train.bin": content, "c/test.bin": content})
    else:
        for folder in ("mnist", "fashion_mnist"):
            write_mnist(tmp_path / folder, 30, 20)
    data = open_images(name, tmp_path, tmp_path / "kept", official=False)
    mean, std, size, classes = OFFICIAL[name]
    assert (data.mean, data.std, data.image_size, data.channels) == (mean, std, size, len(mean))
    if classes is None:  # of 100, the first and the last of the alphabet
        assert (len(data.classes), data.classes[:2], data.classes[-1]) == (100, ("apple", "aquarium_fish"), "worm")
    else:
        assert data.classes == tuple(part.replace("_", " ") for part in classes.split())
    assert IMAGE_SETS[name].augmentation == ("flip_crop" if name.startswith("cifar") else "none")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "has no t10k-labels-idx1-ubyte"),
        ("cut gzip", "damaged or cannot be read"),
        ("cut data", "should hold 30 x 28 x 28 bytes"),
        ("not idx", "not an idx file"),
        ("swapped", "1 dimensions, which is wrong"),
        ("counts", "30 images but 20 labels"),
        ("label", "label 11 is none of the 10 classes"),
    ],
)
def test_damaged_mnist_is_one_clear_error(tmp_path: Path, damage: str, message: str) -> None:
    content = write_mnist(tmp_path, 30, 20)
    images, labels = (tmp_path / f"{name}.gz" for name in IDX["train"])
    if damage == "missing":
        (tmp_path / f"{IDX['test'][1]}.gz").unlink()
    elif damage == "cut gzip":
        images.write_bytes(images.read_bytes()[:-100])
    elif damage == "cut data":
        images.write_bytes(gzip.compress(idx_bytes(content["train"][0])[:-1]))
    elif damage == "not idx":
        images.write_bytes(b"<html>not found</html>")
    elif damage == "swapped":
        images.write_bytes(labels.read_bytes())
    elif damage == "counts":
        labels.write_bytes((tmp_path / f"{IDX['test'][1]}.gz").read_bytes())
    elif damage == "label":
        labels.write_bytes(gzip.compress(idx_bytes(np.full(30, 11, dtype=np.uint8))))
    with pytest.raises(CorpusError, match=message) as error:
        open_images("mnist", tmp_path, tmp_path, official=False)
    assert "\n" not in str(error.value)


def test_clothes_and_digits_as_one_set(tmp_path: Path) -> None:
    clothes = write_mnist(tmp_path / "fashion_mnist", 9000, 1900, seed=1)["train"]
    digits = write_mnist(tmp_path / "mnist", 9000, 1900, seed=2)["train"]
    data = open_images("fmnist_mnist", tmp_path, tmp_path, official=False)
    assert (len(data.train), len(data.test), len(data.classes)) == (10_000, 2_000, 12)
    assert data.classes[5:8] == ("sandal", "4", "5")
    first = [i for i in range(9000) if clothes[1][i] <= 5][:5000]
    second = [i for i in range(9000) if digits[1][i] >= 4][:5000]
    assert np.array_equal(data.train.images[:5000, 0], clothes[0][first])
    assert np.array_equal(data.train.images[5000:, 0], digits[0][second])
    assert data.train.labels[:5000].tolist() == [int(clothes[1][i]) for i in first]
    assert data.train.labels[5000:].tolist() == [int(digits[1][i]) + 2 for i in second]
    assert (data.mean, data.std) == ((0.5,), (0.5,))
    with pytest.raises(CorpusError, match="must hold the folders mnist and fashion_mnist"):
        open_images("fmnist_mnist", tmp_path / "mnist", tmp_path, official=False)


def test_the_part_of_mnist_for_experts_of_pairs(tmp_path: Path) -> None:
    content = write_mnist(tmp_path, 10_500, 2_100)
    data = open_images("mnist_10k", tmp_path, tmp_path, official=False)
    assert (len(data.train), len(data.test), data.mean, data.std) == (10_000, 2_000, (0.5,), (0.5,))
    assert np.array_equal(data.train.images[:, 0], content["train"][0][:10_000])
    assert "10,000 / 2,000" in data.name
    pair = data.train.of_classes((2, 8))  # one expert's part, labels kept
    assert sorted(set(pair.labels.tolist())) == [2, 8]
    assert np.array_equal(pair.images, data.train.images[np.isin(data.train.labels, (2, 8))])


def _write_cifar10(folder: Path, batches: tuple[int, ...]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(exist_ok=True)
    kept = {}
    for number in batches:
        content, images, labels = cifar_bytes(7, 1, 10, seed=number)
        name = f"data_batch_{number}.bin" if number else "test_batch.bin"
        if number % 2:
            (folder / f"{name}.xz").write_bytes(lzma.compress(content))
        else:
            (folder / name).write_bytes(content)
        kept[number] = (images, labels)
    return kept


def test_cifar10_from_single_batches(tmp_path: Path) -> None:
    kept = _write_cifar10(tmp_path, (0, 1, 2, 3, 4, 5))
    data = open_images("cifar10", tmp_path, tmp_path, official=False)
    assert (data.name, data.classes, data.channels, data.image_size) == ("cifar10", CIFAR10, 3, 32)
    assert np.array_equal(data.train.images, np.concatenate([kept[i][0] for i in range(1, 6)]))
    assert np.array_equal(data.train.labels, np.concatenate([kept[i][1] for i in range(1, 6)]))
    assert np.array_equal(data.test.images, kept[0][0])


def test_a_part_of_cifar10_is_used_only_when_asked_for_and_says_so(tmp_path: Path) -> None:
    kept = _write_cifar10(tmp_path, (0, 2, 5))
    with pytest.raises(CorpusError, match=r"no data_batch_1.bin, .*_3.bin, .*_4.bin .*data.options={partial: true}"):
        open_images("cifar10", tmp_path, tmp_path, official=False)
    data = open_images("cifar10", tmp_path, tmp_path, official=False, partial=True)
    assert data.name == "cifar10 (14 of 50,000)"
    assert np.array_equal(data.train.images, np.concatenate((kept[2][0], kept[5][0])))
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(CorpusError, match=r"has no test_batch.bin"):
        open_images("cifar10", tmp_path, tmp_path, official=False, partial=True)


def test_cifar100_from_its_archive_has_fine_labels(tmp_path: Path) -> None:
    train, images, labels = cifar_bytes(9, 2, 100, seed=1)
    test, _, _ = cifar_bytes(4, 2, 100, seed=2)
    write_tar(tmp_path / "cifar-100-binary.tar.gz", {"c/train.bin": train, "c/readme": b"x", "c/test.bin": test})
    for source in (tmp_path, tmp_path / "cifar-100-binary.tar.gz"):
        data = open_images("cifar100", source, tmp_path, official=False)
        assert np.array_equal(data.train.images, images)
        assert np.array_equal(data.train.labels, labels)
        assert len(data.test) == 4
    assert len(set(CIFAR100)) == 100
    assert list(CIFAR100) == sorted(CIFAR100)
    assert IMAGE_SETS["cifar100"].augmentation == "flip_crop"
    with pytest.raises(CorpusError, match="md5"):
        open_images("cifar100", tmp_path, tmp_path)


def test_cifar_of_a_wrong_length(tmp_path: Path) -> None:
    _write_cifar10(tmp_path, (0, 1, 2, 3, 4, 5))
    (tmp_path / "data_batch_2.bin").write_bytes(b"\x00" * 5000)
    with pytest.raises(CorpusError, match=r"data_batch_2.bin has 5,000 bytes, not a multiple of 3,073"):
        open_images("cifar10", tmp_path, tmp_path, official=False)


def test_quickdraw_bitmaps(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    bitmaps = {name: random.integers(0, 256, (n, 784), dtype=np.uint8) for name, n in (("cat", 30), ("ice cream", 25))}
    np.savez_compressed(tmp_path / "several.npz", **bitmaps)
    single = tmp_path / "single"
    single.mkdir()
    np.save(single / "cat.npy", bitmaps["cat"])
    np.save(single / "full_numpy_bitmap_ice_cream.npy", bitmaps["ice cream"])
    for source in (tmp_path / "several.npz", single):
        data = open_images("quickdraw", source, tmp_path)
        assert data.classes == ("cat", "ice cream")
        assert (len(data.train), len(data.test)) == (27 + 23, 3 + 2)
        assert np.array_equal(data.test.images[1].ravel(), bitmaps["cat"][19])
        assert np.array_equal(data.train.images[27].ravel(), bitmaps["ice cream"][0])
        other = open_images("quickdraw", source, tmp_path, classes=("ice cream", "cat"))
        assert other.classes == ("ice cream", "cat")
        assert np.array_equal(other.train.images[0].ravel(), bitmaps["ice cream"][0])
        with pytest.raises(CorpusError, match="no bitmaps of dog; it has cat, ice cream"):
            open_images("quickdraw", source, tmp_path, classes=("cat", "dog"))
        for classes in (["cat", "cat"], "cat", [1, 2]):
            with pytest.raises(CorpusError, match="classes must be a list of different names"):
                open_images("quickdraw", source, tmp_path, classes=classes)
    with zipfile.ZipFile(tmp_path / "several.npz") as archive:
        whole = archive.read("cat.npy")
    with zipfile.ZipFile(tmp_path / "garbled.npz", "w") as archive:
        archive.writestr("cat.npy", whole.replace(b"(30, 784), }", b"(30, 784(, }"))
    with pytest.raises(CorpusError, match=r"garbled.npz is not an .npz of bitmaps, or damaged"):
        open_images("quickdraw", tmp_path / "garbled.npz", tmp_path)
    (single / "cat.npy").write_bytes((single / "cat.npy").read_bytes()[:-10])
    with pytest.raises(CorpusError, match=r"cat.npy is damaged"):
        open_images("quickdraw", single, tmp_path)


def test_strokes_are_rasterised_once_and_the_test_split_is_fixed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number, name in enumerate(("face", "cat", "snowflake", "pencil", "eye")):
        write_drawings(source / f"{name}.npz", 20, 4, seed=number)
    data = open_images("quickdraw_strokes", source, tmp_path)
    assert (len(data.train), len(data.test)) == (100, 20)
    assert (data.mean, data.std) == ((0.0,), (1.0,))
    assert data.train.images.shape[1:] == (1, 28, 28)
    kept = sorted((tmp_path / "quickdraw_strokes").iterdir())
    assert len(kept) == 10
    times = [path.stat().st_mtime_ns for path in kept]
    again = open_images("quickdraw_strokes", source, tmp_path)
    assert again.fingerprint == data.fingerprint
    assert times == [path.stat().st_mtime_ns for path in kept]
    less = data.fraction(0.05)
    assert np.bincount(less.train.labels).tolist() == [1] * 5
    assert less.test is data.test
    # Another file of the same name is not taken for the one that was drawn.
    write_drawings(source / "cat.npz", 20, 4, seed=99)
    assert open_images("quickdraw_strokes", source, tmp_path).fingerprint != data.fingerprint
    with pytest.raises(CorpusError, match=r"no dog.npz"):
        open_images("quickdraw_strokes", source, tmp_path, classes=("cat", "dog"))


def test_a_strokes_file_can_load_nothing_but_arrays(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "owned",)

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    with zipfile.ZipFile(tmp_path / "cat.npz", "w") as archive:
        archive.writestr("train.npy", header.getvalue() + pickle.dumps(Malicious()))
        archive.writestr("test.npy", b"")
    with pytest.raises(CorpusError, match="not a sketch-rnn"):
        open_images("quickdraw_strokes", tmp_path, tmp_path, classes=("cat",))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut short"])
def test_damaged_strokes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cat.npz").write_bytes(content)
    with pytest.raises(CorpusError, match=r"cat.npz is not a sketch-rnn .npz with a train split, or damaged"):
        open_images("quickdraw_strokes", tmp_path, tmp_path, classes=("cat",))


def test_unknown_names_options_and_places(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="did you mean 'mnist'"):
        open_images("mnits", None, tmp_path)
    with pytest.raises(CorpusError, match="mnist has no option 'partial'; it has official"):
        open_images("mnist", None, tmp_path, partial=True)
    for name in ("mnist", "cifar10", "cifar100", "quickdraw", "quickdraw_strokes", "fmnist_mnist"):
        with pytest.raises(CorpusError, match="does not exist"):
            open_images(name, tmp_path / "nothing", tmp_path)
    (tmp_path / "text").write_text("x")
    with pytest.raises(CorpusError, match="neither an archive nor one of"):
        open_images("mnist", tmp_path / "text", tmp_path)


class _Answer(io.BytesIO):
    """What urlopen gives, of a file whose headers announce what they like."""

    def __init__(self, content: bytes, length: int | None = None, announced: str | None = None) -> None:
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Length"] = str(len(content) if length is None else length)
        if announced:
            self.headers["x-goog-hash"] = f"crc32c=AAAAAA==,md5={announced}"


def test_a_download_appears_only_when_it_is_whole_and_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = b"the right content"
    answers: dict[str, _Answer] = {}

    def urlopen(url: str, timeout: float) -> _Answer:
        if url not in answers:
            raise urllib.error.URLError("no such place")
        return answers.pop(url)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    file = Published("file", ("a", "b", "c"), hashlib.md5(right).hexdigest())
    answers.update(a=_Answer(right[:-1], len(right)), b=_Answer(b"wrong"))
    with pytest.raises(CorpusError, match=r"cannot download file .*a: only 16 of 17 bytes.*b: md5 .*c: no such place"):
        fetch(file, tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())
    answers.update(a=_Answer(b"wrong"), b=_Answer(right))
    assert fetch(file, tmp_path / "kept").read_bytes() == right
    assert fetch(file, tmp_path / "kept").read_bytes() == right  # without another download
    (tmp_path / "kept" / "file").write_bytes(b"changed")
    with pytest.raises(CorpusError, match=r"has md5 .* as published .*delete it"):
        fetch(file, tmp_path / "kept")
    unpublished = Published("other", ("d",))  # no checksum is published, but the storage announces one
    answers.update(d=_Answer(b"changed on the way", announced="AAAAAAAAAAAAAAAAAAAAAA=="))
    with pytest.raises(CorpusError, match=r"d: md5 .* as published 0000"):
        fetch(unpublished, tmp_path / "kept")
    assert image_files._announced_md5(["crc32c=x,md5=rL0Y20zC+Fzt72VPzMSk2A=="]) == "acbd18db4cc2f85cedef654fccc4a4d8"


def test_parts_of_a_set_and_its_fingerprint() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    split = ImageSplit(images, np.arange(20) % 4)
    data = ImageSet("some", ("a", "b", "c", "d"), split, split, (0.1,), (0.5,))
    two = data.only((3, 1))
    assert two.classes == ("d", "b")
    assert np.array_equal(two.train.images, images[1::2])
    assert two.train.labels.tolist() == [1, 0] * 5
    half = data.fraction(0.4)
    assert np.array_equal(half.train.images, images[:8])
    assert len(half.test) == 20
    assert data.first(20, 20) is data.drawn(20, 20) is data
    assert data.first(3, 2).name == "some, the first 3 / 2"
    assert data.drawn(3, 2).name == "some, 3 / 2 drawn by chance"
    assert data.normalised(0, 1).std == (1,)
    changed = images.copy()
    changed[3, 0, 0, 0] ^= 1
    others = [
        two,
        half,
        data.normalised(0, 1),
        ImageSet("some", data.classes, ImageSplit(changed, split.labels), split, (0.1,), (0.5,)),
        ImageSet("some", data.classes, ImageSplit(images, split.labels[::-1].copy()), split, (0.1,), (0.5,)),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 6
    same = ImageSet("renamed", data.classes, ImageSplit(images.copy(), split.labels), split, (0.1,), (0.5,))
    assert same.fingerprint == data.fingerprint
    for wrong in (
        lambda: data.only((0, 0)),
        lambda: data.only((4,)),
        lambda: data.fraction(0),
        lambda: data.first(0, 1),
        lambda: data.drawn(1, 0),
    ):
        with pytest.raises(CorpusError):
            wrong()

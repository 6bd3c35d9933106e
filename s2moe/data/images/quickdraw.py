"""Quick, Draw! (Google 2017): 28 x 28 bitmaps, and drawings as strokes that are rasterised here.

The bitmaps have no official split: within each class every tenth image is for testing. The strokes' own test split is
used whole, whatever part of train is used, so that errors can be compared.
"""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from s2moe.data.errors import DAMAGED, CorpusError
from s2moe.data.images.base import Images, ImageSet, ImageSplit
from s2moe.data.images.files import Published, fetch, local
from s2moe.data.images.strokes import VERSION, Drawing, rasterise_cached, read_drawings, shape_drawings

SHAPES = ("face", "cat", "snowflake", "pencil", "eye")  # of Nikolic et al. 2025
SIZE = 28
HELD_OUT = 10
_URL = "https://storage.googleapis.com/quickdraw_dataset/"
_HEADER = (ValueError, KeyError, SyntaxError, tokenize.TokenError, MemoryError)  # numpy's, of one that claims anything
_DAMAGED = (*DAMAGED, *_HEADER, OSError)


def open_bitmaps(source: Path | None, directory: Path, classes: Sequence[str] | None = None) -> ImageSet:
    """Bitmaps [n, 784], light on dark, from <class>.npy each or one .npz of several.

    Args:
        classes: which, in which order; None: all that a source has, the five shapes where they are downloaded.
    """
    _require_different(classes)
    if source is None:
        wanted = tuple(classes or SHAPES)
        paths = {
            name: fetch(
                Published(f"{name}.npy", (f"{_URL}full/numpy_bitmap/{quote(name)}.npy",)), directory / "quickdraw"
            )
            for name in wanted
        }
        arrays = {name: _load(path) for name, path in paths.items()}
    else:
        arrays, present = _bitmaps_at(source, classes)
        wanted = tuple(classes or sorted(arrays))
        missing = [name for name in wanted if name not in arrays]
        if missing or not wanted:
            there = ", ".join(sorted(present)) or "none"
            raise CorpusError(f"{source} has no bitmaps of {', '.join(missing) or 'any class'}; it has {there}")
    parts: dict[bool, list[tuple[Images, int]]] = {False: [], True: []}
    for label, name in enumerate(wanted):
        array = arrays[name]
        if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != SIZE * SIZE or len(array) < HELD_OUT:
            raise CorpusError(f"bitmaps of {name} are {array.dtype} {array.shape}, not uint8 [n, 784]; get them again")
        images = array.reshape(-1, 1, SIZE, SIZE)
        is_test = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
        for held_out in (False, True):
            parts[held_out].append((images[is_test == held_out], label))
    return ImageSet("quickdraw", wanted, _joined(parts[False]), _joined(parts[True]), (0.5,), (0.5,))


def open_strokes(source: Path | None, directory: Path, classes: Sequence[str] | None = None) -> ImageSet:
    """Drawings from sketch-rnn's <class>.npz, rasterised: dark lines on white, 70,000 / 2,500 of a class.

    Pixels are left in [0, 1], as Nikolic et al. 2025 do. Rasterised images are kept in ``directory``.
    """
    _require_different(classes)
    wanted = tuple(classes or SHAPES)
    folder = directory / "quickdraw_strokes"
    train: list[tuple[Images, int]] = []
    test: list[tuple[Images, int]] = []
    for label, name in enumerate(wanted):
        if source is None:
            path = fetch(Published(f"{name}.npz", (f"{_URL}sketchrnn/{quote(name)}.npz",)), folder)
        else:
            path = _drawings_at(source, name)
        content = path.read_bytes()
        key = hashlib.sha256(content).hexdigest()[:16]
        for split, part in (("train", train), ("test", test)):

            def draw(split: str = split, content: bytes = content, path: Path = path) -> list[Drawing]:
                return read_drawings(content, split, str(path))

            part.append(
                (rasterise_cached(draw, folder / f"{name}-{split}-{key}-v{VERSION}.npy", f"{name}, {split}"), label)
            )
    return ImageSet("quickdraw_strokes", wanted, _joined(train), _joined(test), (0.0,), (1.0,))


def open_shapes(source: Path | None, directory: Path, train: int = 2_000, test: int = 400) -> ImageSet:
    """Drawings of the five shapes by a program, in place of people's: for trying things without the network.

    Args:
        train: drawings of each class; likewise ``test``.
    """
    if source is not None:
        raise CorpusError(f"data.source: a program draws synthetic_strokes; leave {source} out")
    for split, count in (("train", train), ("test", test)):
        if not isinstance(count, int) or count < 1:
            raise CorpusError(f"data.options: {split} must be a number of drawings of each class, got {count!r}")
    folder = directory / "synthetic_strokes"
    parts = []
    for split, count in (("train", train), ("test", test)):
        images = []
        for label, name in enumerate(SHAPES):

            def draw(name: str = name, split: str = split, count: int = count) -> list[Drawing]:
                return shape_drawings(name, split, count)

            images.append(
                (rasterise_cached(draw, folder / f"{name}-{split}-{count}-v{VERSION}.npy", f"{name}, {split}"), label)
            )
        parts.append(_joined(images))
    return ImageSet("synthetic_strokes", SHAPES, parts[0], parts[1], (0.0,), (1.0,))


def _joined(parts: list[tuple[Images, int]]) -> ImageSplit:
    labels = np.concatenate([np.full(len(images), label, dtype=np.int64) for images, label in parts])
    return ImageSplit(np.concatenate([images for images, _ in parts]), labels)


def _require_different(classes: Sequence[str] | None) -> None:
    """CorpusError unless these are names, each given once."""
    if classes is None:
        return
    named = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    if not named or len(set(classes)) < len(classes):
        raise CorpusError(f"data.options: classes must be a list of different names, got {classes!r}")


def _bitmaps_at(source: Path, classes: Sequence[str] | None) -> tuple[dict[str, np.ndarray], set[str]]:
    """The bitmaps of some classes, or of all, and the names of all that are there."""
    folder = local(source, "quickdraw")
    assert folder is not None
    files = sorted(folder.rglob("*.np[yz]")) if folder.is_dir() else [folder]
    arrays: dict[str, np.ndarray] = {}
    present: set[str] = set()
    for path in files:
        if path.suffix == ".npy":
            name = path.stem.removeprefix("full_numpy_bitmap_").replace("_", " ")  # as browsers save them
            present.add(name)
            if classes is None or name in classes:
                arrays[name] = _load(path)
        else:
            try:
                with np.load(path, allow_pickle=False) as archive:
                    present |= set(archive.files)
                    arrays |= {name: archive[name] for name in archive.files if classes is None or name in classes}
            except _DAMAGED as error:
                raise CorpusError(f"{path} is not an .npz of bitmaps, or damaged ({error}); get it again") from error
    return arrays, present


def _drawings_at(source: Path, name: str) -> Path:
    folder = local(source, "quickdraw_strokes", "quickdraw")
    assert folder is not None
    names = {f"{spelt}.npz" for stem in (name, name.replace(" ", "_")) for spelt in (stem, f"sketchrnn_{stem}")}
    found = sorted(path for path in folder.rglob("*.npz") if path.name in names) if folder.is_dir() else []
    if not found:
        raise CorpusError(f"{folder} has no {name}.npz of sketch-rnn drawings; give a directory of one for each class")
    return found[0]


def _load(path: Path) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except _DAMAGED as error:
        raise CorpusError(f"{path} is damaged ({error}); get it again") from error

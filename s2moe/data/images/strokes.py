"""Drawings as strokes: read from sketch-rnn's files, rasterised as Nikolic et al. 2025 do, and drawn by a program.

A drawing is int16 [points, 3]: the step (dx, dy) to each point from the one before it, and whether the pen is lifted
after it. It becomes dark lines of width 3 on a white canvas of 56 x 56 pixels, scaled to fill at most 80% of it and
centred, and is then reduced to 28 x 28 by Lanczos' filter: background 255, ink 0. As in the authors' code, lines longer
than 10 pixels are drawn in pieces of 5 to 10, which shows: each piece's ends are rounded to whole pixels.
"""

from __future__ import annotations

import io
import os
import pickle
import tokenize
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from s2moe.data.errors import DAMAGED, CorpusError
from s2moe.data.images.base import Images

Drawing = NDArray[np.integer[Any]]

SIZE, CANVAS = 28, 56
FILLED = 0.8  # part of the canvas that a drawing takes up
LINE_WIDTH = 3
LONGEST_LINE, PIECE = 10, 5  # pixels of the canvas
WHITE, BLACK = 255, 0
# A damaged pickle may ask for anything.
_PICKLE = (pickle.UnpicklingError, ImportError, AttributeError, IndexError, KeyError, TypeError, OverflowError)
_DAMAGED = (*DAMAGED, *_PICKLE, ValueError, SyntaxError, tokenize.TokenError, OSError, MemoryError)
VERSION = 2  # of what is drawn here: part of the name of kept images


def rasterise(drawing: Drawing) -> NDArray[np.uint8]:
    """uint8 [28, 28] of a drawing; blank where nothing is drawn (strokes of a single point are not).

    Raises:
        CorpusError: it is no drawing.
    """
    steps = np.asarray(drawing)
    if steps.ndim != 2 or steps.shape[1] != 3:
        raise CorpusError(f"a drawing must be [points, 3], not {steps.shape}")
    canvas = Image.new("L", (CANVAS, CANVAS), color=WHITE)
    if len(steps) > 1:
        points = np.cumsum(steps[:, :2].astype(np.float64), axis=0)
        low, high = points.min(0), points.max(0)
        extent = (high - low).max()
        scale = FILLED * CANVAS / extent if extent else 1.0
        points = (points - (low + high) / 2) * scale + CANVAS / 2
        pen = ImageDraw.Draw(canvas)
        for stroke in np.split(points, np.nonzero(steps[:-1, 2] == 1)[0] + 1):
            if len(stroke) > 1:
                pen.line(_in_pieces(stroke).ravel().tolist(), fill=BLACK, width=LINE_WIDTH)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def _in_pieces(stroke: NDArray[np.float64]) -> NDArray[np.float64]:
    """A stroke [points, 2] with further points on its long lines; one of a single line stays."""
    step = np.diff(stroke, axis=0)
    length = np.hypot(step[:, 0], step[:, 1])
    if len(stroke) == 2 or length.max() <= LONGEST_LINE:
        return stroke
    pieces = np.where(length > LONGEST_LINE, (length / PIECE).astype(np.int64), 1)
    line = np.repeat(np.arange(len(step)), pieces)  # of each piece
    place = np.arange(len(line)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = stroke[line] + (place / pieces[line])[:, None] * step[line]
    return np.concatenate((start, stroke[-1:]))


def rasterise_cached(draw: Callable[[], list[Drawing]], path: Path, title: str) -> Images:
    """uint8 [N, 1, 28, 28] from ``path``, where it is written if it is not there or not readable."""
    try:
        images = np.load(path, allow_pickle=False)
        if images.dtype == np.uint8 and images.ndim == 4:
            return images
    except (OSError, ValueError, EOFError):
        pass
    drawings = draw()
    images = np.empty((len(drawings), 1, SIZE, SIZE), dtype=np.uint8)
    for i, drawing in enumerate(tqdm(drawings, desc=f"rasterising {title}", disable=None, leave=False)):
        images[i, 0] = rasterise(drawing)
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as part:  # named by chance: there may be others
        np.save(part, images)
    os.replace(part.name, path)
    return images


class _ArraysOnly(pickle.Unpickler):
    """sketch-rnn's files hold pickled lists of arrays; nothing else is built from them, whatever a file asks for."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which no drawing needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_drawings(content: bytes, split: str, where: str) -> list[Drawing]:
    """The drawings of one split (train, valid or test) of a sketch-rnn .npz.

    Raises:
        CorpusError: it is none.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open(f"{split}.npy") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            if dtype.hasobject:
                array = _ArraysOnly(file, encoding="latin1").load()
            else:  # drawings that all happen to have as many points
                array = np.frombuffer(file.read(), dtype=dtype).reshape(shape)
    except _DAMAGED as error:
        raise CorpusError(f"{where} is not a sketch-rnn .npz with a {split} split, or damaged ({error})") from error
    drawings = [np.asarray(drawing) for drawing in array]
    for i, drawing in enumerate(drawings):
        if drawing.ndim != 2 or drawing.shape[1] != 3 or drawing.dtype.kind not in "iuf":
            raise CorpusError(f"{where}: drawing {i} of {split} is not [points, 3] but {drawing.dtype} {drawing.shape}")
    return drawings


def shape_drawings(name: str, split: str, count: int) -> list[Drawing]:
    """Drawings of a shape by a program, always the same for the same name, split and place.

    Every one differs in proportions, details, rotation and a shaking hand.
    """
    if name not in _SHAPES:
        raise CorpusError(f"no program draws {name!r}; there are {', '.join(_SHAPES)}")
    key = crc32(f"{name}/{split}".encode())
    return [_drawn(name, np.random.Generator(np.random.Philox(key=[key, i]))) for i in range(count)]


def _drawn(name: str, random: np.random.Generator) -> Drawing:
    angle = random.normal(0, 0.12)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points, lifts = [], []
    for stroke in _SHAPES[name](random):
        shaken = np.asarray(stroke) @ turn + random.normal(0, 0.012, np.shape(stroke))
        points.append(shaken)
        lifts += [0] * (len(shaken) - 1) + [1]
    place = np.rint(100 * np.concatenate(points))
    steps = np.diff(place, axis=0, prepend=np.zeros((1, 2)))
    return np.column_stack((steps, lifts)).astype(np.int16)


Stroke = Any  # [points, 2], y downwards


def _arc(x: float, y: float, width: float, height: float, start: float = 0, stop: float = 2 * np.pi) -> Stroke:
    angle = np.linspace(start, stop, 3 + round(4 * abs(stop - start)))
    return np.column_stack((x + width * np.cos(angle), y + height * np.sin(angle)))


def _eyes(random: np.random.Generator, apart: float, y: float) -> list[Stroke]:
    size = random.uniform(0.06, 0.16)
    return [_arc(side * apart, y, size, size * random.uniform(0.8, 1.4)) for side in (-1, 1)]


def _face(random: np.random.Generator) -> list[Stroke]:
    width = random.uniform(0.75, 1.05)
    strokes = [_arc(0, 0, width, 1), *_eyes(random, random.uniform(0.3, 0.42) * width, random.uniform(-0.4, -0.2))]
    smile, depth = random.uniform(0.25, 0.5), random.uniform(0.1, 0.35)
    strokes.append(_arc(0, random.uniform(0.25, 0.45), smile, depth, 0, np.pi))
    if random.random() < 0.5:
        strokes.append([(0, -0.1), (random.choice([-0.12, 0.12]), 0.15), (0, 0.17)])
    return strokes


def _cat(random: np.random.Generator) -> list[Stroke]:
    width, ear = random.uniform(0.8, 1.1), random.uniform(0.45, 0.75)
    strokes = [_arc(0, 0, width, 0.85)]
    for side in (-1, 1):
        strokes.append([(side * 0.85 * width, -0.4), (side * 0.75 * width, -0.6 - ear), (side * 0.25 * width, -0.8)])
        for rise in np.linspace(-0.12, 0.12, random.integers(2, 4)):
            strokes.append([(side * 0.2, 0.25), (side * (width + random.uniform(0, 0.4)), 0.25 + 2 * rise)])
    strokes += [*_eyes(random, 0.38 * width, -0.2), [(-0.08, 0.15), (0.08, 0.15), (0, 0.25), (-0.08, 0.15)]]
    strokes.append([(-0.25, 0.4), (-0.1, 0.5), (0, 0.3), (0.1, 0.5), (0.25, 0.4)])
    return strokes


def _snowflake(random: np.random.Generator) -> list[Stroke]:
    arms = int(random.choice([6, 6, 6, 8]))
    strokes: list[Stroke] = []
    twigs = random.uniform(0.4, 0.8, random.integers(1, 3))
    length, start = random.uniform(0.15, 0.3), random.uniform(0, np.pi)
    for arm in range(arms):
        angle = start + 2 * np.pi * arm / arms
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]])
        strokes.append([(0, 0), tuple(along)])
        for at in twigs:
            tips = (at + length) * along
            strokes.append([tips + length * across, at * along, tips - length * across])
    return strokes


def _pencil(random: np.random.Generator) -> list[Stroke]:
    half, length, tip = random.uniform(0.12, 0.25), random.uniform(1.2, 1.9), random.uniform(0.25, 0.5)
    strokes = [[(0, -half), (length, -half), (length + tip, 0), (length, half), (0, half), (0, -half)]]
    strokes.append([(length, -half), (length, half)])
    for at in (0.12, 0.22)[: random.integers(0, 3)]:
        strokes.append([(at * length, -half), (at * length, half)])
    if random.random() < 0.5:
        strokes.append([(0.3 * length, 0), (length, 0)])
    angle = random.choice([-1, 1]) * random.uniform(0.2, 1.3) + random.choice([0, np.pi])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return [np.asarray(stroke) @ turn for stroke in strokes]


def _eye(random: np.random.Generator) -> list[Stroke]:
    upper, lower, iris = random.uniform(0.4, 0.7), random.uniform(0.35, 0.6), random.uniform(0.25, 0.4)
    strokes = [_arc(0, 0, 1, upper, np.pi, 2 * np.pi), _arc(0, 0, 1, lower, np.pi, 0), _arc(0, 0, iris, iris)]
    strokes.append(_arc(0, 0, iris * 0.4, iris * 0.4))
    for angle in np.linspace(1.2, 1.8, random.integers(0, 7)) * np.pi:
        root = np.array([np.cos(angle), upper * np.sin(angle)])
        strokes.append([root, root * random.uniform(1.25, 1.5)])
    return strokes


_SHAPES: dict[str, Callable[[np.random.Generator], list[Stroke]]] = {
    "face": _face,
    "cat": _cat,
    "snowflake": _snowflake,
    "pencil": _pencil,
    "eye": _eye,
}

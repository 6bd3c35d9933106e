"""Which tokens an evaluation feeds to the model at once, and which of them it scores.

A plan is an int64 array [W, 3] of windows (start, first, end): the model reads tokens
`start .. end-2`, and its predictions of tokens `first .. end-1` are scored. Plans differ in the
context that a scored symbol gets; every number reported must name its plan.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Windows = NDArray[np.int64]


def sliding_windows(tokens: int, context: int, segment: int) -> Windows:
    """Score every token but the first exactly once, each with at least `context` tokens before it where they exist.

    The first token of the stream has no context and is in no window; it is charged log2(vocabulary).
    """
    first = np.arange(0, tokens, segment)
    windows = np.stack([np.maximum(first - context, 0), np.maximum(first, 1), np.minimum(first + segment, tokens)], 1)
    return windows[windows[:, 1] < windows[:, 2]]


def lane_windows(tokens: int, lanes: int, segment: int, context: int) -> Windows:
    """The Transformer-XL protocol: equal contiguous lanes, the remainder trimmed, each lane's first token unscored.

    Segments of `segment` tokens, before each `context` tokens of the same lane are read again.
    """
    length = tokens // lanes
    target = np.arange(1, length, segment)  # first scored token of each segment, within its lane
    start = np.maximum(target - 1 - context, 0)
    lane = np.stack([start, target, np.minimum(target + segment, length)], 1)
    return (lane[None] + (np.arange(lanes) * length)[:, None, None]).reshape(-1, 3)


def block_windows(tokens: int, lanes: int, block: int) -> Windows:
    """The adaptive-span protocol: equal lanes, whole blocks of `block` targets, the last partial block dropped."""
    length = tokens // lanes
    start = np.arange(0, max(length - block, 0), block)
    lane = np.stack([start, start + 1, start + block + 1], 1)
    return (lane[None] + (np.arange(lanes) * length)[:, None, None]).reshape(-1, 3)


# Names of the published protocols that the papers' figures come from. Their models had a memory of
# earlier segments; ours has none, which l1 makes up for as the memory-less variant of that code
# means to, by reading 384 symbols again.
LEGACY_PROTOCOLS: dict[str, tuple[Callable[[int], Windows], str]] = {
    "l1": (
        lambda tokens: lane_windows(tokens, 10, 128, 384),
        "Transformer-XL lineage: 10 lanes, segments of 128, 385 to 512 symbols of context within a lane",
    ),
    "l1-segments": (
        lambda tokens: lane_windows(tokens, 10, 128, 0),
        "the same with each segment alone, 1 to 128 symbols of context, as that code runs without memory",
    ),
    "l2": (
        lambda tokens: block_windows(tokens, 8, 512),
        "adaptive-span lineage: 8 lanes, blocks of 512, 1 to 512 symbols of context, last partial block dropped",
    ),
}

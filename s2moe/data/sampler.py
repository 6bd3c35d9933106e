"""Training windows as a pure function of (seed, sample number): nothing to save but a count of samples.

Legend: B samples, S tokens a sample predicts.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from s2moe.data.corpus import TokenStream
from s2moe.data.errors import CorpusError


class WindowSampler:
    """Every token stream position once an epoch, in an order drawn anew each epoch.

    Epoch e cuts the stream into ``windows`` windows that touch and do not overlap, starting at a phase drawn
    from [0, S), and permutes them. Both come from numpy's Philox counter generator keyed by (seed, e), of
    which only the raw 64-bit stream is used, the part that numpy keeps equal between versions. Sample i is
    window i mod ``windows`` of the permutation of epoch i div ``windows``; so the position in the data is the
    number of samples consumed, whatever the ranks, micro-batches and accumulation steps that consumed them.
    """

    def __init__(self, stream: TokenStream | NDArray[np.unsignedinteger], sequence_length: int, seed: int) -> None:
        if sequence_length < 1:
            raise CorpusError(f"the sequence length is {sequence_length}; give at least 1")
        if not 0 <= seed < 1 << 64:
            raise CorpusError(f"the sampling seed is {seed}; give one from 0 to 2**64 - 1")
        if len(stream) < 2 * sequence_length:
            raise CorpusError(
                f"the stream of {len(stream)} tokens is shorter than two sequences of {sequence_length}; "
                f"give a sequence length of at most {len(stream) // 2}, or more text"
            )
        self.stream = stream if isinstance(stream, TokenStream) else None
        self.tokens = stream
        self.sequence_length = sequence_length
        self.seed = seed
        # The largest number that fits behind every phase: phase + windows * S + 1 <= tokens.
        self.windows = (len(stream) - sequence_length) // sequence_length
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may cross from one epoch into the next

    def batch(self, first_sample: int, count: int) -> NDArray[np.int64]:
        """Samples ``first_sample`` to ``first_sample + count - 1``: ``[B, S + 1]`` int64.

        Row b holds S inputs and, shifted by one, their S targets. CorpusError if the file has changed.
        """
        if first_sample < 0:
            raise CorpusError(f"sample {first_sample} does not exist; samples are counted from 0")
        if self.stream is not None:
            self.stream.require_unchanged()
        batch_BS = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for row in range(count):
            start = self.start(first_sample + row)
            batch_BS[row] = self.tokens[start : start + self.sequence_length + 1]
        return batch_BS

    def start(self, sample: int) -> int:
        """The stream position of the first token of a sample."""
        epoch, index = divmod(sample, self.windows)
        phase, order = self._epoch(epoch)
        return phase + int(order[index]) * self.sequence_length

    def _draw_epoch(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        generator = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
        phase = int(generator.random_raw()) % self.sequence_length
        return phase, np.argsort(generator.random_raw(self.windows), kind="stable")


def microbatch_start(position: int, micro_batch: int, rank: int, world_size: int, accumulation_index: int = 0) -> int:
    """The first sample of one rank's micro-batch, in a step that starts after ``position`` consumed samples.

    Micro-batch m = accumulation_index * world_size + rank takes the m-th slice of ``micro_batch`` samples of
    the step, so one process with two accumulation steps sees what two ranks with one step see.
    """
    return position + (accumulation_index * world_size + rank) * micro_batch

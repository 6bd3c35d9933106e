"""Sampling: every window once an epoch, and nothing but (seed, sample) decides."""

from __future__ import annotations

import numpy as np
import pytest

from s2moe.data import CorpusError, WindowSampler, microbatch_start

TOKENS = np.arange(1000, dtype=np.uint16)  # the token at a position is the position
S = 16


def test_an_epoch_holds_every_window_of_its_phase_once() -> None:
    sampler = WindowSampler(TOKENS, S, seed=3)
    assert sampler.windows == (1000 - S) // S
    for epoch in range(4):
        batch_BS = sampler.batch(epoch * sampler.windows, sampler.windows)
        starts = np.sort(batch_BS[:, 0])
        assert 0 <= starts[0] < S
        assert np.array_equal(np.diff(starts), np.full(sampler.windows - 1, S))  # they touch, none twice
        assert np.array_equal(batch_BS - batch_BS[:, :1], np.tile(np.arange(S + 1), (sampler.windows, 1)))
        assert batch_BS.dtype == np.int64


@pytest.mark.parametrize("tokens", [2 * S, 2 * S + 1, 3 * S - 1, 3 * S, 3 * S + 1, 97])
def test_windows_fit_behind_every_phase(tokens: int) -> None:
    sampler = WindowSampler(TOKENS[:tokens], S, seed=0)
    for sample in range(200 * sampler.windows):
        start = sampler.start(sample)
        assert start >= 0
        assert start + S + 1 <= tokens


def test_epochs_differ_in_phase_and_order_and_so_do_seeds() -> None:
    sampler = WindowSampler(TOKENS, S, seed=3)
    epochs = [sampler.batch(epoch * sampler.windows, sampler.windows)[:, 0] for epoch in range(20)]
    assert len({int(starts.min()) for starts in epochs}) > 5
    assert len({tuple((starts // S).tolist()) for starts in epochs}) == 20
    other = WindowSampler(TOKENS, S, seed=4).batch(0, sampler.windows)[:, 0]
    assert not np.array_equal(other, epochs[0])


def test_phase_and_order_are_those_of_the_raw_philox_stream() -> None:
    """The documented rule, written again: a changed rule would make resumed runs see other data."""
    sampler = WindowSampler(TOKENS, S, seed=11)
    for sample in (0, 5, sampler.windows - 1, sampler.windows, 7 * sampler.windows + 3):
        epoch, index = divmod(sample, sampler.windows)
        raw = np.random.Philox(key=np.array([11, epoch], dtype=np.uint64)).random_raw(1 + sampler.windows)
        phase = int(raw[0]) % S
        order = sorted(range(sampler.windows), key=lambda window, raw=raw: int(raw[1 + window]))
        assert sampler.start(sample) == phase + S * order[index]


def test_a_sample_does_not_depend_on_what_was_read_before() -> None:
    sampler = WindowSampler(TOKENS, S, seed=3)
    straight = sampler.batch(0, 5 * sampler.windows)
    for sample in np.random.default_rng(0).permutation(5 * sampler.windows)[:100]:
        fresh = WindowSampler(TOKENS, S, seed=3)
        assert np.array_equal(fresh.batch(int(sample), 1)[0], straight[sample])
        assert np.array_equal(sampler.batch(int(sample), 1)[0], straight[sample])


def test_a_batch_may_cross_epochs() -> None:
    sampler = WindowSampler(TOKENS, S, seed=3)
    first = sampler.windows - 3
    crossing = sampler.batch(first, 8)
    assert np.array_equal(crossing[:3], sampler.batch(first, 3))
    assert np.array_equal(crossing[3:], sampler.batch(sampler.windows, 5))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_ranks_and_accumulation_only_slice_the_same_step(world_size: int, accumulation: int) -> None:
    micro_batch, position = 3, 50
    global_batch = micro_batch * world_size * accumulation
    sampler = WindowSampler(TOKENS, S, seed=3)
    seen = [
        sampler.batch(microbatch_start(position, micro_batch, rank, world_size, index), micro_batch)
        for index in range(accumulation)
        for rank in range(world_size)
    ]
    assert np.array_equal(np.concatenate(seen), sampler.batch(position, global_batch))


def test_one_process_with_two_micro_batches_is_two_ranks_with_one() -> None:
    one = [microbatch_start(24, 4, rank=0, world_size=1, accumulation_index=index) for index in (0, 1)]
    two = [microbatch_start(24, 4, rank=rank, world_size=2) for rank in (0, 1)]
    assert one == two == [24, 28]


def test_resuming_with_other_ranks_continues_at_the_exact_sample() -> None:
    """Two steps by two ranks, then two by four, against one process that never stopped."""
    seen, position = [], 0
    for world_size in (2, 2, 4, 4):
        sampler = WindowSampler(TOKENS, S, seed=9)  # a restarted process has nothing but the position
        for rank in range(world_size):
            seen.append(sampler.batch(microbatch_start(position, 4, rank, world_size), 4))
        position += 4 * world_size
    assert np.array_equal(np.concatenate(seen), WindowSampler(TOKENS, S, seed=9).batch(0, position))


def test_impossible_values_are_refused() -> None:
    with pytest.raises(CorpusError, match="at most 500"):
        WindowSampler(TOKENS, 501, seed=0)
    with pytest.raises(CorpusError, match="at least 1"):
        WindowSampler(TOKENS, 0, seed=0)
    with pytest.raises(CorpusError, match="seed"):
        WindowSampler(TOKENS, S, seed=-1)
    with pytest.raises(CorpusError, match="counted from 0"):
        WindowSampler(TOKENS, S, seed=0).batch(-1, 2)

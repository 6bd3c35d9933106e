"""Bits per character against a plain loop over symbols, and the symbol counts of the legacy protocols."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from s2moe.data import TokenStream
from s2moe.models import S2MoEForCausalLM
from s2moe.models.configuration import S2MoEConfig
from s2moe.training.evaluation import PROTOCOLS, Protocol, attention_mask, evaluate, gather_windows
from s2moe.training.windows import block_windows, lane_windows, sliding_windows

CPU = torch.device("cpu")
VOCABULARY = 11


def stream(tokens: int, symbols_V: Any = None) -> TokenStream:
    """Random tokens, which stand for one symbol each unless ``symbols_V`` says for how many."""
    values = np.random.default_rng(0).integers(0, VOCABULARY, tokens).astype(np.uint8)
    return TokenStream("valid", values, tokens, symbols_V=symbols_V)


def small_model(positions: int = 64) -> S2MoEForCausalLM:
    torch.manual_seed(0)
    config = S2MoEConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        max_position_embeddings=positions,
        moe={"method": "smoe", "num_experts": 4, "expert_hidden": 16},
    )
    return S2MoEForCausalLM(config).double().eval()


@torch.no_grad()
def bits_of(model: nn.Module, tokens: Any, position: int, start: int) -> float:
    """Cost of one symbol, given those from `start` on: one forward pass, the last prediction."""
    context = torch.from_numpy(tokens[start:position].astype(np.int64))[None]
    log_prob = model(input_ids=context, use_cache=False).logits[0, -1].double().log_softmax(-1)
    return -float(log_prob[int(tokens[position])]) / math.log(2)


@pytest.mark.parametrize("tokens", [50, 48, 49, 9, 8, 7, 2])  # the last segment full, with one symbol, partial, ...
def test_bpc_equals_a_loop_over_symbols(tokens: int) -> None:
    model, data, context, segment = small_model(), stream(tokens), 12, 8
    bits = [math.log2(VOCABULARY)]
    for position in range(1, tokens):
        border = position // segment * segment
        bits.append(bits_of(model, data, position, max(0, border - context)))
    score = evaluate(model, data, VOCABULARY, Protocol(context=context, segment=segment, batch=3), CPU)
    assert score.tokens == tokens
    assert score.bits_per_symbol == pytest.approx(sum(bits) / tokens, rel=1e-6)


def test_result_does_not_depend_on_the_batch_size() -> None:
    model, data = small_model(), stream(61)
    scores = [evaluate(model, data, VOCABULARY, Protocol(context=8, segment=4, batch=b), CPU).nats for b in (1, 5, 64)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_only_the_first_symbols() -> None:
    model, data = small_model(), stream(60)
    shorter = TokenStream("valid", data[:23], 23)
    protocol = Protocol(context=8, segment=8, batch=4)
    limited = evaluate(model, data, VOCABULARY, Protocol(context=8, segment=8, batch=4, max_symbols=23), CPU)
    assert limited == evaluate(model, shorter, VOCABULARY, protocol, CPU)


def test_symbols_need_not_be_tokens() -> None:
    model, protocol = small_model(), Protocol(context=8, segment=8)
    one = evaluate(model, stream(40), VOCABULARY, protocol, CPU)
    four = evaluate(model, stream(40, np.full(VOCABULARY, 4)), VOCABULARY, protocol, CPU)
    assert four.symbols == 160
    assert four.bits_per_symbol == pytest.approx(one.bits_per_symbol / 4)


class Uniform(nn.Module):
    """Knows nothing: a token costs log2(V) bits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


@pytest.mark.parametrize("most", [None, 1, 5000])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_symbols_of_the_scored_tokens_are_counted(name: str, most: int | None) -> None:
    """However unevenly they are spread over the tokens, and whichever of those a protocol leaves out."""
    symbols_V = np.array([0, 1, 1, 1, 2, 3, 4, 5, 6, 9, 12])
    data, protocol = stream(8 * 600, symbols_V), Protocol(name, context=64, segment=100, batch=64, max_symbols=most)
    counts = np.cumsum(symbols_V[data[:]])
    total = len(data) if most is None else int(np.count_nonzero(counts <= most))
    scored = {position for _, first, end in protocol.windows(total) for position in range(first, end)}
    if name == "sliding":
        scored.add(0)
    symbols = int(symbols_V[data[:]][sorted(scored)].sum())
    if total < 2 or not len(protocol.windows(total)) or not symbols:
        with pytest.raises(ValueError, match=r"too short for the protocol|do not complete one symbol"):
            evaluate(Uniform(), data, VOCABULARY, protocol, CPU)
        return
    score = evaluate(Uniform(), data, VOCABULARY, protocol, CPU)
    assert (score.tokens, score.symbols) == (len(scored), symbols)
    assert score.bits_per_symbol == pytest.approx(len(scored) * math.log2(VOCABULARY) / symbols)


def test_attention_window_equals_a_model_that_sees_no_further() -> None:
    """With one layer, a window of n is the same as cutting the context to n tokens."""
    model = small_model()
    del model.model.layers[1:]
    data, window = stream(30), 5
    bits = [math.log2(VOCABULARY)]
    bits += [bits_of(model, data, position, max(0, position - window)) for position in range(1, 30)]
    protocol = Protocol(context=16, segment=8, attention_window=window)
    score = evaluate(model, data, VOCABULARY, protocol, CPU)
    assert score.bits_per_symbol == pytest.approx(sum(bits) / 30, rel=1e-6)
    assert score != evaluate(model, data, VOCABULARY, Protocol(context=16, segment=8), CPU)


def test_attention_mask() -> None:
    mask = attention_mask(4, 2, torch.float32, CPU)[0, 0]
    assert (mask == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_experts_per_token_reaches_the_model() -> None:
    seen: list[int | None] = []

    class Uniform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: Tensor, use_cache: bool, experts_per_token: int | None = None) -> SimpleNamespace:
            seen.append(experts_per_token)
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))

    score = evaluate(Uniform(), stream(20), VOCABULARY, Protocol(experts_per_token=3), CPU)
    assert seen == [3]
    assert score.bits_per_symbol == pytest.approx(math.log2(VOCABULARY))


def test_every_symbol_once_with_its_context() -> None:
    for tokens in range(2, 60):
        windows = sliding_windows(tokens, context=12, segment=8)
        scored = [position for _, first, end in windows for position in range(first, end)]
        assert scored == list(range(1, tokens))
        for start, first, _ in windows:
            assert start == 0 or first - start >= 12


@pytest.mark.parametrize("tokens", [50, 48, 9, 2])
def test_contaminated_context_equals_a_loop_over_symbols(tokens: int) -> None:
    """Each symbol's cost is that of the clean one, after what the model reads instead of those before it."""
    model, clean, context, segment = small_model(), stream(tokens), 12, 8
    read = clean[:].copy()
    read[::3] = 0
    bits = [math.log2(VOCABULARY)]
    for position in range(1, tokens):
        start = max(0, position // segment * segment - context)
        ids = torch.from_numpy(read[start:position].astype(np.int64))[None]
        with torch.no_grad():
            log_prob = model(input_ids=ids, use_cache=False).logits[0, -1].double().log_softmax(-1)
        bits.append(-float(log_prob[int(clean[position])]) / math.log(2))
    protocol = Protocol(context=context, segment=segment, batch=3)
    score = evaluate(model, clean, VOCABULARY, protocol, CPU, contaminated=read)
    assert score.bits_per_symbol == pytest.approx(sum(bits) / tokens, rel=1e-6)
    assert score.symbols == tokens
    plain = evaluate(model, clean, VOCABULARY, protocol, CPU)
    assert evaluate(model, clean, VOCABULARY, protocol, CPU, contaminated=clean[:]) == plain
    assert score != plain


def test_contaminated_stream_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="the contaminated stream has 19 tokens, the clean one 20"):
        evaluate(small_model(), stream(20), VOCABULARY, Protocol(), CPU, contaminated=stream(19))


def test_filled_up_windows_score_nothing_more() -> None:
    tokens, scored = gather_windows(np.arange(10), np.array([[2, 4, 6]]), batch=2, length=5)
    assert tokens.tolist() == [[2, 3, 4, 5, 0, 0], [0] * 6]
    assert scored.int().tolist() == [[0, 1, 1, 0, 0], [0] * 5]


def test_lane_protocol_counts() -> None:
    """10 lanes; as in the iterator of that code: segments start at 0, 128, ...; targets are one further."""
    tokens = 10 * 300 + 7
    windows = lane_windows(tokens, 10, 128, 384)
    assert (windows[:, 2] - windows[:, 1]).sum() == 10 * 299
    per_lane = [(start, first, end) for start, first, end in windows if end <= 300]
    assert per_lane == [(0, 1, 129), (0, 129, 257), (0, 257, 300)]
    long = lane_windows(20_000, 10, 128, 384)
    contexts = {int(first - start) for start, first, _ in long[:16]}
    assert contexts == {1, 129, 257, 385}
    assert {int(end - start) - 1 for start, _, end in long[3:15]} == {512}


def test_block_protocol_drops_the_last_partial_block() -> None:
    """As in that code: offsets 0, 512, ... while the offset is below the lane's length less 512."""
    for lane in (512, 513, 1024, 1025, 1500, 1537):
        expected = [offset for offset in range(0, lane, 512) if offset < lane - 512]
        windows = block_windows(8 * lane + 3, 8, 512)
        assert [int(start) for start, _, end in windows if end <= lane + 1][: len(expected)] == expected
        assert len(windows) == 8 * len(expected)
        assert all(end - first == 512 and first - start == 1 for start, first, end in windows)


@pytest.mark.parametrize("name", ["l1", "l1-segments", "l2"])
def test_legacy_protocols_score_with_the_model(name: str) -> None:
    model, data = small_model(), stream(8 * 600)
    score = evaluate(model, data, VOCABULARY, Protocol(name, batch=8), CPU)
    assert score.tokens == {"l1": 10 * 479, "l1-segments": 10 * 479, "l2": 8 * 512}[name]
    if name == "l2":
        nats = 0.0
        for lane in range(8):
            ids = torch.from_numpy(data[600 * lane : 600 * lane + 513].astype(np.int64))[None]
            with torch.no_grad():
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits.double()
            nats += float(nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
        assert score.nats == pytest.approx(nats, rel=1e-5)


def test_too_short_a_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="too short for the protocol 'l2'"):
        evaluate(small_model(), stream(100), VOCABULARY, Protocol("l2"), CPU)

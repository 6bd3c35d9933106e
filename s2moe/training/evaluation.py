"""Bits per symbol of a model on a split, by this project's convention and by the papers'.

Bits per symbol = negative log-likelihood in nats / (ln 2 x symbols), summed in float64; the symbols are those that
the scored tokens stand for, counted (data/units.py). By convention every token of the split is scored exactly once,
with at least `context` tokens before it where they exist; the first token, which has none, costs log2(vocabulary)
bits.

Legend: W windows, B windows of a batch, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from s2moe.data import TokenStream
from s2moe.data.units import bits_per_symbol

from .windows import LEGACY_PROTOCOLS, Windows, sliding_windows

SLIDING = "sliding"
PROTOCOLS = (SLIDING, *LEGACY_PROTOCOLS)


@dataclass(frozen=True)
class Score:
    """What a model made of a token stream: `nats` over `tokens` scored tokens, which stand for `symbols` symbols."""

    nats: float
    tokens: int
    symbols: int

    @property
    def bits_per_symbol(self) -> float:
        """Bits per byte, character or word: what a symbol is, the corpus says."""
        return bits_per_symbol(self.nats, self.symbols)

    @property
    def perplexity(self) -> float:
        """exp(nats per token), the usual figure for word-level corpora."""
        return math.exp(self.nats / self.tokens)


@dataclass(frozen=True)
class Protocol:
    """How to score: the plan's name, for `sliding` its sizes, and how the model is run."""

    name: str = SLIDING
    context: int = 512
    segment: int = 512
    batch: int = 16
    max_symbols: int | None = None  # score only the first tokens, those that stand for so many symbols
    attention_window: int | None = None  # a token attends to the last so many; None: to the whole window
    experts_per_token: int | None = None  # k' at inference; None: as trained

    def windows(self, tokens: int) -> Windows:
        """The windows for a stream of so many tokens."""
        if self.name == SLIDING:
            return sliding_windows(tokens, self.context, self.segment)
        return LEGACY_PROTOCOLS[self.name][0](tokens)

    def settings(self) -> dict[str, Any]:
        """What a report says of it; a plan that has sizes of its own has no context or segment."""
        sliding = self.name == SLIDING
        return {
            "name": self.name,
            "context": self.context if sliding else None,
            "segment": self.segment if sliding else None,
            "attention_window": self.attention_window,
        }

    def tokens_of(self, stream: TokenStream) -> int:
        """Tokens at the beginning of a stream that are read and, but for what the plan leaves out, scored."""
        return len(stream) if self.max_symbols is None else stream.tokens_within(self.max_symbols)


def evaluate(
    model: nn.Module,
    stream: TokenStream,
    vocab_size: int,
    protocol: Protocol,
    device: torch.device,
    contaminated: Any = None,
) -> Score:
    """Score a token stream with `model`. Collective over all processes.

    The windows are dealt out so that every process makes equally many forward passes, which expert
    parallelism needs. The model must be in evaluation mode.

    Args:
        contaminated: what the model reads instead, token by token; scored is still how well it
            predicts `stream`.

    Raises:
        ValueError: if the stream is too short for the protocol, the other one not as long as it, or what is scored
            stands for no symbol.
    """
    if contaminated is not None and len(contaminated) != len(stream):
        raise ValueError(f"the contaminated stream has {len(contaminated)} tokens, the clean one {len(stream)}")
    total = protocol.tokens_of(stream)
    windows = protocol.windows(total)
    if len(windows) == 0:
        raise ValueError(f"a split of {total} tokens is too short for the protocol {protocol.name!r}")
    tokens = int((windows[:, 2] - windows[:, 1]).sum())
    symbols = sum(stream.count_symbols(first, end) for _, first, end in windows.tolist())
    if protocol.name == SLIDING:
        tokens += 1
        symbols += stream.count_symbols(0, 1)
    if not symbols:
        raise ValueError(f"the first {tokens} tokens of the split do not complete one symbol: score more of it")
    nats = _negative_log_likelihood(model, stream, contaminated, windows, protocol, device)
    if protocol.name == SLIDING:
        nats += math.log(vocab_size)
    return Score(nats, tokens, symbols)


def _negative_log_likelihood(
    model: nn.Module,
    stream: Any,
    contaminated: Any,
    windows_W3: Windows,
    protocol: Protocol,
    device: torch.device,
) -> float:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    length = int((windows_W3[:, 2] - windows_W3[:, 0]).max()) - 1
    batch = min(protocol.batch, math.ceil(len(windows_W3) / world))
    rounds = math.ceil(len(windows_W3) / (batch * world))
    arguments: dict[str, Any] = {"use_cache": False}
    if protocol.attention_window is not None and protocol.attention_window < length:
        dtype = next(model.parameters()).dtype
        arguments["attention_mask"] = attention_mask(length, protocol.attention_window, dtype, device)
    if protocol.experts_per_token is not None:
        arguments["experts_per_token"] = protocol.experts_per_token
    nats = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        # Shown on a terminal only (None), and only where there is something to wait for.
        hidden = None if rank == 0 and rounds >= 20 else True
        for index in tqdm(range(rounds), desc="scoring", unit="batch", leave=False, disable=hidden):
            begin = (index * world + rank) * batch
            chosen = windows_W3[begin : begin + batch]
            tokens_BL, scored_BL = gather_windows(stream, chosen, batch, length)
            tokens_BL, scored_BL = tokens_BL.to(device), scored_BL.to(device)
            read_BL = tokens_BL
            if contaminated is not None:
                read_BL = gather_windows(contaminated, chosen, batch, length)[0].to(device)
            logits_BLV = model(input_ids=read_BL[:, :-1], **arguments).logits
            nats += _cross_entropy(logits_BLV, tokens_BL[:, 1:], scored_BL)
    if world > 1:
        dist.all_reduce(nats)
    return float(nats)


def gather_windows(stream: Any, windows_W3: Windows, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens [batch, length + 1] of the windows and which of their targets count, [batch, length].

    Windows that are shorter are filled up with zeros on the right, which no scored token can see;
    missing windows are all zeros and score nothing.
    """
    tokens = np.zeros((batch, length + 1), dtype=np.int64)
    scored = np.zeros((batch, length), dtype=bool)
    for row, (start, first, end) in enumerate(windows_W3):
        tokens[row, : end - start] = stream[start:end]
        scored[row, first - start - 1 : end - start - 1] = True
    return torch.from_numpy(tokens), torch.from_numpy(scored)


def attention_mask(length: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [1, 1, L, L]: 0 where a token may look, at itself and the `window - 1` before it, else -inf.

    So no relative position occurs that the model never saw in training, however long the context.
    """
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(length, length, dtype=dtype, device=device).masked_fill(hidden, -torch.inf)[None, None]


def _cross_entropy(logits_BLV: Tensor, target_BL: Tensor, scored_BL: Tensor) -> Tensor:
    log_prob_BLV = logits_BLV.float().log_softmax(-1)
    nats_BL = -log_prob_BLV.gather(-1, target_BL[..., None]).squeeze(-1)
    return nats_BL.masked_fill(~scored_BL, 0.0).sum(dtype=torch.float64)

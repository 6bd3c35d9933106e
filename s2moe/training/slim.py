"""One model, fewer or more experts per token than trained: what it costs and what it predicts.

`launcher/compare.py slim` measures bits per symbol, counts multiply-accumulates by each convention
(models/macs.py), and times forward passes, all k' of all checkpoints in turns.

Legend: B sequences, S tokens of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from s2moe.config import ConfigError
from s2moe.models.macs import conventions, inference_macs, mean_positions

from .evaluation import Protocol, evaluate
from .hardware import device_name
from .run_directory import require_reportable
from .slim_report import FILES, write_report
from .standalone import Loaded, load_model_and_split, protocol_of
from .stopwatch import Timing, stopwatch, take_turns

WARM_UP = 2  # rounds of forward passes before any is timed
OUT = "slim"  # in a run's directory
SETTINGS = ("name", "context", "segment", "attention_window")  # of the protocol, as a report has them


@dataclass(frozen=True)
class Scored:
    """A checkpoint whose k' are scored, ready for timing. ``numbers`` are its k', ascending."""

    label: str
    loaded: Loaded
    tokens_BS: Tensor
    scores: dict[str, Any]
    numbers: list[int]

    @property
    def trained(self) -> int:
        return self.loaded.model.config.moe_config().experts_per_token

    @property
    def length(self) -> int:
        return self.tokens_BS.shape[1]

    def at(self, number: int) -> dict[str, Any]:
        """What the model is given for k' = number."""
        return {} if number == self.trained else {"experts_per_token": number}

    def key(self, number: int) -> str:
        """Names the timings of k' = number."""
        return f"{self.label}, k' = {number}"


def compare_slim(options: argparse.Namespace) -> dict[str, Any]:
    """Compare as `launcher/compare.py slim` was asked to and write the report; returns it with its files' paths.

    Checkpoints are scored one by one, and timed together: all their weights are in memory then.

    Raises:
        ConfigError, CorpusError: something is missing, does not fit together or makes no sense.
    """
    out = options.out or default_out(options.checkpoint)
    require_reportable(out, *FILES)
    labels = distinct_labels(options.checkpoint)
    scored = []
    for label, path in tqdm(list(zip(labels, options.checkpoint, strict=True)), desc="checkpoints", **_bar(labels)):
        loaded = load_model_and_split(argparse.Namespace(**{**vars(options), "checkpoint": path}))
        scored.append(score(label, loaded, options))
    first = scored[0]
    times = latencies(
        {
            one.key(number): _forward(one.loaded.model, one.tokens_BS, **one.at(number))
            for one in scored
            for number in one.numbers
        },
        options.repeats,
        first.loaded.device,
    )
    corpus = first.loaded.corpus
    report = {
        "corpus": corpus.name,
        "split": options.split,
        "symbol": corpus.metadata.symbol,
        "symbols": first.scores["symbols"],
        "protocol": {name: first.scores[name] for name in SETTINGS},
        "conventions": conventions(options.memory),
        "hardware": hardware(first.loaded.device),
        "checkpoints": [measured(one, times, first, options) for one in scored],
    }
    return report | {"files": [str(path) for path in write_report(out, report)]}


def score(label: str, loaded: Loaded, options: argparse.Namespace) -> Scored:
    """Bits per symbol of one checkpoint's k'.

    Raises:
        ConfigError: it has no SMoE layer, or can only do what it was trained for.
    """
    model, description = loaded.model, loaded.weights.description
    config, moe = model.config, model.config.moe_config()
    if not any(moe.is_sparse(layer) for layer in range(config.num_hidden_layers)):
        raise ConfigError(f"{description} has no SMoE layer, so there is no number of experts per token to change")
    length = options.latency_tokens or config.max_position_embeddings
    tokens_BS = latency_batch(loaded, options.latency_batch, length)
    protocol = protocol_of(options, model)
    trained = moe.experts_per_token
    scores = slimmability(loaded, options.experts_per_token_list, protocol, trained)
    numbers = [int(number) for number in scores["bpc"]]
    if numbers == [trained] and scores["left_out"]:
        reasons = "; ".join(f"k' = {number}: {reason}" for number, reason in scores["left_out"].items())
        raise ConfigError(f"{description}, trained with k = {trained}, has nothing to compare: {reasons}")
    return Scored(label, loaded, tokens_BS, scores, numbers)


def measured(one: Scored, times: dict[str, list[float]], first: Scored, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one checkpoint. Ratios of times are to its trained k and to that of the ``first`` checkpoint."""
    model, trained = one.loaded.model, one.trained
    whole = None if options.memory is None else options.memory + one.length
    chosen = {number: mean_experts(model, one.tokens_BS, **one.at(number)) for number in one.numbers}
    macs = {
        number: inference_macs(model.config, chosen[number], mean_positions(one.length), whole)
        for number in one.numbers
    }
    points = [
        {
            "experts_per_token": number,
            "mean_experts": chosen[number],
            "bpc": one.scores["bpc"][str(number)],
            "macs": macs[number],
            "macs_ratio": {name: count / macs[trained][name] for name, count in macs[number].items()},
            **vars(Timing.of(times[one.key(number)])),
            "latency_ratio": ratio(times[one.key(number)], times[one.key(trained)]),
            "latency_to_first": ratio(times[one.key(number)], times[first.key(first.trained)]),
        }
        for number in one.numbers
    ]
    moe = model.config.moe_config()
    return {
        "label": one.label,
        "weights": one.loaded.weights.description,
        "method": moe.title(),
        "trained": trained,
        "num_experts": moe.num_experts,
        "left_out": one.scores["left_out"],
        "latency_batch": options.latency_batch,
        "latency_tokens": one.length,
        "points": points,
    }


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios, which a drift over the rounds leaves alone."""
    return median(one / other for one, other in zip(times, others, strict=True))


def slimmability(loaded: Loaded, choices: Sequence[int], protocol: Protocol, trained: int) -> dict[str, Any]:
    """Bits per symbol at k' experts per token, of the same weights.

    Some routers know only some k': those are left out, with the router's reason.
    """
    bpc, left_out, symbols = {}, {}, 0
    experts = loaded.model.config.moe_config().num_experts
    numbers = sorted({*choices, trained})
    for number in tqdm(numbers, desc="experts per token", **_bar(numbers)):
        if number > experts:
            left_out[str(number)] = f"there are {experts} experts"
            continue
        at = replace(protocol, experts_per_token=None if number == trained else number)
        try:
            score = evaluate(loaded.model, loaded.stream, loaded.corpus.metadata.vocab_size, at, loaded.device)
        except ValueError as error:
            if number == trained:
                raise ConfigError(str(error)) from error
            left_out[str(number)] = str(error)
            continue
        bpc[str(number)], symbols = score.bits_per_symbol, score.symbols
    return {"bpc": bpc, "trained": trained, "left_out": left_out, "symbols": symbols} | protocol.settings()


def latency_batch(loaded: Loaded, sequences: int, length: int) -> Tensor:
    """The first tokens of the split, [B, S].

    Raises:
        ConfigError: the model was not made for so long a sequence, or the split has too few tokens.
    """
    most = loaded.model.config.max_position_embeddings
    if length > most:
        raise ConfigError(f"--latency-tokens {length}: {loaded.weights.description} was trained on at most {most}")
    if sequences * length > len(loaded.stream):
        raise ConfigError(
            f"{sequences} sequences of {length} tokens are to be timed, and {loaded.stream.name} has "
            f"{len(loaded.stream):,} tokens: give a smaller --latency-batch or --latency-tokens"
        )
    tokens = np.asarray(loaded.stream[: sequences * length]).astype(np.int64)
    return torch.from_numpy(tokens).view(sequences, length).to(loaded.device)


@torch.no_grad()
def mean_experts(model: Any, tokens_BS: Tensor, **at: Any) -> float:
    """Experts that a token meets in an SMoE layer: k', but for routers that let a threshold decide."""
    routing = model(input_ids=tokens_BS, use_cache=False, **at).routing
    return sum(int(layer.counts_E.sum()) for layer in routing) / (len(routing) * tokens_BS.numel())


def latencies(forwards: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each forward pass, round by round."""
    for _ in range(WARM_UP):
        for forward in forwards.values():
            forward()
    clock = stopwatch(device)
    with tqdm(total=repeats, desc="timing", unit="round", leave=False, disable=None) as bar:
        return take_turns(list(forwards), lambda name: clock(forwards[name]), repeats, after_round=bar.update)


def _forward(model: Any, tokens_BS: Tensor, **at: Any) -> Callable[[], object]:
    @torch.no_grad()
    def forward() -> object:
        return model(input_ids=tokens_BS, use_cache=False, **at).logits

    return forward


def distinct_labels(paths: Sequence[Path]) -> list[str]:
    """A name for each checkpoint: its run's where that tells them apart, else its path.

    Raises:
        ConfigError: one is given twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path, full in zip(paths, resolved, strict=True) if resolved.count(full) > 1)
        raise ConfigError(f"--checkpoint: {twice} is given twice")
    short = [path.parent.name if path.name == "hf" else path.name for path in resolved]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def default_out(paths: Sequence[Path]) -> Path:
    """slim/ in the run's directory. Raises ConfigError where there is not one run."""
    if len(paths) == 1 and (paths[0] / "metrics.jsonl").is_file():
        return paths[0] / OUT
    raise ConfigError("say where to write with --out: only for a single run directory it is slim/ in there")


def hardware(device: torch.device) -> dict[str, Any]:
    """What the times depend on."""
    return {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _bar(items: Sequence[Any]) -> dict[str, Any]:
    """Shown on a terminal only (None), and only where there is more than one."""
    return {"leave": False, "disable": None if len(items) > 1 else True}

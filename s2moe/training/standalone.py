"""Jobs on a run's weights that need one process and no engine: evaluation and export of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s2moe.config import ConfigError
from s2moe.data import Corpus, TokenStream

from .checkpoint import find_latest
from .evaluation import Protocol, evaluate
from .export import HF_DIRECTORY, require_replaceable, write_hf
from .weights import checkpoint_config, checkpoint_state, find_weights, load_weights

NEWLINE = 10


def evaluate_weights(options: argparse.Namespace) -> dict[str, Any]:
    """Score a split as `launcher/evaluate.py` was asked to; the figures and everything they depend on.

    Raises:
        ConfigError, CorpusError: weights or corpus not found, or not made for each other.
    """
    device = find_device(options.device)
    corpus = Corpus.open(options.data)
    stream = corpus.split(options.split)
    if options.drop_newlines:
        stream = without_newlines(corpus, stream)
    weights = find_weights(options.checkpoint)
    model = load_weights(weights)
    config = model.config
    if corpus.metadata.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the corpus {options.data} has {corpus.metadata.vocab_size} symbols, the model {config.vocab_size}: "
            "it was trained on another corpus"
        )
    trained, given = weights.tokenizer, corpus.tokenizer.fingerprint()
    if trained and trained != given:
        raise ConfigError(
            f"{weights.description} was trained with the tokenizer {trained}, the corpus {options.data} has {given}: "
            "give the corpus it was trained on, or one prepared with the same tokenizer"
        )
    moe = config.moe_config()
    if options.experts_per_token is not None and not 1 <= options.experts_per_token <= moe.num_experts:
        raise ConfigError(f"--experts-per-token must lie in 1..{moe.num_experts}, got {options.experts_per_token}")
    window = config.max_position_embeddings if options.attention_window is None else options.attention_window
    protocol = Protocol(
        options.protocol,
        options.context,
        options.segment,
        options.batch,
        options.max_symbols,
        window or None,
        options.experts_per_token,
    )
    try:
        score = evaluate(model.to(device), stream, corpus.metadata.vocab_size, protocol, device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {
        "bpc": score.bits_per_symbol,
        "nats_per_token": score.nats / score.tokens,
        "perplexity": score.perplexity,
        "symbols": score.symbols,
        "symbol": "character" if corpus.metadata.symbol == "byte" else corpus.metadata.symbol,
        "corpus": corpus.name,
        "split": options.split,
        "protocol": options.protocol,
        "context": options.context if options.protocol == "sliding" else None,
        "segment": options.segment if options.protocol == "sliding" else None,
        "attention_window": window or None,
        "newlines_dropped": options.drop_newlines,
        "experts_per_token": options.experts_per_token or moe.experts_per_token,
        "weights": weights.description,
    }


def find_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is.

    Raises:
        ConfigError: there is none of this name.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        raise ConfigError(f"--device: unknown device {name!r}: give cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"--device {name}: this machine has {gpus} GPUs that PyTorch can use: give --device cpu")
    return device


def without_newlines(corpus: Corpus, stream: TokenStream) -> TokenStream:
    """The stream of a byte corpus without its newlines."""
    if corpus.metadata.symbol != "byte" or corpus.metadata.vocab_size != 256:
        raise ConfigError(f"--drop-newlines is for corpora of raw bytes; {corpus.name} is not one")
    tokens = np.asarray(stream.tokens)
    kept = tokens[tokens != NEWLINE]
    return TokenStream(stream.name, kept, len(kept))


def export_checkpoint(source: Path, target: Path | None, data: Path | None) -> Path:
    """Write a run's newest checkpoint, or the given one, as a Hugging Face directory.

    Raises:
        ConfigError, CorpusError: no checkpoint, its corpus is not to be found, or `target` holds something else.
    """
    checkpoint = find_latest(source / "checkpoints") or find_weights(source).checkpoint
    if checkpoint is None:
        raise ConfigError(f"{find_weights(source).description} is a Hugging Face directory already: copy it")
    run_directory = checkpoint.path.parent.parent
    target = target or run_directory / HF_DIRECTORY
    require_replaceable(target)
    corpus = Corpus.open(data or checkpoint.state.config["data"]["dir"])
    origin = {"run": run_directory.name, "step": checkpoint.state.step}
    write_hf(checkpoint_config(checkpoint), checkpoint_state(checkpoint), target, corpus.tokenizer, origin)
    return target

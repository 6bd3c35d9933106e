"""Jobs on a run's weights that need one process and no engine: evaluation and export of a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from s2moe.config import ConfigError
from s2moe.data import Corpus, TokenStream, corrupt
from s2moe.models import S2MoEForCausalLM

from .checkpoint import Checkpoint, find_latest, verify
from .evaluation import Protocol, evaluate
from .export import HF_DIRECTORY, write_hf
from .reshape import reshape
from .run_directory import new_model
from .weights import Weights, checkpoint_config, checkpoint_state, find_weights, load_weights

NEWLINE = 10


def evaluate_weights(options: argparse.Namespace) -> dict[str, Any]:
    """Score a split as `launcher/evaluate.py` was asked to; the figures and everything they depend on.

    Raises:
        ConfigError, CorpusError: weights or corpus not found, or not made for each other.
    """
    loaded = load_model_and_split(options)
    corpus, stream, weights, model = loaded.corpus, loaded.stream, loaded.weights, loaded.model
    protocol = protocol_of(options, model)
    contaminated = contaminate(options, corpus, stream)
    try:
        score = evaluate(model, stream, corpus.metadata.vocab_size, protocol, loaded.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    corruption = None
    if contaminated is not None:
        attacked = evaluate(model, stream, corpus.metadata.vocab_size, protocol, loaded.device, contaminated)
        read = slice(protocol.tokens_of(stream))
        corruption = {
            "kind": options.corrupt,
            "rate": options.rate,
            "seed": options.corrupt_seed,
            "bpc": attacked.bits_per_symbol,
            "bpc_increase": attacked.bits_per_symbol - score.bits_per_symbol,
            "perplexity": attacked.perplexity,
            "changed": float(np.mean(contaminated[read] != stream[read])),
        }
    return {
        "bpc": score.bits_per_symbol,
        "nats_per_token": score.nats / score.tokens,
        "perplexity": score.perplexity,
        "symbols": score.symbols,
        "symbol": corpus.metadata.symbol,
        "corpus": corpus.name,
        "split": options.split,
        "protocol": options.protocol,
        "context": protocol.settings()["context"],
        "segment": protocol.settings()["segment"],
        "attention_window": protocol.attention_window,
        "newlines_dropped": options.drop_newlines,
        "experts_per_token": options.experts_per_token or model.config.moe_config().experts_per_token,
        "weights": weights.description,
        "corruption": corruption,
    }


def contaminate(options: argparse.Namespace, corpus: Corpus, stream: TokenStream) -> NDArray[Any] | None:
    """What the model is to read in place of the stream's tokens, where `--corrupt` asks for it.

    Raises:
        CorpusError: if the corruption makes no sense for this corpus.
    """
    if options.corrupt is None:
        return None
    return corrupt(stream[:], corpus.tokenizer, options.corrupt, options.rate, options.corrupt_seed)


@dataclass(frozen=True)
class Loaded:
    """What an evaluation works on, found and checked against one another. The model is on the device."""

    corpus: Corpus
    stream: TokenStream
    weights: Weights
    model: S2MoEForCausalLM
    device: torch.device


def load_model_and_split(options: argparse.Namespace) -> Loaded:
    """Load what `launcher/evaluate.py` was given.

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
    return Loaded(corpus, stream, weights, model.to(device), device)


def protocol_of(options: argparse.Namespace, model: S2MoEForCausalLM) -> Protocol:
    """How `launcher/evaluate.py` was asked to score."""
    window = model.config.max_position_embeddings if options.attention_window is None else options.attention_window
    return Protocol(
        options.protocol,
        options.context,
        options.segment,
        options.batch,
        options.max_symbols,
        window or None,
        options.experts_per_token,
    )


def find_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is.

    Raises:
        ConfigError: there is none of this name.
    """
    choices = "give cpu or cuda"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        raise ConfigError(f"--device: unknown device {name!r}: {choices}") from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"--device {name}: this machine has {gpus} GPUs that PyTorch can use: give --device cpu")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # meta holds no numbers, others are not built in or not there: errors of any kind
        raise ConfigError(f"--device {name}: PyTorch cannot compute on it here: {choices}") from error
    return device


def without_newlines(corpus: Corpus, stream: TokenStream) -> TokenStream:
    """The stream of a byte corpus without its newlines."""
    if corpus.metadata.symbol != "byte" or corpus.metadata.vocab_size != 256:
        raise ConfigError(f"--drop-newlines is for corpora of raw bytes; {corpus.name} is not one")
    tokens = np.asarray(stream[:])
    kept = tokens[tokens != NEWLINE]
    return TokenStream(stream.name, kept, len(kept))


def reshape_checkpoint(source: Path, target: Path | None) -> Path:
    """Rewrite a run's newest checkpoint, or the given one, so that it can be continued in any shape: see reshape.py.

    Raises:
        ConfigError: no checkpoint, or `target` holds something.
    """
    return reshape(_checkpoint_of(source), target)


def _checkpoint_of(source: Path) -> Checkpoint:
    """The newest checkpoint of a run, or the given one, its files compared with their checksums."""
    checkpoint = find_latest(source / "checkpoints") or find_weights(source).checkpoint
    if checkpoint is None:
        raise ConfigError(f"{find_weights(source).description} is no checkpoint, but a Hugging Face directory already")
    verify(checkpoint)
    return checkpoint


def export_checkpoint(source: Path, target: Path | None, data: Path | None) -> Path:
    """Write a run's newest checkpoint, or the given one, as a Hugging Face directory.

    Raises:
        ConfigError, CorpusError: no checkpoint, its corpus is not to be found, or `target` holds something else.
    """
    checkpoint = _checkpoint_of(source)
    run_directory = checkpoint.path.parent.parent
    target = target or run_directory / HF_DIRECTORY
    with new_model(target, run_directory.name, run_directory, checkpoint.state.step):
        corpus = Corpus.open(data or checkpoint.state.config["data"]["dir"])
        origin = {"run": run_directory.name, "step": checkpoint.state.step}
        config, weights = checkpoint_config(checkpoint), checkpoint_state(checkpoint)
        write_hf(config, weights, target, corpus.tokenizer, origin, run_directory)
    return target

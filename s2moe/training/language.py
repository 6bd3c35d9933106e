"""A run that trains a language model: its corpus, its model, its validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from s2moe.config import ConfigError, to_dict
from s2moe.config.run import RunConfig
from s2moe.data import Corpus, CorpusError, WindowSampler
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.sizes import model_sizes

from .checkpoint import TrainingState
from .engine import build_engine
from .evaluation import Protocol, Score, evaluate
from .export import export_engine
from .feed import TextFeed
from .initial import InitialWeights
from .job import Job
from .live_probe import LiveProbe, take_probe_set
from .processes import Processes
from .run_directory import PRETRAINING
from .run_log import RunLog


class LanguageJob(Job):
    """Pre-training of a causal language model.

    Raises:
        ConfigError, CorpusError: a setting or the data does not allow it.
    """

    kind = PRETRAINING
    config: RunConfig

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        self.config, self._device = config, processes.device
        self._corpus = corpus = config.data.open()
        check_prompt(config, corpus)
        train, self._validation = corpus.split(config.data.train), corpus.split(config.data.validation)
        self._probe_set = take_probe_set(config, self._validation)
        sampler = WindowSampler(train, config.training.sequence_length, config.seed)
        self.model_config = config.model_config(corpus.metadata.vocab_size)
        self.state = initial_state(config, self.model_config, corpus, processes.world_size)
        self.symbol = corpus.metadata.symbol
        self.feed = TextFeed(config, processes, sampler, corpus.tokenizer.symbols_V)
        self.flops_per_unit = model_sizes(self.model_config).flops_per_token(config.training.sequence_length)

    def initial(self) -> InitialWeights:
        return InitialWeights(
            self.config.init, self.model_config, self._corpus.tokenizer.fingerprint(), self.config.seed
        )

    def build(self, processes: Processes, initial: InitialWeights | None) -> Any:
        return build_engine(self.config, self.model_config, processes, initial)

    def begin(self, engine: Any) -> None:
        """Nothing is asked of an untrained language model."""

    def prober(self, engine: Any, processes: Processes, log: RunLog) -> Callable[[int], None]:
        return LiveProbe(self.config, engine, self._probe_set, processes, self.config.directory, log)

    def validate(self, engine: Any, full: bool) -> Score:
        return validation_score(
            self.config, self.model_config, engine, self._validation, self._corpus, self._device, full
        )

    def validation_values(self, score: Score) -> dict[str, float]:
        return {"val/bpc": score.bits_per_symbol, "val/loss": score.nats / score.tokens, "val/symbols": score.symbols}

    def export(self, engine: Any, step: int) -> Path:
        return export_engine(engine, self.config.directory, self._corpus.tokenizer, step)


def initial_state(config: RunConfig, model_config: S2MoEConfig, corpus: Corpus, world_size: int) -> TrainingState:
    """The state of a run that has not begun, with everything that a checkpoint must agree with."""
    resolved = to_dict(config)
    resolved["model"] = {name: getattr(model_config, name) for name in config.model}
    return TrainingState(
        seed=config.seed,
        world_size=world_size,
        expert_parallel=config.training.expert_parallel,
        zero_stage=config.training.zero_stage,
        precision=config.training.precision,
        corpus=f"{corpus.metadata.name}:{corpus.metadata.splits[config.data.train].sha256[:16]}",
        tokenizer=corpus.tokenizer.fingerprint(),
        config=resolved,
        versions={"torch": str(torch.__version__), "deepspeed": deepspeed.__version__},
    )


def check_prompt(config: RunConfig, corpus: Corpus) -> None:
    """Raise ConfigError unless the sample at the end of the run can begin."""
    if config.logging.sample_tokens == 0:
        return
    prompt = config.logging.sample_prompt
    try:
        tokens = len(corpus.tokenizer.encode(prompt))
    except CorpusError as error:
        raise ConfigError(
            f"logging.sample_prompt: {prompt!r} cannot be encoded: {error}; "
            "give another one, or logging.sample_tokens=0"
        ) from error
    if tokens == 0:
        raise ConfigError(f"logging.sample_prompt: {prompt!r} has no token: give some text, or logging.sample_tokens=0")


def validation_score(
    config: RunConfig,
    model_config: S2MoEConfig,
    engine: Any,
    stream: Any,
    corpus: Corpus,
    device: torch.device,
    full: bool,
) -> Score:
    """Score the validation split, all of it or its first tokens, which `evaluation.max_symbols` counts. Collective."""
    settings = config.evaluation
    protocol = Protocol(
        context=settings.context,
        segment=settings.segment,
        batch=settings.batch,
        max_symbols=None if full else settings.max_symbols,
        attention_window=model_config.max_position_embeddings,
    )
    stream.require_unchanged()
    engine.eval()
    return evaluate(engine, stream, corpus.metadata.vocab_size, protocol, device)

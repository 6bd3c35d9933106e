"""A pre-training run from its settings to its results: open, resume, train, validate, save, export."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from s2moe.config import ConfigError, to_dict, to_yaml
from s2moe.config.run import RunConfig, check_world
from s2moe.data import Corpus, CorpusError, WindowSampler
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.sizes import model_sizes

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, TrainingState
from .engine import build_engine
from .evaluation import Protocol, Score, evaluate
from .export import HF_DIRECTORY, export_engine
from .figure import CURVES_FILE, draw_run
from .hardware import peak_flops
from .loop import TrainingLoop
from .processes import Processes
from .run_log import RunLog


@dataclass(frozen=True)
class Result:
    """What a run came to: `finished` is False when its time was up first. `score` is the whole validation split's."""

    directory: Path
    finished: bool
    state: TrainingState
    score: Score | None
    hf: Path | None


def pretrain(config: RunConfig, processes: Processes) -> Result:
    """Train the configured model, continuing from the newest complete checkpoint if there is one. Collective.

    Raises:
        ConfigError, CorpusError: a setting, the data or the checkpoint does not allow the run.
        TrainingError: the loss is not finite, or a checkpoint cannot be written.
    """
    check_world(config, processes.world_size)
    if config.training.precision == "fp16" and processes.device.type == "cpu":
        raise ConfigError("training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
    corpus = config.data.open()
    check_prompt(config, corpus)
    train, validation = corpus.split(config.data.train), corpus.split(config.data.validation)
    sampler = WindowSampler(train, config.training.sequence_length, config.seed)
    model_config = config.model_config(corpus.metadata.vocab_size)
    state = initial_state(config, model_config, corpus, processes.world_size)

    directory = config.directory
    latest = prepare_directory(config, state, processes)
    engine = build_engine(config, model_config, processes)
    if latest is not None:
        saved = checkpoints.restore(engine, latest, state)
        state.step, state.samples, state.tokens, state.seconds = saved.step, saved.samples, saved.tokens, saved.seconds
    log = RunLog(config, directory, state.step, processes.is_main)
    if latest is not None:
        log.say(f"continuing from {latest.path}, step {state.step}")

    scores: dict[int, Score] = {}

    def validate(step: int) -> None:
        last = step == config.training.steps
        scores[step] = validation_score(config, model_config, engine, validation, corpus, processes.device, full=last)
        log.validation(step, validation_values(scores[step]))

    def save() -> None:
        checkpoints.save(engine, directory / "checkpoints", state, config.checkpoint.keep)

    try:
        finished = TrainingLoop(
            config,
            engine,
            processes,
            sampler,
            state,
            log,
            bits_per_nat=len(train) / train.symbols / math.log(2),
            validate=validate,
            save=save,
            flops_per_token=model_sizes(model_config).flops_per_token(config.training.sequence_length),
            peak_flops=peak_flops(processes.device, config.training.precision),
        ).run()
    finally:
        log.close()
    if not finished:
        return Result(directory, False, state, None, None)
    score = scores.get(state.step) or validation_score(
        config, model_config, engine, validation, corpus, processes.device, full=True
    )
    hf = export_engine(engine, directory, corpus.tokenizer, state.step)
    if processes.is_main:
        draw_run(directory)
    return Result(directory, True, state, score, hf)


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
        versions={"torch": torch.__version__, "deepspeed": deepspeed.__version__},
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


def prepare_directory(config: RunConfig, state: TrainingState, processes: Processes) -> Checkpoint | None:
    """Clean up after an earlier process, choose the checkpoint to continue from, write config.yaml. Collective.

    Raises:
        ConfigError: `checkpoint.resume` forbids or demands a checkpoint, or the newest one is of another run
            or beyond `training.steps`.
    """
    directory, folder = config.directory, config.directory / "checkpoints"
    answer: list[Any] = [None]
    if processes.is_main:
        answer = [_prepare(config, state, directory, folder)]
    if processes.world_size > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], ConfigError):
        raise answer[0]
    return answer[0]


def _prepare(config: RunConfig, state: TrainingState, directory: Path, folder: Path) -> Checkpoint | ConfigError | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_temporary(folder)
        latest = checkpoints.find_latest(folder, warn=lambda message: print(f"warning: {message}", flush=True))
        if latest is None and config.checkpoint.resume == "must":
            raise ConfigError(f"checkpoint.resume=must, but there is no complete checkpoint in {folder}")
        if latest is not None:
            if config.checkpoint.resume == "never":
                raise ConfigError(
                    f"checkpoint.resume=never, but {latest.path} exists: choose another name=..., remove the "
                    "directory, or continue with checkpoint.resume=auto"
                )
            checkpoints.require_same(latest, state)
            if latest.state.step > config.training.steps:
                raise ConfigError(
                    f"training.steps: {latest.path} is beyond it, got {config.training.steps}: "
                    f"ask for at least {latest.state.step} steps, or start a new run with another name=..."
                )
        else:  # nothing of an earlier attempt counts
            for name in ("tensorboard", HF_DIRECTORY):
                shutil.rmtree(directory / name, ignore_errors=True)
            (directory / CURVES_FILE).unlink(missing_ok=True)
        (directory / "config.yaml").write_text(to_yaml(state.config), encoding="utf-8")
    except ConfigError as error:
        return error
    except OSError as error:
        return ConfigError(f"cannot write the run directory {directory}: {error}")
    return latest


def validation_score(
    config: RunConfig,
    model_config: S2MoEConfig,
    engine: Any,
    stream: Any,
    corpus: Corpus,
    device: torch.device,
    full: bool,
) -> Score:
    """Score the validation split, all of it or its first `evaluation.max_symbols`. Collective."""
    settings = config.evaluation
    protocol = Protocol(
        context=settings.context,
        segment=settings.segment,
        batch=settings.batch,
        max_symbols=None if full else settings.max_symbols,
        attention_window=model_config.max_position_embeddings,
    )
    engine.eval()
    return evaluate(engine, stream, corpus.metadata.vocab_size, protocol, device)


def validation_values(score: Score) -> dict[str, float]:
    """The figures of a validation, as metrics.jsonl has them."""
    return {"val/bpc": score.bits_per_symbol, "val/loss": score.nats / score.tokens, "val/symbols": score.symbols}

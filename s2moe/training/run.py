"""A pre-training run from its settings to its results: open, resume, train, validate, save, export."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
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
from . import metrics_log
from .agreement import require_same_settings, together
from .checkpoint import Checkpoint, TrainingState, shape_of, shape_text
from .engine import build_engine
from .errors import ProcessError
from .evaluation import Protocol, Score, evaluate
from .export import HF_DIRECTORY, export_engine
from .figure import CURVES_FILE, draw_run
from .hardware import peak_flops
from .initial import InitialWeights
from .live_probe import LiveProbe, take_probe_set
from .loop import TrainingLoop
from .probe_files import PROBES, remove_after
from .processes import Processes
from .replicas import require_equal_replicas
from .reshape import in_shape_of
from .run_log import RunLog
from .timing import Timing
from .timing_table import timing_table
from .watchdog import Watchdog


@dataclass(frozen=True)
class Result:
    """What a run came to. `score` is the whole validation split's.

    `finished` is False when its time was up, or a signal came, first.
    """

    directory: Path
    finished: bool
    state: TrainingState
    score: Score | None
    hf: Path | None
    timing: str = ""  # where the time went, as a table; of the first process
    signalled: bool = False  # stopped by a signal


def pretrain(config: RunConfig, processes: Processes) -> Result:
    """Train the configured model, continuing from the newest complete checkpoint if there is one. Collective.

    Raises:
        ConfigError, CorpusError: a setting, the data or the checkpoint does not allow the run.
        TrainingError: the loss is not finite, a checkpoint cannot be written, processes have diverged.
        LostProcessError: another process is gone.
    """
    with Watchdog(config.training.timeout_minutes, processes) as watchdog, watchdog.naming_lost():
        result = _pretrain(config, processes, watchdog)
    if result.finished and processes.is_main:
        draw_run(result.directory)  # nobody waits for it
    return result


def _pretrain(config: RunConfig, processes: Processes, watchdog: Watchdog) -> Result:
    with together(processes):
        check_world(config, processes.world_size)
        if config.training.precision == "fp16" and processes.device.type == "cpu":
            raise ConfigError("training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
        corpus = config.data.open()
        check_prompt(config, corpus)
        train, validation = corpus.split(config.data.train), corpus.split(config.data.validation)
        probe_set = take_probe_set(config, validation)
        sampler = WindowSampler(train, config.training.sequence_length, config.seed)
        model_config = config.model_config(corpus.metadata.vocab_size)
        state = watchdog.state = initial_state(config, model_config, corpus, processes.world_size)
    require_same_settings(state, processes)

    directory = config.directory
    with watchdog.phase("reading the checkpoint"):
        latest = prepare_directory(config, state, processes, watchdog.move)
        if latest is not None:
            source = in_shape_of(latest, state, processes, watchdog.move)
    initial = None
    if latest is None and config.init.weights is not None:
        with together(processes):
            initial = InitialWeights(config.init, model_config, corpus.tokenizer.fingerprint(), config.seed)
    engine = build_engine(config, model_config, processes, initial)
    watchdog.watch(engine.module)
    if latest is not None:
        saved = checkpoints.restore(engine, source, state)
        state.step, state.samples, state.tokens, state.seconds = saved.step, saved.samples, saved.tokens, saved.seconds
    log = RunLog(config, directory, state.step, processes.is_main)
    if latest is not None:
        log.say(f"continuing from {latest.path}, step {state.step}{changes_of_shape(config, latest.state, state)}")

    if initial is not None:
        log.say(initial.description)
    timing = Timing(config, engine.module, processes, directory, log.say)
    probe = LiveProbe(config, engine, probe_set, processes, directory, log)
    saver = checkpoints.Saver(engine, directory / "checkpoints", config.checkpoint.keep, config.checkpoint.asynchronous)
    scores: dict[int, Score] = {}

    def validate(step: int) -> None:
        last, device = step == config.training.steps, processes.device
        with watchdog.phase("validation"):
            scores[step] = validation_score(config, model_config, engine, validation, corpus, device, full=last)
        log.validation(step, validation_values(scores[step]))

    def save() -> None:
        with watchdog.phase("checkpoint"):
            require_equal_replicas(engine.module, state)
            saver.save(state)

    loop = TrainingLoop(
        config,
        engine,
        processes,
        sampler,
        state,
        log,
        timing,
        bits_per_nat=len(train) / train.symbols / math.log(2),
        validate=validate,
        probe=probe,
        save=save,
        settle=saver.settle,
        flops_per_token=model_sizes(model_config).flops_per_token(config.training.sequence_length),
        peak_flops=peak_flops(processes.device, config.training.precision),
    )
    try:
        with watchdog.phase("training"):
            finished = loop.run()
        with watchdog.phase("checkpoint"):
            saver.settle(wait=True)
    except CorpusError as error:  # of this process alone, perhaps
        raise ProcessError(f"training stopped after step {state.step}: {error}") from error
    finally:
        timing.close()
        log.close()
    table = timing_table(metrics_log.read(directory / "metrics.jsonl"), timing.occasions) if processes.is_main else ""
    if not finished:
        return Result(directory, False, state, None, None, table, loop.signalled)
    score = scores.get(state.step) or validation_score(
        config, model_config, engine, validation, corpus, processes.device, full=True
    )
    with watchdog.phase("export"):
        hf = export_engine(engine, directory, corpus.tokenizer, state.step)
    return Result(directory, True, state, score, hf, table)


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


def prepare_directory(
    config: RunConfig, state: TrainingState, processes: Processes, progress: Callable[[], None] = lambda: None
) -> Checkpoint | None:
    """Clean up after an earlier process, choose the checkpoint to continue from, write config.yaml. Collective.

    A checkpoint whose files have not the checksums that were written is passed over, like one without all its files.

    Raises:
        ConfigError: `checkpoint.resume` forbids or demands a checkpoint, all are damaged, or the newest one is of
            another run or beyond `training.steps`.
    """
    folder, damaged = config.directory / "checkpoints", set[Path]()
    if processes.is_main:
        checkpoints.remove_temporary(folder)
    while True:
        latest = _from_main(processes, lambda: _choose(config, folder, damaged))
        if latest is None:
            break
        try:
            checkpoints.verify(latest, progress)
            break
        except ConfigError as error:
            _warn(f"{error}; falling back to the checkpoint before it", processes)
            damaged.add(latest.path)
    if latest is not None and latest.digests is None:
        _warn(f"{latest.path} is older than checksums: only the sizes of its files were checked", processes)
    _from_main(processes, lambda: _prepare(config, state, latest))
    return latest


def _from_main(processes: Processes, work: Callable[[], Any]) -> Any:
    """What `work` returns on the first process, or the ConfigError that it raises there, on all. Collective."""
    answer: list[Any] = [None]
    if processes.is_main:
        try:
            answer = [work()]
        except ConfigError as error:
            answer = [error]
    if processes.world_size > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], ConfigError):
        raise answer[0]
    return answer[0]


def _warn(message: str, processes: Processes) -> None:
    if processes.is_main:
        print(f"warning: {message}", flush=True)


def _choose(config: RunConfig, folder: Path, damaged: set[Path]) -> Checkpoint | None:
    latest = checkpoints.find_latest(folder, lambda message: print(f"warning: {message}", flush=True), damaged)
    resume = config.checkpoint.resume
    if latest is None and resume == "must":
        raise ConfigError(f"checkpoint.resume=must, but there is no complete checkpoint in {folder}")
    if latest is None and not checkpoints.is_empty(folder):
        raise ConfigError(
            f"all checkpoints in {folder} are damaged, see the warnings: bring back a copy of one, or remove the "
            "directory to start anew"
        )
    if latest is not None and resume == "never":
        raise ConfigError(
            f"checkpoint.resume=never, but {latest.path} exists: choose another name=..., remove the "
            "directory, or continue with checkpoint.resume=auto"
        )
    return latest


def _prepare(config: RunConfig, state: TrainingState, latest: Checkpoint | None) -> None:
    directory = config.directory
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        if latest is not None:
            checkpoints.require_same(latest, state)
            if latest.state.step > config.training.steps:
                raise ConfigError(
                    f"training.steps: {latest.path} is beyond it, got {config.training.steps}: "
                    f"ask for at least {latest.state.step} steps, or start a new run with another name=..."
                )
            remove_after(directory / PROBES, latest.state.step)
        else:  # nothing of an earlier attempt counts
            for name in ("tensorboard", HF_DIRECTORY, PROBES):
                shutil.rmtree(directory / name, ignore_errors=True)
            (directory / CURVES_FILE).unlink(missing_ok=True)
        checkpoints.remove_universal(directory / "checkpoints", but=latest)
        (directory / "config.yaml").write_text(to_yaml(state.config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the run directory {directory}: {error}") from error


def changes_of_shape(config: RunConfig, before: TrainingState, now: TrainingState) -> str:
    """For the user: that the run goes on in another shape, and whether that can be seen in its losses."""
    if shape_of(before) == shape_of(now):
        return ""
    text = f"; it was written with {shape_text(before)}, and goes on with {shape_text(now)}"
    then = before.config["training"]
    was = then["micro_batch"] or then["global_batch"] * then.get("sequence_parallel", 1) // before.world_size
    is_now = config.micro_batch(now.world_size)
    if was != is_now:
        text += (
            f". Micro-batches of {is_now} sequences instead of {was}: dropout and noise are drawn otherwise than "
            f"they would have been, which training.micro_batch={was} avoids"
        )
    return text


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
    stream.require_unchanged()
    engine.eval()
    return evaluate(engine, stream, corpus.metadata.vocab_size, protocol, device)


def validation_values(score: Score) -> dict[str, float]:
    """The figures of a validation, as metrics.jsonl has them."""
    return {"val/bpc": score.bits_per_symbol, "val/loss": score.nats / score.tokens, "val/symbols": score.symbols}

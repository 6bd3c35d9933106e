"""A run from its settings to its results: open, resume, train, validate, save, export. Of texts and images alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2moe.config import ConfigError, to_yaml
from s2moe.config.run import RunConfig, check_world
from s2moe.data import CorpusError

from . import checkpoint as checkpoints
from . import metrics_log
from .agreement import changed_settings, require_same_settings, together
from .checkpoint import Checkpoint, TrainingState, shape_of, shape_text
from .errors import ProcessError, ending_on_full_disk
from .export import HF_DIRECTORY
from .figure import CURVES_FILE, draw_run
from .hardware import peak_flops
from .job import Job
from .language import LanguageJob
from .loop import TrainingLoop
from .probe_files import PROBES, remove_after
from .processes import Processes
from .ranks import from_first
from .replicas import require_equal_replicas
from .reshape import in_shape_of
from .run_directory import (
    SETTINGS_FILE,
    Maker,
    claimed,
    exported_step,
    finished_text,
    maker_of,
    read_settings,
    require_leavings,
    require_own_model,
    sign,
)
from .run_log import RunLog
from .signals import losing
from .timing import Timing
from .timing_table import timing_table
from .watchdog import Watchdog

if TYPE_CHECKING:
    from s2moe.config.vision import VisionRunConfig


@dataclass(frozen=True)
class Result:
    """What a run came to. `score` is the whole validation or test split's, as the run's job has it.

    `finished` is False when its time was up, or a signal came, first.
    """

    directory: Path
    finished: bool
    state: TrainingState
    score: Any
    hf: Path | None
    timing: str = ""  # where the time went, as a table; of the first process
    signalled: bool = False  # stopped by a signal
    note: str = ""  # for the user, where the run had finished before and nothing was done


def pretrain(config: RunConfig, processes: Processes) -> Result:
    """Train the configured language model, continuing from the newest complete checkpoint if there is one. Collective.

    Raises:
        As `train`.
    """
    return train(config, processes, lambda: LanguageJob(config, processes))


def train(config: RunConfig | VisionRunConfig, processes: Processes, open_job: Callable[[], Job]) -> Result:
    """Train what `open_job` opens, continuing from the newest complete checkpoint if there is one. Collective.

    Raises:
        ConfigError, CorpusError: a setting, the data or the checkpoint does not allow the run, its directory holds
            something else, another start of it goes on, or a process does not see its directory.
        TrainingError: the loss is not finite, a checkpoint cannot be written, processes have diverged.
        LostProcessError: another process is gone.
    """
    with Watchdog(config.training.timeout_minutes, processes) as watchdog, watchdog.naming_lost():
        with together(processes):
            check_world(config, processes.world_size)
            if config.training.precision == "fp16" and processes.device.type == "cpu":
                raise ConfigError("training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
            job = open_job()
        watchdog.state = job.state
        require_same_settings(job.state, processes)
        claim = claimed(job.config.directory, job.kind, processes)
        with claim, ending_on_full_disk(watchdog), losing(watchdog.loss):
            result = _train(job, processes, watchdog)
    if result.finished and not result.note and processes.is_main:
        draw_run(result.directory)  # nobody waits for it
    return result


def _train(job: Job, processes: Processes, watchdog: Watchdog) -> Result:
    config, state = job.config, job.state
    directory = config.directory
    with watchdog.phase("reading the checkpoint"):
        start = choose_start(job, processes, watchdog.move)
        latest = start.checkpoint
        watchdog.saved = lambda: latest.state.step if latest is not None else None
        if latest is not None:
            source = in_shape_of(latest, state, processes, watchdog.move)
    if start.finished is not None:
        state.step = start.finished
        note = finished_text(directory, f"at step {state.step:,}")
        return Result(directory, True, state, None, directory / HF_DIRECTORY, note=note)
    initial = None
    if latest is None and config.init.weights is not None:
        with together(processes):
            initial = job.initial()
    engine = job.build(processes, initial)
    watchdog.watch(engine.module)
    if latest is not None:
        saved = checkpoints.restore(engine, source, state)
        state.step, state.samples, state.tokens, state.seconds = saved.step, saved.samples, saved.tokens, saved.seconds
    _from_main(processes, lambda: take_over(job, latest))
    with together(processes):
        log = RunLog(config, directory, state.step, processes.is_main, job.symbol)
    if latest is not None:
        changes = changes_of_shape(config, latest.state, state, job.sample)
        log.say(f"continuing from {latest.path}, step {state.step}{changes}")
        if changed := changed_settings(latest.state.config, state.config):
            log.say(f"settings changed since that checkpoint: {changed}")
        if state.config["init"] != latest.state.config.get("init", state.config["init"]):
            log.say("init changes nothing here: it is for a run's first start")

    if initial is not None:
        log.say(initial.description)
    if latest is None:
        with watchdog.phase("the first evaluation"):
            job.begin(engine)
    timing = Timing(config, engine.module, processes, directory, log.say)
    keep, asynchronous = config.checkpoint.keep, config.checkpoint.asynchronous
    saver = checkpoints.Saver(engine, directory / "checkpoints", keep, asynchronous, watchdog.saved())
    watchdog.saved = lambda: saver.saved
    scores: dict[int, Any] = {}

    def validate(step: int) -> None:
        with watchdog.phase("validation"):
            scores[step] = job.validate(engine, full=step == config.training.steps)
        log.validation(step, job.validation_values(scores[step]))

    def save() -> None:
        with watchdog.phase("checkpoint"):
            require_equal_replicas(engine.module, state, saver.saved)
            saver.save(state)
            if state.step == config.training.steps:
                saver.settle(wait=True)

    loop = TrainingLoop(
        config,
        engine,
        processes,
        job.feed,
        state,
        log,
        timing,
        validate=validate,
        probe=job.prober(engine, processes, log),
        save=save,
        settle=saver.settle,
        remains=watchdog.remains,
        flops_per_unit=job.flops_per_unit,
        peak_flops=peak_flops(processes.device, config.training.precision),
    )
    try:
        with watchdog.phase("training"):
            finished = loop.run()
        with watchdog.phase("checkpoint"):
            saver.settle(wait=True)
        if finished and state.step not in scores:  # an earlier start ended between its last checkpoint and this
            validate(state.step)
    except CorpusError as error:  # of this process alone, perhaps
        raise ProcessError(f"training stopped after step {state.step}: {error}") from error
    finally:
        timing.close()
        log.close()
    table = timing_table(metrics_log.read(directory / "metrics.jsonl"), timing.occasions) if processes.is_main else ""
    if not finished:
        return Result(directory, False, state, None, None, table, loop.signalled)
    with watchdog.phase("export"):
        hf = job.export(engine, state.step)
    return Result(directory, True, state, scores[state.step], hf, table)


@dataclass(frozen=True)
class Start:
    """The `checkpoint` to continue from; or the step that a run is `finished` at, of which no checkpoint is left."""

    checkpoint: Checkpoint | None = None
    finished: int | None = None


def choose_start(job: Job, processes: Processes, progress: Callable[[], None] = lambda: None) -> Start:
    """Choose the checkpoint to continue from, if there is one; nothing is changed. Collective.

    A checkpoint whose files have not the checksums that were written is passed over, like one without all its files.

    Raises:
        ConfigError: `checkpoint.resume` forbids or demands a checkpoint, all are damaged, the newest one is of
            another run or beyond `training.steps`, or beginning anew would replace what this run did not make.
    """
    config, state = job.config, job.state
    folder, damaged = config.directory / "checkpoints", set[Path]()
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
    if latest is None:
        return Start(finished=_from_main(processes, lambda: _finished_before(job)))
    _from_main(processes, lambda: _require_continuable(config, state, latest))
    return Start(latest)


def _from_main(processes: Processes, work: Callable[[], Any]) -> Any:
    """What `work` returns on the first process, or the ConfigError that it raises there, on all. Collective."""
    answer: Any = None
    if processes.is_main:
        try:
            answer = work()
        except ConfigError as error:
            answer = error
        except OSError as error:
            answer = ConfigError(str(error))
    answer = from_first(answer)
    if isinstance(answer, ConfigError):
        raise answer
    return answer


def _warn(message: str, processes: Processes) -> None:
    if processes.is_main:
        print(f"warning: {message}", flush=True)


def _choose(config: RunConfig | VisionRunConfig, folder: Path, damaged: set[Path]) -> Checkpoint | None:
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


def _require_continuable(config: RunConfig | VisionRunConfig, state: TrainingState, latest: Checkpoint) -> None:
    checkpoints.require_same(latest, state)
    assert config.training.steps is not None
    if latest.state.step > config.training.steps:
        raise ConfigError(
            f"training.steps: {latest.path} is beyond it, got {config.training.steps}: "
            f"ask for at least {latest.state.step} steps, or start a new run with another name=..."
        )
    require_own_model(config.directory, config.name)


def _finished_before(job: Job) -> int | None:
    """The step of the finished run of which no checkpoint is left, or None where the run may begin.

    Raises:
        ConfigError: neither: what is there is another run's, or is to go on, for which there is no checkpoint.
    """
    config, now = job.config, job.state
    directory, hf = config.directory, config.directory / HF_DIRECTORY
    step = exported_step(hf)
    if step is None or maker_of(directory) != Maker(job.kind, config.name):
        require_leavings(directory, job.kind, config.name)
        return None
    before = read_settings(directory)
    precision = before.get("training", {}).get("precision", "")
    made = replace(now, step=step, seed=before.get("seed", 0), precision=precision, config=before)
    checkpoints.require_same(Checkpoint(hf, made), now)
    assert config.training.steps is not None
    if step < config.training.steps:
        raise ConfigError(
            f"{hf} is of step {step:,}, and no checkpoint is left to continue from to step "
            f"{config.training.steps:,}: choose another name=... (with init.weights={hf} to begin with its weights), "
            f"or remove {directory} to start anew"
        )
    return step


def take_over(job: Job, latest: Checkpoint | None) -> None:
    """Say whose the directory is, and remove what an earlier start left that this one makes anew."""
    directory = job.config.directory
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        sign(directory, job.kind, job.config.name)
        checkpoints.remove_temporary(directory / "checkpoints")
        if latest is not None:
            remove_after(directory / PROBES, latest.state.step)
        else:  # nothing of an earlier attempt counts
            for name in ("tensorboard", HF_DIRECTORY, PROBES):
                shutil.rmtree(directory / name, ignore_errors=True)
            (directory / CURVES_FILE).unlink(missing_ok=True)
        checkpoints.remove_universal(directory / "checkpoints", but=latest)
        (directory / SETTINGS_FILE).write_text(to_yaml(job.state.config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the run directory {directory}: {error}") from error


def changes_of_shape(
    config: RunConfig | VisionRunConfig, before: TrainingState, now: TrainingState, sample: str = "sequences"
) -> str:
    """For the user: that the run goes on in another shape, and whether that can be seen in its losses.

    Another division into micro-batches or parts of sequences can, in the same shape too.
    """
    text = ""
    if shape_of(before) != shape_of(now):
        text = f"; it was written with {shape_text(before)}, and goes on with {shape_text(now)}"
    then, training = before.config["training"], now.config["training"]
    parts, parts_now = then.get("sequence_parallel", 1), training.get("sequence_parallel", 1)
    was = then["micro_batch"] or then["global_batch"] * parts // before.world_size
    is_now = config.micro_batch(now.world_size)
    otherwise = "dropout and noise are drawn otherwise than they would have been, which"
    if parts != parts_now:
        text += f". Sequences in {parts_now} parts instead of {parts}: {otherwise} training.sequence_parallel={parts} "
        text += f"with training.micro_batch={was} avoids" if was != is_now else "avoids"
    elif was != is_now:
        text += f". Micro-batches of {is_now} {sample} instead of {was}: {otherwise} training.micro_batch={was} avoids"
    return text

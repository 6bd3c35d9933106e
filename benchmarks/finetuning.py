#!/usr/bin/env python
"""Pre-train a small model by each method, fine-tune each on each task with several seeds: accuracies in one table.

    python -m data_prep enwik8 --out data/enwik8
    python benchmarks/finetuning.py --data data/enwik8 --out runs/finetuning
    python benchmarks/finetuning.py --data data/enwik8 --out runs/trial --tasks sst2 --seeds 1 --methods smoe,dense \\
        --pretrain training.steps=50 --finetune data.max_texts=200 training.epochs=1
    python benchmarks/finetuning.py --data data/enwik8 --out runs/papers --budget papers \\
        --launch "deepspeed --num_gpus 4"

smoe and xmoe have two experts a token, s2moe one on each of its two paths, and dense an MLP as wide as two experts:
all cost the same in training (s2moe less at inference). They differ in nothing else, and every model is fine-tuned by
the same recipe, once for each seed. Each run is one of launcher/pretrain.py or launcher/finetune.py, in --out. The
table, results.md, and results.json, with all that was set, are written anew after every run.

The same command goes on where it was stopped, killed or interrupted: finished runs are kept, an unfinished one
continues from its newest checkpoint. Tasks, methods and seeds may be added later; other settings want another --out.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
try:
    from launcher.common import prepare_environment, quiet_libraries, user_errors
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, str(ROOT))
    from launcher.common import prepare_environment, quiet_libraries, user_errors

prepare_environment()

TASKS = ("sst2", "sst5", "imdb", "banking77")
RESULTS, TABLE, SETTINGS = "results.json", "results.md", "campaign.json"

# SimSMoE's tables 1 and 3: a 63M model of Mistral's form pre-trained on enwik8, plain methods. Accuracies in per cent.
DECIDED = {  # settings of runs that the command line cannot have, and what to give instead
    "pretrain": {
        "name": "",
        "output_dir": ": give --out",
        "data.dir": ": give --data",
        "model.moe.method": ": give --methods",
        "model.moe.experts_per_token": " by its method",
        "model.moe.first_dense": " by its method",
    },
    "finetune": {
        "name": "",
        "output_dir": ": give --out",
        "model.checkpoint": "",
        "seed": ": give --seeds",
        "data.task": ": give --tasks",
        "data.source": ": give --source",
    },
}
PUBLISHED = {
    "smoe": {"bpc": 1.12, "sst2": 81.5, "sst5": 36.9, "imdb": 85.2, "banking77": 74.6},
    "xmoe": {"bpc": 1.13, "sst2": 82.2, "sst5": 34.5, "imdb": 84.3, "banking77": 78.6},
    "stablemoe": {"bpc": 1.13, "sst2": 81.0, "sst5": 36.4, "imdb": 85.0, "banking77": 74.1},
}


@dataclass(frozen=True)
class Budget:
    """What a campaign of this size sets, beside what the method, the task and the command line do."""

    config: Path
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    epochs: dict[str, int] = field(default_factory=dict)  # of each task, instead of its configuration's


BUDGETS = {
    # Some hours on one core: 4.1M bytes of pre-training, few epochs of texts cut to 128 bytes. At a learning
    # rate of 1e-3 fine-tuning stays near chance.
    "small": Budget(
        ROOT / "configs" / "enwik8_two_cores.yaml",
        (
            "model.hidden_size=128",
            "model.num_hidden_layers=3",
            "model.num_attention_heads=2",
            "model.moe.num_experts=8",
            "model.moe.expert_hidden=128",
            "training.global_batch=8",
            "training.expert_parallel=1",
            "evaluation.every=0",
            "evaluation.context=256",
            "evaluation.segment=768",
            "logging.sample_tokens=0",
        ),
        ("data.input_length=128", "optimizer.lr=3e-4", "optimizer.warmup=0.05"),
        {"sst2": 1, "sst5": 3, "imdb": 1, "banking77": 6},
    ),
    "two_cores": Budget(
        ROOT / "configs" / "enwik8_two_cores.yaml",
        ("training.expert_parallel=1",),
        ("data.input_length=256", "optimizer.lr=3e-4", "optimizer.warmup=0.05"),
        dict.fromkeys(TASKS, 5),
    ),
    "papers": Budget(ROOT / "configs" / "methods" / "xmoe.yaml"),
}


@dataclass(frozen=True)
class Run:
    """One run: its directory's name, the launcher and its arguments, and the file that it leaves when finished."""

    name: str
    script: str
    arguments: tuple[str, ...]
    leaves: str
    facts: dict[str, Any] = field(default_factory=dict)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared enwik8, or another corpus of bytes")
    parser.add_argument("--out", type=Path, required=True, help="directory of all runs and of the results")
    parser.add_argument("--methods", default="smoe,s2moe,xmoe,dense", help=f"of {','.join(METHODS)} (default: all)")
    parser.add_argument("--tasks", default="sst2,sst5,banking77", help=f"of {','.join(TASKS)} (default: without imdb)")
    parser.add_argument("--seeds", default="1,2,3", help="of fine-tuning (default: 1,2,3); pre-training has seed 1")
    parser.add_argument("--budget", choices=BUDGETS, default="small", help="sizes and steps (default: small)")
    parser.add_argument(
        "--source", action="append", default=[], metavar="TASK=PATH", help="a local copy of a task's official files"
    )
    parser.add_argument("--pretrain", nargs="+", default=[], metavar="KEY=VALUE", help="settings of pre-training")
    parser.add_argument("--finetune", nargs="+", default=[], metavar="KEY=VALUE", help="settings of fine-tuning")
    parser.add_argument("--launch", default=sys.executable, help="what starts a launcher (default: this Python)")
    options = parser.parse_args(arguments)
    for name, decided in DECIDED.items():
        for override in getattr(options, name):
            key = override.partition("=")[0]
            if key in decided:
                parser.error(f"--{name}: {key} is decided for each run{decided[key]}")
    for name, known in (("methods", tuple(METHODS)), ("tasks", TASKS)):
        given = getattr(options, name).split(",")
        unknown = [value for value in given if value not in known]
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
        setattr(options, name, list(dict.fromkeys(given)))
    try:
        options.seeds = list(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    except ValueError:
        parser.error("--seeds: expected whole numbers with commas between, e.g. 1,2,3")
    options.sources = dict(pair.partition("=")[::2] for pair in options.source)
    if not all(task in TASKS and path for task, path in options.sources.items()):
        parser.error("--source: expected TASK=PATH, e.g. sst2=copies/trees")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that are not done, one after the other; 0 if all are finished."""
    options = parse(arguments)
    quiet_libraries()
    runs = [run for method in options.methods for run in [pretraining(options, method)]]
    runs += [
        finetuning(options, task, method, seed)
        for task in options.tasks
        for seed in options.seeds
        for method in options.methods
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out) as lock:
        remember(options)
        failed: list[str] = []
        lost: set[str] = set()  # methods without a pre-trained model
        start = time.monotonic()
        for number, run in enumerate(runs, 1):
            if (options.out / run.name / run.leaves).exists() or run.facts["method"] in lost:
                continue
            minutes = (time.monotonic() - start) / 60
            print(f"[{number}/{len(runs)}] {run.name}  (after {minutes:.0f} min)", flush=True)
            status = work(run, options, lock)
            if status != 0:
                failed.append(run.name)
                lost |= {run.facts["method"]} if run.script == "pretrain" else set()
                print(f"  ended with status {status}, see {log_of(run, options)}", file=sys.stderr, flush=True)
            if status == STOPPED:
                print("stopped; the same command goes on", flush=True)
                return STOPPED
            write(options, runs)
        write(options, runs)
    print((options.out / TABLE).read_text(encoding="utf-8"))
    if failed:
        print(f"error: {len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


# --- the runs ---------------------------------------------------------------------------------------


def _dense(options: argparse.Namespace) -> list[str]:
    from s2moe.config import load
    from s2moe.config.run import RunConfig

    budget = BUDGETS[options.budget]
    model = load(RunConfig, budget.config, [*budget.pretrain, *options.pretrain]).model
    return [
        "model.moe.method=smoe",
        f"model.moe.first_dense={model['num_hidden_layers']}",
        f"model.intermediate_size={2 * model['moe']['expert_hidden']}",
    ]


METHODS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "smoe": lambda options: ["model.moe.method=smoe", "model.moe.experts_per_token=2"],
    "s2moe": lambda options: ["model.moe.method=s2moe"],
    "xmoe": lambda options: ["model.moe.method=xmoe", "model.moe.experts_per_token=2"],
    "dense": _dense,
}


def pretraining(options: argparse.Namespace, method: str) -> Run:
    """The run that a method's fine-tuning starts from."""
    budget = BUDGETS[options.budget]
    name = f"pretrain-{method}"
    common = [*budget.pretrain, *options.pretrain]
    if method == "dense":  # for which what is set of experts would change nothing
        common = [setting for setting in common if not setting.startswith("model.moe.")]
    settings = [*common, *METHODS[method](options)]
    settings += [f"name={name}", f"data.dir={options.data}", f"output_dir={options.out}"]
    return Run(name, "pretrain", ("--config", str(budget.config), *settings), "hf/config.json", {"method": method})


def finetuning(options: argparse.Namespace, task: str, method: str, seed: int) -> Run:
    """A fine-tuning run."""
    name = f"{task}-{method}-seed{seed}"
    budget = BUDGETS[options.budget]
    epochs = [f"training.epochs={budget.epochs[task]}"] if task in budget.epochs else []
    settings = [*budget.finetune, *epochs, *options.finetune]
    settings += [f"data.source={options.sources[task]}"] if task in options.sources else []
    settings += [f"model.checkpoint={options.out / f'pretrain-{method}' / 'hf'}", f"seed={seed}"]
    settings += [f"name={name}", f"output_dir={options.out}"]
    config = ROOT / "configs" / "finetune" / f"{task}.yaml"
    facts = {"task": task, "method": method, "seed": seed}
    return Run(name, "finetune", ("--config", str(config), *settings), "results.json", facts)


STOPPED = 75  # a run's exit status after a signal, and this one's


def work(run: Run, options: argparse.Namespace, lock: IO[str]) -> int:
    """Run it to its end; a request to stop is handed on, and the run saves a checkpoint. Returns its status."""
    command = [*shlex.split(options.launch), str(ROOT / "launcher" / f"{run.script}.py"), *run.arguments]
    asked = False

    def hand_on(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        child.send_signal(signal.SIGTERM)

    with log_of(run, options).open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        # It holds the lock as well: should this process be killed, nobody starts a second one beside it.
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock.fileno(),), start_new_session=True
        )
        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finished = (options.out / run.name / run.leaves).exists()
    if asked and not finished:
        return STOPPED
    return 0 if finished else status or 1


def log_of(run: Run, options: argparse.Namespace) -> Path:
    """What the run printed."""
    return options.out / f"{run.name}.log"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[IO[str]]:
    """The directory for this process alone."""
    with (out / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"error: another campaign, or a run of it, is at work in {out}: wait for it, or give --out")
        yield lock


def remember(options: argparse.Namespace) -> None:
    """What all runs here have in common; ends with an error where an earlier command had something else."""
    common = {name: getattr(options, name) for name in ("budget", "pretrain", "finetune")}
    common |= {"data": str(options.data.resolve()), "sources": options.sources}
    path = options.out / SETTINGS
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        known = {task: source for task, source in earlier["sources"].items() if task in common["sources"]}
        changed = [name for name in common if name != "sources" and earlier[name] != common[name]]
        changed += ["sources"] if any(common["sources"][task] != source for task, source in known.items()) else []
        if changed:
            told = "; ".join(f"{name} was {earlier[name]}, is {common[name]}" for name in changed)
            sys.exit(f"error: {options.out} was begun with other settings: {told}. Give another --out")
        common["sources"] = earlier["sources"] | common["sources"]
    path.write_text(json.dumps(common, indent=1) + "\n", encoding="utf-8")


# --- what came of them ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretrained:
    """Of a pre-trained model; parameters without the classifier's head."""

    method: str
    bpc: float
    tokens: int
    parameters: int
    active: int
    symbol: str  # what bpc is divided by


def pretrained(directory: Path, method: str) -> Pretrained:
    """The figures of a finished run."""
    from s2moe.models import S2MoEConfig
    from s2moe.models.sizes import model_sizes
    from s2moe.training import metrics_log
    from s2moe.training.run_symbol import symbol_of_run

    events = metrics_log.read(directory / "metrics.jsonl")
    last = [event for event in events if "val/bpc" in event][-1]
    trained = [event for event in events if "train/loss" in event][-1]
    sizes = model_sizes(S2MoEConfig.from_pretrained(directory / "hf"))
    return Pretrained(method, last["val/bpc"], trained["tokens"], sizes.total, sizes.active, symbol_of_run(directory))


def write(options: argparse.Namespace, runs: list[Run]) -> None:
    """results.json and results.md, of what is finished by now."""
    import torch

    from benchmarks.report import header

    done = [run for run in runs if (options.out / run.name / run.leaves).exists()]
    models = [pretrained(options.out / run.name, run.facts["method"]) for run in done if run.script == "pretrain"]
    results = [
        json.loads((options.out / run.name / run.leaves).read_text(encoding="utf-8")) | run.facts
        for run in done
        if run.script == "finetune"
    ]
    content = {
        "header": header(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "commands": [shlex.join([f"launcher/{run.script}.py", *run.arguments]) for run in done],
        "pretrained": [asdict(model) for model in models],
        "finetuned": results,
        "summary": summary(results),
    }
    for name, text in ((RESULTS, json.dumps(content, indent=1) + "\n"), (TABLE, markdown(options, models, results))):
        temporary = options.out / f".tmp-{name}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, options.out / name)


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By method and task: mean and sample standard deviation over seeds of the test accuracy, and how many seeds."""
    answer: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        cell = answer.setdefault(result["method"], {}).setdefault(result["task"], {"accuracies": {}})
        cell["accuracies"][str(result["seed"])] = result["test_accuracy"]
    for tasks in answer.values():
        for cell in tasks.values():
            values = list(cell["accuracies"].values())
            cell["mean"] = statistics.mean(values)
            cell["sd"] = statistics.stdev(values) if len(values) > 1 else None
    return answer


def markdown(options: argparse.Namespace, models: list[Pretrained], results: list[dict[str, Any]]) -> str:
    """The table, what was published, and what was run."""
    from s2moe.data.units import UNKNOWN_SYMBOL, unit_of

    tasks = [task for task in options.tasks if any(result["task"] == task for result in results)]
    found, unit = summary(results), unit_of(models[0].symbol if models else UNKNOWN_SYMBOL)
    lines = [
        f"| method | parameters, M (active) | {unit} | " + " | ".join(f"{task}, %" for task in tasks) + " |",
        "| --- " * (3 + len(tasks)) + "|",
    ]
    for model in models:
        cells = [_cell(found.get(model.method, {}).get(task), len(options.seeds)) for task in tasks]
        size = f"{model.parameters / 1e6:.2f} ({model.active / 1e6:.2f})"
        lines.append(f"| {model.method} | {size} | {model.bpc:.3f} | " + " | ".join(cells) + " |")
    for method, figures in PUBLISHED.items():
        cells = [f"{figures[task]:.1f}" for task in tasks]
        lines.append(f"| published: {method} | 63 | {figures['bpc']:.2f} | " + " | ".join(cells) + " |")
    text = [*lines, ""]
    if models:
        seed = next((given[5:] for given in reversed(options.pretrain) if given.startswith("seed=")), "1")
        text.append(f"Pre-training: {models[0].tokens:,} tokens of {options.data}, seed {seed}; {unit} of valid.")
    for task in tasks:
        first = next(result for result in results if result["task"] == task)
        texts = " / ".join(f"{first['texts'][split]:,}" for split in ("train", "validation", "test"))
        notes = "; ".join(first["notes"])
        text.append(f"{task}: {texts} texts, {first['steps']:,} steps, the best epoch by validation; {notes}.")
    text.append(
        "Accuracies are means ± sample standard deviations over seeds of fine-tuning. Published: SimSMoE, tables 1 and "
        "3, plain methods; its models are larger and saw far more text, so the rows are for orientation only."
    )
    return "\n".join(text) + "\n"


def _cell(cell: dict[str, Any] | None, seeds: int) -> str:
    if cell is None:
        return "-"
    values = len(cell["accuracies"])
    mean = f"{100 * cell['mean']:.1f}"
    spread = "" if cell["sd"] is None else f" ± {100 * cell['sd']:.1f}"
    return mean + spread + ("" if values == seeds else f" ({values} of {seeds} seeds)")


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())

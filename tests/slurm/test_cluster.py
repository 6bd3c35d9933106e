"""The batch scripts on a real Slurm cluster: two nodes, preemption, time limit, a lost node, a sweep."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from s2moe.training.checkpoint import list_complete
from tests.data.classification_files import glue
from tests.finetuning.finetune_jobs import language_model
from tests.training.jobs import tiny_run

from .cluster import NODES, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 160
SETTINGS = [
    f"training.steps={STEPS}",
    "training.expert_parallel=2",
    "training.micro_batch=1",
    "checkpoint.every=0",
    "evaluation.every=0",
    "logging.tensorboard=false",
]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]


class Run:
    """A run of two processes, one on each node, submitted from a directory of its own."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.cluster, self.home, self.directory = cluster, home, home / "runs" / "tiny"
        self.number = ""

    def submit(self, *overrides: str, options: tuple[str, ...] = ()) -> None:
        config, places = tiny_run(self.home)
        arguments = ["--config", config, *places, *SETTINGS, *overrides]
        self.number = self.cluster.submit(self.home, "pretrain.sbatch", [*TWO_NODES, *options], arguments)

    def metrics(self) -> list[dict[str, Any]]:
        """Log events without what measures time."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{k: v for k, v in event.items() if _is_exact(k)} for event in events]

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait(
            lambda: bool(self.metrics()) and self.metrics()[-1]["step"] >= step, 120, f"step {step}\n{self.output()}"
        )

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return [found.state.step for found in list_complete(self.directory / "checkpoints")]

    def output(self) -> str:
        """What the batch script printed."""
        path = self.home / f"slurm-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def rank(self, rank: int) -> str:
        """The log of a process."""
        return (self.home / "logs" / f"pretrain-{self.number}" / f"rank-{rank}.log").read_text()

    def wait_for_restart(self, count: int) -> None:
        def restarted() -> bool:
            return int(self.cluster.job(self.number)["Restarts"]) >= count

        self.cluster.wait(restarted, 120, f"restart {count}\n{self.output()}")

    def require_finished(self) -> None:
        job = self.cluster.wait_for_end(self.number)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.output()


def _is_exact(name: str) -> bool:
    return not name.startswith(("time/", "memory", "timing/", "phase")) and not any(
        part in name for part in ("seconds", "per_second", "mfu", "time")
    )


def assert_same_run(run: Run, reference: Run) -> None:
    """Every logged figure and every final weight is equal, bit for bit."""
    assert run.metrics() == reference.metrics()
    ours, theirs = (load_file(of.directory / "hf" / "model.safetensors") for of in (run, reference))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.equal(theirs[name]), name


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(cluster, tmp_path_factory.mktemp("uninterrupted"))
    run.submit()
    run.require_finished()
    return run


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Run:
    return Run(cluster, tmp_path)


def test_a_training_on_two_nodes(uninterrupted: Run) -> None:
    assert [event["step"] for event in uninterrupted.metrics() if "train/loss" in event] == list(range(1, STEPS + 1))
    assert "bits per byte" in uninterrupted.rank(0)
    assert uninterrupted.rank(1).count("error") == 0
    assert "MASTER_ADDR=127.0.0.1\n" in uninterrupted.output()
    assert "2 nodes x 1 processes x 1 threads" in uninterrupted.output()


def test_stopped_by_a_signal_and_then_by_a_killed_process(run: Run, uninterrupted: Run) -> None:
    run.submit()
    run.wait_for_step(30)
    run.cluster.run("scancel", "--signal=USR1", "--batch", run.number)
    run.wait_for_restart(1)
    (step,) = run.saved()
    assert 30 <= step < STEPS
    assert "exit code 75" in run.output()
    assert f"after step {step}; the same command continues" in run.rank(0)

    run.wait_for_step(step + 20)
    assert f"continuing from {run.directory / 'checkpoints' / f'step-{step:08d}'}, step {step}" in run.rank(0)
    os.kill(_process(run, "1"), signal.SIGKILL)
    run.wait_for_restart(2)
    assert "restart 1 of 3" in run.output()

    run.require_finished()
    assert_same_run(run, uninterrupted)


def test_a_killed_node(run: Run, uninterrupted: Run) -> None:
    run.submit("checkpoint.every=20")
    run.wait_for_step(50)
    run.cluster.kill_node(NODES[1])
    run.cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=killed")
    run.wait_for_restart(1)
    run.cluster.start_node(NODES[1])
    run.cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    run.require_finished()
    assert "continuing from" in run.rank(0)
    assert_same_run(run, uninterrupted)


def test_the_time_limit_without_a_warning_and_then_scancel(run: Run) -> None:
    run.submit("training.steps=1000000", options=("--time=1", "--signal=B:USR1@0"))
    run.wait_for_restart(1)
    run.cluster.run("scontrol", "update", f"JobId={run.number}", "TimeLimit=60")
    (step,) = run.saved()
    run.wait_for_step(step + 5)
    assert f"continuing from {run.directory / 'checkpoints' / f'step-{step:08d}'}, step {step}" in run.rank(0)
    events = [event["step"] for event in run.metrics() if "train/loss" in event]
    assert events == list(range(1, events[-1] + 1))

    run.cluster.run("scancel", run.number)
    assert run.cluster.wait_for_end(run.number)["JobState"] == "CANCELLED"  # and it is not started again
    assert "not requeued from here" in run.output()


def test_a_mistake_is_told_and_not_tried_again(run: Run) -> None:
    run.submit("training.stepz=3")
    job = run.cluster.wait_for_end(run.number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert run.output().count("error: training.stepz: unknown key; did you mean training.steps?") >= 1


def test_a_mistake_of_one_rank_is_not_tried_again(run: Run) -> None:
    """srun kills the other one, and its status is then 137 or 143."""
    python = run.home / "python"
    python.write_text(
        "#!/bin/bash\n"
        'if [[ $SLURM_PROCID == 1 ]]; then sleep 2; echo "error: the loss is not finite"; exit 3; fi\n'
        "exec sleep 600\n"
    )
    python.chmod(0o755)
    run.submit(options=(f"--export=ALL,S2MOE_PYTHON={python}",))
    job = run.cluster.wait_for_end(run.number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "0"), run.output()
    assert "the run ended with status 3: not started again" in run.output()
    assert "error: the loss is not finite" in run.output()
    assert "task 1: Exited with exit code 3" in run.output()


def test_a_sweep_of_two_methods_and_two_seeds(cluster: Cluster, tmp_path: Path) -> None:
    config, places = tiny_run(tmp_path)
    number = cluster.submit(
        tmp_path,
        "sweep.sbatch",
        ["--array=0-3", "--cpus-per-task=1"],
        ["--methods", "smoe,s2moe", "--seeds", "1,2", "--config", config, *places, "logging.tensorboard=false"],
    )
    for element in range(4):
        job = cluster.wait_for_end(f"{number}_{element}")
        assert job["JobState"] == "COMPLETED", (tmp_path / f"slurm-{number}_{element}.out").read_text()
    finished = {
        (path.parent.parent.name, json.loads((path.parent / "config.json").read_text())["moe"]["method"])
        for path in (tmp_path / "runs").glob("*/hf/model.safetensors")
    }
    assert finished == {
        ("tiny-smoe-seed1", "smoe"),
        ("tiny-smoe-seed2", "smoe"),
        ("tiny-s2moe-seed1", "s2moe"),
        ("tiny-s2moe-seed2", "s2moe"),
    }


def test_fine_tuning_on_two_nodes_is_stopped_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    language_model(tmp_path / "hf")
    glue(tmp_path / "glue", (400, 60))
    settings = {
        "name": "tuned",
        "data.source": tmp_path / "glue",
        "data.official": "false",
        "data.input_length": 32,
        "model.checkpoint": tmp_path / "hf",
        "output_dir": tmp_path / "runs",
        "training.batch": 4,
        "training.epochs": 4,
        "logging.every": 5,
    }
    number = cluster.submit(
        tmp_path,
        "finetune.sbatch",
        TWO_NODES,
        ["--config", str(ROOT / "configs/finetune/sst2.yaml"), *(f"{key}={value}" for key, value in settings.items())],
    )
    log, output = tmp_path / "runs" / "tuned" / "metrics.jsonl", tmp_path / f"slurm-{number}.out"
    cluster.wait(lambda: log.exists() and log.read_text().count('"step"') > 2, 180, "the first steps")
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    cluster.wait(lambda: int(cluster.job(number)["Restarts"]) >= 1, 120, "the restart")
    assert "exit code 75" in output.read_text()
    job = cluster.wait_for_end(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output.read_text()
    assert json.loads((log.parent / "results.json").read_text())["task"] == "sst2"
    assert (log.parent / "hf" / "model.safetensors").exists()


def _process(run: Run, rank: str) -> int:
    """The process of a rank of a running job."""
    wanted = {f"SLURM_JOB_ID={run.number}".encode(), f"SLURM_PROCID={rank}".encode(), b"SLURM_STEP_ID=0"}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((path / "environ").read_bytes().split(b"\0"))
            if wanted <= variables and b"launcher/pretrain.py" in (path / "cmdline").read_bytes():
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} of job {run.number} does not run")

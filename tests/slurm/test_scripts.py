"""What the batch scripts would launch, and that they are sound; without Slurm."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/quickstart.yaml"
SCRIPTS = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))


def bash(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run bash in the clone, with nothing of a surrounding job and no site file."""
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "S2MOE", "NCCL", "GLOO", "OMP"))}
    environment = inherited | {"S2MOE_SITE": "/dev/null", "S2MOE_PYTHON": "python3"} | variables
    return subprocess.run(
        ["bash", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def dry_run(script: str, *arguments: str, **variables: str) -> list[str]:
    """The lines that a dry run prints."""
    result = bash(f"slurm/{script}", "--dry-run", *arguments, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return [line.strip() for line in result.stdout.splitlines()]


@pytest.mark.parametrize("nodes", [["-N", "4"], ["-N4"], ["--nodes", "4"]], ids=" ".join)
@pytest.mark.parametrize("gpus", ["8", "a100:8"])
def test_a_dry_run_takes_what_sbatch_takes(nodes: list[str], gpus: str) -> None:
    config = str(ROOT / "configs" / "quickstart.yaml")
    shape = ["--gpus-per-node", gpus, "-c12"]
    wanted = dry_run("pretrain.sbatch", "--nodes=4", "--gpus-per-node=8", "--cpus-per-task=12", "--config", config)
    assert dry_run("pretrain.sbatch", *nodes, *shape, "--config", config) == wanted


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    assert bash("-n", str(path)).stderr == ""


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_a_job_may_be_stopped_and_requeued(path: Path) -> None:
    lines = path.read_text().splitlines()
    for option in ("--signal=B:USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}" in lines


def test_one_process_a_gpu(tmp_path: Path) -> None:
    config = tmp_path / "x y"
    config.touch()
    lines = dry_run(
        "pretrain.sbatch", "--nodes=4", "--gpus-per-node", "8", "--cpus-per-task=12", "--config", str(config)
    )
    assert lines[-1] == (
        "srun --nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=12 --kill-on-bad-exit=1 "
        "--output=logs/pretrain-0/rank-%t.log --open-mode=append python3 "
        f"{ROOT}/launcher/pretrain.py --config {tmp_path}/x\\ y"
    )
    assert "OMP_NUM_THREADS=12" in lines
    assert "4 nodes x 8 processes x 12 threads" in lines[0]


def test_nodes_without_gpus() -> None:
    lines = dry_run("pretrain.sbatch", "--nodes=2", "--ntasks-per-node=2", "--config", CONFIG)
    assert "srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=1 " in lines[-1]


def test_fine_tuning_starts_its_own_program() -> None:
    lines = dry_run("finetune.sbatch", "--gpus-per-node=2", "--cpus-per-task=3", "--config", CONFIG, "name=y")
    assert lines[-1].startswith("srun --nodes=1 --ntasks=2 --ntasks-per-node=2 --cpus-per-task=3 ")
    assert lines[-1].endswith(
        f" --output=logs/finetune-0/rank-%t.log --open-mode=append python3 "
        f"{ROOT}/launcher/finetune.py --config {CONFIG} name=y"
    )


def test_container_and_site(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("export NCCL_SOCKET_IFNAME=ib0\nMASTER_ADDR=first-ib\nS2MOE_SRUN_OPTIONS='--cpu-bind=none'\n")
    container = "apptainer exec --nv image.sif"
    inherited = {"MASTER_ADDR": "stale", "MASTER_PORT": "1", "RANK": "7"}
    lines = dry_run("pretrain.sbatch", "--config", "x", S2MOE_SITE=str(site), S2MOE_CONTAINER=container, **inherited)
    assert f"--open-mode=append --cpu-bind=none {container} python3 {ROOT}/launcher" in lines[-1]
    assert {"NCCL_SOCKET_IFNAME=ib0", "MASTER_ADDR=first-ib"} <= set(lines)
    assert "MASTER_PORT=1" not in lines


def test_a_sweep_has_a_run_for_each_pair() -> None:
    lines = dry_run("sweep.sbatch", "--methods=smoe,s2moe", "--seeds", "1,2", "--config", CONFIG, "a.b=c")
    launched = [line.partition("pretrain.py ")[2] for line in lines if line.startswith("srun ")]
    assert "--array=0-3" in lines[0]
    assert launched == [
        f"--config {CONFIG} a.b=c model.moe.method={method} seed={seed} name=quickstart-{method}-seed{seed}"
        for method in ("smoe", "s2moe")
        for seed in (1, 2)
    ]
    logs = [line.partition("--output=")[2].split()[0] for line in lines if line.startswith("srun ")]
    assert logs == [f"logs/sweep-0_{number}/rank-%t.log" for number in range(4)]


def test_spaces_between_methods_are_in_no_name() -> None:
    lines = dry_run("sweep.sbatch", "--methods", "smoe, s2moe", "--seeds=1, 2", "--config", CONFIG)
    names = [line.partition(" name=")[2] for line in lines if line.startswith("srun ")]
    assert names == [f"quickstart-{method}-seed{seed}" for method in ("smoe", "s2moe") for seed in (1, 2)]


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_help_is_the_head_of_the_script(path: Path, option: str) -> None:
    result = bash(str(path), option)
    assert (result.returncode, result.stderr) == (0, "")
    head = path.read_text().partition("\n#SBATCH")[0].splitlines()[1:]
    assert result.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["pretrain.sbatch"], {}, "error: submit this script: sbatch slurm/"),
        (["pretrain.sbatch", "--dry-run", "--nodes=two"], {}, "error: --nodes: must be a number, got 'two'"),
        (["pretrain.sbatch", "--dry-run"], {"S2MOE_SITE": "nowhere"}, "error: S2MOE_SITE: there is no file nowhere"),
        (
            ["pretrain.sbatch", "--dry-run", "--gpus-per-node=8", "--config", CONFIG],
            {"SLURM_CPUS_ON_NODE": "1"},
            "error: the job has 1 CPUs on a node for 8 processes: submit with --ntasks-per-node=8 --cpus-per-task=N",
        ),
        (["sweep.sbatch", "--dry-run", "--seeds=1"], {}, "error: give --methods a,b,... and --seeds 1,2,..."),
        (["pretrain.sbatch", "--dry-run"], {}, "error: --config is missing"),
        (["finetune.sbatch", "--dry-run", "--config=no.yaml"], {}, "error: --config: there is no file 'no.yaml'"),
        (["sweep.sbatch", "--dry-run", "--methods=smoe", "--seeds=1"], {}, "error: --config is missing"),
        (
            ["sweep.sbatch", "--dry-run", "--methods=smoe,s2moe", "--seeds=1,2", "--config", "no.yaml"],
            {},
            "error: --config: there is no file 'no.yaml'",
        ),
        (
            ["sweep.sbatch", "--dry-run", "--methods=smoe,s2moe,smoe", "--seeds=1", "--config", CONFIG],
            {},
            "error: --methods: smoe is given twice",
        ),
        (
            ["sweep.sbatch", "--dry-run", "--methods=smoe", "--seeds=1,12,1", "--config", CONFIG],
            {},
            "error: --seeds: 1 is given twice",
        ),
        (
            ["sweep.sbatch", "--dry-run", "--methods=smoe,s2mo", "--seeds=1", "--config", CONFIG],
            {},
            "error: --methods: 's2mo' is none",
        ),
        (
            ["sweep.sbatch", "--dry-run", "--methods=smoe", "--seeds=1,x", "--config", CONFIG],
            {},
            "error: --seeds: must be whole numbers with commas between, got 'x'",
        ),
        (
            ["sweep.sbatch", "--dry-run", "--methods=smoe", "--seeds=1", "--config", CONFIG, "seed=3"],
            {},
            "error: seed is decided for each run: give --seeds and --methods",
        ),
        (
            ["sweep.sbatch", "--dry-run", "--methods=smoe", "--seeds=1", "--config", CONFIG, "model.moe.method=s2moe"],
            {},
            "error: model.moe.method is decided for each run: give --seeds and --methods",
        ),
        (
            ["pretrain.sbatch", "--dry-run", "--gpus=4", "--config", CONFIG],
            {},
            "error: --gpus is not an option of launcher/pretrain.py in a job",
        ),
        (
            ["sweep.sbatch", "--methods=smoe,s2moe", "--seeds=1", "--config", CONFIG],
            {},
            "a sweep of 2 runs is a job array: sbatch --array=0-1",
        ),
        (
            ["sweep.sbatch", "--methods=smoe,s2moe", "--seeds=1", "--config", CONFIG],
            {"SLURM_ARRAY_TASK_ID": "2"},
            "error: the sweep has 2 runs, number 2 is none of them: sbatch --array=0-1",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], variables: dict[str, str], message: str) -> None:
    result = bash(f"slurm/{arguments[0]}", *arguments[1:], **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_that_somebody_listens_on_is_passed_over() -> None:
    def port(job: int) -> int:
        return int(bash("-c", f"root=.; source slurm/common.sh; free_port {job}").stdout)

    job = next(number for number in range(4000, 4100) if port(number) == 10000 + number)
    with socket.socket() as server:
        server.bind(("", 10000 + job))
        server.listen()
        assert port(job) == 10000 + job + 4999
    assert port(12_345_678) < 32768


# Stand-ins for Slurm's programs. What srun tells, its status, and what rank 0 logs come from the environment.
SRUN = """#!/bin/bash
for option; do case $option in --output=*) log=${option#--output=} ;; esac; done
echo "$LOGGED" >>"${log/\\%t/0}"
echo "$TOLD" >&2
exit "$STATUS"
"""
SCONTROL = """#!/bin/bash
case $1 in show) echo 127.0.0.1 JobState=RUNNING ;; esac
"""


def job(folder: Path, status: int, told: str, logged: str = "") -> subprocess.CompletedProcess[str]:
    """A start of a job whose srun ends so; with the logs of the starts before."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    variables = {"STATUS": str(status), "TOLD": told, "LOGGED": logged, "S2MOE_LOGS": str(folder / "logs")}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "127.0.0.1"}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    return bash("slurm/pretrain.sbatch", "--config", CONFIG, **variables, **slurm, **path)


@pytest.mark.parametrize("own", [2, 3])
@pytest.mark.parametrize("highest", [4, 137, 143])
def test_a_rank_that_failed_by_itself_counts_whatever_became_of_the_others(
    tmp_path: Path, own: int, highest: int
) -> None:
    told = f"srun: error: n1: task 1: Exited with exit code {own}\nsrun: error: n0: task 0: Exited with exit code 4"
    ended = job(tmp_path, highest, told, "error: the loss is not finite")
    assert ended.returncode == own
    assert f"the run ended with status {own}: not started again" in ended.stdout
    assert "error: the loss is not finite" in ended.stdout
    assert told in ended.stderr
    assert "requeued" not in ended.stdout


def test_a_lost_process_is_started_again_while_the_run_gets_on(tmp_path: Path) -> None:
    told = "srun: error: n1: task 1: Killed\nsrun: error: n0: task 23: Exited with exit code 23"
    for restart in (1, 2, 3):
        ended = job(tmp_path, 137, told)
        assert ended.returncode == 0
        assert f"restart {restart} of 3" in ended.stdout
    for restart in (1, 2, 3):  # the checkpoint is another one than before
        assert f"restart {restart} of 3" in job(tmp_path, 137, told, "continuing from runs/x/step-9, step 9").stdout
    ended = job(tmp_path, 137, told, "continuing from runs/x/step-9, step 9; reshaped")
    assert ended.returncode == 137
    assert "so it was in 3 starts before: giving up" in ended.stdout
    assert "restart 1 of 3" in job(tmp_path, 137, told, "continuing from runs/x/step-12, step 12").stdout

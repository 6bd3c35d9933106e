"""A wheel works without the clone and adds one name to an environment; the source distribution is whole."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from s2moe import commands

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("s2moe", "launcher", "data_prep", "configs", "benchmarks", "docs", "slurm", "pyproject.toml", "setup.py")
FILES = ("MANIFEST.in", "README.md", "LICENSE", "requirements.lock", "Makefile")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def scripts() -> dict[str, str]:
    return project()["scripts"]


def test_ranges_of_dependencies_end_and_hold_what_is_locked() -> None:
    """A release that nothing here was tested with is not installed by itself."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = {line.split("==")[0].lower(): line.split("==")[1].split()[0] for line in lines if "==" in line}
    for text in project()["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[wanted.name.lower()]), text
        assert any(part.operator in ("<", "==", "~=") for part in wanted.specifier), text


def test_every_launcher_has_a_command() -> None:
    launchers = {path.stem for path in (ROOT / "launcher").glob("*.py")} - {"__init__", "common"}
    assert scripts() == {
        f"s2moe-{name.replace('_', '-')}": f"s2moe.commands:{name}" for name in (*launchers, "data_prep")
    }
    assert all(callable(getattr(commands, name)) for name in (*launchers, "data_prep"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both distributions; built where the clone is not touched, and nothing is fetched."""
    directory = tmp_path_factory.mktemp("built")
    source = directory / "source"
    source.mkdir()
    for name in (*SOURCE, *FILES):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, source / name)
    build = "from setuptools import build_meta as b; b.build_wheel('..'); b.build_sdist('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.slow
def test_the_source_distribution_has_what_a_clone_has(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "configs/quickstart.yaml",
        "docs/running.md",
        "slurm/pretrain.sbatch",
        "requirements.lock",
        "setup.py",
    ):
        assert name in names


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_works_by_itself(built: Path, tmp_path: Path) -> None:
    (path,) = built.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    assert sorted(name.partition("-")[0] for name in os.listdir(site)) == ["s2moe", "s2moe"]  # and its dist-info
    entries = configparser.ConfigParser()
    entries.read(next(site.glob("*.dist-info")) / "entry_points.txt")
    assert dict(entries["console_scripts"]) == scripts()

    lines = [
        "train_vision --list-tables",
        "pretrain --config configs/quickstart.yaml --dry-run",
        "plan --config configs/large_10b.yaml --top 1",
        "data_prep embedded --out embedded",
        "doctor --output runs",
    ]
    program = (
        "import shlex, sys\nfrom s2moe import commands\n"
        f"for line in {lines!r}:\n"
        "    command, *sys.argv[1:] = shlex.split(line)\n"
        "    try:\n        getattr(commands, command)()\n"
        "    except SystemExit as end:\n        assert not end.code, line\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(  # in a directory without a clone
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for printed in ("mnist", "parameters", "tokens/s", "torch"):
        assert printed in done.stdout, printed
    assert '"command": "s2moe-data-prep embedded' in (tmp_path / "embedded" / "metadata.json").read_text()

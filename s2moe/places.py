"""Where what comes with the project lies: in a clone beside this package, in an installed wheel inside it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CARRIED = _PACKAGE / "_clone"  # setup.py puts it into a wheel
IN_CLONE = not _CARRIED.is_dir()
ROOT = _PACKAGE.parent if IN_CLONE else _CARRIED  # launcher/, data_prep/, configs/, benchmarks/results, pyproject.toml
DATA_PREP = "python -m data_prep" if IN_CLONE else "s2moe-data-prep"


def find(path: Path) -> Path:
    """A file as named, or of that name in the project where there is none here: configs/quickstart.yaml."""
    return ROOT / path if not path.exists() and (ROOT / path).is_file() else path

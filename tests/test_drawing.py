"""Pictures are drawn beside pyplot, whose backend a notebook or a user has chosen."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from s2moe import drawing
from s2moe.training.figure import draw_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing pyplot, which would load the backend, fails."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


def test_a_backend_that_is_not_there_is_no_obstacle(tmp_path: Path) -> None:
    """As Jupyter and Colab export it to the programs that a notebook starts, in environments without it."""
    program = (
        "import os, runpy, sys; from pathlib import Path; sys.modules['matplotlib.pyplot'] = None\n"
        f"drawing = runpy.run_path({str(ROOT / 's2moe' / 'drawing.py')!r})\n"
        "figure, axis = drawing['subplots'](figsize=(1, 1)); axis.plot([0, 1])\n"
        "drawing['save'](figure, Path('a.png')); print(os.environ['MPLBACKEND'])"
    )
    backend = "module://not_installed.backend_inline"
    environment = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, backend + "\n"), done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_drawn_without_pyplot(tmp_path: Path) -> None:
    events = [
        {"step": step, "tokens": step, "train/loss": 2.0, "train/bpc": 2.9, "val/bpc": 3.0, "layer_0/load": [1.5, 0.5]}
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert draw_run(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_figures_are_drawn_as_asked(tmp_path: Path) -> None:
    figure, axes = drawing.subplots(1, 2, figsize=(2.0, 1.0), squeeze=False, sharey=True)
    axes[0, 1].plot([0, 1], color=drawing.colour_map("viridis")(0.5))
    path = drawing.save(figure, tmp_path / "a.png")
    header = path.read_bytes()[:24]
    assert [int.from_bytes(header[place : place + 4], "big") for place in (16, 20)] == [220, 110]


def test_all_pictures_are_drawn_so() -> None:
    used = [
        path.relative_to(ROOT).as_posix()
        for folder in ("s2moe", "launcher", "data_prep", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"import matplotlib|from matplotlib", path.read_text(encoding="utf-8"))
    ]
    assert used == ["s2moe/drawing.py"]

"""The commands of an installed package: s2moe-pretrain is launcher/pretrain.py, s2moe-data-prep `python -m data_prep`.

Under another starter give the command's file: `torchrun --nproc-per-node 8 $(which s2moe-pretrain) --config ...`.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable

from s2moe.places import ROOT


def _launcher(name: str) -> Callable[[], None]:
    def start() -> None:
        _importable()
        runpy.run_path(str(ROOT / "launcher" / f"{name}.py"), run_name="__main__")

    return start


def data_prep() -> None:
    """`python -m data_prep`."""
    _importable()
    runpy.run_module("data_prep", run_name="__main__", alter_sys=True)


def _importable() -> None:
    sys.path.insert(0, str(ROOT))  # for this process alone: launcher and data_prep are nobody else's names


pretrain, finetune, train_vision = _launcher("pretrain"), _launcher("finetune"), _launcher("train_vision")
evaluate, compare, generate = _launcher("evaluate"), _launcher("compare"), _launcher("generate")
export, supervise, doctor, plan = _launcher("export"), _launcher("supervise"), _launcher("doctor"), _launcher("plan")

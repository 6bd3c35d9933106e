#!/usr/bin/env python
"""Check a machine or an allocation before a long job, and say what to fix.

    python launcher/doctor.py                                                this machine, one process
    torchrun --standalone --nproc-per-node 8 launcher/doctor.py              with communication between processes
    deepspeed launcher/doctor.py --config configs/large_10b.yaml             is there room for its checkpoints?
    srun --ntasks-per-node 8 python launcher/doctor.py --output /scratch/me  the whole allocation
    ... --json doctor.json                                                   also for launcher/plan.py --measured

Start it as the job itself will be started: same launcher, same modules, same container.

Exit status: 0 all well or only warnings, 1 something failed, 2 an option or a setting is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

NEEDED = ("torch", "numpy", "yaml", "transformers", "huggingface_hub", "packaging")  # to look at all


def main(arguments: list[str]) -> int:
    """Examine, print, and answer the exit status."""
    from launcher.common import Parser

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory that runs write to (default: the config's, or runs)")
    parser.add_argument("--config", help="of the run to come, for the size of its checkpoints")
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds to wait for other processes (default: 120)"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # of the deepspeed launcher
    parser.add_argument("overrides", nargs="*", help="section.key=value, on top of --config")
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and not options.config:
        parser.error(f"{options.overrides[0]} needs --config: it changes a setting of the run to come")
    from s2moe.config import ConfigError, load
    from s2moe.config.run import RunConfig
    from s2moe.doctor.examine import examine, table
    from s2moe.training.processes import stop_processes

    config = load(RunConfig, options.config, options.overrides) if options.config else None
    output = options.output or Path(config.output_dir if config else "runs")
    examination = examine(output, config, options.timeout)
    if os.environ.get("RANK", "0") == "0" or not examination.measured:
        print(table(examination), flush=True)
        if options.json:
            import json

            content = json.dumps(examination.as_json(), indent=1) + "\n"
            try:
                options.json.write_text(content, encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--json: cannot write {options.json}: {error.strerror}") from error
    stop_processes()
    return int(examination.status == "fail")


def start() -> int:
    """The same without the parts of the environment that it is to examine."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"FAIL  {sys.executable} has no {', '.join(missing)}\n"
            "      -> make setup, then use .venv/bin/python; or pip install -r requirements.lock"
        )
        return 1
    try:
        from launcher.common import prepare_environment, user_errors
    except ImportError:  # started as a file, from any directory
        sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        from launcher.common import prepare_environment, user_errors
    prepare_environment()
    from s2moe.output import guard_output

    guard_output()
    with user_errors():
        return main(sys.argv[1:])
    return 1


if __name__ == "__main__":
    sys.exit(start())

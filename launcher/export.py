#!/usr/bin/env python
"""Write the weights of a run's newest checkpoint as a Hugging Face directory.

    python launcher/export.py --checkpoint runs/quickstart --out exported

A finished run already has one, hf/. This serves a run that is still going on, or one checkpoint of it.

    python launcher/export.py reshape --checkpoint runs/quickstart               for its next start
    python launcher/export.py reshape --checkpoint runs/quickstart --out runs/b  for a run of its own

rewrites the whole checkpoint, optimizer included, so that any number of processes, expert-parallel degree and
ZeRO stage can continue it. A run that is started in another shape does so by itself; this does it ahead of time,
in one process, where no GPU waits.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

try:
    from launcher.common import prepare_environment, run
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import prepare_environment, run

prepare_environment()


def main(arguments: list[str]) -> None:
    """Read a checkpoint in this one process and write it out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("weights", "reshape"), default="weights", help="default: weights")
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory, or one of its checkpoints")
    parser.add_argument(
        "--out",
        type=Path,
        help="directory to write (default: hf/ in the run directory; with reshape: beside the checkpoint)",
    )
    parser.add_argument("--data", type=Path, help="corpus whose tokenizer goes along (default: the run's)")
    options = parser.parse_args(arguments)
    if options.what == "reshape":
        if options.data is not None:
            parser.error("--data does not go with reshape")
        from s2moe.training.standalone import reshape_checkpoint

        print(f"wrote {reshape_checkpoint(options.checkpoint, options.out)}")
        return
    from s2moe.training.standalone import export_checkpoint

    print(f"wrote {export_checkpoint(options.checkpoint, options.out, options.data)}")


if __name__ == "__main__":
    run(main)

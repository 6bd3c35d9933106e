#!/usr/bin/env python
"""Compare trained models: with fewer experts per token than trained, or run against run.

python launcher/compare.py slim --checkpoint runs/enwik8-s2moe-flop-matched --data data/enwik8
python launcher/compare.py slim --checkpoint runs/s2moe runs/smoe --data data/enwik8 --out runs/slim
python launcher/compare.py runs runs/s2moe runs/smoe --out runs/comparison

`COMMAND --help` explains each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

try:
    from launcher.common import Parser, prepare_environment, run
    from launcher.evaluate import add_scoring_arguments, not_negative, numbers, positive, require_sliding
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import Parser, prepare_environment, run
    from launcher.evaluate import add_scoring_arguments, not_negative, numbers, positive, require_sliding

prepare_environment()

SLIM = """\
What does a model lose with fewer experts per token, and what does it save?

python launcher/compare.py slim --checkpoint runs/enwik8-s2moe-flop-matched --data data/enwik8
python launcher/compare.py slim --checkpoint runs/s2moe runs/smoe --data data/enwik8 --out runs/slim \\
    --experts-per-token 1,2,4,8 --max-symbols 500000 --repeats 30

For each k' and for the trained k: bits per byte, character or word of the corpus; multiply-accumulates of a token by
four ways of counting them, since a share that is saved depends on what is counted; and the time of a forward pass, all
checkpoints and k' in turns, for which the weights of all checkpoints are in memory at once. --memory adds a fifth way
of counting: that of a Transformer-XL, whose attention over a memory makes the experts a smaller share. Written are
slim.json, slim.md (the table) and slim.png (bits against both). A k' that a checkpoint's router does not know is left
out with the reason.

Times mean something on a machine that does nothing else. On small models and short sequences much of a forward pass
does not depend on k': choose --latency-batch and --latency-tokens as in use.
"""
RUNS = """\
Runs of launcher/pretrain.py side by side: validation at the end, parameters, tokens, speed, and the curves.

python launcher/compare.py runs runs/s2moe runs/smoe --out runs/comparison

Written are runs.json, runs.md (the table) and runs.png (validation against tokens). Runs on different corpora or
splits are refused, for their figures do not compare.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    slim = commands.add_parser(
        "slim", help="one checkpoint or several at k' experts per token", description=SLIM, formatter_class=raw
    )
    slim.add_argument(
        "--checkpoint", type=Path, nargs="+", required=True, help="run directories, hf/ directories or checkpoints"
    )
    slim.add_argument("--data", type=Path, required=True, help="prepared corpus")
    slim.add_argument("--split", default="test", help="split to score (default: test)")
    slim.add_argument(
        "--experts-per-token",
        type=numbers,
        default=[1, 2, 4, 8, 16],
        dest="experts_per_token_list",
        metavar="K,K,...",
        help="k' to compare with the trained k (default: 1,2,4,8,16)",
    )
    slim.add_argument("--out", type=Path, help="directory of the report (default, for one run: slim/ in there)")
    slim.add_argument(
        "--memory",
        type=not_negative,
        metavar="POSITIONS",
        help="count MACs also as of a Transformer-XL with so long a memory (the lineage's: 512)",
    )
    add_scoring_arguments(slim, "all")
    times = slim.add_argument_group("latency")
    times.add_argument(
        "--repeats", type=positive, default=20, help="rounds, in each of which every k' is timed (default: 20)"
    )
    times.add_argument("--latency-batch", type=positive, default=8, help="sequences of such a pass (default: 8)")
    times.add_argument(
        "--latency-tokens", type=positive, help="tokens of a sequence (default: the training sequence length)"
    )
    runs = commands.add_parser("runs", help="runs side by side", description=RUNS, formatter_class=raw)
    runs.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    runs.add_argument("--out", type=Path, required=True, help="directory of the report")
    options = parser.parse_args(arguments)
    if options.command == "slim":
        require_sliding(slim, options)
    options.experts_per_token = None  # what an evaluation would be given: as trained
    return options


def main(arguments: list[str]) -> None:
    """Compare, print the table and a line of JSON that names the files."""
    options = parse(arguments)
    if options.command == "slim":
        from s2moe.training.slim import compare_slim
        from s2moe.training.slim_report import table

        report = compare_slim(options)
        print(table(report))
    else:
        from s2moe.training.compare_runs import compare_runs
        from s2moe.training.compare_runs import table as runs_table

        report = compare_runs(options.runs, options.out)
        print(runs_table(report))
    print(json.dumps({"files": report["files"]}))


if __name__ == "__main__":
    run(main)

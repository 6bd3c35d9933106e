#!/usr/bin/env python
"""Forward and backward time of our SMoE layer and of S2MoE against their peers, in one run.

    python benchmarks/moe_layer.py                        all shapes
    python benchmarks/moe_layer.py --quick --json out.json
    python benchmarks/moe_layer.py --shape 65536,1024,2048,64,8 --device cuda
    python benchmarks/moe_layer.py --profile 4096,256,512,16,2

dense               a gated MLP of equal active FLOPs (hidden width k F)
smoe                our layer: top-k, gated SiLU experts, dropless, balance loss in the backward
s2moe               ours, S2MoE: one expert for each token and one for its noisy copy; compare with top-2,
                    which is smoe where k is 2 and else the row smoe_top2
transformers_*      MixtralSparseMoeBlock with each implementation of its experts (it has no balance loss)
deepspeed_moe       deepspeed.moe.layer.MoE, dropless, with its balance loss
deepspeed_autoep    the layer that DeepSpeed's AutoEP puts in place of a Mixtral block

A shape is T,D,F,E,K: tokens, model width, hidden width of an expert, experts, experts per token.
Before it is timed, every sparse layer but S2MoE must agree with transformers' eager block on equal weights,
in its output and its input's gradient. Times are medians of rounds in which all take turns, spread is the
interquartile range, ratios are those of medians. Where spread nears the differences, the machine was busy:
run it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

try:
    from benchmarks.shapes import FULL, QUICK, Shape
    from launcher.common import Parser
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.shapes import FULL, QUICK, Shape
    from launcher.common import Parser

DTYPES = ("float32", "bfloat16", "float16")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def shape(text: str) -> Shape:
        try:
            return Shape.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
        return int(text)

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help=f"the first {len(QUICK)} of the {len(FULL)} shapes")
    which.add_argument("--shape", type=shape, action="append", metavar="T,D,F,E,K", help="this one; repeatable")
    which.add_argument(
        "--profile", type=shape, metavar="T,D,F,E,K",
        help="instead, print where the time of smoe (or of the --only ones) goes",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these implementations, besides dense")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header, rows and summary here")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=positive, help="of the CPU (default: torch's own choice)")
    parser.add_argument("--repeats", type=positive, help="timed rounds (default: 11, on a GPU 50)")
    parser.add_argument(
        "--slow-seconds", type=float, default=5.0,
        help="an implementation that takes longer is timed once (default: 5)",
    )  # fmt: skip
    parser.needs("not profile", "json", "repeats", "slow_seconds")
    options = parser.parse_args(arguments)
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: the directory of {options.json} does not exist; create it first")
    options.shapes = options.shape or (QUICK if options.quick else FULL)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: this torch sees no GPU; use --device cpu")
    if options.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others, and warns
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    repeats = options.repeats or (50 if device.type == "cuda" else 11)

    from benchmarks import report
    from benchmarks.comparison import SMOE, compare, known_implementations, summarise
    from s2moe.training.processes import keep_freed_memory

    if device.type == "cpu":
        keep_freed_memory()  # as in training: else the kernel hands every large tensor new pages, for all alike

    known = known_implementations()
    if unknown := set(options.only or ()) - set(known):
        sys.exit(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    facts = report.header(device, dtype)
    print(report.header_text(facts), flush=True)
    if options.profile:
        from benchmarks.profiling import operator_table

        for name in options.only or [SMOE]:
            print(f"\n{name}  {options.profile}\n{operator_table(name, options.profile, device, dtype)}")
        return
    rows, summaries = [], []
    for shape in options.shapes:
        names = [name for name in known if name in (options.only or known)]
        compared = compare(shape, names, device, dtype, repeats, options.slow_seconds)
        rows += compared
        summaries.append(summarise(compared))
        print(f"\n{report.table(compared)}", flush=True)
        if options.json:
            report.write_json(options.json, facts, rows, summaries)
    print(f"\n{report.summary_table(summaries)}")


if __name__ == "__main__":
    main()

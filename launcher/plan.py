#!/usr/bin/env python
"""Which parallel shape is the fastest on a cluster, and does it fit? Nothing is allocated.

    python launcher/plan.py --config configs/large_10b.yaml --nodes 8 --gpus-per-node 8 --gpu h100
    python launcher/plan.py --config ... --nodes 128 --gpus-per-node 8 --gpu h200 training.global_batch=4096
    python launcher/plan.py --config ... --measured doctor.json --load-cv 0.4      with the cluster's own figures
    python launcher/plan.py --config ... --write shape        shape/deepspeed.json and shape/overrides.txt of the best
    ... launcher/pretrain.py --config ... $(cat shape/overrides.txt)

Shapes are ZeRO stage x expert-parallel degree x micro-batch x activation checkpointing, ranked by predicted
tokens per second. Memory is counted, and agrees with what is really allocated; time comes from a cost model with
stated assumptions (s2moe/planning/cost.py), calibrated by benchmarks/results and launcher/doctor.py --json: trust
the order of shapes more than the seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

try:
    from launcher.common import Parser, prepare_environment, run
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import Parser, prepare_environment, run

prepare_environment()


def positive(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def size(text: str) -> float:
    """An argument that measures something that is there."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def spread(text: str) -> float:
    """A coefficient of variation."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return number


def over_mean(text: str) -> float:
    """The most of several numbers over their mean."""
    number = float(text)
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}: the busiest rank has no less than the mean")
    return number


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    from s2moe.planning.machines import MACHINES

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--nodes", type=positive, default=1, help="machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=positive, default=8, help="processes of each (default: 8)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(MACHINES)} (default: h100)")
    parser.add_argument("--gpu-memory", type=size, metavar="GIB", help="memory of a GPU (default: the model's)")
    parser.add_argument(
        "--network-gbit", type=size, help="network of each GPU to other machines (default: 400, of an A100 200)"
    )
    parser.add_argument("--measured", type=Path, help="what launcher/doctor.py --json wrote on the cluster")
    parser.add_argument(
        "--load-cv",
        type=spread,
        default=0.3,
        help="standard deviation over mean of the experts' loads, layer_N/load_cv in metrics.jsonl (default: 0.3)",
    )
    parser.add_argument(
        "--imbalance",
        type=over_mean,
        help="rows of the busiest rank's experts over the mean that memory must hold, "
        "expert_parallel/imbalance_max in metrics.jsonl (default: simulated)",
    )
    parser.add_argument("--top", type=positive, default=10, help="shapes to show (default: 10)")
    parser.add_argument("--json", type=Path, help="write all shapes to this file")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write the best shape's DeepSpeed config and settings"
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> None:
    """Rank the shapes and print, or write, what was found."""
    options = parse(arguments)
    from s2moe.config import ConfigError, load
    from s2moe.config.run import RunConfig
    from s2moe.planning import report
    from s2moe.planning.calibration import calibrate
    from s2moe.planning.machines import machine
    from s2moe.planning.shapes import Cluster, rank_shapes, require_possible
    from s2moe.training.plan import vocabulary

    config = load(RunConfig, options.config, options.overrides)
    symbols, note = vocabulary(config)
    if note:
        print(note)
    found = machine(options.gpu, options.gpu_memory, options.network_gbit)
    found, efficiency = calibrate(found, config.training.precision, options.measured)
    cluster = Cluster(found, options.nodes, options.gpus_per_node, efficiency, options.load_cv, options.imbalance)
    shapes = rank_shapes(config, config.model_config(symbols), cluster)
    require_possible(shapes, config, cluster)
    print(report.text(shapes, cluster, options.top))
    if options.json:
        content = json.dumps(report.as_json(shapes, cluster), indent=1) + "\n"
        try:
            options.json.write_text(content, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: cannot write {options.json}: {error.strerror}") from error
    if options.write:
        for path in report.write_best(shapes, cluster, options.write):
            print(f"wrote {path}")


if __name__ == "__main__":
    run(main)

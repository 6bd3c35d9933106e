#!/usr/bin/env python
"""Bits per character of a trained model on a split of a prepared corpus.

python launcher/evaluate.py --checkpoint runs/quickstart --data data/embedded --split test
python launcher/evaluate.py --checkpoint runs/quickstart/hf --data data/embedded --experts-per-token 1
python launcher/evaluate.py --checkpoint runs/enwik8 --data data/enwik8 --protocol l1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

try:
    from launcher.common import prepare_environment, run
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import prepare_environment, run

prepare_environment()


def positive(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def not_negative(text: str) -> int:
    """An argument of which 0 has a meaning."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {number}")
    return number


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    from s2moe.training.evaluation import PROTOCOLS
    from s2moe.training.windows import LEGACY_PROTOCOLS

    legacy = "; ".join(f"{name}: {text}" for name, (_, text) in LEGACY_PROTOCOLS.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory, hf/ directory or checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="prepared corpus")
    parser.add_argument("--split", default="test", help="split to score (default: test)")
    parser.add_argument("--experts-per-token", type=positive, help="k' experts per token instead of the trained number")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="sliding",
        help=f"sliding (default): every symbol scored once with --context tokens before it; {legacy}",
    )
    parser.add_argument("--context", type=positive, default=512, help="tokens before every scored one (default: 512)")
    parser.add_argument("--segment", type=positive, default=512, help="tokens scored per window (default: 512)")
    parser.add_argument("--batch", type=positive, default=16, help="windows per forward pass (default: 16)")
    parser.add_argument("--max-symbols", type=positive, help="score only the first so many tokens")
    parser.add_argument(
        "--attention-window",
        type=not_negative,
        help="tokens that a token attends to (default: the training sequence length; 0: the whole window)",
    )
    parser.add_argument(
        "--drop-newlines",
        action="store_true",
        help="leave newline bytes out of the stream, as the l1 lineage's enwik8 loader does",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Load, score, print a line for people and one of JSON."""
    options = parse(arguments)
    from s2moe.training.standalone import evaluate_weights

    start = time.monotonic()
    answer = evaluate_weights(options)
    answer["seconds"] = round(time.monotonic() - start, 1)
    tokens = answer["attention_window"]
    window = f"attention to the last {tokens} tokens" if tokens else "attention to the whole window"
    print(
        f"{answer['split']} of {answer['corpus']}: {answer['bpc']:.4f} bits per {answer['symbol']} over "
        f"{answer['symbols']:,.0f} symbols, protocol {answer['protocol']}, "
        f"{window}, {answer['experts_per_token']} experts per token, weights {answer['weights']}"
    )
    print(json.dumps(answer))


if __name__ == "__main__":
    run(main)

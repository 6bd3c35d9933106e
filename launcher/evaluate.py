#!/usr/bin/env python
"""Bits per byte, character or word of a trained model on a split of a prepared corpus.

The corpus' tokenizer says which: bytes of a corpus of bytes, words of one of words, characters of one of characters
or SentencePiece. Characters are counted, however they are spread over tokens.

python launcher/evaluate.py --checkpoint runs/quickstart --data data/embedded --split test
python launcher/evaluate.py --checkpoint runs/quickstart/hf --data data/embedded --experts-per-token 1
python launcher/evaluate.py --checkpoint runs/enwik8 --data data/enwik8 --protocol l1
python launcher/evaluate.py --checkpoint runs/enwik8 --data data/enwik8 --corrupt word_swap --rate 0.05
python launcher/evaluate.py --checkpoint runs/enwik8 --data data/enwik8 --report collapse --against runs/enwik8-seed2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

try:
    from launcher.common import Parser, prepare_environment, run
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import Parser, prepare_environment, run

prepare_environment()

OF_REPORT: dict[str, Any] = {  # options that only a report has, and what they are by default
    "out": None,
    "against": [],
    "slim": [1, 2, 4, 8, 16],
    "probe_tokens": 4096,
    "probe_samples": 256,
}
OF_SLIDING = {"context": 512, "segment": 512}  # options that only the sliding protocol has


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


def numbers(text: str) -> list[int]:
    """An argument that lists counts: 1,2,4."""
    try:
        return [positive(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be counts such as 1,2,4, got {text!r}") from None


def probability(text: str) -> float:
    """An argument between 0 and 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0..1, got {text}")
    return number


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory, hf/ directory or checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="prepared corpus")
    parser.add_argument("--split", help="split to score (default: test; with --report: valid)")
    parser.add_argument("--experts-per-token", type=positive, help="k' experts per token instead of the trained number")
    add_scoring_arguments(parser, "all; with --report: 100000")
    add_corruption_arguments(parser)
    add_report_arguments(parser)
    options = parser.parse_args(arguments)
    if options.corrupt is None and (options.rate is not None or options.corrupt_seed is not None):
        parser.error("--rate and --corrupt-seed belong to --corrupt: say which corruption")
    if options.corrupt is not None and options.rate is None:
        parser.error("--corrupt needs --rate, the probability that a word (or pair of characters) is hit, e.g. 0.05")
    if options.corrupt is not None and options.report:
        parser.error("--corrupt scores and --report reports: run them one after the other")
    require_sliding(parser, options)
    fill_in(parser, options, OF_REPORT, None if options.report else "belongs to --report: say which report")
    options.corrupt_seed = options.corrupt_seed or 0
    options.split = options.split or ("valid" if options.report else "test")
    if options.report and options.max_symbols is None:
        options.max_symbols = 100_000
    return options


def require_sliding(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in the options of the sliding protocol, or refuse them beside another one."""
    other = None if options.protocol == "sliding" else "belongs to --protocol sliding"
    fill_in(parser, options, OF_SLIDING, other and f"{other}: {options.protocol} has sizes of its own")


def fill_in(
    parser: argparse.ArgumentParser, options: argparse.Namespace, defaults: dict[str, Any], refusal: str | None
) -> None:
    """Put these defaults where nothing was given; where something was, say ``refusal`` and end, unless it is None."""
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif refusal is not None:
            parser.error(f"--{name.replace('_', '-')} {refusal}")


def add_scoring_arguments(parser: argparse.ArgumentParser, most: str) -> None:
    """How a split is scored. ``most``: how much of it by default."""
    from s2moe.training.evaluation import PROTOCOLS
    from s2moe.training.windows import LEGACY_PROTOCOLS

    legacy = "; ".join(f"{name}: {text}" for name, (_, text) in LEGACY_PROTOCOLS.items())
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="sliding",
        help=f"sliding (default): every token scored once with --context tokens before it; {legacy}",
    )
    parser.add_argument("--context", type=positive, help="sliding: tokens before every scored one (default: 512)")
    parser.add_argument("--segment", type=positive, help="sliding: tokens scored per window (default: 512)")
    parser.add_argument("--batch", type=positive, default=16, help="windows per forward pass (default: 16)")
    parser.add_argument(
        "--max-symbols",
        type=positive,
        help=f"score only the first so many bytes, characters or words of the split (default: {most})",
    )
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


def add_corruption_arguments(parser: argparse.ArgumentParser) -> None:
    """What --corrupt is told."""
    from s2moe.data import CORRUPTIONS

    group = parser.add_argument_group(
        "robustness",
        "The model reads contaminated text and is scored on predicting the clean text's next token,\n"
        "beside the figure for clean text. The same tokens are scored.",
    )
    group.add_argument(
        "--corrupt",
        choices=CORRUPTIONS,
        help="char_swap: neighbouring characters within a word change places; word_swap: a word becomes AAA, as long "
        "as it was (one token where tokens are words)",
    )
    group.add_argument(
        "--rate", type=probability, help="probability that a pair of characters is swapped, or a word replaced"
    )
    group.add_argument("--corrupt-seed", type=not_negative, help="draws where (default: 0)")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """What --report is told."""
    group = parser.add_argument_group("reports")
    group.add_argument(
        "--report",
        choices=("collapse",),
        help="instead of a score: every collapse and routing metric of the SMoE layers, as JSON and pictures",
    )
    group.add_argument("--out", type=Path, help="directory of the report (default: collapse/ in the run directory)")
    group.add_argument(
        "--against", type=Path, nargs="+", help="other run directories, for the consistency of their loads"
    )
    group.add_argument("--slim", type=numbers, help="k' of the slimmability curve (default: 1,2,4,8,16)")
    group.add_argument(
        "--probe-tokens",
        type=positive,
        help="first so many tokens of the split are probed (default: 4096)",
    )
    group.add_argument("--probe-samples", type=positive, help="of them, tokens that all experts compute (default: 256)")


def main(arguments: list[str]) -> None:
    """Load, score, print a line for people and one of JSON."""
    options = parse(arguments)
    if options.report:
        report(options)
        return
    from s2moe.data.units import unit_of
    from s2moe.training.standalone import evaluate_weights

    start = time.monotonic()
    answer = evaluate_weights(options)
    answer["seconds"] = round(time.monotonic() - start, 1)
    tokens = answer["attention_window"]
    window = f"attention to the last {tokens} tokens" if tokens else "attention to the whole window"
    print(
        f"{answer['split']} of {answer['corpus']}: {answer['bpc']:.4f} {unit_of(answer['symbol'])} over "
        f"{answer['symbols']:,} {answer['symbol']}s, protocol {answer['protocol']}, "
        f"{window}, {answer['experts_per_token']} experts per token, weights {answer['weights']}"
    )
    if answer["corruption"]:
        found = answer["corruption"]
        symbol = answer["symbol"]
        print(
            f"after {found['kind']} at rate {found['rate']:g} (seed {found['seed']}, {found['changed']:.2%} of the "
            f"{symbol}s changed): {found['bpc']:.4f} {unit_of(symbol)}, {found['bpc_increase']:+.4f}"
        )
    print(json.dumps(answer))


def report(options: argparse.Namespace) -> None:
    """Write the report, print a table for people and a line of JSON that names its files."""
    from s2moe.training.report_collapse import report_collapse, summary

    answer = report_collapse(options)
    print(summary(answer))
    print(json.dumps({"mean": answer["mean"], "bpc": answer["slimmability"]["bpc"], "files": answer["files"]}))


if __name__ == "__main__":
    run(main)

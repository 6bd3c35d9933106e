#!/usr/bin/env python
"""Let a trained model continue a text.

python launcher/generate.py --checkpoint runs/quickstart "The list "
python launcher/generate.py --checkpoint runs/quickstart/hf "The list " --tokens 200 --temperature 0.8 --top-p 0.95
python launcher/generate.py --checkpoint runs/quickstart "The list " --color-by-expert 1

The checkpoint is a run directory, one of its checkpoints, or a Hugging Face directory. With --color-by-expert every
token has the colour of its first expert in that layer, the prompt's tokens too.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

try:
    from launcher.common import Parser, prepare_environment, run
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from launcher.common import Parser, prepare_environment, run

prepare_environment()


def main(arguments: list[str]) -> None:
    """Load, generate, print."""
    options = parse(arguments)
    from s2moe.training.generation import continue_text

    print(continue_text(options))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="text to continue; - reads it from standard input")
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory, checkpoint or hf/ directory")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to add (default: 100)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of sampling; 0 takes the likeliest token (default: 1)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest with this probability")
    parser.add_argument("--experts-per-token", type=int, help="k' experts per token instead of the trained number")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument(
        "--color-by-expert", type=int, metavar="LAYER", help="colour each token by its first expert in this layer"
    )
    parser.add_argument("--data", type=Path, help="corpus with the tokenizer, for a checkpoint whose own is gone")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.needs("temperature", "top_p", "seed")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        parser.error("--tokens must be at least 1")
    if not 0 <= options.temperature < float("inf"):
        parser.error("--temperature must be a number and not negative; 0 takes the likeliest token")
    if not -(2**63) <= options.seed < 2**64:
        parser.error("--seed must be a number of 64 bits")
    if not 0 < options.top_p <= 1:
        parser.error("--top-p is a probability above 0")
    if options.prompt == "-":
        options.prompt = read_prompt(parser)
    return options


def read_prompt(parser: Parser) -> str:
    """All of standard input."""
    if sys.stdin is None:
        parser.error("- reads the prompt from standard input, which is closed: give the text itself, or pipe it in")
    try:
        return sys.stdin.read()
    except (OSError, ValueError) as error:  # a directory; bytes that are no text
        parser.error(f"- reads the prompt from standard input, which cannot be read: {error}")


if __name__ == "__main__":
    run(main)

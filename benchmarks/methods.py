#!/usr/bin/env python
"""What every published method costs, and what it learns in a few hundred steps: one table from one run.

    python -m data_prep embedded --out data/embedded-bytes
    python benchmarks/methods.py --data data/embedded-bytes --json methods.json
    python benchmarks/methods.py --data data/embedded-bytes --methods smoe,xmoe,s2moe --steps 100

All methods train side by side on the same batches, one step each in turn, so that whatever slows the
machine down slows all alike. A step is forward, backward, clipping, optimizer and the routers' feedback.
The first method, plain top-2 unless said otherwise, is what the ratios refer to. Bits are those of the
validation split after the last step, from one seed: a sign that a method learns, no ranking.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

try:
    from benchmarks.report import header, header_text
except ImportError:  # started as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.report import header, header_text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a prepared corpus of bytes or characters")
    parser.add_argument("--methods", help="comma-separated; the first is the base (default: all, smoe first)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each method (default: 300)")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step (default: 8)")
    parser.add_argument("--layers", type=int, default=2, help="blocks (default: 2)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model (default: 128)")
    parser.add_argument("--experts", type=int, default=16, help="experts of a layer (default: 16)")
    parser.add_argument("--expert-hidden", type=int, default=256, help="hidden width of an expert (default: 256)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate, after 20 steps of warm-up (0.002)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scored", type=int, help="validation symbols to score (default: all)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, score, print the table."""
    options = parse(arguments)
    import torch

    from benchmarks.learning import Learner, Text, learn, markdown
    from s2moe.data import Corpus
    from s2moe.moe.methods import METHODS
    from s2moe.training.processes import keep_freed_memory

    if options.device == "cpu":
        keep_freed_memory()  # as in training
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    names = options.methods.split(",") if options.methods else list(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        sys.exit(f"error: --methods: unknown {', '.join(unknown)}; known: {', '.join(METHODS)}")
    facts = header(device, torch.float32)
    print(header_text(facts), file=sys.stderr)
    corpus = Corpus.open(options.data).metadata
    sizes = {
        "vocab_size": corpus.vocab_size,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, options.hidden // 64),
        "max_position_embeddings": options.sequence,
    }
    moe = {"num_experts": options.experts, "expert_hidden": options.expert_hidden}
    learners = [Learner.of(name, sizes, moe, options.seed) for name in names]
    for learner in learners:
        learner.model.to(device)
    text = Text(options.data, options.sequence, options.batch, options.steps, options.lr, options.seed, options.scored)
    found = list(learn(learners, text, device, lambda line: print(line, file=sys.stderr, flush=True)))
    print(markdown(found, corpus.symbol))
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        content = {"header": facts, "settings": settings, "rows": [asdict(row) for row in found]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Write a model in another form: a run's weights, a reshaped checkpoint, a dense model made sparse, other formats.

    python launcher/export.py --checkpoint runs/quickstart --out exported

writes the weights of a run's newest checkpoint as a Hugging Face directory. A finished run already has one, hf/. This
serves a run that is still going on, or one checkpoint of it.

    python launcher/export.py reshape --checkpoint runs/quickstart               for its next start
    python launcher/export.py reshape --checkpoint runs/quickstart --out runs/b  for a run of its own

rewrites the whole checkpoint, optimizer included, so that any number of processes, expert-parallel degree and
ZeRO stage can continue it. A run that is started in another shape does so by itself; this does it ahead of time,
in one process, where no GPU waits.

    python launcher/export.py upcycle --model path/to/llama --method s2moe_k2 --experts 8 --out sparse

puts SMoE layers in place of a dense model's MLPs (Llama, Mistral, Qwen2, Qwen3, GPT-2, or one of ours); the new model
computes the same at first. Other options of the layers follow as settings of a run:

    ... model.moe.router.balance_loss=0.02 model.moe.shared_experts=1

    python launcher/export.py import --model path/to/mixtral --out ours
    python launcher/export.py to-transformers --model runs/quickstart/hf --out mixtral

turn Mixtral, Qwen-MoE and OLMoE into a model of ours, and ours into one that transformers loads without this project.
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

FORMS = ("weights", "reshape", "upcycle", "import", "to-transformers")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Each form has its own options, and takes no other's; without a form it is `weights`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    forms = parser.add_subparsers(dest="form", metavar="{" + ",".join(FORMS) + "}")
    weights = forms.add_parser("weights", help="a checkpoint's weights as a Hugging Face directory (the default)")
    weights.add_argument("--checkpoint", type=Path, required=True, help="run directory, or one of its checkpoints")
    weights.add_argument("--out", type=Path, help="directory to write (default: hf/ in the run directory)")
    weights.add_argument("--data", type=Path, help="corpus whose tokenizer goes along (default: the run's)")
    reshape = forms.add_parser("reshape", help="a checkpoint that a run of any shape continues")
    reshape.add_argument("--checkpoint", type=Path, required=True, help="run directory, or one of its checkpoints")
    reshape.add_argument("--out", type=Path, help="directory to write (default: beside the checkpoint)")
    upcycle = forms.add_parser("upcycle", help="a dense model with SMoE layers in place of its MLPs")
    for name in ("import", "to-transformers"):
        forms.add_parser(name, help="another project's mixture as ours" if name == "import" else "ours as theirs")
    for form in (upcycle, forms.choices["import"], forms.choices["to-transformers"]):
        form.add_argument("--model", type=Path, required=True, help="Hugging Face directory to read")
        form.add_argument("--out", type=Path, required=True, help="directory to write")
    upcycle.add_argument("--method", default="smoe", help="routing method, as in model.moe.method (default: smoe)")
    upcycle.add_argument("--experts", type=int, default=8, help="experts of each layer (default: 8)")
    upcycle.add_argument("--experts-per-token", type=int, help="default: the method's own, times --slices")
    upcycle.add_argument("--every", type=int, default=1, help="make every n-th layer sparse (default: 1)")
    upcycle.add_argument("--first-dense", type=int, default=0, help="leave the first n layers dense (default: 0)")
    upcycle.add_argument("--slices", type=int, default=1, help="cut each MLP into so many experts; 1: copy it")
    upcycle.add_argument(
        "--noise", type=float, default=0.0, help="what copies are told apart by, relative (default: 0)"
    )
    upcycle.add_argument("--seed", type=int, default=1, help="of new routers and of the noise (default: 1)")
    upcycle.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="other options of the layers, e.g. model.moe.router.z_loss=1e-3",
    )
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["weights", *arguments]
    if arguments[0] == "upcycle":  # whose settings may stand anywhere, which a parser with forms does not allow
        return upcycle.parse_intermixed_args(arguments[1:], argparse.Namespace(form="upcycle"))
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Read in this one process, and write it out."""
    options = parse(arguments)
    print(f"wrote {convert(options)}")


def convert(options: argparse.Namespace) -> Path:
    """Do what was asked; where it is written."""
    from s2moe.training import standalone

    if options.form == "weights":
        return standalone.export_checkpoint(options.checkpoint, options.out, options.data)
    if options.form == "reshape":
        return standalone.reshape_checkpoint(options.checkpoint, options.out)
    from s2moe.training.run_directory import new_model

    with new_model(options.out):
        return _converted(options)


def _converted(options: argparse.Namespace) -> Path:
    """What is no run's weights."""
    from s2moe.config import ConfigError
    from s2moe.hub import directories

    try:
        if options.form == "import":
            return directories.import_directory(options.model, options.out)
        if options.form == "to-transformers":
            return directories.export_directory(options.model, options.out)
        import torch

        from s2moe.hub.upcycle_settings import moe_settings

        torch.manual_seed(options.seed)
        names = ("method", "experts", "experts_per_token", "every", "first_dense", "slices", "noise")
        settings = {name: getattr(options, name) for name in names}
        moe = moe_settings(options.overrides, options.method, options.experts)
        return directories.upcycle_directory(options.model, options.out, **settings, moe=moe)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    run(main)

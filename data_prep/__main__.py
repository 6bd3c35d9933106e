"""Prepare a corpus: ``python -m data_prep CORPUS --out DIR``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from data_prep import embedded, enwik8, text, text8, wikitext103
from data_prep.build import Output
from s2moe.data.errors import CorpusError
from s2moe.output import flush_output, guard_output
from s2moe.places import DATA_PREP

CORPORA = {"text8": text8, "enwik8": enwik8, "wikitext103": wikitext103, "text": text, "embedded": embedded}
DESCRIPTION = "Prepare a corpus for training: fetch or read it, verify it, write memory-mapped token streams."
EPILOG = """\
examples:
  python -m data_prep embedded --out data/embedded                      no network needed
  python -m data_prep enwik8 --out data/enwik8                          from the official place
  python -m data_prep enwik8 --source enwik8.zip --out data/enwik8      from a local copy
  python -m data_prep text --source 'books/*.txt' --out data/books      your own text

`python -m data_prep CORPUS --help` explains each. The directory is complete or absent: interrupt at any
time and run the same command again. A second run of a finished one compares its checksums and does nothing
else; a run compares those of each split of up to 1 GiB when it opens it.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if the corpus is there, 2 after one line on stderr that says why not."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(given)
    command = f"{DATA_PREP} {shlex.join(word for word in given if word != '--force')}"
    output = Output(arguments.out, arguments.force, command)
    try:
        CORPORA[arguments.corpus].run(arguments, output)
        flush_output()
    except CorpusError as error:
        problem = str(error)
    except OSError as error:  # a full disk, missing permission
        problem = f"{error.filename or arguments.out}: {error.strerror or error}; mend that and run again"
    except KeyboardInterrupt:
        print("data_prep: interrupted, nothing was written; run the same command again", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"data_prep: error: {' '.join(problem.split())}", file=sys.stderr)
    return 2


def build_parser() -> Parser:
    """The command line, one sub-command a corpus."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(DATA_PREP, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="corpus", metavar="CORPUS", required=True)
    for name, module in CORPORA.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, epilog=module.EPILOG, formatter_class=raw
        )
        command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
        command.add_argument("--force", action="store_true", help="replace a corpus that is there already")
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    guard_output()
    sys.exit(main())

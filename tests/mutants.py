"""Change one line of the product at a time, and see whether a test notices: ``make mutants FOLDER=s2moe/moe/routers``.

A mutant that no test fails for is a survivor: code that no test sees. Mutations are drawn at random, the same for the
same seed, each of one line: another comparison, another sign, another number, a flipped flag or condition, an argument
that is not passed on, a call that is left out. What only words a message, types, docstrings and options' help are left
alone. Everything happens in a copy of the tree. The heavy libraries are imported once; each mutant is tried in a
process forked from there.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
SIGNS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}
LEFT_ALONE = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.arg)
WORDS = {"print", "option", "ConfigError", "warn", "register", "field"}  # calls whose arguments are for people
KILLED, SURVIVED, TOO_LONG = "killed", "SURVIVED", "killed (too long)"


@dataclass(frozen=True)
class Mutant:
    """A line of a file as it is and as it would be."""

    path: Path  # in the tree
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before.strip()}  ->  {self.after.strip()}"


def mutants_of(path: Path, source: str) -> list[Mutant]:
    """Every mutation of a file's lines."""
    lines = source.splitlines()
    found = []
    for node, replacement in _changes(ast.parse(source)):
        if node.lineno != node.end_lineno:  # type: ignore[attr-defined]
            continue
        line: str = lines[node.lineno - 1]  # type: ignore[attr-defined]
        whole = line.encode()  # columns are of bytes
        start, end = whole[: node.col_offset].decode(), whole[node.end_col_offset :].decode()  # type: ignore[attr-defined]
        found.append(Mutant(path, node.lineno, line, f"{start}{replacement}{end}"))  # type: ignore[attr-defined]
    return sorted(set(found), key=lambda mutant: (mutant.line, mutant.after))


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Nodes below one, and the text that each would become."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, LEFT_ALONE):
                continue
            if name in ("annotation", "returns", "decorator_list") or _is_words(child):
                continue
            yield from _of(child)
            yield from _changes(child)


def _is_words(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    called = node.func if isinstance(node, ast.Call) else None
    return getattr(called, "id", getattr(called, "attr", "")) in WORDS


def _of(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The mutations of a node itself."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        changed = ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
        yield node, f"({ast.unparse(changed)})"
    elif isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        yield node, f"({ast.unparse(ast.BinOp(node.left, SIGNS[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, f"({ast.unparse(ast.BoolOp(other, node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, repr(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield node, repr(node.value + 1 if isinstance(node.value, int) else node.value * 2 or 1.0)
    elif isinstance(node, ast.Call) and any(keyword.arg for keyword in node.keywords):
        for left_out in node.keywords:
            if left_out.arg:
                kept = [keyword for keyword in node.keywords if keyword is not left_out]
                yield node, ast.unparse(ast.Call(node.func, node.args, kept))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "pass"
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        yield node.test, f"(not ({ast.unparse(node.test)}))"


def draw(folder: Path, count: int, seed: int) -> list[Mutant]:
    """So many mutants of a folder's files, or of a file."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
    every = [mutant for file in files for mutant in mutants_of(file.relative_to(ROOT), file.read_text("utf-8"))]
    return sorted(random.Random(seed).sample(every, min(count, len(every))), key=str)


def tests_of(file: Path) -> list[str]:
    """The test files that speak of a module most, its own first, and then the folder of tests of the same name."""
    word = re.compile(rf"\b{re.escape(file.stem)}\b")
    found = {path: len(word.findall(path.read_text("utf-8"))) for path in ROOT.glob("tests/**/test_*.py")}
    nearest = sorted((path for path in found if found[path]), key=lambda path: (-found[path], path))[:3]
    own = sorted(path for path in found if path.stem == f"test_{file.stem}")
    first = dict.fromkeys(str(path.relative_to(ROOT)) for path in [*own, *nearest])
    return [*first, *folder_of_tests(file)]


def folder_of_tests(folder: Path) -> list[str]:
    """The tests that lie where the product's folder or file does, or all."""
    parts = folder.relative_to(ROOT).with_suffix("").parts[1:]
    for length in range(len(parts), 0, -1):
        mirrored = Path("tests", *parts[:length])
        if (ROOT / mirrored).is_dir():
            return [str(mirrored)]
    return ["tests"]


def verdict(tree: Path, mutant: Mutant | None, tests: list[str], seconds: float) -> str:
    """What the tests say of a mutant (None: of the tree as it is), in a forked process."""
    file, original = None, b""
    if mutant is not None:
        file = tree / mutant.path
        original = file.read_bytes()
        lines = original.decode().splitlines(keepends=True)
        lines[mutant.line - 1] = f"{mutant.after}\n"
        file.write_text("".join(lines), "utf-8")
    try:
        child = os.fork()
        if child == 0:
            _run_tests(tree, tests)
        return _wait(child, seconds)
    finally:
        if file is not None:
            file.write_bytes(original)


def _run_tests(tree: Path, tests: list[str]) -> None:
    """In the forked process: pytest in the copy, without output; exits with its status."""
    import pytest

    os.setsid()  # so that what it starts can be ended with it
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests])
    os._exit(int(status))


def _wait(child: int, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return SURVIVED if os.waitstatus_to_exitcode(status) == 0 else KILLED
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TOO_LONG


def main() -> int:
    """List the survivors; 1 where there are any, 2 where the tests fail without a mutation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder or file of the product")
    parser.add_argument(
        "--tests",
        nargs="+",
        help="what should notice (default: the test files that speak of a mutant's module, then the folder of tests of "
        "the same name)",
    )
    parser.add_argument("--trust", action="store_true", help="do not try first whether the tests pass as it is")
    parser.add_argument("--count", type=int, default=50, help="mutants to draw (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the draw (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a mutant, which is then killed")
    options = parser.parse_args()
    folder = options.folder.resolve()
    known = options.tests or folder_of_tests(folder)
    mutants = draw(folder, options.count, options.seed)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as tests/conftest.py has it, before it is read
    import deepspeed  # noqa: F401 (once, for all forks)
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        tree = Path(directory) / "tree"
        left = shutil.ignore_patterns(".git", ".venv", "runs", "data", "*_cache", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=lambda at, names: left(at, names) if Path(at) == ROOT else set())
        start = time.monotonic()
        if not options.trust and verdict(tree, None, known, options.timeout) != SURVIVED:
            print(f"{' '.join(known)} fail or take over {options.timeout:g} s without a mutation", file=sys.stderr)
            return 2
        print(f"{len(mutants)} mutants of {options.folder}; {time.monotonic() - start:.0f} s to begin with", flush=True)
        survivors = []
        for number, mutant in enumerate(mutants, 1):
            found = verdict(tree, mutant, options.tests or tests_of(ROOT / mutant.path), options.timeout)
            print(f"[{number}/{len(mutants)}] {found}: {mutant}", flush=True)
            if found == SURVIVED:
                survivors.append(mutant)
    print(f"\n{len(survivors)} of {len(mutants)} survive:", *survivors, sep="\n  ")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

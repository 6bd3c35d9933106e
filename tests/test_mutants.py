"""The mutations of ``make mutants``: what is changed, and what is left alone."""

from __future__ import annotations

import ast
from pathlib import Path

from tests import mutants

SOURCE = '''\
"""A docstring with 1 + 1."""
from __future__ import annotations
X = option(3, "times 2")
def f(a: int = 1, b: Literal[2] = 2) -> Literal[3]:
    if a < b and c:
        g(a, size=b)
    if a in (1,):
        raise ValueError(f"{a + 1} is not {b == 2}")
    return a + b if a else not True
'''


def test_each_mutation_is_of_one_line_and_of_code() -> None:
    found = [(mutant.line, mutant.after.strip()) for mutant in mutants.mutants_of(Path("f.py"), SOURCE)]
    assert found == [
        (4, "def f(a: int = 1, b: Literal[2] = 3) -> Literal[3]:"),
        (4, "def f(a: int = 2, b: Literal[2] = 2) -> Literal[3]:"),
        (5, "if (a < b or c):"),
        (5, "if (a <= b) and c:"),
        (5, "if (not (a < b and c)):"),
        (6, "g(a)"),
        (6, "pass"),
        (7, "if (a not in (1,)):"),
        (7, "if a in (2,):"),
        (9, "return (a - b) if a else not True"),
        (9, "return a + b if (not (a)) else not True"),
        (9, "return a + b if a else (True)"),
        (9, "return a + b if a else not False"),
    ]


def test_every_mutant_of_the_product_is_still_python() -> None:
    file = mutants.ROOT / "s2moe" / "moe" / "layer.py"
    lines = file.read_text("utf-8").splitlines()
    every = mutants.mutants_of(file, "\n".join(lines))
    assert len(every) > 40
    for mutant in every:
        assert mutant.before == lines[mutant.line - 1] != mutant.after
        ast.parse("\n".join([*lines[: mutant.line - 1], mutant.after, *lines[mutant.line :]]))


def test_the_draw_and_the_tests_of_a_folder() -> None:
    folder = mutants.ROOT / "s2moe" / "moe" / "routers"
    assert mutants.draw(folder, 5, seed=1) == mutants.draw(folder, 5, seed=1) != mutants.draw(folder, 5, seed=2)
    assert mutants.folder_of_tests(folder) == ["tests/moe"]
    assert mutants.folder_of_tests(mutants.ROOT / "s2moe" / "options.py") == ["tests"]
    nearest = mutants.tests_of(mutants.ROOT / "s2moe" / "moe" / "token_graph.py")
    assert (nearest[0], nearest[-1]) == ("tests/moe/test_token_graph.py", "tests/moe")

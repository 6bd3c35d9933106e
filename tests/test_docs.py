"""What the documentation shows has to run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from s2moe.moe.config import SECTIONS, resolve_moe
from s2moe.moe.methods import METHODS
from s2moe.moe.routers import ROUTERS

ROOT = Path(__file__).parents[1]


def test_links_in_the_documentation_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def option_rows() -> Iterator[tuple[list[str], str, list[str], str]]:
    """Rows of the option tables in docs/methods.md: the section's methods, the table's head, names, default."""
    methods: list[str] = []
    head = ""
    for line in (ROOT / "docs/methods.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            methods = [name for name in re.findall(r"`(?:model\.moe\.method=)?(\w+)`", line) if name in METHODS]
        if not line.startswith("|"):
            head = ""
        elif not head:
            head = line
        elif methods and not line.startswith("| ---"):
            first, second = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:3])
            yield methods, head, re.findall(r"`([\w.]+)`", first), second


def test_the_methods_page_names_every_option() -> None:
    named = {name.split(".")[-1] for _, _, names, _ in option_rows() for name in names}
    for cls in [*(router.Options for router in ROUTERS.values()), *SECTIONS.values()]:
        assert {field.name for field in dataclasses.fields(cls)} <= named, cls


def test_the_methods_page_tells_the_defaults() -> None:
    """Those of one of the section's methods, or of the plain mixture. What is told in words is left out."""
    compared = 0
    for methods, head, names, cell in option_rows():
        found = re.search(r"option of `(\w+)`|`model\.moe\.(\w+)\.`", head)
        section = [part for part in found.groups() if part] if found else []
        told = [plain(text) for text in cell.split(", ")]
        if len(told) == 1:
            told *= len(names)
        for name, value in zip(names, told, strict=False):
            path = name.split(".")[2:] if name.startswith("model.moe.") else [*section, name]
            actual = [value_at(method, path) for method in (*methods, "smoe")]
            if value is not Ellipsis:
                assert value in actual, (methods, name, actual)
                compared += 1
    assert compared > 100


def plain(text: str) -> Any:
    """The value that a table's cell begins with; ... where it is told in words."""
    text = re.split(r" \(|: | in ", text.strip())[0].strip("`")
    if " " in text or not text:
        return ...
    try:
        return float(text)
    except ValueError:
        value = yaml.safe_load(text)
    return ... if value == "experts_per_token" else value


def value_at(method: str, path: list[str]) -> Any:
    value: Any = dataclasses.asdict(resolve_moe({"method": method}))
    for key in path:
        value = value.get(key, ...) if isinstance(value, dict) else ...
    return value

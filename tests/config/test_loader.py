"""Loading settings: what is read, what wins, and what an error says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from s2moe.config import ConfigError, load, option, to_yaml
from s2moe.config.help import help_text


@dataclass
class Inner:
    rate: float = option(1.0, "how fast")
    kind: Literal["flat", "round"] = option("flat", "which shape")
    limits: tuple[float, float] = option((0.0, 1.0), "from and to")
    often: int | None = option(None, "how often; null: never")

    def __post_init__(self) -> None:
        if self.rate > 100:
            raise ValueError("rate above 100 is impossible")


@dataclass
class Outer:
    steps: int = option(help="how many")
    flag: bool = option(False, "yes or no")
    inner: Inner = option(factory=Inner, help="the inner part")
    names: list[str] = option(factory=list, help="names")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_file_then_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "steps: 3\ninner: {rate: 2, kind: round}\nnames: [x]\n")
    config = load(Outer, file, ["inner.rate=1e-3", "flag=true", "inner.limits=[1, 2]", "inner.often=4"])
    assert config == Outer(3, True, Inner(0.001, "round", (1.0, 2.0), 4), ["x"])
    assert isinstance(config.inner.rate, float)


def test_bases_merge_section_by_section_and_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "low.yaml", "steps: 1\ninner: {rate: 5, kind: round}\n")
    write(tmp_path / "mid.yaml", "base: low.yaml\nsteps: 2\n")
    write(tmp_path / "other.yaml", "flag: true\n")
    top = write(tmp_path / "sub" / "top.yaml", "base: [../mid.yaml, ../other.yaml]\ninner: {rate: 7}\n")
    assert load(Outer, top) == Outer(2, True, Inner(7.0, "round"))


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load(Outer, None, ["steps=3", "inner.rate=1e-7", "names=[a, b]"])
    assert load(Outer, write(tmp_path / "again.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=x", "steps: expected int, got 'x'"),
        ("steps=1.5", "steps: expected int, got 1.5"),
        ("steps=true", "steps: expected int, got True"),
        ("flag=1", "flag: expected bool, got 1"),
        ("inner.rate=fast", "inner.rate: expected float, got 'fast'"),
        ("inner.kind=oval", "inner.kind: expected one of flat, round, got 'oval'"),
        ("inner.limits=[1]", "inner.limits: expected 2 values, got [1]"),
        ("inner.often=now", "inner.often: expected int or null, got 'now'"),
        ("names=[1]", "names[0]: expected str, got 1; text that looks like something else is quoted"),
        ("inner.rat=1", "inner.rat: unknown key; did you mean inner.rate?"),
        ("iner.rate=1", "iner: unknown key; did you mean inner?"),
        ("often=1", "often: unknown key; did you mean inner.often?"),
        ("zzz=1", "zzz: unknown key; known here: steps, flag, inner, names"),
        ("inner=3", "inner: a section of settings, got 3"),
        ("steps", "expected an override of the form section.key=value, got 'steps'"),
        ("inner.rate=200", "inner: rate above 100 is impossible"),
    ],
)
def test_errors_name_key_and_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(Outer, None, ["steps=1", override])
    assert str(error.value) == message


def test_missing_required_key() -> None:
    with pytest.raises(ConfigError, match=r"^steps: must be given: how many$"):
        load(Outer, None)


def test_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "stepz: 1\n")
    top = write(tmp_path / "top.yaml", "base: base.yaml\n")
    with pytest.raises(ConfigError, match=rf"^{base}: stepz: unknown key; did you mean steps\?$"):
        load(Outer, top)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(Outer, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(Outer, write(tmp_path / "bad.yaml", "a: [1\n"))
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        load(Outer, write(tmp_path / "list.yaml", "- 1\n"))
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.yaml: not a text file in UTF-8 \(invalid start byte at byte 6\)"):
        load(Outer, tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="is its own base"):
        load(Outer, write(tmp_path / "self.yaml", "base: self.yaml\n"))


def test_help_lists_every_key_with_type_default_and_meaning() -> None:
    text = help_text(Outer)
    for part in (
        "steps = int; required",
        "how many",
        "flag = bool; default false",
        "inner.kind = one of flat, round; default flat",
        "inner.often = int or null; default null",
        "inner.limits = list of float, float; default [0.0, 1.0]",
    ):
        assert part in text

"""What a table is made of: rows of runs in stages, and what was published, from `configs/vision/tables/<name>.yaml`.

    title: what the table shows
    runs: 10                        for every row, with seeds 1 to 10
    seeds: [42, 1234]               instead of 1, 2, ..., where seeds were published; as many as runs
    figures: {error: test error}    what is tabulated, of evaluation.json, and its name
    base: {data: {name: mnist}}     settings of every stage of every row
    rows:
      vanilla:
        label: vanilla MoE
        runs: 3                     at most so many of this row, instead of the table's
        stages: [{}]                settings of each stage, on top of base
        published: {error: [.038, .009]}      mean and deviation as printed
        corrected: {error: [.0443, .0085]}    those of all runs of the one configuration
      distilled:
        after: attentive            the first stage begins with that row's finished run of the same seed
        stages: [{init: {stage: distil}}]
    orders:                         claims to look at
      - {claim: "attentive gating is sharper", figure: h_s, lower: attentive, higher: vanilla}
    gathered:                       runs of several rows by what came out of them
      {by: active_experts, figure: recon, rows: [one, two], published: {1: [17.7, .1, 8]}}      mean, deviation, runs
    details: true                   a report on the first run of each row (training/details)

A stage may have `by_seed`, a list of settings that runs take in turn. A stage after another one begins with its
weights. Every key is checked before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from s2moe.config.loader import build as build_section
from s2moe.config.loader import check_keys, read_override
from s2moe.config.options import ConfigError, dataclass_section
from s2moe.config.plain_yaml import read_yaml
from s2moe.config.relevance import Settings
from s2moe.config.vision import VisionRunConfig
from s2moe.options import deep_merge, nearest
from s2moe.places import ROOT

FOLDER = ROOT / "configs" / "vision" / "tables"
ROW_KEYS = ("label", "runs", "after", "base", "stages", "published", "corrected", "note")
BY_SEED = "by_seed"
TABLE_KEYS = ("title", "runs", "seeds", "figures", "base", "rows", "orders", "gathered", "note", "boxes", "details")

Numbers = dict[str, tuple[float, float | None]]  # mean and deviation by figure


@dataclass(frozen=True)
class Row:
    """One row of a table: settings of each stage, and what was published."""

    name: str
    label: str
    stages: tuple[tuple[dict[str, Any], ...], ...]  # of each stage the settings that runs take in turn
    after: str | None = None
    published: Numbers = field(default_factory=dict)
    corrected: Numbers = field(default_factory=dict)
    note: str = ""
    runs: int | None = None  # at most so many; None: as many as the table's other rows


@dataclass(frozen=True)
class Order:
    """A claim: row `lower` has a lower mean of a figure than row `higher` (of `figure_of_higher`, where given)."""

    claim: str
    figure: str
    lower: str
    higher: str
    figure_of_higher: str | None = None

    @property
    def higher_figure(self) -> str:
        return self.figure_of_higher or self.figure


@dataclass(frozen=True)
class Gathered:
    """Runs of several rows by the value of a figure that came out of them, a whole number."""

    by: str
    figure: str
    rows: tuple[str, ...]
    published: dict[int, tuple[float, float, int]]  # mean, deviation and number of runs, by that value


@dataclass(frozen=True)
class Table:
    """A published table."""

    name: str
    title: str
    runs: int
    figures: dict[str, str]
    rows: tuple[Row, ...]
    orders: tuple[Order, ...] = ()
    boxes: tuple[str, ...] = ()  # figures that are drawn over seeds
    note: str = ""
    details: bool = False  # whether the first run of each row gets a report of its own
    seeds: tuple[int, ...] = ()  # of the first run, the second, ...; empty: 1, 2, ...
    gathered: Gathered | None = None

    def row(self, name: str) -> Row:
        """The row called `name`."""
        return next(row for row in self.rows if row.name == name)

    def seeds_of(self, runs: int) -> tuple[int, ...]:
        """The seeds of so many runs.

        Raises:
            ConfigError: the table lists fewer.
        """
        if not self.seeds:
            return tuple(range(1, runs + 1))
        if runs > len(self.seeds):
            raise ConfigError(f"--runs: table {self.name} lists {len(self.seeds)} seeds, which is fewer than {runs}")
        return self.seeds[:runs]

    def chosen(self, names: Sequence[str] | None) -> Table:
        """The table with these rows, and those that they come after.

        Raises:
            ConfigError: there is no such row.
        """
        if names is None:
            return self
        wanted = set()
        known = {row.name: row for row in self.rows}
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"--rows: table {self.name} has no row {name!r}{nearest(name, known)}; it has {', '.join(known)}"
                )
            needed: str | None = name
            while needed is not None and needed not in wanted:
                wanted.add(needed)
                needed = known[needed].after
        orders = tuple(order for order in self.orders if {order.lower, order.higher} <= wanted)
        return replace(self, rows=tuple(row for row in self.rows if row.name in wanted), orders=orders)


def list_tables() -> str:
    """One line a table: its name and title."""
    names = table_names()
    width = max(map(len, names))
    return "\n".join(f"{name:{width}}  {_read(name)['title']}" for name in names)


def table_names() -> list[str]:
    """The tables that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_table(name: str) -> Table:
    """The table called `name`, or in a file of that path.

    Raises:
        ConfigError: there is none, or its file is not one.
    """
    tree = _read(name)
    _check(tree, TABLE_KEYS, f"table {name}")
    base = tree.get("base") or {}
    rows = [_row(key, row, base, f"table {name}: rows.{key}") for key, row in tree["rows"].items()]
    known = [row.name for row in rows]
    runs = _count(tree.get("runs", 1), f"table {name}: runs")
    for place, row in enumerate(rows):
        if row.after is None:
            continue
        if row.after not in known[:place]:
            raise ConfigError(f"table {name}: rows.{row.name}.after: {row.after!r} is no row above it")
        most = rows[known.index(row.after)].runs
        if most is not None and (row.runs is None or row.runs > most):
            raise ConfigError(f"table {name}: rows.{row.name}.runs: must be at most the {most} of row {row.after}")
    seeds = tuple(tree.get("seeds") or ())
    if not all(isinstance(seed, int) and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"table {name}: seeds: must be different whole numbers, not negative: {list(seeds)}")
    if seeds and len(seeds) < runs:
        raise ConfigError(f"table {name}: seeds: must be at least as many as its {runs} runs, not {len(seeds)}")
    orders = tuple(
        _order(order, f"table {name}: orders[{place}]") for place, order in enumerate(tree.get("orders") or ())
    )
    for order in orders:
        for row_name in (order.lower, order.higher):
            if row_name not in known:
                raise ConfigError(f"table {name}: orders: there is no row {row_name!r}{nearest(row_name, known)}")
    return Table(
        Path(name).stem,
        tree["title"],
        runs,
        tree["figures"],
        tuple(rows),
        orders,
        tuple(tree.get("boxes") or ()),
        tree.get("note", ""),
        bool(tree.get("details", False)),
        seeds,
        _gathered(tree["gathered"], known, f"table {name}: gathered") if "gathered" in tree else None,
    )


def _read(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = table_names()
        raise ConfigError(f"--table: there is no table {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    tree = read_yaml(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("rows"), dict) or not {"title", "figures"} <= tree.keys():
        raise ConfigError(f"{path}: a table has title, figures and rows")
    return tree


def _row(name: str, tree: Mapping[str, Any], base: Mapping[str, Any], where: str) -> Row:
    _check(tree, ROW_KEYS, where)
    own = deep_merge(base, tree.get("base") or {})
    section = dataclass_section(VisionRunConfig)
    stages = []
    for number, stage in enumerate(tree.get("stages") or [{}]):
        by_seed = stage.get(BY_SEED) or [{}]
        given = {key: value for key, value in stage.items() if key != BY_SEED}
        for part in (given, *by_seed):
            check_keys(part, section, source=f"{where}.stages[{number}]: ")
        stages.append(tuple(deep_merge(deep_merge(own, given), part) for part in by_seed))
    return Row(
        name,
        tree.get("label", name),
        tuple(stages),
        tree.get("after"),
        _numbers(tree.get("published"), f"{where}.published"),
        _numbers(tree.get("corrected"), f"{where}.corrected"),
        tree.get("note", ""),
        None if tree.get("runs") is None else _count(tree["runs"], f"{where}.runs"),
    )


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: must be a whole number from 1, got {value!r}")
    return value


def _order(tree: Mapping[str, Any], where: str) -> Order:
    names = [item.name for item in fields(Order)]
    _check(tree, names, where)
    missing = [name for name in names if name not in tree and name != "figure_of_higher"]
    if missing:
        raise ConfigError(f"{where}: has no {', '.join(missing)}")
    return Order(**tree)


def _gathered(tree: Mapping[str, Any], known: Sequence[str], where: str) -> Gathered:
    names = [item.name for item in fields(Gathered)]
    _check(tree, names, where)
    if set(tree) != set(names):
        raise ConfigError(f"{where}: expected {', '.join(names)}, got {', '.join(tree)}")
    for row in tree["rows"]:
        if row not in known:
            raise ConfigError(f"{where}: there is no row {row!r}{nearest(row, known)}")
    try:
        published = {int(value): (float(mean), float(sd), int(n)) for value, (mean, sd, n) in tree["published"].items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            f"{where}.published: expected value: [mean, deviation, runs], got {tree['published']}"
        ) from None
    return Gathered(tree["by"], tree["figure"], tuple(tree["rows"]), published)


def _numbers(tree: Mapping[str, Any] | None, where: str) -> Numbers:
    found: Numbers = {}
    for name, value in (tree or {}).items():
        given = value if isinstance(value, list) else [value, None]
        try:
            mean, deviation = given
            found[name] = float(mean), None if deviation is None else float(deviation)
        except (TypeError, ValueError):
            raise ConfigError(f"{where}.{name}: expected a mean, or [mean, deviation], got {value!r}") from None
    return found


def _check(tree: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in tree:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, known)}")


@dataclass(frozen=True)
class Stage:
    """One run of a table."""

    row: str
    seed: int
    number: int  # from 1
    config: VisionRunConfig
    last: bool

    @property
    def label(self) -> str:
        """For the person who waits."""
        return f"{self.row}, seed {self.seed}" + ("" if self.last and self.number == 1 else f", stage {self.number}")


def plan_runs(
    table: Table,
    directory: Path,
    runs: int,
    epochs: float | None = None,
    source: str | None = None,
    overrides: Sequence[str] = (),
) -> list[list[Stage]]:
    """The runs of a table, in chains of which each run begins with the one before: seed by seed, row by row.

    Args:
        runs: of each row; rows that are made for fewer get those.

    Raises:
        ConfigError: a setting is impossible, or one of those that the table itself decides; more runs than seeds.
    """
    section = dataclass_section(VisionRunConfig)
    given: dict[str, Any] = {}
    for text in overrides:
        given = deep_merge(given, read_override(text, section))
    for key in ("name", "output_dir", "seed", "init"):
        if key in given:
            raise ConfigError(f"{key}: is decided by the table, for each run")
    asked = given
    for option, value, section_name, keys in (
        ("--epochs", epochs, "training", ("epochs", "steps")),
        ("--source", source, "data", ("source",)),
    ):
        for key in keys:
            if value is not None and key in (given.get(section_name) or {}):
                raise ConfigError(f"{section_name}.{key}: {option} decides it: give one of them")
    if epochs is not None:
        given = deep_merge(given, {"training": {"epochs": epochs, "steps": None}})
    if source is not None:
        given = deep_merge(given, {"data": {"source": source}})
    chains: dict[tuple[int, str], list[Stage]] = {}
    for turn, seed in enumerate(table.seeds_of(runs)):
        for row in (row for row in table.rows if row.runs is None or turn < row.runs):
            before = chains[seed, row.after][-1].config.directory if row.after is not None else None
            stages: list[Stage] = []
            for number, settings in enumerate(row.stages, start=1):
                place = {"name": f"stage{number}", "output_dir": str(directory / "runs" / row.name / f"seed{seed}")}
                tree = deep_merge(deep_merge(settings[turn % len(settings)], given), {**place, "seed": seed})
                if before is not None:
                    tree = deep_merge(tree, {"init": {"weights": str(before)}})
                config = build_section(section, tree)
                stages.append(Stage(row.name, seed, number, config, number == len(row.stages)))
                before = config.directory
            chains[seed, row.name] = stages
    configs = [stage.config for stages in chains.values() for stage in stages]
    idle = [set(Settings.of(config, section).without_effect(asked)) for config in configs]
    for path in sorted(set.intersection(*idle)) if idle else ():
        reason = Settings.of(configs[0], section).reason(path)
        raise ConfigError(f"{'.'.join(path)}: changes nothing in any row of the table: {reason}")
    return list(chains.values())


__all__ = ["Order", "Row", "Stage", "Table", "list_tables", "plan_runs", "read_table", "table_names"]

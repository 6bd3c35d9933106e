"""What settings declare is kept: limits, what they belong to, and how YAML is read. Of every class of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from s2moe.config import ConfigError, load, to_yaml
from s2moe.config.finetune import FinetuneConfig
from s2moe.config.options import Key, dataclass_section
from s2moe.config.plain_yaml import parse_yaml, write_yaml
from s2moe.config.relevance import Settings
from s2moe.config.run import RunConfig
from s2moe.config.vision import VisionRunConfig
from s2moe.models.vision import VISION_KINDS
from s2moe.moe.routers import ROUTERS
from s2moe.options import needed_names

from .cases import FACTS, at, leaves, on, others, outside, partner

TEXT = ["name=x", "data.dir=x", "training.steps=20", "training.global_batch=4", "training.sequence_length=8"]
TUNE = ["name=x", "data.task=sst2", "model.checkpoint=x"]


def router(name: str) -> list[str]:
    k = 1 if name == "base" else 2
    return ["model.moe.method=smoe", f"model.moe.router.name={name}", f"model.moe.experts_per_token={k}"]


CLASSES: dict[str, tuple[Any, list[str]]] = {  # by name: a class of settings, and choices that decide its sections
    "text": (RunConfig, TEXT),
    **{f"text, {name}": (RunConfig, [*TEXT, *router(name)]) for name in ROUTERS},
    **{f"images, {kind}": (VisionRunConfig, ["name=x", f"model.kind={kind}"]) for kind in VISION_KINDS},
    "fine-tuning": (FinetuneConfig, TUNE),
}


def settings_of(name: str) -> Settings:
    cls, base = CLASSES[name]
    return Settings.of(load(cls, None, base), dataclass_section(cls))


def own_leaves(name: str, settings: Settings) -> list[tuple[tuple[str, ...], Key]]:
    """The keys that a test goes through for this class: of a router those of the layers, the rest is the text's."""
    return [
        leaf for leaf in leaves(settings.section) if not name.startswith("text, ") or leaf[0][:2] == ("model", "moe")
    ]


def told(cls: Any, overrides: list[str]) -> str:
    """The error of these settings, of one line; empty where there is none."""
    message = ""
    try:
        load(cls, None, overrides)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", CLASSES)
def test_numbers_outside_the_limits_are_refused(name: str) -> None:
    cls, base = CLASSES[name]
    for path, known in own_leaves(name, settings_of(name)):
        key, hint = ".".join(path), str(known.type)
        if "tuple" in hint or not ("float" in hint or "int" in hint):
            continue
        for value in outside(known.limits, whole="float" not in hint):
            error = told(cls, [*base, f"{key}={write_yaml(value).split()[0]}"])
            assert key in error or (path[-1] in error and "model" in error), (key, value, error)


@pytest.mark.parametrize("name", CLASSES)
def test_a_key_of_what_is_off_is_refused_on_the_command_line_and_named_in_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cls, base = CLASSES[name]
    settings = settings_of(name)
    tried = 0
    for path, known in own_leaves(name, settings):
        if not settings.reason(path):
            continue
        values = others(known)
        assert values, path
        override = f"{'.'.join(path)}={json.dumps(values[0])}"
        error = told(cls, [*base, override])
        if "matters only with" not in error:  # refused for another reason, by name
            assert path[-1] in error, (override, error)
            continue
        assert error.startswith(f"{'.'.join(path)}: matters only with "), error
        file = tmp_path / "shared.yaml"
        tree: Any = values[0]
        for part in reversed(path):
            tree = {part: tree}
        file.write_text(write_yaml(tree), encoding="utf-8")
        load(cls, file, base)
        warned = capsys.readouterr().err
        assert warned.startswith("warning: without effect in this run: "), warned
        assert ".".join(path) in warned
        load(cls, file, base, written=True)
        assert capsys.readouterr().err == ""
        tried += 1
    assert tried > 0


@pytest.mark.parametrize("name", CLASSES)
def test_every_condition_is_about_a_setting_that_can_meet_it(name: str) -> None:
    settings = settings_of(name)
    for path, _ in leaves(settings.section):
        for depth in range(1, len(path) + 1):
            for condition in filter(None, at(settings, path[:depth]).needs.split(" or ")):
                needed, values = needed_names(condition)[0], condition.partition("=")[2]
                if needed in FACTS:
                    continue
                key = at(settings, partner(settings, needed, path[: depth - 1]))
                assert key is not None, (path, condition)
                known = {str(value) for value in [key.default, *others(key)]}
                if values and key.type is not str:
                    assert set(values.split("|")) <= known | set(VISION_KINDS) | {"imdb", "banking77"}, condition
                elif not values:
                    assert on(key)


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_run_writes_is_read_as_the_same(name: str, tmp_path: Path) -> None:
    cls, base = CLASSES[name]
    config = load(cls, None, base)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(cls, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed: must not be negative, got -1"),
        ("seed=4294967296", "seed: must be below 4294967296"),
        ("training.timeout_minutes=.inf", "training.timeout_minutes: must be a finite number"),
        ("model.hidden_size=1e10", "model.hidden_size: expected int"),
        ("model.hidden_size=10000000000", "hidden_size"),
        ("model.initializer_range=-1.0", "initializer_range must not be negative|initializer_range: must not be"),
        ("model.rms_norm_eps=-1.0", "rms_norm_eps"),
        ("model.moe.router.balance_loss=.nan", "balance_loss: must be a finite number, got nan"),
        ("model.moe.router.balance_loss=-100000", "balance_loss: must not be negative"),
        ("model.rope_parameters={rope_theta: 10.0, rope_tetha: 3.0}", "rope_type=default has no key 'rope_tetha'"),
        ("model.rope_parameters={rope_type: linear}", "rope_type=linear needs factor"),
        ("model.rope_parameters={rope_type: spiral}", "unknown rope_type 'spiral'"),
        ("model.moe.router.name=[]", "router.name|expected"),
        ("profile.steps=21-22", "profile.steps: the run ends at step 20"),
    ],
)
def test_what_is_absurd_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(RunConfig, None, [*TEXT, override])
    assert "\n" not in str(error.value)


def test_settings_of_experts_are_refused_for_a_dense_model() -> None:
    dense = [*TEXT, "model.moe.first_dense=4"]
    load(RunConfig, None, dense)
    for override in (
        "training.expert_parallel=2",
        "training.freeze=routers",
        "probe.every=5",
        "profile.layers_every=5",
        "model.moe.num_experts=8",
        "model.moe.router.z_loss=0.1",
        "model.moe.regularisers.snnl_loss=0.1",
        "model.moe.momentum.kind=nag",
    ):
        assert told(RunConfig, [*dense, override]).startswith(override.partition("=")[0]), override


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0100", 100),
        ("1_000", 1000),
        ("1e-3", 1e-3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1:30", "1:30"),
        ("2026-11-30", "2026-11-30"),
        ("2026-11-31", "2026-11-31"),
        ("0x_", "0x_"),
        ("0x1F", "0x1F"),
        ("0o17", "0o17"),
        ("1_", "1_"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("=", "="),
        ("[1, 2]", [1, 2]),
    ],
)
def test_yaml_means_what_people_read(text: str, value: Any) -> None:
    found = parse_yaml(text, "it")
    assert (found, type(found)) == (value, type(value))


def test_an_alias_is_what_it_stands_for() -> None:
    shared = [0.9, 0.95]
    written = write_yaml({"a": shared, "b": shared})
    assert "*" in written
    assert parse_yaml(written, "it") == {"a": shared, "b": shared}


@pytest.mark.parametrize(
    "value", ["1e-3", "1:30", "0100", "0x1F", "2026-11-31", "yes", "null", "1_000", "=", "", "a b"]
)
def test_text_that_looks_like_something_else_is_written_so_that_it_stays_text(value: str) -> None:
    assert parse_yaml(write_yaml({"name": value}), "it") == {"name": value}


GROWING = "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 20)}]" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1}\na: 2", "line 3: not valid YAML: 'a' is given twice, first in line 1"),
        ("training: {steps: 1}\ntraining: {steps: 2}", "line 2: .*'training' is given twice"),
        ("a: !!float abc", "line 1: .*tag"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: .*tag"),
        ("[" * 3000, "nested more than 50 levels"),
        ("a: &x [*x]", "contains itself"),
        ("{[a]: 1}", "a key must be a name"),
        ("9" * 6000, "too long a number"),
        ("a: [1", "line"),
        ("a: b: c", "mapping values are not allowed"),
        ("\x00", "not valid YAML"),
        ("*x", "undefined alias"),
        (GROWING, "line 4: .*more than 10000 values"),
        ("--- 1\n--- 2", "another document"),
    ],
)
def test_other_yaml_is_one_line_with_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        load(RunConfig, file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        load(RunConfig, None, [f"name={text}"])
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    for path in (loop, tmp_path, tmp_path / "absent.yaml", tmp_path / "a\0b"):
        with pytest.raises(ConfigError, match="cannot read the configuration") as error:
            load(RunConfig, path)
        assert "\n" not in str(error.value)


def test_a_name_may_look_like_a_date() -> None:
    assert load(RunConfig, None, [*TEXT, "name=2026-11-31"]).name == "2026-11-31"
    with pytest.raises(ConfigError, match="name: expected str, got 100; text that looks like something else is quoted"):
        load(RunConfig, None, [*TEXT, "name=0100"])
    assert load(RunConfig, None, [*TEXT, "name='0100'"]).name == "0100"

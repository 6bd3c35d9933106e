"""docs/add_a_router.md is a program: its router, its entry in the table of methods, and its commands."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.moe.methods import Method
from s2moe.moe.routers import ROUTERS
from tests.methods import test_conformance as conformance
from tests.methods.test_layouts import overrides_of
from tests.pages import blocks

ROOT = Path(__file__).parents[1]
PAGE = "docs/add_a_router.md"
SHORT = (
    "training.steps=4 schedule.warmup_steps=1 evaluation.context=1 evaluation.segment=128 evaluation.max_symbols=500 "
    "logging.sample_tokens=0"
)

ROUTER, ENTRY = blocks(PAGE)
TESTS, COMPARISON = blocks(PAGE, "bash")
# A process knows the methods it began with: here the entry's settings stand for the name.
METHOD = eval(f"{{{ENTRY}}}", {"Method": Method})["random"]
MOE = {"method": "smoe", **METHOD.defaults(num_experts=4)}


@pytest.fixture
def _added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's router, for one test."""
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # dataclasses look their module up
    try:
        exec(compile(ROUTER, PAGE, "exec"), module.__dict__)
        yield
    finally:
        ROUTERS.pop("random", None)


def promised() -> Iterator[Any]:
    """Every test of tests/methods/test_conformance.py, with its own parameters but the method."""
    for name, test in inspect.getmembers(conformance, inspect.isfunction):
        if name.startswith("test_"):
            marks = [mark.args for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] != "moe"]
            for values in itertools.product(*(values for _, values in marks)):
                given = dict(zip((names for names, _ in marks), values, strict=True))
                yield pytest.param(test, given, id="-".join([name, *map(str, values)]))


@pytest.mark.usefixtures("_added")
@pytest.mark.parametrize(("test", "given"), list(promised()))
def test_the_router_stands_what_every_method_must(
    test: Callable[..., None], given: dict[str, Any], tmp_path: Path
) -> None:
    if "tmp_path" in inspect.signature(test).parameters:
        given = {**given, "tmp_path": tmp_path}
    test(moe=MOE, **given)


@pytest.mark.usefixtures("_added")
def test_its_option_and_its_draws() -> None:
    moe = {"method": "smoe", "num_experts": 4, "expert_hidden": 8, "router": {"name": "random", "weight": 3.0}}
    config = S2MoEConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, moe=moe)
    router = S2MoEForCausalLM(config).model.layers[0].moe.router
    context, hidden_TD = conformance.RoutingContext(seed=1, step=2), torch.randn(500, 16)
    first = router(hidden_TD, context)
    assert first.weight_N.tolist() == [1.5] * 1000
    assert first.load_E.min() > 100  # of 250
    later = router(hidden_TD, conformance.RoutingContext(seed=1, step=3))
    kept = (first.expert_N.view(-1, 2)[:, 0] == later.expert_N.view(-1, 2)[:, 0]).float().mean()
    assert kept < 0.6  # a quarter by chance, more where the projections happen to be alike
    assert router.macs_per_token() == 4 * 16


@pytest.mark.usefixtures("_added")
def test_the_compared_runs_differ_in_the_router_alone() -> None:
    """The settings that the page's commands give."""
    loop = re.search(r"for method in (.*); do\n(.*)done", COMPARISON, re.DOTALL)
    assert loop
    given = re.search(r"pretrain\.py --config (\S+) (.*)", loop[2].replace("\\\n", " "))
    assert given
    named = {"random": overrides_of(MOE), "smoe": ["model.moe.method=smoe"]}
    configs = [
        load(RunConfig, ROOT / given[1], [*given[2].replace("model.moe.method=$method", "").split(), *named[method]])
        for method in loop[1].split()
    ]
    found = [vars(config) | {"model": dict(config.model)} for config in configs]
    layers = [settings["model"].pop("moe") for settings in found]
    assert found[0] == found[1]
    assert [layer.pop("router")["name"] for layer in layers] == ["random", "topk"]
    assert layers[0] == layers[1]
    assert not layers[0]["stochastic"]["enabled"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_run(tmp_path: Path) -> None:
    """In a copy of the project, with the page's file and entry: its tests, and its comparison on short runs."""
    for folder in ("s2moe", "launcher", "data_prep", "benchmarks", "configs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "s2moe/moe/routers/random.py").write_text(ROUTER)
    methods = tmp_path / "s2moe/moe/methods.py"
    head = "METHODS: dict[str, Method] = {\n"
    assert head in methods.read_text()
    methods.write_text(methods.read_text().replace(head, head + ENTRY))
    config = "--config configs/quickstart.yaml"
    assert config in COMPARISON
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for commands in (TESTS, COMPARISON.replace(config, f"{config} {SHORT}")):
        done = subprocess.run(
            ["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    table = (tmp_path / "runs/comparison/runs.md").read_text()
    for method in ("random", "smoe"):
        assert re.search(rf"^\| {method} \| {method} \|", table, re.MULTILINE), table

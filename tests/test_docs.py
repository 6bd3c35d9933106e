"""What the documentation shows has to run."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.routers import ROUTERS

ROOT = Path(__file__).parents[1]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_router_works(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = python_blocks("docs/add_a_router.md")
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # dataclasses look their module up
    try:
        exec(compile(source, "docs/add_a_router.md", "exec"), module.__dict__)
        moe = {"method": "smoe", "num_experts": 4, "expert_hidden": 8, "router": {"name": "random", "weight": 2.0}}
        config = S2MoEConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, moe=moe)
        tokens = torch.arange(12).view(2, 6)
        output = S2MoEForCausalLM(config)(input_ids=tokens, labels=tokens)
    finally:
        ROUTERS.pop("random", None)
    output.loss.backward()
    assert [layer.counts_E.sum().item() for layer in output.routing] == [12 * 2] * 2


def test_links_in_the_documentation_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

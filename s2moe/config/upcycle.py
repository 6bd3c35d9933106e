"""The settings that `launcher/export.py upcycle` takes beside its options: of the SMoE layers, as a run has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from s2moe.moe.config import MoEConfig
from s2moe.options import deep_merge

from .loader import build, read_override
from .model import with_checked_router
from .options import ConfigError, Section, open_section

OPTIONS = {
    "method": "--method",
    "num_experts": "--experts",
    "experts_per_token": "--experts-per-token",
    "every": "--every",
    "first_dense": "--first-dense",
}
OF_THE_DENSE_MODEL = ("expert_hidden", "expert_form", "activation")


def moe_settings(overrides: Iterable[str], method: str, experts: int) -> dict[str, Any]:
    """`model.moe.key=value` arguments as the dictionary that `upcycle` takes: the given keys alone.

    Raises:
        ConfigError: unknown key, wrong type, or a key that an option or the dense model decides.
    """
    moe = open_section(MoEConfig, dict)
    section = Section({"model": Section({"moe": moe}, dict)}, dict)
    tree: dict[str, Any] = {}
    for text in overrides:
        tree = deep_merge(tree, read_override(text, section))
    given = (tree.get("model") or {}).get("moe") or {}
    for name in given:
        if name in OPTIONS:
            raise ConfigError(f"model.moe.{name}: is given as {OPTIONS[name]}")
        if name in OF_THE_DENSE_MODEL:
            raise ConfigError(f"model.moe.{name}: follows from the dense model, whose MLPs become the experts")

    def of_the_layers(typed: dict[str, Any]) -> dict[str, Any]:
        checked = with_checked_router({**typed, "method": method, "num_experts": experts})
        return {name: checked[name] for name in given}

    return build(replace(moe, build=of_the_layers), given, "model.moe.")

"""The settings that `launcher/export.py upcycle` takes beside its options: of the SMoE layers, as a run has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from s2moe.config.loader import build, read_override
from s2moe.config.model import with_checked_router, with_router
from s2moe.config.options import ConfigError, Section, open_section
from s2moe.config.relevance import Settings
from s2moe.hub.upcycling import ARGUMENTS, OF_THE_DENSE_MODEL
from s2moe.moe.config import MoEConfig, resolve_moe
from s2moe.options import deep_merge


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
        if name in ARGUMENTS:
            raise ConfigError(f"model.moe.{name}: is given as --{ARGUMENTS[name].replace('_', '-')}")
        if name in OF_THE_DENSE_MODEL:
            raise ConfigError(f"model.moe.{name}: follows from the dense model, whose MLPs become the experts")

    def of_the_layers(typed: dict[str, Any]) -> dict[str, Any]:
        checked = with_checked_router({**typed, "method": method, "num_experts": experts})
        return {name: checked[name] for name in given}

    found: dict[str, Any] = build(replace(moe, build=of_the_layers), given, "model.moe.")
    made = resolve_moe({**found, "method": method, "num_experts": experts})
    layers = Section({"model": with_router(Section({"moe": moe}, dict), made.router["name"])}, dict)
    settings = Settings(layers, {"model": {"moe": asdict(made)}}, {"SMoE layers": True})
    for path in settings.without_effect(tree):
        raise ConfigError(f"{'.'.join(path)}: {settings.reason(path)}: leave it out, or change that")
    return found

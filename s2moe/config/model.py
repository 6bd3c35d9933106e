"""The `model:` section: `S2MoEConfig`'s own fields, with `moe` described by `MoEConfig`.

`S2MoEConfig` is a transformers configuration, which carries some sixty inherited fields and accepts
any keyword; here only what it declares itself is a setting, so that a misspelt key is an error.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from s2moe.models.configuration import S2MoEConfig
from s2moe.moe.config import MoEConfig, resolve_moe
from s2moe.moe.routers import ROUTERS

from .loader import build as build_section
from .loader import check_keys
from .options import MISSING, Key, Section, open_section

FROM_THE_RUN = {
    "vocab_size": "symbols of the vocabulary; null: as many as the corpus has",
    "max_position_embeddings": "longest sequence the model is meant for; null: training.sequence_length",
}


def model_section() -> Section:
    """Keys of `model:`. Its value is a plain dict of every field, `moe` resolved."""
    hints = inspect.get_annotations(S2MoEConfig, eval_str=True)
    fields = {item.name: item for item in dataclasses.fields(S2MoEConfig)}
    keys: dict[str, Key | Section] = {}
    for name, hint in hints.items():
        if name not in fields:
            continue
        text = fields[name].metadata.get("help", "")
        if name in FROM_THE_RUN:
            keys[name] = replace(Key.of(fields[name], int | None, FROM_THE_RUN[name]), default=None)
        elif name == "moe":
            text = "the sparse mixture-of-experts layers; method changes defaults below, which are the default method's"
            section = open_section(MoEConfig, build_moe, text)
            keys[name] = with_defaults(section, dataclasses.asdict(resolve_moe({})))
        else:
            keys[name] = Key.of(fields[name], hint, text)

    def build(given: dict[str, Any]) -> dict[str, Any]:
        values = {name: key.default for name, key in keys.items() if isinstance(key, Key)} | given
        S2MoEConfig(**{name: value for name, value in values.items() if value is not None})  # raises on impossible ones
        return values

    return Section(keys, build, "the Transformer")


def build_moe(given: dict[str, Any]) -> dict[str, Any]:
    """Every field of `moe`: the method's settings under the given ones, the router's options checked."""
    return dataclasses.asdict(resolve_moe(with_checked_router(given)))


def with_checked_router(given: dict[str, Any]) -> dict[str, Any]:
    """The given fields of `moe`, the router's options checked and converted to their types."""
    router = dict(given.get("router") or {})
    named = {"name": router.pop("name")} if "name" in router else {}
    name = resolve_moe({**given, "router": named}).router["name"]
    options = router_section(name)
    check_keys(router, options, "model.moe.router.")
    checked = build_section(options, router, "model.moe.router.")
    return {**given, "router": {**named, **checked}}


def router_section(name: str) -> Section:
    """Keys of `model.moe.router:` for the router called `name`, of which only the given ones are set."""
    section = open_section(ROUTERS[name].Options, dict)
    router = resolve_moe({}).router  # the default method's
    return with_defaults(section, router) if router["name"] == name else section


def with_defaults(section: Section, values: Mapping[str, Any]) -> Section:
    """The section with `values` as defaults; a key that holds further settings keeps its own."""
    keys: dict[str, Key | Section] = {}
    for name, known in section.keys.items():
        if isinstance(known, Section):
            keys[name] = with_defaults(known, values[name])
        else:
            keys[name] = known if isinstance(values[name], dict) else dataclasses.replace(known, default=values[name])
    return dataclasses.replace(section, keys=keys)


def with_router(model: Section, name: str) -> Section:
    """The section of a model's settings, with the options of the router called `name` in place of any."""
    moe = model.keys["moe"]
    assert isinstance(moe, Section)
    options = open_section(ROUTERS[name].Options, dict)
    known = moe.keys["router"]
    router = replace(options, needs=known.needs, keys={"name": Key(str, MISSING), **options.keys})
    return replace(model, keys={**model.keys, "moe": replace(moe, keys={**moe.keys, "router": router})})


def facts_of(moe: MoEConfig, layers: int) -> dict[str, bool]:
    """What of a model's layers decides which settings matter."""
    sparse = sum(moe.is_sparse(layer) for layer in range(layers))
    return {"SMoE layers": sparse > 0, "dense layers": sparse < layers}


def default_model() -> dict[str, Any]:
    """The `model:` section when nothing is given."""
    return model_section().build({"moe": build_moe({})})

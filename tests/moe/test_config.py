"""The layer's options: methods, overrides, and errors that name the key and its nearest neighbour."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from s2moe.models.vision.vit_config import VMoEConfig
from s2moe.moe.config import MoEConfig, resolve_moe
from s2moe.moe.layer import SMoELayer, build_layer
from s2moe.moe.methods import METHODS
from s2moe.moe.routers import ROUTERS, Router, register
from s2moe.moe.stochastic import StochasticSMoELayer


@pytest.mark.parametrize(
    ("method", "k", "kind"),
    [("smoe", 2, SMoELayer), ("s2moe", 1, StochasticSMoELayer), ("s2moe_k2", 2, StochasticSMoELayer)],
)
def test_methods(method: str, k: int, kind: type) -> None:
    config = resolve_moe({"method": method})
    assert config.experts_per_token == k
    assert type(build_layer(config, 8, 0)) is kind
    assert config.router["combine"] == "softmax_then_topk"  # trains the router at any k


@pytest.mark.parametrize("method", METHODS)
def test_resolving_twice_changes_nothing(method: str) -> None:
    """A saved configuration holds the resolved options and is resolved again when loaded."""
    config = resolve_moe({"method": method, "num_experts": 6, "stochastic": {"samples": 64}})
    assert resolve_moe(asdict(config)) == config


def test_what_is_given_overrides_the_method() -> None:
    given = {"method": "s2moe", "experts_per_token": 2, "stochastic": {"enabled": False, "temperature": 0.5}}
    config = resolve_moe(given)
    assert config.experts_per_token == 2
    assert type(build_layer(config, 8, 0)) is SMoELayer
    assert given == {"method": "s2moe", "experts_per_token": 2, "stochastic": {"enabled": False, "temperature": 0.5}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_expert": 4}, r"moe: unknown key 'num_expert', did you mean 'num_experts'"),
        ({"router": {"balance_los": 0.1}}, r"router: unknown key 'balance_los', did you mean 'balance_loss'"),
        ({"stochastic": {"temprature": 1.0}}, r"stochastic: unknown key 'temprature', did you mean 'temperature'"),
        ({"method": "s2mo"}, r"unknown method 's2mo', did you mean 's2moe'"),
        ({"router": {"name": "topp"}}, r"unknown router 'topp', did you mean 'topk'"),
        ({"method": ["smoe"]}, r"unknown method \['smoe'\]"),
        ({"router": {"name": []}}, r"unknown router \[\]"),
        ({"competition": {"enabled": True}, "router": {"name": "xmoe"}}, r"affinities into the logits of a linear rou"),
        ({"expert_form": "glu"}, r"moe.expert_form: must be one of gated, mlp"),
        ({"activation": "tanh"}, r"moe.activation: must be one of silu"),
        ({"router": {"combine": "softmax"}}, r"router.combine: must be one of"),
        ({"stochastic": {"statistics": "batch"}}, r"stochastic.statistics: must be one of token_batch"),
        ({"num_experts": 4, "experts_per_token": 5}, r"experts_per_token must lie in 1..num_experts \(4\), got 5"),
        ({"num_experts": 0}, r"num_experts"),
        ({"every": 0}, r"every must be at least 1"),
        ({"expert_hidden": -3}, r"expert_hidden must be at least 1"),
        ({"shared_experts": -1}, r"shared_experts"),
        ({"first_dense": -1}, r"first_dense"),
        ({"stochastic": {"temperature": 0.0}}, r"temperature must be positive"),
        ({"stochastic": {"samples": 1}}, r"samples must be at least 2"),
        ({"router": {"capacity_factor": 0.0}}, r"capacity_factor must be positive"),
        ({"router": {"load_loss": 0.1}}, r"noise=shazeer"),
        ({"router": "topk"}, r"router"),  # meant: router: {name: topk}
    ],
    ids=str,
)
def test_errors_name_the_key_and_the_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_moe(given)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_router_beside_a_method_is_taken_as_it_is_or_refused_by_both_names(method: str, name: str) -> None:
    """Never the method's settings for its own router on another one, nor one of the two in silence."""
    settings = METHODS[method].defaults(4)
    own = settings["router"]["name"]
    given: dict[str, Any] = {"method": method, "num_experts": 4, "router": {"name": name}}
    if name == "base":
        given["experts_per_token"] = 1
    if own == name:
        assert resolve_moe(given).title() == method
        assert resolve_moe(given) == resolve_moe({k: v for k, v in given.items() if k != "router"})
    elif not METHODS[method].any_router:
        with pytest.raises(ValueError, match=rf"^method={method} .* the router '{own}', and router\.name={name} is "):
            resolve_moe(given)
    elif ROUTERS[name].refuses_noise and "stochastic" in settings:
        with pytest.raises(ValueError, match=rf"\(S2MoE\) cannot use the router '{name}'"):
            resolve_moe(given)
    elif "cka_loss" in settings.get("regularisers", {}) and name == "base":
        with pytest.raises(ValueError, match="experts_per_token=2"):
            resolve_moe(given)
    else:
        config = resolve_moe(given)
        assert config.router == {"name": name, **asdict(ROUTERS[name].Options())}
        assert config.title() == f"{method}, router {name}"  # what tables, plans and cards call it


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_without_a_method_is_that_router_alone(name: str) -> None:
    config = resolve_moe({"num_experts": 4, "router": {"name": name}})
    assert config == resolve_moe({"num_experts": 4, "method": "smoe", "router": {"name": name}})
    assert config.router == {"name": name, **asdict(ROUTERS[name].Options())}
    assert not config.stochastic.enabled
    if not ROUTERS[name].keeps_history:  # of a text
        vision = VMoEConfig(moe={"router": {"name": name}, "experts_per_token": 1 if name == "base" else 2})
        assert vision.moe["method"] == ("vmoe" if name == "vmoe" else "smoe")
        assert vision.moe["router"].items() >= asdict(ROUTERS[name].Options()).items()


def test_without_either_the_default_method_holds() -> None:
    assert resolve_moe({}).method == resolve_moe({"router": {"z_loss": 0.1}}).method == "s2moe"
    assert VMoEConfig(moe={"router": {"noise": 2.0}}).moe["method"] == "vmoe"


@pytest.mark.parametrize(("method", "name"), [("stablemoe", "topk"), ("gshard", "topk"), ("ssr", "xmoe")])
def test_a_saved_configuration_with_another_router_is_still_read(method: str, name: str) -> None:
    """As earlier versions accepted and wrote it: config.json and checkpoints hold every option."""
    saved = asdict(resolve_moe({"method": "smoe", "num_experts": 6, "router": {"name": name}}))
    read = resolve_moe({**saved, "method": method})
    assert asdict(read) == {**saved, "method": method}


@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"every": 2}, [1, 3, 5]),
        ({"every": 3}, [2, 5]),
        ({"first_dense": 2}, [2, 3, 4, 5]),
        ({"first_dense": 1, "every": 2}, [2, 4]),
        ({"first_dense": 6}, []),
    ],
    ids=str,
)
def test_which_layers_are_sparse(options: dict[str, int], sparse: list[int]) -> None:
    config = MoEConfig(**options)
    assert [layer for layer in range(6) if config.is_sparse(layer)] == sparse


def test_a_second_router_of_one_name_is_refused() -> None:
    with pytest.raises(ValueError, match="topk"):
        register("topk")(Router)
    assert ROUTERS["topk"] is not Router

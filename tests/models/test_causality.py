"""No logit may depend on a later token, nor on another sequence, in evaluation: whatever the router."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.models.decoder import tiny

ROUTERS = [
    {"combine": combine, "noise": noise, "capacity_factor": capacity, "drop_policy": policy, "bias_update_rate": rate}
    for combine, noise, (capacity, policy), rate in itertools.product(
        ("softmax_then_topk", "topk_then_softmax", "sigmoid", "straight_through"),
        ("none", "shazeer", "jitter"),
        ((None, "position"), (0.5, "position"), (0.5, "probability")),
        (0.0, 1e-3),
    )
]


def assert_causal(model: torch.nn.Module, **given: Any) -> None:
    ids = torch.randint(19, (2, 8))
    plain_BSV = model(ids, **given).logits
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 7) % 19
    changed_BSV = model(changed, **given).logits
    assert (changed_BSV[0, :5] - plain_BSV[0, :5]).abs().max() < 1e-9, "an earlier logit saw a later token"
    assert (changed_BSV[1] - plain_BSV[1]).abs().max() < 1e-9, "a sequence saw another one"
    assert (changed_BSV[0, 5:] - plain_BSV[0, 5:]).abs().amax(-1).min() > 1e-6  # the change is felt


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: "-".join(str(value) for value in router.values()))
def test_every_router_is_causal_in_evaluation(router: dict[str, Any]) -> None:
    for method in ("smoe", "s2moe", "s2moe_k2"):
        if method == "s2moe" and router["combine"] == "topk_then_softmax":
            continue  # refused at k=1
        model = tiny(method, router, num_hidden_layers=2).double().eval()
        for layer in model.model.layers:
            if router["bias_update_rate"]:
                layer.moe.router.bias_E.normal_(std=0.3)
        assert_causal(model)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("inference", ["clean", "gated"])
def test_slimmed_s2moe_is_causal(k: int, inference: str) -> None:
    assert_causal(tiny("s2moe", moe_stochastic={"inference": inference}).double().eval(), experts_per_token=k)


@pytest.mark.parametrize("router", [{}, {"combine": "sigmoid"}, {"combine": "straight_through"}], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropless_routing_is_causal_in_training_too(router: dict[str, Any], implementation: str) -> None:
    model = tiny(router=router, num_key_value_heads=2).double()
    model.set_attn_implementation(implementation)
    assert_causal(model)

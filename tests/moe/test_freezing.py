"""Frozen routers and experts: what stays, what moves, and what the balance loss still reaches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from s2moe import S2MoEForCausalLM, from_transformers, upcycle
from s2moe.config.run import TrainingConfig
from s2moe.moe.freezing import PARTS, freeze, freeze_named
from s2moe.parallel.deepspeed_compat import FROZEN, optimizer_groups
from s2moe.training.engine import set_learning_rate
from tests.hub.foreign import foreign, ids
from tests.models.decoder import tiny

MODELS: dict[str, dict[str, Any]] = {
    "xmoe": {"method": "xmoe"},
    "s2moe": {"method": "s2moe"},
    "shared": {"method": "smoe", "moe_shared_experts": 1, "moe_expert_form": "mlp"},
    "loss_free": {"method": "loss_free"},
}
PARAMETERS = pytest.mark.parametrize("given", MODELS.values(), ids=MODELS)


def belongs(name: str, parts: str) -> bool:
    routers, experts = PARTS[parts]
    return (routers and ".router." in name) or (experts and (".experts." in name or ".shared." in name))


def step(model: S2MoEForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.randint(19, (2, 8))
    out = model(ids, labels=ids)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    model.update_routers([out.routing])


@PARAMETERS
@pytest.mark.parametrize("parts", PARTS)
def test_frozen_weights_stay_to_the_bit_and_the_others_move(given: dict[str, Any], parts: str) -> None:
    model = tiny(**given)
    freeze_named(model, parts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
    for name, value in model.state_dict().items():
        assert value.equal(before[name]) == belongs(name, parts), name


@PARAMETERS
def test_freezing_changes_no_other_gradient(given: dict[str, Any]) -> None:
    model = tiny(**given).double()
    ids = torch.randint(19, (2, 8))
    results = []
    for parts in ("none", "routers_and_experts"):
        freeze_named(model, parts)
        model.zero_grad()
        torch.manual_seed(0)
        model.model._forwards = 0  # the same draws again
        out = model(ids, labels=ids)
        out.loss.backward()
        results.append((out.loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0])
    every, rest = results[0][1], results[1][1]
    assert set(rest) == {name for name in every if not belongs(name, "routers_and_experts")}
    for name, gradient in rest.items():
        torch.testing.assert_close(gradient, every[name])


@PARAMETERS
def test_the_balance_loss_still_reaches_the_hidden_states(given: dict[str, Any]) -> None:
    model = tiny(**given, router={"balance_loss": 0.1}).double()
    freeze(model)
    ids = torch.randint(19, (2, 8))
    model(ids, labels=ids).aux_loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 1e-8
    assert model.model.layers[0].attention.v_proj.weight.grad.abs().max() > 1e-8


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt2"])
def test_what_another_architecture_has_beside_its_layers_is_frozen_with_them(name: str, parts: str) -> None:
    """Qwen2-MoE's shared expert and the bias of GPT-2's MLPs with the experts, the shared expert's gate as a router."""
    theirs = foreign(name).train()
    model = upcycle(theirs, experts=4) if name == "gpt2" else from_transformers(theirs)
    routers, experts = PARTS[parts]
    freeze_named(model, parts)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        loss = model(ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = {key for key, value in model.named_parameters() if value.equal(before[key])}
    routing = (".router.", ".shared_expert_gate.")
    computing = (".experts.", ".shared_expert.", ".mlp.bias")
    wanted = {key for key in before for part in routing if routers and part in key}
    wanted |= {key for key in before for part in computing if experts and (part in key or key.endswith(part))}
    assert kept == wanted
    if experts:
        assert any(key.endswith(".mlp.bias") if name == "gpt2" else ".shared_expert." in key for key in kept)


def test_a_frozen_routers_bias_does_not_move() -> None:
    """The selection bias is the router's, though it learns without a gradient."""
    model, ids = tiny("loss_free"), torch.randint(19, (2, 8))
    for parts, moves in (("experts", True), ("routers", False)):
        freeze_named(model, parts)
        before = model.model.layers[0].moe.router.bias_E.clone()
        model.update_routers([model(ids).routing])
        assert model.model.layers[0].moe.router.bias_E.equal(before) != moves


def test_nothing_to_freeze_is_refused() -> None:
    with pytest.raises(ValueError, match="no SMoE layer"):
        freeze(tiny(moe_first_dense=3))


def test_frozen_experts_stay_with_the_engine_without_gradient_rate_or_decay() -> None:
    """ZeRO needs them in the optimizer: there they stand apart, and no backward pass reaches them."""
    model = tiny("smoe")
    freeze(model)
    optimizer_groups(model, 0.1)
    groups = optimizer_groups(model, 0.1)  # making them twice changes nothing
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert len(found) == len({name for name, _ in found})
    assert {name for name, _ in found} == {name for name in names.values() if ".router." not in name}
    for name, group in found:
        assert bool(group.get(FROZEN)) == bool(group.get("moe")) == (".experts." in name)
        if ".experts." in name:
            assert group["lr"] == group["weight_decay"] == 0

    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    set_learning_rate(SimpleNamespace(optimizer=optimizer), 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0 if g.get(FROZEN) else 0.5 for g in groups]
    experts = model.model.layers[0].moe.experts
    before = experts.w1.clone()
    step(model, optimizer)
    assert experts.w1.requires_grad
    assert experts.w1.grad is None
    assert experts.w1.equal(before)


def test_every_name_of_the_run_configuration_is_known() -> None:
    assert get_args(get_type_hints(TrainingConfig)["freeze"]) == tuple(PARTS)
    assert TrainingConfig(steps=1, global_batch=1, sequence_length=1).freeze == "none"

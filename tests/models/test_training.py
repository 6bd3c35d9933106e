"""The model learns: repeatably, with or without activation checkpointing, and better with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.routing import RoutingContext
from s2moe.parallel import ExpertParallel
from tests.models.decoder import SIZES, tiny

IDS = torch.randint(19, (3, 8), generator=torch.Generator().manual_seed(5))
NOISY: dict[str, dict[str, Any]] = {
    "smoe": {},
    "s2moe": {"method": "s2moe"},
    "s2moe_k2": {"method": "s2moe_k2", "moe_stochastic": {"statistics": "sequence", "samples": 5}},
    "shazeer": {"router": {"noise": "shazeer", "load_loss": 0.1, "importance_loss": 0.1}},
    "jitter": {"router": {"noise": "jitter", "jitter": 0.3}},
    "capacity": {"router": {"capacity_factor": 1.0, "drop_policy": "probability"}},
    "dropout": {"method": "s2moe", "hidden_dropout": 0.2, "attention_dropout": 0.1},
}
PARAMETERS = pytest.mark.parametrize("given", NOISY.values(), ids=NOISY)


def gradients(model: S2MoEForCausalLM, context: RoutingContext | None, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(seed)  # dropout draws from the global generator
    model.zero_grad()
    out = model(IDS, labels=IDS, context=context)
    out.loss.backward()
    return out.loss.detach(), [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


@PARAMETERS
@pytest.mark.parametrize("context", [RoutingContext(seed=3, step=5), None], ids=["context", "none"])
def test_activation_checkpointing_changes_nothing(given: dict[str, Any], context: RoutingContext | None) -> None:
    plain, checkpointed = tiny(**given), tiny(**given)
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.activation_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    loss, wanted = gradients(plain, context)
    again, found = gradients(checkpointed, context)
    torch.testing.assert_close(again, loss)
    for (name, _), left, right in zip(plain.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(left, right, msg=lambda text, name=name: f"{name}: {text}")


def test_reentrant_checkpointing_is_refused() -> None:
    """It detaches tensors inside named tuples: the auxiliary losses would lose their gradient in silence."""
    with pytest.raises(ValueError, match="use_reentrant"):
        tiny("s2moe").activation_checkpointing_enable({"use_reentrant": True})


@PARAMETERS
def test_only_the_same_context_repeats_a_training_step(given: dict[str, Any]) -> None:
    model, context = tiny(**given), RoutingContext(seed=1, step=2, microbatch=3)
    loss, wanted = gradients(model, context)
    again, found = gradients(model, context)
    assert torch.equal(again, loss)
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
    random = bool(given.get("method")) or "noise" in given.get("router", {})
    for key in ("seed", "step", "microbatch"):
        other, _ = gradients(model, replace(context, **{key: 9}))
        assert (other != loss) == random


def test_without_a_context_each_training_pass_is_a_step_of_its_own() -> None:
    model = tiny("s2moe")
    assert len({model(IDS, labels=IDS).loss.item() for _ in range(4)}) == 4
    model.eval()
    assert len({model(IDS, labels=IDS).loss.item() for _ in range(4)}) == 1


def test_layers_draw_different_noise() -> None:
    """Two layers with the same parameters and input still disagree."""
    model = tiny("s2moe")
    first, second = model.model.layers[0].moe, model.model.layers[1].moe
    second.load_state_dict(first.state_dict())
    hidden_BSD = torch.randn(2, 5, 16)
    assert not torch.allclose(first(hidden_BSD)[0], second(hidden_BSD)[0])
    torch.testing.assert_close(first.eval()(hidden_BSD)[0], second.eval()(hidden_BSD)[0])


@PARAMETERS
def test_every_parameter_learns(given: dict[str, Any]) -> None:
    model = tiny(**given)
    model(torch.randint(19, (8, 16)), labels=torch.randint(19, (8, 16))).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("method", ["smoe", "s2moe", "s2moe_k2"])
def test_overfits_a_tiny_batch(method: str) -> None:
    model = S2MoEForCausalLM(
        S2MoEConfig(
            **{**SIZES, "initializer_range": 0.02}, moe={"method": method, "num_experts": 4, "expert_hidden": 32}
        )
    )
    ids = torch.randint(19, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(120):
        loss = model(ids, labels=ids, context=RoutingContext(step=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.eval()(ids, labels=ids).loss.item() < 0.1


def associations(classes: int, values: int) -> tuple[Tensor, Tensor]:
    """Every pair (class, value) as a sequence of two symbols, and its label: a random table to learn."""
    table = torch.randint(values, (classes, values))
    pair = torch.cartesian_prod(torch.arange(classes), torch.arange(values))
    return torch.stack((pair[:, 0] + values, pair[:, 1]), 1), table[pair[:, 0], pair[:, 1]]


def final_loss(moe: dict[str, Any], ids: Tensor, labels: Tensor) -> float:
    """Nats after 200 steps, in evaluation."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    moe = {"method": "smoe", "expert_hidden": 8, **moe}
    model = S2MoEForCausalLM(S2MoEConfig(**sizes, intermediate_size=8, initializer_range=0.1, moe=moe))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    targets = torch.stack((torch.full_like(labels, -100), labels), 1)
    for step in range(200):
        loss = model(ids, shift_labels=targets, context=RoutingContext(step=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()(ids, shift_labels=targets).loss.item()


def test_experts_learn_more_than_a_dense_model_of_the_same_active_size() -> None:
    """1024 random associations: one expert of width 8 a token, out of 16, against one MLP of width 8."""
    ids, labels = associations(classes=32, values=32)
    dense = final_loss({"first_dense": 1}, ids, labels)
    experts = final_loss({"num_experts": 16, "experts_per_token": 1}, ids, labels)
    assert experts < 0.7 * dense


@pytest.mark.parametrize("method", ["smoe", "s2moe"])
@pytest.mark.parametrize("form", ["gated", "mlp"])
def test_initialisation_does_not_depend_on_the_expert_parallel_degree(method: str, form: str) -> None:
    """Same seed, any degree: the ranks' experts together are those of a single process."""
    config = S2MoEConfig(**SIZES, moe={"method": method, "num_experts": 4, "expert_hidden": 8, "expert_form": form})

    def build(degree: int, rank: int) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(11)
        parallel = ExpertParallel(size=degree, rank=rank)
        return S2MoEForCausalLM(config, parallel).state_dict(), torch.rand(3)

    whole, following = build(1, 0)
    assert whole["model.layers.0.moe.experts.w1"].shape[0] == 4
    for degree in (2, 4):
        parts = [build(degree, rank) for rank in range(degree)]
        assert all(torch.equal(after, following) for _, after in parts)  # what is drawn next agrees as well
        for name, value in whole.items():
            pieces = [state[name] for state, _ in parts]
            if ".experts." in name:
                assert torch.equal(torch.cat(pieces), value), name
            else:
                assert all(torch.equal(piece, value) for piece in pieces), name


def test_no_parameter_is_left_as_the_memory_it_was_made_of() -> None:
    """Every value is set by the initialisation, to the scale that the configuration asks for."""
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN
    try:
        router = {"noise": "shazeer", "bias_update_rate": 1e-3, "combine": "sigmoid"}
        moe = {"num_experts": 4, "expert_hidden": 64, "shared_experts": 1, "every": 2, "router": router}
        model = S2MoEForCausalLM(S2MoEConfig(**{**SIZES, "hidden_size": 64, "initializer_range": 0.05}, moe=moe))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), name
        if tensor.numel() > 2000:
            assert tensor.std().item() == pytest.approx(0.05, rel=0.1), name
            assert abs(tensor.mean().item()) < 0.005, name
    experts_EFD = model.model.layers[1].moe.experts.w1
    assert not torch.allclose(experts_EFD[0], experts_EFD[1])  # no identical copies


def test_two_models_of_one_seed_are_equal_and_of_two_seeds_are_not() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(S2MoEForCausalLM(S2MoEConfig(**SIZES, moe={"num_experts": 4})).state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        if value.numel() > 50:
            assert not torch.equal(value, states[2][name]), name


def test_trains_under_autocast() -> None:
    """What a Hugging Face Trainer with bf16=True does."""
    model = tiny("s2moe", {"z_loss": 1e-3}, moe_shared_experts=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, labels=IDS)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())

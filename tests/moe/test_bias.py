"""Auxiliary-loss-free balancing: the update of the selection bias, and when it may happen.

Legend: E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.routers import ROUTERS
from s2moe.moe.routing import RoutingContext

E, RATE = 4, 1e-2
SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def model(**options: Any) -> S2MoEForCausalLM:
    moe = {
        "method": options.pop("method", "smoe"),
        "num_experts": E,
        "expert_hidden": 8,
        "router": {"combine": "sigmoid", "bias_update_rate": RATE, "balance_loss": 0.0, **options},
    }
    made = S2MoEForCausalLM(S2MoEConfig(**SIZES, moe=moe))
    for layer in made.model.layers:  # large enough that experts are chosen unevenly
        torch.nn.init.normal_(layer.moe.router.scores.weight)
    return made.train()


def biases(made: S2MoEForCausalLM) -> torch.Tensor:
    return torch.stack([layer.moe.router.bias_E.clone() for layer in made.model.layers])


def test_update_moves_each_bias_by_the_rate_towards_the_mean_load() -> None:
    cls = ROUTERS["topk"]
    made = cls(3, E, 1, cls.Options(bias_update_rate=RATE))
    made.after_step(torch.tensor([10.0, 2.0, 5.0, 3.0]))  # mean 5
    moved = torch.tensor([-1.0, 1.0, 0.0, 1.0]) * RATE
    torch.testing.assert_close(made.bias_E, moved - moved.mean())
    before = made.bias_E.clone()
    made.after_step(torch.tensor([5.0, 5.0, 5.0, 5.0]))
    torch.testing.assert_close(made.bias_E, before)


def test_bias_stays_centred() -> None:
    cls = ROUTERS["topk"]
    made = cls(3, E, 1, cls.Options(bias_update_rate=RATE))
    for _ in range(200):
        made.after_step(torch.randint(0, 9, (E,)).float())
        assert made.bias_E.mean().abs() < 1e-6


def test_bias_is_state_but_not_a_parameter() -> None:
    made = model()
    assert [name for name in made.state_dict() if "bias_E" in name]
    assert not [name for name, _ in made.named_parameters() if "bias_E" in name]
    assert not [name for name in model(bias_update_rate=0.0).state_dict() if "bias_E" in name]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_no_forward_pass_moves_the_bias(train: bool) -> None:
    made = model().train(train)
    for _ in range(2):
        made(torch.randint(11, (2, 6)), labels=torch.randint(11, (2, 6)))
    assert not biases(made).any()


def test_update_sums_the_micro_batches_of_a_step() -> None:
    """One update of the step's whole load, not one for each micro-batch."""
    made = model()
    routing = [made(torch.randint(11, (2, 6))).routing for _ in range(3)]
    made.update_routers(routing)
    for layer in range(2):
        load_E = sum(micro[layer].counts_E for micro in routing).float()
        moved = RATE * torch.sign(load_E.mean() - load_E)
        torch.testing.assert_close(biases(made)[layer], moved - moved.mean())


def test_activation_recomputation_counts_once() -> None:
    ids, results = torch.randint(11, (2, 6)), []
    plain, checkpointed = model(), model()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.activation_checkpointing_enable()
    for made in (plain, checkpointed):
        out = made(ids, labels=ids, context=RoutingContext())
        out.loss.backward()
        made.update_routers([out.routing])
        results.append(([layer.counts_E for layer in out.routing], biases(made)))
    torch.testing.assert_close(results[0], results[1])  # of whole numbers, and signs of their differences
    assert results[0][1].any()


def test_both_paths_of_s2moe_count() -> None:
    made = model(method="s2moe")
    out = made(torch.randint(11, (2, 6)))
    assert [layer.counts_E.sum().item() for layer in out.routing] == [2 * 12] * 2


@pytest.mark.parametrize("combine", ["sigmoid", "softmax_then_topk"])
def test_bias_balances_a_skewed_router(combine: str) -> None:
    cls = ROUTERS["topk"]
    made = cls(8, E, 2, cls.Options(combine=combine, bias_update_rate=0.003, balance_loss=0.0))
    torch.nn.init.normal_(made.scores.weight, std=0.1)
    with torch.no_grad():
        made.scores.weight[1] += 0.3
    hidden_TD = torch.randn(512, 8) + 0.5
    violations = []
    for _ in range(400):
        counts_E = made(hidden_TD, RoutingContext()).counts_E.float()
        violations.append((counts_E.max() / counts_E.mean() - 1).item())
        made.after_step(counts_E)
    assert violations[0] > 0.6
    assert max(violations[-20:]) < 0.2


def test_padding_moves_no_bias() -> None:
    """Three real tokens beside a hundred padded ones: only the real ones are load."""
    made = model()
    ids, mask = torch.randint(11, (1, 103)), torch.zeros(1, 103, dtype=torch.int64)
    mask[:, -3:] = 1
    for layer in made(ids, attention_mask=mask).routing:
        assert layer.counts_E.sum().item() == 3 * 2


def test_bias_counts_what_the_router_asked_for_not_what_capacity_left() -> None:
    """An expert below the mean load has to rise, whatever other experts had to drop."""
    cls = ROUTERS["topk"]
    made = cls(E, E, 1, cls.Options(combine="sigmoid", bias_update_rate=RATE, capacity_factor=1.0))
    with torch.no_grad():
        made.scores.weight.copy_(torch.eye(E))
    asked = torch.tensor([0] * 20 + [1] * 8 + [2] * 6 + [3] * 6)  # mean 10, so experts 1 to 3 are all below it
    made.after_step(made(torch.eye(E)[asked], RoutingContext()).load_E.float())
    assert made.bias_E[0] < 0
    assert (made.bias_E[1:] > 0).all()


def test_a_half_precision_model_still_learns_its_bias() -> None:
    """Steps of 1e-3 vanish in bfloat16 as soon as a bias exceeds 0.25: the buffer has to stay float32."""
    cls = ROUTERS["topk"]
    made = cls(3, E, 1, cls.Options(combine="sigmoid", bias_update_rate=1e-3)).bfloat16()
    for _ in range(1000):
        made.after_step(torch.tensor([4.0, 0.0, 2.0, 2.0]))
    torch.testing.assert_close(made.bias_E.float(), torch.tensor([-1.0, 1.0, 0.0, 0.0]), rtol=1e-3, atol=1e-3)

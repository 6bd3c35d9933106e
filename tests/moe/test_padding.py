"""Padding takes no part in losses and statistics, whatever stands in it, and changes no real token.

Legend: B batch, S sequence, T = B S tokens, D model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import LayerStatistics, RoutingContext
from tests.moe.test_layer import layer

B, S, D = 2, 6, 8
LAYERS: dict[str, dict[str, Any]] = {
    "top2": {"router": {"z_loss": 0.1, "importance_loss": 0.1}},
    "gshard": {"router": {"balance_form": "gshard"}},
    "kl": {"router": {"balance_form": "kl"}},
    "sigmoid": {"router": {"combine": "sigmoid", "bias_update_rate": 1e-3}},
    "shazeer": {"router": {"noise": "shazeer", "load_loss": 0.1, "importance_loss": 0.1}},
    "jitter": {"router": {"noise": "jitter"}},
    "shared": {"shared_experts": 1},
    "capacity": {"router": {"capacity_factor": 1.0}},
    **{
        f"s2moe_{kind}": {"method": "s2moe", "stochastic": {"statistics": kind, "samples": samples}}
        for kind, samples in (("token_batch", 3), ("sequence", 1024), ("token", 1024))
    },
    "s2moe_symmetric": {"method": "s2moe", "stochastic": {"symmetric": True}},
    "s2moe_inputs": {"method": "s2moe_k2", "stochastic": {"contrast": "inputs", "reroute": False}},
}
PARAMETERS = pytest.mark.parametrize("moe", LAYERS.values(), ids=LAYERS)
MASK_BS = torch.tensor([[False, False, False, True, True, True], [False, True, True, True, True, True]])


def answers(made: SMoELayer) -> list[tuple[torch.Tensor, LayerStatistics]]:
    """Outputs of the real tokens and statistics, with three different fillings of the padding."""
    torch.manual_seed(1)
    real_BSD, found = torch.randn(B, S, D, dtype=torch.float64), []
    for filling in (0.0, 3.0, -40.0):
        hidden_BSD = torch.where(MASK_BS[..., None], real_BSD, filling)
        out_BSD, statistics = made(hidden_BSD, RoutingContext(mask_T=MASK_BS.reshape(-1)))
        found.append((out_BSD[MASK_BS], statistics))
    return found


@PARAMETERS
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_loss_and_figures_do_not_see_padding(moe: dict[str, Any], train: bool) -> None:
    first, *others = answers(layer(**moe).train(train))
    for _, statistics in others:
        torch.testing.assert_close(statistics.loss, first[1].loss)
        torch.testing.assert_close(statistics.values, first[1].values)


@PARAMETERS
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_outputs_of_real_tokens_do_not_see_padding(moe: dict[str, Any], train: bool) -> None:
    first, *others = answers(layer(**moe).train(train))
    for out_TD, _ in others:
        torch.testing.assert_close(out_TD, first[0])


@PARAMETERS
def test_loads_do_not_see_padding(moe: dict[str, Any]) -> None:
    """Logged heat-maps and the bias update read these."""
    first, *others = answers(layer(**moe))
    for _, statistics in others:
        assert statistics.counts_E.tolist() == first[1].counts_E.tolist()


@pytest.mark.parametrize("moe", [LAYERS["top2"], LAYERS["kl"], LAYERS["shazeer"], LAYERS["s2moe_token_batch"]])
def test_a_batch_of_padding_alone_leaves_everything_finite(moe: dict[str, Any]) -> None:
    """A rank's last micro-batch may be empty."""
    made = layer(**moe)
    hidden_BSD = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    _, statistics = made(hidden_BSD, RoutingContext(mask_T=torch.zeros(B * S, dtype=torch.bool)))
    assert torch.isfinite(statistics.loss)
    statistics.loss.backward()
    for tensor in (hidden_BSD, *made.parameters()):
        assert tensor.grad is None or torch.isfinite(tensor.grad).all()
    assert all(torch.isfinite(value) for value in statistics.values.values())


@PARAMETERS
def test_a_mask_of_real_tokens_alone_is_no_mask(moe: dict[str, Any]) -> None:
    made, hidden_BSD = layer(**moe), torch.randn(B, S, D, dtype=torch.float64)
    everything = RoutingContext(mask_T=torch.ones(B * S, dtype=torch.bool))
    (out_BSD, plain), (masked_BSD, masked) = made(hidden_BSD), made(hidden_BSD, everything)
    torch.testing.assert_close(masked_BSD, out_BSD)
    torch.testing.assert_close(masked.loss, plain.loss)
    torch.testing.assert_close(masked.values, plain.values)

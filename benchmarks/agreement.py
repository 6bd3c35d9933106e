"""Whether an implementation computes the function it is timed for.

Legend: T tokens, D model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.implementation import Implementation, Weights
from benchmarks.shapes import Shape
from benchmarks.transformers_peers import mixtral_block


class Outcome(NamedTuple):
    """What a forward and backward pass gives, [1, T, D] each. The auxiliary loss has no part in it."""

    out_1TD: Tensor
    input_gradient_1TD: Tensor


def run(implementation: Implementation, hidden_1TD: Tensor, gradient_1TD: Tensor) -> Outcome:
    """One pass; the parameters' gradients are cleared again."""
    outcome = _run(lambda hidden: implementation.forward(hidden)[0], hidden_1TD, gradient_1TD)
    implementation.module.zero_grad(set_to_none=True)
    return outcome


class Reference:
    """Transformers' eager Mixtral block, at k = 1 with and without the router's probability as a factor."""

    def __init__(
        self, shape: Shape, weights: Weights, hidden_1TD: Tensor, gradient_1TD: Tensor, dtype: torch.dtype
    ) -> None:
        self.half = dtype != torch.float32
        block = mixtral_block(shape, weights, "eager", dtype)
        self.outcomes = {"renormalised": _run(block, hidden_1TD, gradient_1TD)}
        if shape.experts_per_token == 1:
            self.outcomes["unnormalised"] = _run(_with_probability(block), hidden_1TD, gradient_1TD)

    def disagreement(self, kind: str | None, outcome: Outcome) -> float:
        """Share of tokens whose output or input gradient is off by more than rounding, 0 to 1.

        Args:
            kind: ``Implementation.reference``; None agrees with anything.
        """
        if kind is None:
            return 0.0
        tolerance = 5e-2 if self.half else 1e-3
        wrong = torch.zeros(outcome.out_1TD.shape[:2], dtype=torch.bool, device=outcome.out_1TD.device)
        for value, expected in zip(outcome, self.outcomes[kind], strict=True):
            error = (value.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
            wrong |= ~(error <= tolerance)  # also where it is not a number
        return wrong.float().mean().item()

    def agrees(self, disagreement: float) -> bool:
        """Whether near ties between experts alone can explain it.

        Rounding decides those: next to none in float32, more the more experts there are where some
        routers compute in half precision and others do not.
        """
        return disagreement <= (0.1 if self.half else 0.001)


def _with_probability(block: Any) -> Callable[[Tensor], Tensor]:
    """The block at k = 1, its output times the chosen expert's probability."""

    def forward(hidden_1TD: Tensor) -> Tensor:
        logits_TE = F.linear(hidden_1TD[0], block.gate.weight)
        probability_T1 = logits_TE.float().softmax(-1).max(-1, keepdim=True).values
        return block(hidden_1TD) * probability_T1.to(hidden_1TD.dtype)

    return forward


def _run(layer: Callable[[Tensor], Tensor], hidden_1TD: Tensor, gradient_1TD: Tensor) -> Outcome:
    leaf = hidden_1TD.detach().clone().requires_grad_()
    out_1TD = layer(leaf)
    out_1TD.backward(gradient_1TD)
    assert leaf.grad is not None
    return Outcome(out_1TD.detach(), leaf.grad)

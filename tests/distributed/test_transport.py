"""Marginals over all ranks: each rank's part of the plan is its part of one process' plan.

Legend: T tokens, D model, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from s2moe.moe.routers import ROUTERS, Router
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.moe.transport import column_error, sinkhorn
from tests.distributed_harness import run_distributed
from tests.moe.test_transport import Waits

pytestmark = pytest.mark.distributed

D, E = 6, 4
PARTS = {  # tokens of each rank, and which of them are padding
    "equal": ([8, 8], None),
    "uneven": ([3, 13], None),
    "padded": ([8, 8], [[1, 2], [7]]),
    "one rank all padding": ([4, 8], [[0, 1, 2, 3], []]),
    "one rank empty": ([0, 9], None),
    "all padding": ([2, 2], [[0, 1], [0, 1]]),
}


def inputs(part: str, width: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor | None]]:
    sizes, padding = PARTS[part]
    generator = torch.Generator().manual_seed(1)
    values = [
        torch.randn(size, width, generator=generator, dtype=dtype) + 0.3 * rank for rank, size in enumerate(sizes)
    ]
    if padding is None:
        return values, [None] * len(sizes)
    masks = []
    for size, numbers in zip(sizes, padding, strict=True):
        mask_T = torch.ones(size, dtype=torch.bool)
        mask_T[numbers] = False
        masks.append(mask_T)
    return values, masks


def whole(values: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return torch.cat(values), None if masks[0] is None else torch.cat(masks)


def solve(part: str, scale: float, tolerance: float | None) -> tuple[Tensor, float, int]:
    costs, masks = inputs(part, E)
    rank, group = dist.get_rank(), dist.group.WORLD
    with Waits() as waits:
        v_E = sinkhorn(scale * costs[rank], 40, masks[rank], group, tolerance)
    error = column_error((scale * costs[rank] + v_E).softmax(-1), masks[rank], group)
    return v_E, error.item(), waits.count


def solve_all(scale: float, tolerance: float | None) -> dict[str, tuple[Tensor, float, int]]:
    return {part: solve(part, scale, tolerance) for part in PARTS}


@pytest.mark.parametrize("tolerance", [None, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 4.0, 1e4])
def test_ranks_find_what_one_process_finds(scale: float, tolerance: float | None) -> None:
    first, second = run_distributed(solve_all, 2, scale, tolerance)
    for part in PARTS:
        cost_TE, mask_T = whole(*inputs(part, E))
        want_E = sinkhorn(scale * cost_TE, 40, mask_T, None, tolerance)
        want_error = column_error((scale * cost_TE + want_E).softmax(-1), mask_T).item()
        for got_E, error, waits in (first[part], second[part]):
            torch.testing.assert_close(got_E, want_E, msg=lambda text, part=part: f"{part}: {text}")
            assert error == pytest.approx(want_error, abs=1e-9), part
            assert waits == first[part][2], part  # all looked at the residual equally often
            assert tolerance is not None or waits == 0
        assert torch.equal(first[part][0], second[part][0]), part


def made(name: str, k: int, options: dict[str, Any]) -> Router:
    cls = ROUTERS[name]
    torch.manual_seed(7)
    router = cls(D, E, k, cls.Options(**options)).double()
    torch.nn.init.normal_(router.scores.weight)
    return router.train()


def answer(router: Router, hidden_TD: Tensor, context: RoutingContext) -> tuple[list[int], Tensor, Tensor, list[int]]:
    hidden_TD = hidden_TD.clone().requires_grad_()
    routing: Routing = router(hidden_TD, context)
    routing.weight_N.square().sum().backward()
    return routing.expert_N.tolist(), routing.weight_N.detach(), hidden_TD.grad, routing.load_E.tolist()


def route(name: str, k: int, options: dict[str, Any]) -> dict[str, tuple[list[int], Tensor, Tensor, list[int]]]:
    rank, answers = dist.get_rank(), {}
    for part in PARTS:
        hidden, masks = inputs(part, D)
        context = RoutingContext(microbatch=rank, mask_T=masks[rank], group=dist.group.WORLD)
        answers[part] = answer(made(name, k, options), hidden[rank], context)
    return answers


@pytest.mark.parametrize("marginals", ["global", "local"])
@pytest.mark.parametrize(
    ("name", "k", "options"),
    [("ssr", 2, {"probability": 1.0}), ("ssr", 1, {"probability": 1.0, "cost": "softmax"}), ("sbase", 2, {})],
    ids=["ssr", "ssr of one", "sbase"],
)
def test_routers_over_ranks(name: str, k: int, options: dict[str, Any], marginals: str) -> None:
    """Global marginals: what one process makes of all tokens. Local ones: what each makes of its own."""
    options = {**options, "marginals": marginals}
    results = run_distributed(route, 2, name, k, options)
    for part in PARTS:
        hidden, masks = inputs(part, D)
        together_TD, mask_T = whole(hidden, masks)
        together = answer(made(name, k, options), together_TD, RoutingContext(mask_T=mask_T))
        apart = [
            answer(made(name, k, options), hidden_TD, RoutingContext(mask_T=mask))
            for hidden_TD, mask in zip(hidden, masks, strict=True)
        ]
        joined, separate = join([result[part] for result in results]), join(apart)
        wanted, other = (join([together]), separate) if marginals == "global" else (separate, join([together]))
        assert joined[0] == wanted[0], part
        torch.testing.assert_close(joined[1:], wanted[1:], msg=lambda text, part=part: f"{part}: {text}")
        if part in ("equal", "uneven", "padded"):  # where the two differ
            assert joined[0] != other[0] or not torch.allclose(joined[1], other[1]), part


def join(answers: list[tuple[list[int], Tensor, Tensor, list[int]]]) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Of all ranks: experts, weights and gradients one after another, the load summed."""
    expert, weight, gradient, load = zip(*answers, strict=True)
    return [e for part in expert for e in part], torch.cat(weight), torch.cat(gradient), torch.tensor(load).sum(0)

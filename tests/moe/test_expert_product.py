"""The expert product, both backends, against one token and one expert at a time.

Legend: N rows sorted by expert, E experts, D model, F hidden.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2moe.moe.expert_product import expert_product
from tests.moe import reference

D, F = 8, 16  # bfloat16 rows of the grouped kernel have to be multiples of 16 bytes
COUNTS = {
    "ragged": [3, 1, 5, 2],
    "empty_experts": [0, 4, 0, 3],
    "one_hot_expert": [0, 0, 9, 0],
    "no_rows": [0, 0, 0, 0],
    "single_expert": [6],
}


def operands(counts: list[int], form: str, weighted: bool, dtype: torch.dtype) -> list[Tensor | None]:
    """rows, weight, w1, w2, w3 that want a gradient, the same values in every dtype."""
    rows, experts = sum(counts), len(counts)
    w3_shape = {"gated": (experts, F, D), "mlp": (experts, 1, F), "mlp_biases": (experts, 1, F + D)}[form]
    shapes = [(rows, D), (rows,), (experts, F, D), (experts, D, F), w3_shape]
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors: list[Tensor | None] = [value.to(dtype).requires_grad_() for value in drawn]
    if not weighted:
        tensors[1] = None
    return tensors


def dense(counts: list[int], tensors: list[Tensor | None], form: str, activation: str) -> Tensor:
    rows_ND, weight_N, w1, w2, w3 = tensors
    expert_N = [e for e, n in enumerate(counts) for _ in range(n)]
    out = [
        (1 if weight_N is None else weight_N[n])
        * reference.expert_mlp(rows_ND[n], w1[e], w2[e], w3[e], form, activation)
        for n, e in enumerate(expert_N)
    ]
    return torch.stack(out) if out else rows_ND * 0


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("form", ["gated", "mlp", "mlp_biases"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("loop", torch.float64, 1e-10),
        ("loop", torch.float32, 1e-4),
        ("grouped", torch.float32, 1e-4),
        ("every", torch.float64, 1e-10),
    ],
)
def test_output_and_gradients_equal_the_equations(
    counts: list[int],
    weighted: bool,
    activation: str,
    form: str,
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    exact, ours = (operands(counts, form, weighted, kind) for kind in (torch.float64, dtype))
    want_ND = dense(counts, exact, form, activation)
    rows_ND, weight_N, w1, w2, w3 = ours
    got_ND = expert_product(rows_ND, torch.tensor(counts), weight_N, w1, w2, w3, form, activation, backend)
    assert got_ND.dtype == dtype
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(got_ND, want_ND, **close)

    direction_ND = torch.randn(want_ND.shape, dtype=torch.float64)
    (want_ND * direction_ND).sum().backward()
    (got_ND * direction_ND.to(dtype)).sum().backward()
    for name, left, right in zip(("rows", "weight", "w1", "w2", "w3"), ours, exact, strict=True):
        if left is not None:
            # An optimizer's groups must stay complete: also an expert without rows has a gradient, zero.
            assert left.grad is not None, name
            expected = torch.zeros_like(right) if right.grad is None else right.grad
            torch.testing.assert_close(left.grad, expected, msg=lambda text, name=name: f"{name}: {text}", **close)


@pytest.mark.parametrize("form", ["gated", "mlp", "mlp_biases"])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_half_precision_stays_near_the_exact_product(form: str, backend: str) -> None:
    counts = COUNTS["ragged"]
    rows_ND, weight_N, w1, w2, w3 = operands(counts, form, True, torch.bfloat16)
    weight_N = weight_N.detach().float().requires_grad_()  # a router's weights are float32
    got_ND = expert_product(rows_ND, torch.tensor(counts), weight_N, w1, w2, w3, form, "silu", backend)
    exact = [value.detach().double().requires_grad_() for value in (rows_ND, weight_N, w1, w2, w3)]
    want_ND = dense(counts, exact, form, "silu")
    assert got_ND.dtype == torch.bfloat16
    assert (got_ND.double() - want_ND).norm() < 0.02 * want_ND.norm()
    got_ND.float().square().sum().backward()
    want_ND.square().sum().backward()
    for left, right in zip((rows_ND, weight_N, w1, w2, w3), exact, strict=True):
        assert left.grad.dtype == left.dtype
        assert (left.grad.double() - right.grad).norm() < 0.03 * right.grad.norm()


@pytest.mark.parametrize("form", ["gated", "mlp", "mlp_biases"])
def test_gradient_equals_finite_differences(form: str) -> None:
    counts = torch.tensor([2, 0, 3])
    tensors = operands(counts.tolist(), form, True, torch.float64)
    assert torch.autograd.gradcheck(
        lambda rows, weight, *w: expert_product(rows, counts, weight, *w, form, "gelu", "loop"), tensors
    )


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_frozen_operands_get_no_gradient(backend: str) -> None:
    counts = torch.tensor(COUNTS["ragged"])
    rows_ND, weight_N, w1, w2, w3 = operands(counts.tolist(), "gated", True, torch.float32)
    frozen = [rows_ND.detach(), weight_N.detach(), w1, w2.detach(), w3]
    out_ND = expert_product(frozen[0], counts, *frozen[1:], "gated", "silu", backend)
    out_ND.square().sum().backward()
    assert w1.grad is not None
    assert w3.grad is not None
    assert w2.grad is rows_ND.grad is weight_N.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["gated", "mlp", "mlp_biases"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_kernel_of_the_gpu_equals_the_equations(form: str, counts: list[int]) -> None:
    exact = operands(counts, form, True, torch.float64)
    ours = [value.detach().float().cuda().requires_grad_() for value in exact]
    rows_ND, weight_N, w1, w2, w3 = ours
    got_ND = expert_product(rows_ND, torch.tensor(counts).cuda(), weight_N, w1, w2, w3, form, "silu")
    want_ND = dense(counts, exact, form, "silu")
    close = {"rtol": 1e-2, "atol": 1e-2, "check_dtype": False}
    torch.testing.assert_close(got_ND.cpu(), want_ND, **close)
    got_ND.square().sum().backward()
    want_ND.square().sum().backward()
    for left, right in zip(ours, exact, strict=True):
        expected = torch.zeros_like(right) if right.grad is None else right.grad
        torch.testing.assert_close(left.grad.cpu(), expected, **close)

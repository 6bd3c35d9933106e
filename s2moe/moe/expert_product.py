"""The one seam through which rows meet expert weights: three implementations of the same product.

Legend: N rows sorted by expert, E experts, D model, F hidden.

``loop`` is a plain product per expert over its slice of rows, with the backward written out so that
nothing is stored but rows and pre-activations; it takes every dtype. ``grouped`` is
``torch.nn.functional.grouped_mm``, one kernel for all experts, on half precision and float32.

``every`` puts each row through all experts and keeps its own one's output. That is E times the work, but no shape
depends on the routing, and no operator is special: a program made by ``torch.export`` can be run anywhere.

``grouped`` has a fast kernel for bfloat16 on GPUs of compute capability 9.0 (H100) and later. Elsewhere it
is itself a loop over experts, on a CPU with a backward several times slower than plain products
(benchmarks/moe_layer.py: transformers_grouped_mm), so there the loop is ours. On a GPU it waits once for
the device, to learn the sizes of its slices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2moe.precision import full_precision

aten = torch.ops.aten

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's
    "relu": F.relu,
}
ACTIVATIONS = tuple(ACTIVATION_FUNCTIONS)
ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "gelu_tanh": partial(aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, value: aten.threshold_backward(grad, value, 0),
}


def expert_product(
    rows_ND: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3: Tensor,
    form: str,
    activation: str,
    backend: str = "auto",
    factor_NF: Tensor | None = None,
) -> Tensor:
    """Each row through its own expert's MLP, times the row's weight, [N, D].

    gated: W2 (weight · act(W1 x) ⊙ W3 x);  mlp: W2 (weight · act(W1 x + w3));
    mlp_biases: W2 (weight · act(W1 x + b1)) + weight · b2, with b1 and b2 one after the other in w3.
    The weight multiplies the hidden activation: the same by linearity, and no [N, D] tensor has to be
    kept for its gradient.

    Args:
        counts_E: rows of each expert, in order; they sum to N.
        w3: [E, F, D] in the gated form, the hidden bias [E, 1, F] in the mlp form, both biases [E, 1, F + D] in the
            mlp_biases form.
        factor_NF: further factors of the hidden activation, constant: dropout.
        backend: "loop", "grouped", "every", or "auto": every in a program that torch.export makes, grouped where
            it has its fast kernel, else loop.
    """
    if backend == "auto":
        if torch.compiler.is_exporting():
            backend = "every"
        else:
            backend = "grouped" if has_grouped_kernel(rows_ND) else "loop"
    if backend == "grouped":
        return _grouped(rows_ND, counts_E, weight_N, w1_EFD, w2_EDF, w3, form, activation, factor_NF)
    if backend == "every":
        return _every(rows_ND, counts_E, weight_N, w1_EFD, w2_EDF, w3, form, activation, factor_NF)
    return _loop(rows_ND, counts_E, weight_N, w1_EFD, w2_EDF, w3, form, activation, factor_NF)


@torch.compiler.disable  # it would be compiled anew for every other number of rows of an expert
def _loop(
    rows_ND: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3: Tensor,
    form: str,
    activation: str,
    factor_NF: Tensor | None,
) -> Tensor:
    return _Loop.apply(rows_ND, counts_E.tolist(), weight_N, w1_EFD, w2_EDF, w3, form, activation, factor_NF)


def has_grouped_kernel(rows_ND: Tensor) -> bool:
    """Whether ``grouped_mm`` is one kernel for these rows. Not for no rows at all, whose strides it refuses."""
    return (
        rows_ND.is_cuda
        and rows_ND.dtype == torch.bfloat16
        and len(rows_ND) > 0
        and torch.cuda.get_device_capability(rows_ND.device) >= (9, 0)
    )


def _grouped(
    rows_ND: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3: Tensor,
    form: str,
    activation: str,
    factor_NF: Tensor | None,
) -> Tensor:
    for name, width in (("hidden_size", rows_ND.shape[1]), ("expert_hidden", w1_EFD.shape[1])):
        if width * rows_ND.element_size() % 16:
            raise ValueError(
                f"{name} {width} does not fill whole 16-byte rows in {rows_ND.dtype}, which grouped products need: "
                f"make it a multiple of {16 // rows_ND.element_size()}"
            )
    ends_E = counts_E.cumsum(0).to(torch.int32)
    act = ACTIVATION_FUNCTIONS[activation]
    up_NF = F.grouped_mm(rows_ND, w1_EFD.transpose(1, 2), offs=ends_E)
    if form == "gated":
        hidden_NF = act(up_NF) * F.grouped_mm(rows_ND, w3.transpose(1, 2), offs=ends_E)
    else:
        expert_N = torch.searchsorted(ends_E, torch.arange(len(rows_ND), device=ends_E.device), right=True)
        hidden_NF = act(up_NF + w3[:, 0, : up_NF.shape[1]].index_select(0, expert_N))
    if factor_NF is not None:
        hidden_NF = hidden_NF * factor_NF
    if weight_N is not None:
        hidden_NF = hidden_NF * weight_N.to(hidden_NF.dtype)[:, None]
    out_ND = F.grouped_mm(hidden_NF, w2_EDF.transpose(1, 2), offs=ends_E)
    if form == "mlp_biases":
        bias_ND = w3[:, 0, up_NF.shape[1] :].index_select(0, expert_N)
        out_ND = out_ND + (bias_ND if weight_N is None else bias_ND * weight_N.to(bias_ND.dtype)[:, None])
    return out_ND


def _every(
    rows_ND: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3: Tensor,
    form: str,
    activation: str,
    factor_NF: Tensor | None,
) -> Tensor:
    act = ACTIVATION_FUNCTIONS[activation]
    expert_N1 = torch.searchsorted(
        counts_E.cumsum(0), torch.arange(rows_ND.shape[0], device=rows_ND.device), right=True
    )[:, None]
    out_ND = torch.zeros_like(rows_ND)
    for expert in range(len(w1_EFD)):
        first_NF = rows_ND @ w1_EFD[expert].T
        width = first_NF.shape[1]
        if form == "gated":
            hidden_NF = act(first_NF) * (rows_ND @ w3[expert].T)
        else:
            hidden_NF = act(first_NF + w3[expert, :, :width])
        if factor_NF is not None:
            hidden_NF = hidden_NF * factor_NF
        if weight_N is not None:
            hidden_NF = hidden_NF * weight_N.to(hidden_NF.dtype)[:, None]
        own_ND = hidden_NF @ w2_EDF[expert].T
        if form == "mlp_biases":
            bias_1D = w3[expert, :, width:]
            own_ND = own_ND + (bias_1D if weight_N is None else bias_1D * weight_N.to(bias_1D.dtype)[:, None])
        out_ND = torch.where(expert_N1 == expert, own_ND, out_ND)
    return out_ND


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its slice of rows) for every expert that has any."""
    pairs, start = [], 0
    for expert, rows in enumerate(counts):
        if rows:
            pairs.append((expert, slice(start, start + rows)))
        start += rows
    return pairs


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        counts: list[int],
        weight_N: Tensor | None,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        w3: Tensor,
        form: str,
        activation: str,
        factor_NF: Tensor | None,
    ) -> Tensor:
        act, gated, width = ACTIVATION_FUNCTIONS[activation], form == "gated", w1_EFD.shape[1]
        out_ND = rows_ND.new_empty(rows_ND.shape[0], w2_EDF.shape[1])
        first_NF = rows_ND.new_empty(rows_ND.shape[0], w1_EFD.shape[1])
        second_NF = torch.empty_like(first_NF) if gated else None
        for expert, own in _slices(counts):
            first = first_NF[own]
            if second_NF is not None:
                torch.mm(rows_ND[own], w1_EFD[expert].T, out=first)
                second = second_NF[own]
                torch.mm(rows_ND[own], w3[expert].T, out=second)
                hidden = act(first).mul_(second)
            else:
                torch.addmm(w3[expert, :, :width], rows_ND[own], w1_EFD[expert].T, out=first)
                hidden = act(first)
            if factor_NF is not None:
                hidden.mul_(factor_NF[own])
            if weight_N is not None:
                hidden.mul_(weight_N[own, None])
            torch.mm(hidden, w2_EDF[expert].T, out=out_ND[own])
            if form == "mlp_biases":
                bias_1D = w3[expert, :, width:]
                out_ND[own] += bias_1D if weight_N is None else bias_1D * weight_N[own, None]
        ctx.counts, ctx.form, ctx.activation = counts, form, activation
        ctx.save_for_backward(rows_ND, weight_N, first_NF, second_NF, w1_EFD, w2_EDF, w3, factor_NF)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weight_N, first_NF, second_NF, w1_EFD, w2_EDF, w3, factor_NF = ctx.saved_tensors
        gated, width = ctx.form == "gated", w1_EFD.shape[1]
        act, act_backward = ACTIVATION_FUNCTIONS[ctx.activation], ACTIVATION_GRADIENTS[ctx.activation]
        grad_rows_ND = torch.empty_like(rows_ND) if ctx.needs_input_grad[0] else None
        grad_weight_N = torch.empty_like(weight_N) if weight_N is not None else None
        # Experts without rows keep a zero gradient: the optimizer's groups must stay complete.
        complete = all(ctx.counts)
        learned = any(ctx.needs_input_grad[3:6])  # not where they are frozen
        grad_w1, grad_w2, grad_w3 = (
            (torch.empty_like(w) if complete else torch.zeros_like(w)) if learned else None
            for w in (w1_EFD, w2_EDF, w3)
        )
        for expert, own in _slices(ctx.counts):
            rows, grad, first = rows_ND[own], grad_ND[own], first_NF[own]
            activated = act(first)
            hidden = activated * second_NF[own] if gated else activated
            if factor_NF is not None:
                hidden = hidden * factor_NF[own]
            grad_hidden = grad @ w2_EDF[expert]
            if ctx.form == "mlp_biases" and grad_w3 is not None:
                weighted = grad if weight_N is None else grad * weight_N[own, None]
                grad_w3[expert, 0, width:] = weighted.sum(0)
            if weight_N is not None and grad_weight_N is not None:
                grad_weight_N[own] = torch.linalg.vecdot(full_precision(grad_hidden), full_precision(hidden))
                if ctx.form == "mlp_biases":
                    grad_weight_N[own] += full_precision(grad) @ full_precision(w3[expert, 0, width:])
                weight = weight_N[own, None]
                # `hidden` may be `activated` itself, which the mlp form does not need again.
                hidden = hidden.mul_(weight)
                grad_hidden.mul_(weight)
            if grad_w2 is not None:
                torch.mm(grad.T, hidden, out=grad_w2[expert])
            if factor_NF is not None:
                grad_hidden.mul_(factor_NF[own])
            if gated:
                grad_first = act_backward(grad_hidden * second_NF[own], first)
                grad_second = grad_hidden.mul_(activated)
                if grad_w3 is not None:
                    torch.mm(grad_second.T, rows, out=grad_w3[expert])
            else:
                grad_first = act_backward(grad_hidden, first)
                if grad_w3 is not None:
                    torch.sum(grad_first, 0, keepdim=True, out=grad_w3[expert, :, :width])
            if grad_w1 is not None:
                torch.mm(grad_first.T, rows, out=grad_w1[expert])
            if grad_rows_ND is not None:
                torch.mm(grad_first, w1_EFD[expert], out=grad_rows_ND[own])
                if gated:
                    grad_rows_ND[own].addmm_(grad_second, w3[expert])
        return grad_rows_ND, None, grad_weight_N, grad_w1, grad_w2, grad_w3, None, None, None

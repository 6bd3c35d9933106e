"""Do the experts specialise, and are they different? Expert Specialization Entropy and Pairwise Embedding Similarity.

Agarap & Azcarraga 2026 (SNNL-MoE) name both and print no formula that we could find. What is computed here follows
their figures (routing entropy over seeds; cosine of the experts' weight matrices), each with a second reading:

    ese_routing     −(1/N) Σ_n Σ_i p_ni ln p_ni, nats: high where routing is flexible. Over ln M it lies in [0, 1]
    ese_class       Σ_i (n_i / N) H(Y | E = i), nats, from an expert-selection table: low where experts specialise.
                    The two point in opposite directions, hence two names
    pes_weights     mean over pairs i < j of cos(w_i, w_j), with w_i an expert's weight matrices, flattened. Biases
                    and normalisation are left out: low where experts are orthogonal. Independent initial weights are
                    orthogonal already, so its value at the start is what to compare with
    pes_activation  the same of outputs u_i, each output's mean over the samples removed, and linear CKA, since
                    orthogonal weights may still compute the same

Legend: N samples, B of a batch, M experts, C classes or outputs, X any width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s2moe.metrics.selection import entropy_bits
from s2moe.metrics.similarity import cosine, cosine_of, mean_off_diagonal


def ese_routing(gate_NM: Tensor) -> Tensor:
    """Mean entropy of the gate, in nats: ln 2 times ``Selection.figures()["h_s"]``."""
    return entropy_bits(gate_NM).mean() * math.log(2)


def ese_routing_normalised(gate_NM: Tensor) -> Tensor:
    """The same over ln M, in [0, 1]; NaN for a single expert."""
    experts = gate_NM.shape[1]
    return ese_routing(gate_NM) / (math.log(experts) if experts > 1 else math.nan)


def ese_of_bits(sample_entropy: float, experts: int) -> dict[str, float]:
    """``ese_routing`` and ``ese_normalised`` of a gate's mean entropy in bits; the latter for several experts."""
    found = {"ese_routing": sample_entropy * math.log(2)}
    return found | ({"ese_normalised": sample_entropy / math.log2(experts)} if experts > 1 else {})


def ese_class(count_MC: Tensor) -> Tensor:
    """Entropy of the class given the selected expert, in nats, from an expert-selection table of counts."""
    count_MC = count_MC.double()
    usage_M = count_MC.sum(1)
    entropy_M = entropy_bits(count_MC / usage_M.clamp(min=1)[:, None]) * math.log(2)
    return (usage_M * entropy_M).sum() / usage_M.sum()


class Similarity(NamedTuple):
    """Of each pair of experts, [M, M], and over the pairs i < j."""

    matrix_MM: Tensor
    mean: float
    mean_absolute: float


def pes_weights(weight_MX: Tensor) -> Similarity:
    """Cosine of the experts' flattened weight matrices."""
    return _similarity(cosine(weight_MX))


@dataclass
class OutputProducts:
    """Sums over samples of the experts' outputs and of their products. Ranks add ``totals``.

    They are all that the cosine and linear CKA of centred outputs depend on, so neither needs the outputs of the whole
    test set at once.
    """

    experts: int
    outputs: int
    totals: Tensor  # float64: samples, Σ u [M C], Σ u uᵀ [M C, M C]

    @classmethod
    def zero(cls, experts: int, outputs: int, device: torch.device | str = "cpu") -> OutputProducts:
        size = experts * outputs
        return cls(experts, outputs, torch.zeros(1 + size + size**2, dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, out_MBC: Tensor) -> None:
        """Add what every expert makes of the same batch."""
        out_BX = out_MBC.double().transpose(0, 1).flatten(1)
        samples = out_BX.new_full((1,), len(out_BX))
        self.totals += torch.cat((samples, out_BX.sum(0), (out_BX.T @ out_BX).flatten()))

    def covariance(self) -> Tensor:
        """Of each output of an expert with each of another, [M, M, C, C]."""
        size = self.experts * self.outputs
        samples, sum_X, product_XX = self.totals[0], self.totals[1 : 1 + size], self.totals[1 + size :].view(size, size)
        covariance_XX = product_XX / samples - sum_X[:, None] * sum_X / samples**2
        return covariance_XX.view(self.experts, self.outputs, self.experts, self.outputs).transpose(1, 2)


def pes_activation(products: OutputProducts) -> tuple[Similarity, Similarity]:
    """Cosine of the experts' centred outputs, and their linear CKA (Kornblith et al. 2019).

    CKA is ‖C_ij‖² / (‖C_ii‖ ‖C_jj‖), with C_ij the covariance of two experts' outputs.
    """
    covariance_MMCC = products.covariance()
    cosine_MM = cosine_of(covariance_MMCC.diagonal(dim1=2, dim2=3).sum(-1))
    cka_MM = cosine_of(covariance_MMCC.square().sum((2, 3)))
    return _similarity(cosine_MM), _similarity(cka_MM)


def _similarity(matrix_MM: Tensor) -> Similarity:
    return Similarity(matrix_MM, mean_off_diagonal(matrix_MM).item(), mean_off_diagonal(matrix_MM.abs()).item())

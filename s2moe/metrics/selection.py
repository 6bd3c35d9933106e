"""Which expert a gate selects for which class: sparsity, balance and information, in bits.

Krishnamurthy, Watkins & Gaertner 2023, "Improving Expert Specialization in Mixture of Experts". With p_ni the gate's
probability of expert i for sample n, of N samples, and p̄_i = mean_n p_ni:

    H_s = −(1/N) Σ_n Σ_i p_ni log₂ p_ni    sample entropy: low where a few experts share a sample
    H_u = −Σ_i p̄_i log₂ p̄_i                usage entropy: high where all experts are used; at most log₂ M
    I(E; Y) = H(E) + H(Y) − H(E, Y)         from counts of pairs, with E = argmax_i p_ni

What Y is, the paper and its code disagree on: ``mi_true`` takes the sample's label (appendix A), ``mi_pred`` the class
that the selected expert predicts, which the paper's tables hold. Their H_u is of the last test batch alone; here it is
of all samples, and ``last_batch_usage_entropy`` is there to compare with.

All sums are float64 in one tensor, ``totals``, which ranks can add before anything is read off it.

Legend: B samples of a batch, M experts, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def entropy_bits(prob: Tensor, dim: int = -1) -> Tensor:
    """−Σ p log₂ p along ``dim``, in float64, with 0 log 0 = 0."""
    prob = prob.double()
    return -torch.special.xlogy(prob, prob).sum(dim) / math.log(2)


def sample_entropy(gate_BM: Tensor) -> Tensor:
    """H_s of one batch, in bits."""
    return entropy_bits(gate_BM).mean()


def usage_entropy(gate_BM: Tensor) -> Tensor:
    """H_u of one batch, in bits."""
    return entropy_bits(gate_BM.double().mean(0))


def mutual_information_bits(count_MC: Tensor) -> Tensor:
    """I between the row and the column of a table of counts, in bits; 0 for a table without counts."""
    joint_MC = count_MC.double() / count_MC.sum().clamp(min=1)
    information = entropy_bits(joint_MC.sum(1)) + entropy_bits(joint_MC.sum(0)) - entropy_bits(joint_MC.flatten())
    return information.clamp(min=0)  # rounding


@dataclass
class Selection:
    """Sums over samples, added batch by batch. ``dist.all_reduce(selection.totals)`` adds those of several ranks."""

    experts: int
    classes: int
    totals: Tensor  # float64: samples, Σ_n H(p_n) in bits, Σ_n p_n [M], counts [M, C] of labels, [M, C] of predictions
    last_M: Tensor  # float64 mean of the gate over the last batch that this rank added

    @classmethod
    def zero(cls, experts: int, classes: int, device: torch.device | str = "cpu") -> Selection:
        size = 2 + experts + 2 * experts * classes
        totals = torch.zeros(size, dtype=torch.float64, device=device)
        return cls(experts, classes, totals, totals.new_zeros(experts))

    @torch.no_grad()
    def add(self, gate_BM: Tensor, label_B: Tensor, predicted_B: Tensor, valid_B: Tensor | None = None) -> None:
        """Add a batch. Nothing is read back from the device.

        Args:
            predicted_B: int64, the class that the selected expert (of the largest gate value) predicts.
            valid_B: samples that count; the others are padding.
        """
        selected_B, gate_BM = gate_BM.argmax(1), gate_BM.double()
        weight_B = gate_BM.new_ones(len(gate_BM)) if valid_B is None else valid_B.double()
        samples, sum_M = weight_B.sum(), (gate_BM * weight_B[:, None]).sum(0)
        entropy = (entropy_bits(gate_BM) * weight_B).sum()
        count_2MC = gate_BM.new_zeros(2, self.experts * self.classes)
        for count, class_B in zip(count_2MC, (label_B, predicted_B), strict=True):
            count.index_add_(0, selected_B * self.classes + class_B.clamp(min=0), weight_B)
        self.totals += torch.cat((samples[None], entropy[None], sum_M, count_2MC.flatten()))
        self.last_M = sum_M / samples.clamp(min=1)

    @property
    def true_MC(self) -> Tensor:
        """The expert-selection table: how many samples of each class an expert was selected for, [M, C]."""
        return self.totals[2 + self.experts :].view(2, self.experts, self.classes)[0]

    @property
    def predicted_MC(self) -> Tensor:
        """The same of the classes that the selected experts predict."""
        return self.totals[2 + self.experts :].view(2, self.experts, self.classes)[1]

    def figures(self) -> dict[str, float]:
        """``h_s``, ``h_u``, ``mi_pred``, ``mi_true`` in bits; NaN where no sample was added."""
        samples = self.totals[0]
        found = torch.stack(
            [
                self.totals[1] / samples,
                entropy_bits(self.totals[2 : 2 + self.experts] / samples),
                mutual_information_bits(self.predicted_MC) + 0 / samples,
                mutual_information_bits(self.true_MC) + 0 / samples,
            ]
        )
        return dict(zip(("h_s", "h_u", "mi_pred", "mi_true"), found.tolist(), strict=True))

    def last_batch_usage_entropy(self) -> float:
        """H_u of the last batch of this rank, in bits: what the paper's tables have, for replication alone."""
        return entropy_bits(self.last_M).item()

"""Which experts are chosen together, within a layer and from layer to layer.

Legend: T tokens, E experts of one layer, F of another.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coselection(selected_TE: Tensor) -> Tensor:
    """How many tokens have both experts, float64 [E, E]; the diagonal is each expert's load."""
    return cross_selection(selected_TE, selected_TE)


def coselection_rate(selected_TE: Tensor) -> Tensor:
    """P(j | i): the part of expert i's tokens that expert j has too, [E, E]. 0 in the row of an expert without any.

    Independent choices would give every j the same rate in all rows; at k = 1 it is the identity.
    """
    count_EE = coselection(selected_TE)
    return count_EE / count_EE.diagonal().clamp(min=1)[:, None]


def cross_selection(first_TE: Tensor, second_TF: Tensor) -> Tensor:
    """How many tokens have expert e in the first layer and f in the second, float64 [E, F]."""
    return first_TE.double().T @ second_TF.double()


def mutual_information(count_EF: Tensor) -> Tensor:
    """Of the two layers' choices, as a part of the smaller entropy: 0 independent, 1 one determines the other.

    Unlike ``overlap`` it does not depend on how experts are numbered. It is computed from counts of pairs
    (``cross_selection``); few tokens for so many pairs overestimate it.
    """
    joint_EF = count_EF / count_EF.sum()
    first_E, second_F = joint_EF.sum(1), joint_EF.sum(0)
    entropies = torch.stack([-torch.special.xlogy(share, share).sum() for share in (first_E, second_F)])
    expected_EF = first_E[:, None] * second_F
    information = torch.special.xlogy(joint_EF, joint_EF / expected_EF.where(expected_EF > 0, 1.0)).sum()
    return torch.where(entropies.min() > 0, information / entropies.min(), torch.nan).clamp(min=0)


def overlap(first_TE: Tensor, second_TE: Tensor) -> Tensor:
    """Mean over tokens of |A ∩ B| / |A ∪ B|, of the numbers of a token's experts in two layers.

    Layers number their experts independently, so chance decides which numbers agree: k / (2E − k) or so where
    nothing ties the layers. It means something where they share experts or a router.
    """
    both_T, either_T = (first_TE & second_TE).sum(-1), (first_TE | second_TE).sum(-1)
    return torch.where(either_T == 0, 1.0, both_T.double() / either_T.clamp(min=1)).mean()

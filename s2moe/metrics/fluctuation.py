"""Do tokens change experts while the model is trained?

X-MoE (Chi et al. 2022) counts, on a fixed set of tokens, how many have another target expert than at the checkpoint
before; StableMoE (Dai et al. 2022) asks when a token changed for the last time.

Assignments of one layer are compared at a time; the fraction over (token, layer) pairs is the mean over layers.

Legend: P probes (checkpoints), T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fluctuation(before_T: Tensor, now_T: Tensor) -> Tensor:
    """Fraction of the tokens whose target (the expert with the heaviest weight) changed."""
    return (before_T != now_T).double().mean()


def set_fluctuation(before_TE: Tensor, now_TE: Tensor) -> Tensor:
    """Mean over tokens of 1 − |A ∩ B| / |A ∪ B|, of a token's sets of experts before and now.

    Two empty sets are equal: 0. At k = 1 this is ``fluctuation``.

    Args:
        before_TE, now_TE: bool, which experts a token has.
    """
    both_T, either_T = (before_TE & now_TE).sum(-1), (before_TE | now_TE).sum(-1)
    return torch.where(either_T == 0, 0.0, 1 - both_T.double() / either_T.clamp(min=1)).mean()


def last_fluctuation(step_P: Sequence[int], expert_PT: Tensor) -> Tensor:
    """Each token's last step at which its expert was not the final one, int64 [T]; 0 where it always was.

    Known as finely as there are probes: the change fell between that probe and the next.
    """
    differs_PT = expert_PT != expert_PT[-1]
    step_P1 = torch.tensor(step_P, dtype=torch.int64, device=expert_PT.device)[:, None]
    return torch.where(differs_PT, step_P1, 0).amax(0)


def settled(last_T: Tensor, step_P: Sequence[int]) -> list[float]:
    """Cumulative distribution: the fraction of tokens whose last fluctuation is not after each of the steps."""
    return [float((last_T <= step).double().mean()) for step in step_P]

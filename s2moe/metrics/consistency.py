"""Do independent runs use their experts alike?

Legend: R runs, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inter_run_consistency(load_RE: Tensor) -> Tensor:
    """IC: mean over all R² pairs of runs, the diagonal included, of the Pearson correlation of their loads.

    X-MoE (Chi et al. 2022), with loads accumulated over 100 steps. 1: every run loads its experts alike; 1/R, the
    diagonal's share, is what unrelated runs tend to.

    The numbers of experts must mean the same in all runs: it makes sense among runs that start from one checkpoint
    or the same initial experts and router (fine-tuning, other seeds of the data), not among runs that were
    initialised apart, whose experts are permuted at random.

    NaN where a run's load is exactly even: it correlates with nothing, itself included.
    """
    return correlation(load_RE).mean()


def correlation(load_RE: Tensor) -> Tensor:
    """Pearson correlation of each pair of rows, float64 [R, R]."""
    load_RE = load_RE.double()
    centred_RE = load_RE - load_RE.mean(-1, keepdim=True)
    # Rounding leaves something of a constant row's deviations; they count as none.
    length_R1 = centred_RE.norm(dim=-1, keepdim=True)
    length_R1 = length_R1.masked_fill(length_R1 <= 1e-12 * load_RE.norm(dim=-1, keepdim=True), torch.nan)
    unit_RE = centred_RE / length_R1
    return unit_RE @ unit_RE.T

"""How evenly the experts of a layer are used."""

from __future__ import annotations

import math
from collections.abc import Sequence


def load_figures(counts_E: Sequence[float]) -> dict[str, float]:
    """How evenly the assignments fall: see methods such as Switch, DeepSeek and X-MoE for the names.

    load_entropy: entropy of the load / log E, 1 is even. max_violation: largest load / mean - 1.
    load_cv: standard deviation / mean. dead_experts: fraction without any assignment.
    """
    experts, total = len(counts_E), sum(counts_E)
    if total == 0:
        return {}
    share = [count / total for count in counts_E]
    entropy = -sum(s * math.log(s) for s in share if s > 0)
    variance = sum((s - 1 / experts) ** 2 for s in share) / experts
    return {
        "load_entropy": entropy / math.log(experts) if experts > 1 else 1.0,
        "max_violation": max(share) * experts - 1,
        "load_cv": math.sqrt(variance) * experts,
        "min_load": min(share) * experts,
        "dead_experts": sum(s == 0 for s in share) / experts,
    }

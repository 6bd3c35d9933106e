"""How evenly the experts of a layer are used.

Legend: E experts, P log events.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def load_figures(counts_E: Sequence[float]) -> dict[str, float]:
    """How evenly the assignments fall: see methods such as Switch, DeepSeek and X-MoE for the names.

    load_entropy: entropy H of the load / log E, 1 is even. load_perplexity: exp(H) / E, the part of the experts that
    an even load of the same entropy would use. max_violation: largest load / mean - 1. load_cv: standard deviation /
    mean. min_load, max_load: in units of the mean. dead_experts: fraction without any assignment.
    """
    experts, total = len(counts_E), sum(counts_E)
    if total == 0:
        return {}
    share = [count / total for count in counts_E]
    entropy = -sum(s * math.log(s) for s in share if s > 0)
    variance = sum((s - 1 / experts) ** 2 for s in share) / experts
    return {
        "load_entropy": entropy / math.log(experts) if experts > 1 else 1.0,
        "load_perplexity": math.exp(entropy) / experts,
        "max_violation": max(share) * experts - 1,
        "load_cv": math.sqrt(variance) * experts,
        "min_load": min(share) * experts,
        "max_load": max(share) * experts,
        "dead_experts": sum(s == 0 for s in share) / experts,
    }


def dead_experts(load_PE: Sequence[Sequence[float]], window: int) -> float:
    """Fraction of the experts that had no assignment in any of the last ``window`` log events.

    An expert without load for a moment may come back; one without load over a long window is dead.
    """
    recent = list(zip(*load_PE[-window:], strict=True))
    return sum(not any(loads) for loads in recent) / len(recent)

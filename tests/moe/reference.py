"""The layer written from the published equations, in float64, one token and one expert at a time.

Nothing here calls the code under test. Speed does not matter; being readable beside the formulas does.

Legend: T tokens, D model, F hidden, E experts, K choices per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Choice = tuple[int, Tensor]  # an expert and its weight


def activate(value: Tensor, name: str) -> Tensor:
    """silu: z / (1 + e^-z);  gelu: z Φ(z);  gelu_tanh: z (1 + tanh(√(2/π) (z + 0.044715 z³))) / 2;  relu: max(z, 0)."""
    if name == "silu":
        return value / (1 + torch.exp(-value))
    if name == "gelu":
        return value * normal_cdf(value)
    if name == "gelu_tanh":
        return value * (1 + torch.tanh((2 / math.pi) ** 0.5 * (value + 0.044715 * value**3))) / 2
    return value * (value > 0)


def normal_cdf(value: Tensor) -> Tensor:
    return (1 + torch.erf(value / math.sqrt(2))) / 2


def normalise_exp(logits: Tensor) -> Tensor:
    """Softmax of a vector."""
    power = torch.exp(logits - logits.detach().max())
    return power / power.sum()


def expert_mlp(x_D: Tensor, w1_FD: Tensor, w2_DF: Tensor, w3: Tensor, form: str, activation: str) -> Tensor:
    """gated: W2 (act(W1 x) ⊙ W3 x);  mlp: W2 act(W1 x + b), with b in w3 [1, F]; mlp_biases: and + b2, behind b."""
    if form == "gated":
        return w2_DF @ (activate(w1_FD @ x_D, activation) * (w3 @ x_D))
    if form == "mlp_biases":
        hidden = len(w1_FD)
        return w2_DF @ activate(w1_FD @ x_D + w3[0, :hidden], activation) + w3[0, hidden:]
    return w2_DF @ activate(w1_FD @ x_D + w3[0], activation)


SHARES: list[dict[str, Any]] = [{}, {"renormalise": True}, {"combine": "straight_through"}]  # options of ``shares``


def best(score_E: Tensor, k: int) -> list[int]:
    """The k highest, highest first."""
    return sorted(range(len(score_E)), key=lambda i: -score_E[i].item())[:k]


def choose(
    logits_E: Tensor,
    k: int,
    combine: str = "softmax_then_topk",
    renormalise: bool = False,
    scale: float = 1.0,
    bias_E: Tensor | None = None,
) -> list[Choice]:
    """A token's experts, best first, and their weights."""
    sigmoid_E, softmax_E = 1 / (1 + torch.exp(-logits_E)), normalise_exp(logits_E)
    affinity_E = sigmoid_E if combine == "sigmoid" else softmax_E
    chosen = best(logits_E if bias_E is None else affinity_E + bias_E, k)
    within = normalise_exp(torch.stack([logits_E[e] for e in chosen]))
    weights = []
    for place, e in enumerate(chosen):
        if combine == "topk_then_softmax":
            weights.append(within[place])
        elif combine == "straight_through":  # the value of the one, the derivative of the other
            weights.append(within[place].detach() + softmax_E[e] - softmax_E[e].detach())
        else:
            weights.append(affinity_E[e])
    if renormalise:
        total = sum(weights)
        weights = [w / total for w in weights]
    return [(e, scale * w) for e, w in zip(chosen, weights, strict=True)]


def shares(chosen: list[Choice], combine: str = "gate", renormalise: bool = False) -> list[Choice]:
    """A token's gates as weights: as they are, or over their sum; straight_through has the gradient of the gate."""
    total = sum(gate for _, gate in chosen)
    if combine == "straight_through":
        return [(e, (gate / total).detach() + gate - gate.detach()) for e, gate in chosen]
    return [(e, gate / total) for e, gate in chosen] if renormalise else chosen


def mixture(
    x_TD: Tensor, choices: Sequence[Sequence[Choice]], experts: Sequence[Tensor], form: str, activation: str
) -> Tensor:
    """y_t = Σ over the token's choices of weight · expert(x_t), [T, D]."""
    w1_EFD, w2_EDF, w3 = experts
    rows = []
    for x_D, chosen in zip(x_TD, choices, strict=True):
        y_D = torch.zeros_like(x_D)
        for e, weight in chosen:
            y_D = y_D + weight * expert_mlp(x_D, w1_EFD[e], w2_EDF[e], w3[e], form, activation)
        rows.append(y_D)
    return torch.stack(rows)


def balance(logits_TE: Tensor, choices: Sequence[Sequence[Choice]], form: str, sigmoid: bool = False) -> Tensor:
    """E Σ f_i P_i (switch: f of all choices, gshard: of first choices), or KL(P ‖ uniform).

    With sigmoid affinities a token's distribution is s / Σ s (DeepSeek-V3).
    """
    experts = logits_TE.shape[1]
    mean_prob, load = [0.0] * experts, [0] * experts
    for logits_E, chosen in zip(logits_TE, choices, strict=True):
        prob_E = normalise_exp(logits_E)
        if sigmoid:
            affinity_E = 1 / (1 + torch.exp(-logits_E))
            prob_E = affinity_E / affinity_E.sum()
        for e in range(experts):
            mean_prob[e] = mean_prob[e] + prob_E[e] / len(logits_TE)
        for e, _ in chosen[:1] if form == "gshard" else chosen:
            load[e] += 1
    if form == "kl":
        return sum(p * torch.log(p * experts) for p in mean_prob)
    return experts * sum(n / sum(load) * p for n, p in zip(load, mean_prob, strict=True))


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of (log Σ_i exp logit_i)²."""
    return sum(torch.log(torch.exp(logits_E).sum()) ** 2 for logits_E in logits_TE) / len(logits_TE)


def cv_squared(values: Sequence[Tensor]) -> Tensor:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def importance(choices: Sequence[Sequence[Choice]], experts: int) -> Tensor:
    """CV² of every expert's summed gate values (Shazeer et al. 2017, eq. 6-7)."""
    return cv_squared([sum((w for c in choices for i, w in c if i == e), torch.zeros(())) for e in range(experts)])


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, k: int) -> Tensor:
    """CV² of Σ_t P(x_t, i), P = Φ((clean_i − kth_excluding(noisy, k, i)) / std_i) (eq. 8-11)."""
    experts = clean_TE.shape[1]
    load = []
    for i in range(experts):
        total = torch.zeros((), dtype=clean_TE.dtype)
        for clean_E, noisy_E, std_E in zip(clean_TE, noisy_TE, std_TE, strict=True):
            others = [noisy_E[j] for j in range(experts) if j != i]
            kth_excluding = sorted(others, key=lambda v: -v.item())[k - 1]
            total = total + normal_cdf((clean_E[i] - kth_excluding) / std_E[i])
        load.append(total)
    return cv_squared(load)


def info_nce(first_MD: Tensor, second_MD: Tensor, temperature: float) -> Tensor:
    """Mean over i of −log exp(cos(u_i, v_i)/τ) / Σ_j exp(cos(u_i, v_j)/τ)."""
    total = torch.zeros((), dtype=first_MD.dtype)
    for i, u in enumerate(first_MD):
        cosines = torch.stack([u @ v / (u.norm() * v.norm()) for v in second_MD])
        total = total - torch.log(normalise_exp(cosines / temperature)[i])
    return total / len(first_MD)


def kept_within_capacity(
    expert_TK: list[list[int]], weight_TK: list[list[float]], capacity: int, policy: str
) -> set[tuple[int, int]]:
    """(token, choice) pairs that find a place, by filling the experts' buffers one pair at a time."""
    tokens, choices = len(expert_TK), len(expert_TK[0])
    queue = [(t, k) for k in range(choices) for t in range(tokens)]
    if policy == "probability":
        queue.sort(key=lambda pair: -weight_TK[pair[0]][pair[1]])
    used: dict[int, int] = {}
    kept = set()
    for t, k in queue:
        e = expert_TK[t][k]
        if used.get(e, 0) < capacity:
            used[e] = used.get(e, 0) + 1
            kept.add((t, k))
    return kept


def ks_distance_to_normal(sample: Tensor) -> float:
    """Kolmogorov-Smirnov distance between a sample and N(0, 1)."""
    value = sample.double().flatten().sort().values
    cdf = normal_cdf(value)
    step = torch.arange(len(value) + 1, dtype=torch.float64) / len(value)
    return torch.maximum((cdf - step[:-1]).abs(), (step[1:] - cdf).abs()).max().item()

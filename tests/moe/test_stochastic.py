"""The S2MoE layer in training and evaluation, against a dense float64 reference that sees the same noise.

Legend: B batch, S sequence, T = B S tokens, D model, E experts.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import RoutingContext
from tests.moe import reference
from tests.moe.test_layer import B, D, E, S, assert_same_gradients, experts, hidden, layer, shared

T = B * S
ALPHA, BETA = 0.3, 0.2


def stochastic(k: int = 1, **options: Any) -> SMoELayer:
    """An S2MoE layer in float64. ``router`` and ``shared_experts`` may be among the options."""
    rest = {name: options.pop(name) for name in ("shared_experts", "expert_form") if name in options}
    router = {"balance_loss": ALPHA, **options.pop("router", {})}
    options = {"contrast_loss": BETA, "samples": 64, **options}
    return layer(method="s2moe", experts_per_token=k, router=router, stochastic=options, **rest)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every standard normal tensor that the code draws, in order."""
    found: list[Tensor] = []
    plain = torch.randn

    def randn(*args: Any, **kwargs: Any) -> Tensor:
        found.append(plain(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(torch, "randn", randn)
    return found


def statistics_of(x_TD: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """μ and σ of S2MoE, constants for the gradient."""
    x_BSD = x_TD.detach().view(B, S, D)
    axes = {"token_batch": (0, 1), "sequence": (1,), "token": (2,)}[kind]
    mean = x_BSD.mean(axes, keepdim=True)
    std = ((x_BSD - mean) ** 2).mean(axes, keepdim=True) ** 0.5
    return mean.expand(B, S, D).reshape(T, D), std.expand(B, S, D).reshape(T, D)


@pytest.mark.parametrize(
    ("k", "options"),
    [
        (1, {}),
        (2, {}),
        (E, {}),
        (1, {"statistics": "sequence"}),
        (1, {"statistics": "token"}),
        (1, {"spread": "variance"}),
        (1, {"reroute": False}),
        (2, {"reroute": False, "spread": "variance", "statistics": "sequence"}),
        (1, {"contrast": "inputs"}),
        (1, {"symmetric": True, "temperature": 0.5}),
        (1, {"contrast_loss": 0.0}),
        (1, {"shared_experts": 1, "expert_form": "mlp"}),
        (1, {"inference": "gated"}),
        (2, {"router": {"combine": "topk_then_softmax"}}),
        (2, {"router": {"combine": "sigmoid", "renormalise": True, "scale": 2.5, "balance_form": "gshard"}}),
        (1, {"router": {"combine": "straight_through", "balance_form": "kl"}}),
        (1, {"router": {"balance_loss": 0.0, "z_loss": 0.1}}),
    ],
    ids=str,
)
def test_training_equals_the_dense_reference(k: int, options: dict[str, Any], draws: list[Tensor]) -> None:
    made, hidden_BSD = stochastic(k, **options), hidden()
    draws.clear()
    out_BSD, statistics = made(hidden_BSD)
    (epsilon_TD,) = draws  # one standard normal for each feature of each token
    assert epsilon_TD.shape == (T, D)

    x_TD = hidden_BSD.reshape(-1, D)
    mean_TD, sigma_TD = statistics_of(x_TD, options.get("statistics", "token_batch"))
    sigma_TD = sigma_TD**2 if options.get("spread") == "variance" else sigma_TD
    noisy_TD = x_TD + mean_TD + sigma_TD * (1 + x_TD**2) ** 0.5 * epsilon_TD

    router = options.get("router", {})
    combine, form = router.get("combine", "softmax_then_topk"), router.get("balance_form", "switch")
    rule = (k, combine, router.get("renormalise", False), router.get("scale", 1.0))
    logits_TE = [x @ made.router.scores.weight.T for x in (x_TD, noisy_TD)]
    if not options.get("reroute", True):
        logits_TE[1] = logits_TE[0]
    choices = [[reference.choose(row, *rule) for row in rows] for rows in logits_TE]
    y_TD, noisy_y_TD = (
        reference.mixture(x, c, experts(made), made.config.expert_form, "silu")
        for x, c in zip((x_TD, noisy_TD), choices, strict=True)
    )
    gate_T1 = 1 / (1 + torch.exp(-(x_TD @ made.mix_gate.weight.T + made.mix_gate.bias)))
    want_TD = gate_T1 * y_TD + (1 - gate_T1) * noisy_y_TD + shared(made, x_TD)

    both = list(zip(logits_TE, choices, strict=True))
    balance = sum(reference.balance(rows, c, form, combine == "sigmoid") for rows, c in both) / 2
    z = sum(reference.z_loss(rows) for rows in logits_TE) / 2
    pair = (x_TD, noisy_TD) if options.get("contrast") == "inputs" else (y_TD, noisy_y_TD)
    tau = options.get("temperature", 0.1)
    contrast = reference.info_nce(*pair, tau)
    if options.get("symmetric"):
        contrast = (contrast + reference.info_nce(*reversed(pair), tau)) / 2
    want_loss = router.get("balance_loss", ALPHA) * balance + router.get("z_loss", 0.0) * z
    want_loss = want_loss + options.get("contrast_loss", BETA) * contrast

    torch.testing.assert_close(out_BSD, want_TD.view(B, S, D))
    torch.testing.assert_close(statistics.loss, want_loss)
    load = [sum(e == i for rows in choices for c in rows for e, _ in c) for i in range(E)]
    assert statistics.counts_E.tolist() == load
    assert ("infonce_loss" in statistics.values) == (options.get("contrast_loss", BETA) > 0)
    if "infonce_loss" in statistics.values:
        torch.testing.assert_close(statistics.values["infonce_loss"], contrast.detach())
    torch.testing.assert_close(statistics.values["gate_mean"], gate_T1.mean().detach())
    same_first = [a[0][0] == b[0][0] for a, b in zip(*choices, strict=True)]
    assert statistics.values["agreement"].item() == pytest.approx(sum(same_first) / T)
    cosine = torch.stack([a @ b / a.norm() / b.norm() for a, b in zip(x_TD, noisy_TD, strict=True)]).mean()
    assert statistics.values["noise_cosine"].item() == pytest.approx(cosine.item(), abs=1e-5)
    assert statistics.values["noise_std"].item() == pytest.approx(sigma_TD.mean().item())

    direction_BSD = torch.randn_like(out_BSD)
    want = (want_TD.view(B, S, D) * direction_BSD).sum() + want_loss
    assert_same_gradients((out_BSD * direction_BSD).sum() + statistics.loss, want, made, hidden_BSD)


def test_contrast_compares_a_subset_of_the_tokens_drawn_anew_each_step(draws: list[Tensor]) -> None:
    """With M of T samples the loss is that of some M tokens, and over the steps every token has its turn."""
    samples, turns = 2, [0] * T
    made = stochastic(contrast="inputs", samples=samples, router={"balance_loss": 0.0}, contrast_loss=1.0)
    x_TD = torch.randn(T, D, dtype=torch.float64)
    for step in range(60):
        draws.clear()
        _, statistics = made(x_TD.view(B, S, D), RoutingContext(step=step))
        mean_TD, sigma_TD = statistics_of(x_TD, "token_batch")
        noisy_TD = x_TD + mean_TD + sigma_TD * (1 + x_TD**2) ** 0.5 * draws[0]
        distance, subset = min(
            (abs(reference.info_nce(x_TD[list(s)], noisy_TD[list(s)], 0.1) - statistics.loss).item(), s)
            for s in itertools.combinations(range(T), samples)
        )
        assert distance < 1e-9
        for t in subset:
            turns[t] += 1
    assert min(turns) > 0


@pytest.mark.parametrize("inference", ["clean", "gated"])
@pytest.mark.parametrize("k", [None, 1, 3, E])
def test_evaluation_is_the_clean_path_alone(inference: str, k: int | None, draws: list[Tensor]) -> None:
    made, hidden_BSD = stochastic(2, inference=inference, shared_experts=1).eval(), hidden()
    draws.clear()
    out_BSD, statistics = made(hidden_BSD, RoutingContext(experts_per_token=k))
    assert not draws
    x_TD = hidden_BSD.reshape(-1, D)
    choices = [reference.choose(made.router.scores.weight @ x, k or 2) for x in x_TD]
    want_TD = reference.mixture(x_TD, choices, experts(made), "gated", "silu")
    if inference == "gated":
        want_TD = torch.sigmoid(x_TD @ made.mix_gate.weight.T + made.mix_gate.bias) * want_TD
    torch.testing.assert_close(out_BSD, (want_TD + shared(made, x_TD)).view(B, S, D))
    assert statistics.loss.item() == 0
    assert statistics.counts_E.sum().item() == T * (k or 2)


def test_only_the_same_context_repeats_the_draw(draws: list[Tensor]) -> None:
    made, hidden_BSD = stochastic(samples=3), hidden()
    context = RoutingContext(seed=1, step=2, microbatch=3)

    def noise(*, seed: int = 0, layer_number: int = 1, at: RoutingContext = context) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)  # the global generator has no part in it
        made.layer = layer_number
        draws.clear()
        _, statistics = made(hidden_BSD, at)
        return draws[0], statistics.loss.detach()

    first = noise()
    again = noise(seed=5)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])  # the tokens that InfoNCE samples as well
    changed = [noise(at=replace(context, **{key: 9})) for key in ("seed", "step", "microbatch")]
    for other in (*changed, noise(layer_number=0)):
        assert not (other[0] == first[0]).any()


def test_noise_reaches_the_gate_only_through_the_output() -> None:
    """g reads the clean token: it is the same at every draw."""
    made, hidden_BSD = stochastic(), hidden()
    gates = [made(hidden_BSD, RoutingContext(step=step))[1].values["gate_mean"] for step in range(3)]
    assert torch.equal(gates[0], gates[1])
    assert torch.equal(gates[0], gates[2])


def test_a_closed_gate_trains_on_noise_alone_and_an_open_one_on_none() -> None:
    made, hidden_BSD = stochastic(contrast_loss=0.0), hidden()
    with torch.no_grad():
        made.mix_gate.weight.zero_()
        made.mix_gate.bias.fill_(60.0)
    open_BSD, _ = made(hidden_BSD)
    torch.testing.assert_close(open_BSD, made.eval()(hidden_BSD)[0])
    made.train().mix_gate.bias.data.fill_(-60.0)
    outputs = [made(hidden_BSD, RoutingContext(step=step))[0] for step in range(2)]
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("statistics", ["token", "sequence", "token_batch"])
def test_causality_in_training_is_what_the_documentation_says(statistics: str) -> None:
    """Statistics of each token alone are strictly causal; those over tokens are not."""
    made, hidden_BSD = stochastic(statistics=statistics), hidden().detach()
    out_BSD, _ = made(hidden_BSD)
    hidden_BSD[:, -1] += 1.0
    perturbed_BSD, _ = made(hidden_BSD)
    unchanged = torch.allclose(perturbed_BSD[:, :-1], out_BSD[:, :-1], rtol=0, atol=1e-12)
    assert unchanged == (statistics == "token")
    if statistics == "sequence":  # other sequences never matter
        hidden_BSD[1] += 1.0
        torch.testing.assert_close(made(hidden_BSD)[0][0], perturbed_BSD[0])


def test_capacity_and_noise_together() -> None:
    """Each path has the capacity of one pass over its tokens."""
    made = stochastic(router={"capacity_factor": 1.0})
    routings = []
    made.router.register_forward_hook(lambda module, given, routing: routings.append(routing))
    out_BSD, statistics = made(hidden())
    assert torch.isfinite(out_BSD).all()
    assert len(routings) == 2
    assert max(routing.counts_E.max().item() for routing in routings) <= 3  # ceil(1.0 * 1 * 10 / 4)
    dropped = sum(10 - routing.counts_E.sum().item() for routing in routings) / 20
    assert statistics.values["dropped_fraction"].item() == pytest.approx(dropped)

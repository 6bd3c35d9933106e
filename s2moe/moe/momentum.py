"""MomentumSMoE: the SMoE layers of a model as steps of an optimiser, with momentum carried across depth.

Teo & Nguyen 2024, "MomentumSMoE: Integrating Momentum into Sparse Mixture of Experts". With u the output of the
SMoE layer (after dropout), read as the step −f(x) of a descent on the experts' objectives, a plain layer takes
x ← x + u. Here a velocity p, zero before the first SMoE layer, is handed from each SMoE layer to the next one:

    y = x + α γ p                    the point at which norm, router and experts are evaluated
    p ← μ p + u(y)
    x ← x + γ p

    heavy_ball   α = 0
    negative     α = 0, and −μ in place of μ
    nag          α = μ: Nesterov's accelerated gradient, evaluated where the velocity alone would lead
    robust       the Robust Momentum Method (Cyrus et al. 2018) for gradients with Lipschitz constant L and a
                 condition κ, ρ between 1 − 1/√κ (fastest) and 1 − 1/κ (gradient descent on y, with step 1/L):
                 γ = κ (1 − ρ)² (1 + ρ) / L,  μ = κ ρ³ / (κ − 1),  α = ρ³ / ((κ − 1) (1 − ρ)² (1 + ρ))

and with a running square v, zero at first as well,

    adam         p ← β₁ p + (1 − β₁) u,  v ← β₂ v + (1 − β₂) u²,  x ← x + γ_a p / √(v + ε) − κ_a x
    rms          v likewise,                                      x ← x + γ_a u / √(v + ε) − κ_a x

Heavy ball and Adam are those of the released code; only the first SMoE layer takes Adam's step there, the later
ones are heavy balls whose velocity holds the first layer's u as well (``adam_layers=all`` is the other reading).
The other kinds, which that code lacks, are written from memory of the paper and of the methods they are named
after. The constants of the robust kind are ours.

Decay. The released AdamSMoE subtracts κ_a x with κ_a = 1: that cancels its module's own residual, and the block
adds x a second time. One residual is left, as in our block with κ_a = 0, the default; κ_a = 1 here would delete the
residual stream.

Sign. The released code takes x − p. Since experts' last matrices may have either sign, that is the same family of
functions; ``sign=subtract`` is for weights that were trained so.

Double residual. In the released code the SMoE module returns norm(x + step) and the block adds that to x again.
``legacy_double_residual`` is the nearest form with pre-norm blocks, x ← x + norm(x + step), with a norm of its own.

State is held in float32 whatever the model's dtype. It belongs to a token and lives within one forward pass, from
layer to layer: dense layers hand it on as it is, activation checkpointing keeps it as an input of each block, and
cached decoding needs to keep nothing. Causal wherever the router is.

Legend: B batch, S sequence, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s2moe.options import Checked, option
from s2moe.precision import full_precision

KINDS = ("none", "heavy_ball", "nag", "adam", "rms", "robust", "negative")


@dataclass(kw_only=True)
class MomentumOptions(Checked):
    """MomentumSMoE (Teo & Nguyen 2024): a velocity carried from each SMoE layer to the next. See moe/momentum.py."""

    kind: str = option(
        "none",
        "how an SMoE layer's output u changes the residual stream. none: x + u; heavy_ball: x + gamma p with "
        "p = mu p + u; nag: the same with u evaluated at x + gamma mu p; robust: at another point ahead, constants "
        "from rho, condition and smoothness; negative: heavy_ball with -mu; adam: running mean over root of running "
        "square; rms: u over root of running square",
        choices=KINDS,
        needs="SMoE layers",
    )
    mu: float = option(
        0.7,
        "momentum of heavy_ball, nag, negative, and of adam's later layers",
        least=0,
        below=1,
        needs="kind=heavy_ball|nag|negative|adam",
    )
    gamma: float = option(1.0, "step along the velocity, likewise", above=0, needs="kind=heavy_ball|nag|negative|adam")
    gamma_adaptive: float = option(1.0, "step of adam and rms", above=0, needs="kind=adam|rms")
    beta1: float = option(0.9, "adam: decay of the running mean", least=0, below=1, needs="kind=adam")
    beta2: float = option(0.999, "adam, rms: decay of the running square", least=0, below=1, needs="kind=adam|rms")
    epsilon: float = option(1e-8, "adam, rms: added to the square under the root", above=0, needs="kind=adam|rms")
    bias_correction: bool | None = option(
        None,
        "adam, rms: divide mean and square by 1 - beta^n in the n-th SMoE layer. null: only rms, whose first step "
        "would be 1/sqrt(1 - beta2) = 32 times too long; the released AdamSMoE does not",
        needs="kind=adam|rms",
    )
    adam_layers: str = option(
        "first",
        "adam: the SMoE layers that take its step. first: the first alone, then heavy_ball (the released code); all",
        choices=("first", "all"),
        needs="kind=adam",
    )
    decay: float = option(
        0.0, "adam, rms: also subtract so many times x; 1 cancels a residual", least=0, needs="kind=adam|rms"
    )
    rho: float = option(
        0.8,
        "robust: convergence rate, in [1 - 1/sqrt(condition), 1 - 1/condition]; larger: steadier",
        above=0,
        below=1,
        needs="kind=robust",
    )
    condition: float = option(10.0, "robust: kappa = L/m, above 1", above=1, needs="kind=robust")
    smoothness: float = option(1.0, "robust: L; gamma is proportional to 1/L", above=0, needs="kind=robust")
    sign: str = option(
        "add",
        "add: x + step; subtract: x - step, as the released code has it, for its weights",
        choices=("add", "subtract"),
        needs="kind!=none",
    )
    legacy_double_residual: bool = option(
        False,
        "x + norm(x + step) in place of x + step, for any kind: the nearest to the released code, whose SMoE module "
        "has a residual and a norm inside the block's own residual",
        needs="SMoE layers",
    )

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise ValueError(f"mu must lie in [0, 1), got {self.mu}; for a negative momentum set kind=negative")
        super().__post_init__()
        if self.kind == "robust":
            least, most = 1 - self.condition**-0.5, 1 - 1 / self.condition
            if not least <= self.rho <= most:
                raise ValueError(
                    f"rho must lie in [{least:.4g}, {most:.4g}] for condition={self.condition:g}, got {self.rho}"
                )


class Coefficients(NamedTuple):
    """μ, γ and α of the velocity's recursion."""

    mu: float
    gamma: float
    alpha: float


def coefficients(options: MomentumOptions) -> Coefficients:
    """The constants of a kind with a velocity."""
    if options.kind == "robust":
        rho, kappa = options.rho, options.condition
        spread = (1 - rho) ** 2 * (1 + rho)
        return Coefficients(
            mu=kappa * rho**3 / (kappa - 1),
            gamma=kappa * spread / options.smoothness,
            alpha=rho**3 / ((kappa - 1) * spread),
        )
    mu = -options.mu if options.kind == "negative" else options.mu
    return Coefficients(mu, options.gamma, options.mu if options.kind == "nag" else 0.0)


class MomentumState(NamedTuple):
    """What an SMoE layer hands to the next one, float32; None stands for zero."""

    velocity_BSD: Tensor | None = None  # p
    square_BSD: Tensor | None = None  # v


class MomentumUpdate:
    """The step of one SMoE layer, number ``position`` (from 0) among the model's SMoE layers."""

    def __init__(self, options: MomentumOptions, position: int) -> None:
        self.options = options
        self.position = position
        self.mu, self.gamma, self.alpha = coefficients(options)
        first_only = options.kind == "adam" and options.adam_layers == "first"
        self.starts_heavy_ball = first_only and position == 0
        self.is_adaptive = options.kind == "rms" or (options.kind == "adam" and not (first_only and position > 0))
        self.corrects_bias = options.kind == "rms" if options.bias_correction is None else options.bias_correction

    def look_ahead(self, hidden_BSD: Tensor, state: MomentumState | None) -> Tensor:
        """y = x + α γ p, the point at which the SMoE layer is evaluated."""
        if not self.alpha or state is None or state.velocity_BSD is None:
            return hidden_BSD
        ahead_BSD = full_precision(hidden_BSD) + self.alpha * self.gamma * state.velocity_BSD
        return ahead_BSD.to(hidden_BSD.dtype)

    def step(
        self, hidden_BSD: Tensor, mixed_BSD: Tensor, state: MomentumState | None
    ) -> tuple[Tensor, MomentumState | None]:
        """The change of the residual stream x (``hidden_BSD``), in its dtype, by u (``mixed_BSD``); the new state."""
        if self.options.kind == "none":
            return -mixed_BSD if self.options.sign == "subtract" else mixed_BSD, state
        state = state or MomentumState()
        update_BSD = full_precision(mixed_BSD)
        if self.options.sign == "subtract":
            update_BSD = -update_BSD
        if self.is_adaptive:
            step_BSD, state = self._adaptive(hidden_BSD, update_BSD, state)
        else:
            velocity_BSD = _decayed_sum(self.mu, state.velocity_BSD, 1.0, update_BSD)
            step_BSD, state = self.gamma * velocity_BSD, MomentumState(velocity_BSD)
        return step_BSD.to(hidden_BSD.dtype), state

    def _adaptive(self, hidden_BSD: Tensor, update_BSD: Tensor, state: MomentumState) -> tuple[Tensor, MomentumState]:
        options, count = self.options, self.position + 1
        beta1, beta2 = options.beta1, options.beta2
        mean_BSD, velocity_BSD = update_BSD, None
        if options.kind == "adam":
            velocity_BSD = mean_BSD = _decayed_sum(beta1, state.velocity_BSD, 1 - beta1, update_BSD)
        corrected_BSD = square_BSD = _decayed_sum(beta2, state.square_BSD, 1 - beta2, update_BSD.square())
        if self.corrects_bias:
            corrected_BSD = square_BSD / (1 - beta2**count)
            if options.kind == "adam":
                mean_BSD = mean_BSD / (1 - beta1**count)
        step_BSD = options.gamma_adaptive * mean_BSD * (corrected_BSD + options.epsilon).rsqrt()
        if options.decay:
            step_BSD = step_BSD - options.decay * full_precision(hidden_BSD)
        if self.starts_heavy_ball:
            return step_BSD, MomentumState(update_BSD)  # the later layers' velocity
        return step_BSD, MomentumState(velocity_BSD, square_BSD)


def build_momentum(options: MomentumOptions, position: int) -> MomentumUpdate | None:
    """The update of the ``position``-th SMoE layer (from 0), None for the plain x + u."""
    is_plain = options.kind == "none" and options.sign == "add" and not options.legacy_double_residual
    return None if is_plain else MomentumUpdate(options, position)


def _decayed_sum(decay: float, before_BSD: Tensor | None, weight: float, new_BSD: Tensor) -> Tensor:
    """decay · before + weight · new, where before may be zero."""
    if weight != 1:
        new_BSD = weight * new_BSD
    return new_BSD if before_BSD is None else torch.add(new_BSD, before_BSD, alpha=decay)

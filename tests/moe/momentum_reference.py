"""MomentumSMoE for one token, written from the equations: a step for each SMoE layer, with p and v at zero before."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from s2moe.moe.momentum import MomentumOptions


class Reference:
    """One token on its way through the SMoE layers."""

    def __init__(self, options: MomentumOptions) -> None:
        self.options = options
        self.p: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.layers = 0

    def layer(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """x after one more SMoE layer, whose output at a point y is f(y)."""
        sign = {"add": 1, "subtract": -1}[self.options.sign]
        self.layers += 1
        return getattr(self, self.options.kind)(x, lambda y: sign * f(y))

    def none(self, x: Tensor, u: Callable[[Tensor], Tensor]) -> Tensor:
        return x + u(x)

    def heavy_ball(self, x: Tensor, u: Callable[[Tensor], Tensor]) -> Tensor:
        self.p = self.options.mu * self.p + u(x)
        return x + self.options.gamma * self.p

    def negative(self, x: Tensor, u: Callable[[Tensor], Tensor]) -> Tensor:
        self.p = u(x) - self.options.mu * self.p
        return x + self.options.gamma * self.p

    def nag(self, x: Tensor, u: Callable[[Tensor], Tensor]) -> Tensor:
        mu, gamma = self.options.mu, self.options.gamma
        y = x + gamma * mu * self.p
        self.p = mu * self.p + u(y)
        return x + gamma * self.p

    def robust(self, x: Tensor, u: Callable[[Tensor], Tensor]) -> Tensor:
        rho, kappa, smoothness = self.options.rho, self.options.condition, self.options.smoothness
        gamma = kappa * (1 - rho) ** 2 * (1 + rho) / smoothness
        mu = kappa * rho**3 / (kappa - 1)
        alpha = rho**3 / ((kappa - 1) * (1 - rho) ** 2 * (1 + rho))
        y = x + alpha * gamma * self.p
        self.p = mu * self.p + u(y)
        return x + gamma * self.p

    def adam(self, x: Tensor, u: Callable[[Tensor], Tensor]) -> Tensor:
        o = self.options
        if o.adam_layers == "first" and self.layers > 1:
            return self.heavy_ball(x, u)
        step = u(x)
        p = o.beta1 * self.p + (1 - o.beta1) * step
        self.v = o.beta2 * self.v + (1 - o.beta2) * step * step
        correct = (1 - o.beta1**self.layers, 1 - o.beta2**self.layers) if o.bias_correction else (1, 1)
        self.p = step if o.adam_layers == "first" else p  # the heavy balls after it start from u
        return x + o.gamma_adaptive * (p / correct[0]) / (self.v / correct[1] + o.epsilon) ** 0.5 - o.decay * x

    def rms(self, x: Tensor, u: Callable[[Tensor], Tensor]) -> Tensor:
        o = self.options
        step = u(x)
        self.v = o.beta2 * self.v + (1 - o.beta2) * step * step
        correct = 1 if o.bias_correction is False else 1 - o.beta2**self.layers
        return x + o.gamma_adaptive * step / (self.v / correct + o.epsilon) ** 0.5 - o.decay * x

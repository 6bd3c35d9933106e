"""S2MoE: a sparse mixture of experts that also learns from a noisy copy of every token.

Do, Le & Tran 2025, "S2MoE: Robust Sparse Mixture of Experts via Stochastic Learning". In training

    x̂ = a ⊙ x + b,   a ~ N(1, σ²),  b ~ N(μ, σ²)            Gaussian noise module
    y = g(x) · SMoE(x) + (1 − g(x)) · SMoE(x̂),   g = sigmoid(w·x + c)
    loss = task + α (balance(x) + balance(x̂)) / 2 + β InfoNCE(SMoE(x), SMoE(x̂))

and at inference y = SMoE(x), with as many experts per token as one likes. μ and σ are the features'
mean and deviation, without gradient. What the paper leaves open is an option of StochasticOptions,
whose defaults are the recommended reading.

InfoNCE compares 256 sampled tokens by default. Reimplementations take 1024 or all; the loss costs the square
of their number, and 1024 would add an eighth to a layer's time at 4096 tokens (width 256, CPU).

Clean and noisy tokens go through one dispatch (one sort, one exchange, one expert product).

Causality: with statistics=token_batch or sequence, training lets a token's noise depend on the
mean and deviation of later tokens; statistics=token does not. Inference is causal always.

Legend: T tokens, D model, M sampled tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.nn.functional import all_gather

from s2moe.moe.config import MoEConfig, StochasticOptions
from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import Routing, RoutingContext, stack
from s2moe.moe.sampling import sample_tokens
from s2moe.objectives.balance import masked_mean
from s2moe.objectives.contrastive import Contrast, info_nce
from s2moe.parallel import ExpertParallel
from s2moe.precision import FullPrecisionLinear, full_precision


@torch.no_grad()
def noise_statistics(
    hidden_TD: Tensor, kind: str, sequences: int = 1, mask_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (population) of the features, broadcastable to [T, D], float32.

    Args:
        kind: "token_batch": over all tokens, per feature; "sequence": over each of ``sequences``
            equally long sequences, per feature; "token": over each token's features.
        mask_T: padding to leave out of the first two.
    """
    hidden_TD = full_precision(hidden_TD)
    if kind == "token":
        variance, mean = torch.var_mean(hidden_TD, dim=1, correction=0, keepdim=True)
        return mean, variance.sqrt()
    if kind == "token_batch" and mask_T is None:
        # Two plain sums: several times faster than var_mean over the leading dimension on a CPU.
        mean = hidden_TD.mean(0, keepdim=True)
        return mean, (hidden_TD - mean).square_().mean(0, keepdim=True).sqrt_()
    parts = sequences if kind == "sequence" else 1
    hidden_PSD = hidden_TD.view(parts, -1, hidden_TD.shape[1])
    if mask_T is None:
        variance, mean = torch.var_mean(hidden_PSD, dim=1, correction=0, keepdim=True)
    else:
        weight_PS1 = mask_T.view(parts, -1, 1).to(hidden_TD.dtype)
        total = weight_PS1.sum(1, keepdim=True).clamp(min=1)
        mean = (hidden_PSD * weight_PS1).sum(1, keepdim=True) / total
        variance = ((hidden_PSD - mean).square() * weight_PS1).sum(1, keepdim=True) / total
    shape = hidden_PSD.shape
    return mean.expand(shape).reshape_as(hidden_TD), variance.sqrt().expand(shape).reshape_as(hidden_TD)


def noisy_copy(hidden_TD: Tensor, mean: Tensor, spread: Tensor, noise_TD: Tensor) -> Tensor:
    """x̂ from one standard normal draw: x + μ + σ √(1 + x²) ε.

    Given x, (1 + σ ε₁) x + μ + σ ε₂ with independent normal ε₁, ε₂ is normal with mean x + μ and
    variance σ² (1 + x²). One draw has the same law at half the cost, and the same expected gradient.
    """
    return _NoisyCopy.apply(full_precision(hidden_TD), mean, spread, noise_TD).to(hidden_TD.dtype)


class _NoisyCopy(torch.autograd.Function):
    """In few passes over memory, of which the noise would otherwise be made: x̂ and dx̂/dx = 1 + σ ε x / √(1 + x²)."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, mean: Tensor, spread: Tensor, noise_TD: Tensor) -> Tensor:
        root_TD = torch.addcmul(hidden_TD.new_ones(()), hidden_TD, hidden_TD).sqrt_()
        scaled_TD = spread * noise_TD
        ctx.save_for_backward(hidden_TD, root_TD, scaled_TD)
        return (hidden_TD + mean).addcmul_(scaled_TD, root_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        hidden_TD, root_TD, scaled_TD = ctx.saved_tensors
        slope_TD = (hidden_TD / root_TD).mul_(scaled_TD)
        return slope_TD.mul_(grad_TD).add_(grad_TD), None, None, None


class StochasticSMoELayer(SMoELayer):
    """S2MoE. The clean path alone in evaluation."""

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config, hidden_size, layer, parallel)
        self.options: StochasticOptions = config.stochastic
        self.mix_gate = FullPrecisionLinear(hidden_size, 1)

    def mix(self, hidden_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing, dict[str, Tensor]]:
        if not self.training:
            out_TD, routing, values = super().mix(hidden_TD, context)
            if self.options.inference == "gated":
                out_TD = self._gate(hidden_TD).to(out_TD.dtype) * out_TD
            return out_TD, routing, values

        options, mask_T = self.options, context.mask_T
        mean, std = noise_statistics(hidden_TD, options.statistics, context.sequences, mask_T)
        spread = std if options.spread == "std" else std.square()
        generator = context.generator(hidden_TD.device, "noise")
        noise_TD = torch.randn(hidden_TD.shape, generator=generator, device=hidden_TD.device, dtype=mean.dtype)
        noisy_TD = noisy_copy(hidden_TD, mean, spread, noise_TD)

        clean = self.router(hidden_TD, context)
        if context.probe is not None:
            context.probe.record(self, hidden_TD, clean, context)
        noisy = self.router(noisy_TD, context.for_copy()) if options.reroute else clean
        routing = stack(clean, noisy)
        out_2TD, rows_ND = self.compute(torch.cat((hidden_TD, noisy_TD)), routing, context)
        clean_TD, noisy_out_TD = out_2TD.chunk(2)
        gate_T1 = self._gate(hidden_TD)
        out_TD = torch.lerp(noisy_out_TD, clean_TD, gate_T1.to(clean_TD.dtype))

        index_M, valid_M = sample_tokens(context, len(hidden_TD), options.samples, hidden_TD.device, "contrast")
        cosine_M = F.cosine_similarity(hidden_TD[index_M].detach().float(), noisy_TD[index_M].detach().float())
        values = self._figures(masked_mean(cosine_M, valid_M), gate_T1, spread, clean, noisy, context.mask_T)
        clean_ND = None if rows_ND is None else rows_ND[: len(clean.token_N)]
        values |= self.regularise(hidden_TD, clean, clean_ND, context, routing.losses)
        if options.contrast_loss:
            pair = (clean_TD, noisy_out_TD) if options.contrast == "outputs" else (hidden_TD, noisy_TD)
            contrast = self._contrast(pair[0][index_M], pair[1][index_M], valid_M, context)
            routing.losses["infonce_loss"] = options.contrast_loss * contrast.loss
            values["infonce_loss"] = contrast.loss.detach()
            values["infonce_accuracy"] = contrast.accuracy
        return out_TD, routing, values

    def _gate(self, hidden_TD: Tensor) -> Tensor:
        """g(x), a scalar for each token in float32, [T, 1]."""
        return torch.sigmoid(self.mix_gate(hidden_TD))

    def _contrast(
        self, first_MD: Tensor, second_MD: Tensor, valid_M: Tensor | None, context: RoutingContext
    ) -> Contrast:
        if self.options.gather_negatives and context.group is not None:
            first_MD = torch.cat(all_gather(first_MD.contiguous(), group=context.group))
            second_MD = torch.cat(all_gather(second_MD.contiguous(), group=context.group))
            if valid_M is not None:
                valid_M = torch.cat(all_gather(valid_M, group=context.group))
        return info_nce(first_MD, second_MD, self.options.temperature, valid_M, self.options.symmetric)

    @torch.no_grad()
    def _figures(
        self,
        cosine: Tensor,
        gate_T1: Tensor,
        spread: Tensor,
        clean: Routing,
        noisy: Routing,
        mask_T: Tensor | None,
    ) -> dict[str, Tensor]:
        """Mean gate and noise scale, cosine of sampled x and x̂, how often both have the same first expert."""
        per_token = spread.shape[0] > 1
        values = {
            "gate_mean": masked_mean(gate_T1[:, 0], mask_T),
            "noise_std": masked_mean(spread.mean(1), mask_T) if per_token else spread.mean(),
            "noise_cosine": cosine,
        }
        if clean.choices is not None and clean.choices == noisy.choices:
            first_T = clean.expert_N.view(-1, clean.choices)[:, 0]
            second_T = noisy.expert_N.view(-1, noisy.choices)[:, 0]
            values["agreement"] = masked_mean((first_T == second_T).float(), mask_T)
        return values

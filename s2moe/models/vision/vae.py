"""SMoE-VAE: a variational autoencoder whose decoder is chosen from several by a gate on the latent features.

Nikolic, Oguz & Psaltis 2025. mu and log variance of an image come from one encoder (vae_networks.py),
z = mu + exp(logvar / 2) · eps, p = softmax(gate(z)); z is sampled at test time too.

    training     x̂ = Σ_i p_i dec_i(z)             decoding soft, the unsupervised default
                 x̂ = dec_{argmax p}(z)            hard, the supervised default: the gate feels no reconstruction
                 x̂ = Σ_i w_i dec_i(z)             straight_through: w is one-hot at the argmax, its gradient that of p
    evaluation   x̂ = dec_{argmax p}(z)            only the chosen decoder is computed

The published loss is a sum over the images of a batch of 128, gating terms added once:

    Σ ‖x̂ − x‖² + 0.01 · KL + 200 · E Σ_i (p̄_i − 1/E)² + 400 · mean H(p)         unsupervised
    Σ ‖x̂ − x‖² + 0.01 · KL + 200 · Σ CE(gate, label mod E)                       supervised

with p̄ the mean gate of the batch, H in nats and KL = −½ Σ (1 + logvar − mu² − e^logvar). E Σ (p̄_i − 1/E)² is the
squared coefficient of variation of p̄. Here the loss is that divided by the images, the weights of the unsupervised
gating terms by ``reference_batch``: at 128 images it is the published loss over 128, which Adam does not see, and at
another batch an image's reconstruction still weighs as much against the gate. p̄ and H are means over the micro-batch.

The published supervised and unsupervised models differ in labels, in how they decode in training and in the gating
terms; ``decoding`` can be crossed with ``supervised`` to tell these apart.

Legend: B images, E experts, Z latent features, C colour channels, S image size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from s2moe.models.vision.base import VisionConfig, VisionModel, VisionOutput, register_kind
from s2moe.models.vision.stacked import StackedLayer
from s2moe.models.vision.vae_networks import DECODERS, ENCODERS, Decoders, Encoder, Gate
from s2moe.moe.routing import RoutingContext
from s2moe.objectives.balance import importance_loss
from s2moe.options import check_fields, option
from s2moe.precision import full_precision

DECODINGS = ("soft", "hard", "straight_through")


@strict
class VAEConfig(VisionConfig):
    """SMoE-VAE. See models/vision/vae.py.

    Raises:
        ValueError: on impossible values, naming the key.
    """

    model_type = "s2moe_vae"

    num_experts: int = option(
        10, "decoders; 1: a plain autoencoder. Often only half of them come to be used", least=1, most=10_000
    )
    latent_size: int = option(32, "latent features", least=1, most=2**20)
    encoder: str = option("medium", "size of the encoder", choices=ENCODERS)
    decoder: str = option("lite", "size of each decoder", choices=DECODERS)
    supervised: bool = option(False, "the gate learns the labels (mod num_experts), instead of balance and sharpness")
    decoding: str | None = option(
        None,
        "in training: soft mixes all decoders, hard takes the likeliest, straight_through does that with the gradient "
        "of soft; null: soft, and hard where supervised",
        choices=DECODINGS,
    )
    kl_loss: float = option(0.01, "weight of the KL divergence, summed over latent features", least=0)
    balance_loss: float = option(
        200.0,
        "weight of the variation of the mean gate, for a batch of reference_batch",
        least=0,
        needs="not supervised",
    )
    entropy_loss: float = option(
        400.0,
        "weight of the gate's mean entropy in nats, for a batch of reference_batch",
        least=0,
        needs="not supervised",
    )
    label_loss: float = option(
        200.0, "weight of the cross-entropy of gate and label, where supervised", least=0, needs="supervised"
    )
    reference_batch: int = option(
        128, "images of the batch that balance_loss and entropy_loss are meant for", least=1, needs="not supervised"
    )

    def __post_init__(self, **kwargs: object) -> None:
        if self.decoding is None:
            self.decoding = "hard" if self.supervised else "soft"
        check_fields(self)
        if self.image_size < 4 or self.image_size % 4:
            raise ValueError(f"image_size: halved twice, it must be a multiple of 4, got {self.image_size}")
        super().__post_init__(**kwargs)


class VAEModel(VisionModel):
    """Encoder, gate and decoders. Pixels must lie in [0, 1]: images without normalisation.

    ``gate`` of the output is p. ``figures`` are means over the images: ``recon`` (the squared error of an image, summed
    over its pixels), ``kl``, ``balance``, ``entropy``; in soft and straight-through training ``gap``, by how much the
    squared error of hard decoding exceeds that of soft; ``gate_accuracy`` where supervised.
    """

    config: VAEConfig
    config_class = VAEConfig
    unit_pixels = True

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        image = (config.num_channels, config.image_size)
        self.encoder = Encoder(config.encoder, image, config.latent_size)
        self.gate = Gate(config.latent_size, config.num_experts)
        self.decoders = Decoders(config.decoder, config.num_experts, image, config.latent_size)
        self._range_checked = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StackedLayer):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, context: RoutingContext | None = None
    ) -> VisionOutput:
        """Loss, gate and figures. ``labels`` [B] are needed for a supervised model's loss alone."""
        image_BCSS = pixel_values.to(self.dtype)
        self._check_range(pixel_values)
        mu_BZ, logvar_BZ, z_BZ = self.encode(image_BCSS, context or RoutingContext())
        logits_BE = full_precision(self.gate(z_BZ))
        gate_BE = logits_BE.softmax(-1)
        output = VisionOutput(gate=gate_BE)
        if self.config.supervised and labels is None:
            return output
        wanted_BX = full_precision(pixel_values).flatten(1)
        decoded_BX, gap = self._decode(z_BZ, gate_BE, wanted_BX)
        recon = (decoded_BX - wanted_BX).square().sum(1).mean()
        kl = -0.5 * (1 + logvar_BZ - mu_BZ.square() - logvar_BZ.exp()).sum(1).mean()
        balance = importance_loss(gate_BE)
        entropy = gate_entropy(logits_BE)
        figures = {"recon": recon, "kl": kl, "balance": balance, "entropy": entropy, **gap}
        output.task_loss = recon + self.config.kl_loss * kl
        if self.config.supervised:
            assert labels is not None
            expert_B = labels % self.config.num_experts
            output.aux_loss = self.config.label_loss * F.cross_entropy(logits_BE, expert_B)
            figures["gate_accuracy"] = (logits_BE.argmax(-1) == expert_B).float().mean()
        else:
            gating = self.config.balance_loss * balance + self.config.entropy_loss * entropy
            output.aux_loss = gating / self.config.reference_batch
        output.loss = output.task_loss + output.aux_loss
        output.figures = {name: value.detach().float() for name, value in figures.items()}
        return output

    def encode(self, image_BCSS: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor, Tensor]:
        """mu, log variance (in full precision) and sampled z, [B, Z] each."""
        mu_BZ, logvar_BZ = map(full_precision, self.encoder(image_BCSS))
        generator = context.generator(mu_BZ.device, "latent")
        noise_BZ = torch.randn(mu_BZ.shape, generator=generator, device=mu_BZ.device)
        z_BZ = mu_BZ + (0.5 * logvar_BZ).exp() * noise_BZ
        return mu_BZ, logvar_BZ, z_BZ.to(self.dtype)

    def _decode(self, z_BZ: Tensor, gate_BE: Tensor, wanted_BX: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction [B, X] of C S S pixels, and the gap where all decoders are computed."""
        chosen_B = gate_BE.argmax(-1)
        if not self.training or self.config.decoding == "hard":
            return full_precision(self.decoders.chosen(z_BZ, chosen_B)).flatten(1), {}
        decoded_BEX = full_precision(self.decoders(z_BZ)).flatten(2)
        weight_BE = gate_BE
        if self.config.decoding == "straight_through":
            chosen_BE = torch.zeros_like(gate_BE).scatter(1, chosen_B[:, None], 1.0)
            weight_BE = chosen_BE + (gate_BE - gate_BE.detach())
        mixed_BX = torch.einsum("be,bex->bx", weight_BE, decoded_BEX)
        with torch.no_grad():
            hard_BX = decoded_BEX[torch.arange(len(chosen_B), device=chosen_B.device), chosen_B]
            soft_BX = mixed_BX
            if self.config.decoding == "straight_through":
                soft_BX = torch.einsum("be,bex->bx", gate_BE, decoded_BEX)
            gap = ((hard_BX - wanted_BX).square() - (soft_BX - wanted_BX).square()).sum(1).mean()
        return mixed_BX, {"gap": gap}

    def _check_range(self, pixel_values: Tensor) -> None:
        """Normalised pixels would train to a wrong figure without an error. Once, since it waits for the device."""
        if not self._range_checked:
            low, high = pixel_values.min().item(), pixel_values.max().item()
            if low < -1e-4 or high > 1 + 1e-4:
                raise ValueError(
                    f"kind vae needs pixels in [0, 1], got {low:.3f} to {high:.3f}: set the images' mean to 0, std to 1"
                )
            self._range_checked = True


def gate_entropy(logits_BE: Tensor) -> Tensor:
    """Mean entropy of the gate's distributions, in nats."""
    log_BE = logits_BE.log_softmax(-1)
    return -(log_BE.exp() * log_BE).sum(-1).mean()


register_kind("vae", "SMoE-VAE: an autoencoder with several decoders (Nikolic et al. 2025)", VAEConfig, VAEModel)

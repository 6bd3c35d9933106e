"""SMoE-VAE written from the paper's description with plain torch layers in float64: one network after the other.

Legend: B images, E experts, Z latent features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from s2moe.models.vision.vae import VAEModel


def encode(model: VAEModel, image: Tensor) -> tuple[Tensor, Tensor]:
    """mu and log variance."""
    strides, activation = {"medium": ((1, 2, 2), torch.relu), "lite": ((2, 2), F.elu)}[model.config.encoder]
    hidden = image
    for layer, stride in zip(model.encoder.convolutions, strides, strict=True):
        hidden = activation(F.conv2d(hidden, layer.weight[0], layer.bias[0], stride=stride, padding=1))
    hidden = hidden.reshape(len(image), -1)
    heads = model.encoder.heads
    mu, logvar = (hidden @ heads.weight[i].T + heads.bias[i] for i in (0, 1))
    return mu, logvar


def gate(model: VAEModel, z: Tensor) -> Tensor:
    """Logits [B, E]."""
    first, second, third = ((layer.weight[0], layer.bias[0]) for layer in model.gate.layers)
    hidden = torch.relu(z @ first[0].T + first[1])
    hidden = torch.relu(hidden @ second[0].T + second[1])
    return hidden @ third[0].T + third[1]


def decode(model: VAEModel, z: Tensor, expert: int) -> Tensor:
    """The image that one decoder makes of z."""
    decoders, size = model.decoders, model.config.decoder
    channels, corner = {"lite": 8, "medium": 32, "full": 128}[size], model.config.image_size // 4
    hidden = z @ decoders.linear.weight[expert].T + decoders.linear.bias[expert]
    hidden = hidden.reshape(len(z), channels, corner, corner)
    layers = [(layer.weight[expert], layer.bias[expert]) for layer in decoders.convolutions]
    if size == "full":
        hidden = torch.relu(F.conv_transpose2d(hidden, *layers[0], stride=2, padding=1))
        hidden = torch.relu(F.conv_transpose2d(hidden, *layers[1], stride=2, padding=1))
        return torch.sigmoid(F.conv_transpose2d(hidden, *layers[2], stride=1, padding=1))
    for number, layer in enumerate(layers):
        if number < 2:
            hidden = hidden.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        hidden = F.conv2d(hidden, *layer, padding=1)
        hidden = torch.sigmoid(hidden) if number == len(layers) - 1 else F.elu(hidden)
    return hidden


def published_loss(
    model: VAEModel, image: Tensor, label: Tensor | None, noise: Tensor, mode: str, batch_scale: float = 1.0
) -> Tensor:
    """The loss of one batch as published: sums over images, gating terms once (times ``batch_scale``).

    Args:
        mode: "soft", "hard" or "straight_through".
    """
    experts = model.config.num_experts
    mu, logvar = encode(model, image)
    z = mu + (logvar / 2).exp() * noise
    logits = gate(model, z)
    prob = logits.exp() / logits.exp().sum(1, keepdim=True)
    made = [decode(model, z, expert) for expert in range(experts)]
    total = image.new_zeros(())
    for n in range(len(image)):
        best = int(logits[n].argmax())
        if mode == "soft":
            picture = sum(prob[n, i] * made[i][n] for i in range(experts))
        elif mode == "hard":
            picture = made[best][n]
        else:  # the value of the best, the gradient of each weight that of its probability
            picture = sum((float(i == best) + prob[n, i] - prob[n, i].detach()) * made[i][n] for i in range(experts))
        total = total + ((picture - image[n]) ** 2).sum()
    total = total + 0.01 * -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
    if label is not None:
        for n in range(len(image)):
            total = total + 200 * -prob[n, int(label[n]) % experts].log()
        return total
    mean = prob.mean(0)
    balance = experts * sum((mean[i] - 1 / experts) ** 2 for i in range(experts))
    entropy = sum(-(p * p.log()).sum() for p in prob) / len(image)
    return total + batch_scale * (200 * balance + 400 * entropy)


def gaussian_kl(mean: float, std: float) -> float:
    """KL(N(mean, std²) ‖ N(0, 1))."""
    return 0.5 * (std**2 + mean**2 - 1) - math.log(std)

"""The classic mixtures written out in plain torch layers, network by network, from the paper's equations and tables.

Legend: B images, M experts, C classes, H width of the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2moe.models.vision import MixtureModel
from s2moe.models.vision.stacked import StackedLayer


class PlainNetwork(nn.Module):
    """Layers as the published tables list them, in the order in which they are applied."""

    def __init__(self, convs: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]], widths: list[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv for conv, _ in convs)
        self.norms = nn.ModuleDict({str(i): norm for i, (_, norm) in enumerate(convs) if norm is not None})
        self.linear = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The second linear layer's output before its ReLU, and the last layer's."""
        for index, conv in enumerate(self.convs):
            image = conv(image)
            if str(index) in self.norms:
                image = self.norms[str(index)](image)
            image = F.max_pool2d(F.relu(image), 2, stride=2)
        hidden = self.linear[1](F.relu(self.linear[0](image.flatten(1))))
        return hidden, self.linear[2](F.relu(hidden)) if len(self.linear) > 2 else hidden


def plain_expert(architecture: str, classes: int) -> PlainNetwork:
    if architecture == "cifar100":
        return PlainNetwork(
            [
                (nn.Conv2d(3, 16, 3, padding=1), None),
                (nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)),
                (nn.Conv2d(32, 64, 3, padding=1), None),
                (nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)),
            ],
            [512, 1024, 256, classes],
        )
    return PlainNetwork([(nn.Conv2d(1, 1, 3), None)], [169, 64 if architecture == "fmnist" else 5, 32, classes])


def plain_gate(architecture: str, experts: int | None) -> PlainNetwork:
    """``experts`` None: the attentive gate's network, which ends at the hidden state."""
    last = [] if experts is None else [experts]
    if architecture == "cifar100":
        return PlainNetwork(
            [
                (nn.Conv2d(3, 64, 3, padding=1), None),
                (nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)),
                (nn.Conv2d(128, 256, 3, padding=1), None),
                (nn.Conv2d(256, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512)),
            ],
            [2048, 1024, 256, *last],
        )
    if architecture == "fmnist":
        return PlainNetwork([(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))], [1352, 512, 32, *last])
    if architecture == "fmnist_mnist":
        return PlainNetwork([(nn.Conv2d(1, 1, 5), None)], [144, 128, 32, *last])
    return PlainNetwork([(nn.Conv2d(1, 1, 3), None)], [169, 128, 32, *last])


class PlainMixture(nn.Module):
    """Experts one by one, the gate, and both losses."""

    def __init__(self, architecture: str, experts: int, classes: int, attentive: bool, query_relu: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(plain_expert(architecture, classes) for _ in range(experts))
        self.trunk = plain_gate(architecture, None if attentive else experts)
        self.attentive, self.query_relu = attentive, query_relu
        if attentive:
            width = self.trunk.linear[-1].out_features
            self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """p [B, M], and each expert's probabilities [B, M, C]."""
        found = [expert(image) for expert in self.experts]
        probability_BMC = torch.stack([out.softmax(-1) for _, out in found], dim=1)
        hidden, out = self.trunk(image)
        if not self.attentive:
            return out.softmax(-1), probability_BMC
        query_B1H = self.query(hidden.relu() if self.query_relu else hidden)[:, None]
        key_BMH = self.key(torch.stack([h for h, _ in found], dim=1))
        score_B1M = query_B1H @ key_BMH.transpose(1, 2) / math.sqrt(key_BMH.shape[-1])
        return score_B1M[:, 0].softmax(-1), probability_BMC


def mixture_loss(gate_BM: Tensor, probability_BMC: Tensor, label_B: Tensor) -> Tensor:
    total = torch.zeros((), dtype=gate_BM.dtype)
    for p, e, t in zip(gate_BM, probability_BMC, label_B.tolist(), strict=True):
        total = total - torch.log(sum(p[i] * e[i, t] for i in range(len(p))) + 1e-7)
    return total / len(gate_BM)


def stochastic_loss(gate_BM: Tensor, probability_BMC: Tensor, label_B: Tensor) -> Tensor:
    total = torch.zeros((), dtype=gate_BM.dtype)
    for p, e, t in zip(gate_BM, probability_BMC, label_B.tolist(), strict=True):
        nll = [-torch.log(e[i, t] + 1e-7) for i in range(len(p))]
        total = total - torch.log(sum(p[i] * torch.exp(-0.5 * nll[i]) for i in range(len(p))))
    return total / len(gate_BM)


def pairs(model: MixtureModel, plain: PlainMixture) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Each stacked parameter or buffer with a network's number, and the plain tensor that it corresponds to."""
    for index, expert in enumerate(plain.experts):
        yield from _network_pairs(model.experts, index, expert)
    assert model.gate is not None
    yield from _network_pairs(model.gate.trunk, 0, plain.trunk)
    if plain.attentive:
        yield model.gate.query.weight, 0, plain.query.weight
        yield model.gate.key.weight, 0, plain.key.weight


def _network_pairs(stack: nn.Module, index: int, plain: PlainNetwork) -> Iterator[tuple[Tensor, int, Tensor]]:
    layers: list[StackedLayer] = [*stack.convs, stack.fc1, stack.fc2, *([] if stack.out is None else [stack.out])]
    for layer, reference in zip(layers, [*plain.convs, *plain.linear], strict=True):
        yield layer.weight, index, reference.weight
        if reference.bias is not None:
            yield layer.bias, index, reference.bias
    for name, norm in plain.norms.items():
        stacked = stack.norms[name]
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            yield getattr(stacked, tensor).view(stack.count, -1), index, getattr(norm, tensor)


@torch.no_grad()
def copy_into(model: MixtureModel, plain: PlainMixture) -> None:
    """The reference's weights into the model."""
    for stacked, index, reference in pairs(model, plain):
        stacked[index].copy_(reference)

"""Layers of M small networks of one shape, computed together.

The experts of a classic mixture are many and tiny. All of them see every image in training, so their layers are held
as stacked parameters [M, ..] and computed at once: a grouped convolution, a batched product. Each network's weights
are drawn as its own plain layer would draw them, from a generator of its own, so that they do not depend on how many
networks there are. A single network (a gate, say) is a stack of one.

Legend: B images, M networks, I channels or features in, O out, H height and width, k kernel size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Fill = Callable[[Tensor, torch.Generator], object]


def draw(parameter: nn.Parameter, key: str, fill: Fill) -> None:
    """Fill each network's part of a stacked parameter from a generator keyed by (initial seed, key, network)."""
    if getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta:
        return  # loaded by from_pretrained, or without storage
    for network, part in enumerate(parameter.data):
        digest = hashlib.blake2b(f"{torch.initial_seed()}/{key}/{network}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.empty(part.shape, dtype=torch.float32)
        fill(drawn, generator)
        part.copy_(drawn)


def torch_default(weight: Tensor, generator: torch.Generator) -> None:
    """As ``nn.Linear`` and ``nn.Conv2d`` draw their weights: U(−1/√fan_in, 1/√fan_in)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def kaiming_normal(weight: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)


def xavier_uniform(weight: Tensor, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(weight, generator=generator)


class StackedLayer(nn.Module):
    """Weights [M, O, ..] and biases [M, O] of M layers.

    Args:
        key: names the layer for its generators; unique within a model.
        fill: how weights are drawn. Biases are always torch's default, U(−1/√fan_in, 1/√fan_in).
    """

    def __init__(self, shape: tuple[int, ...], bias: bool, key: str, fill: Fill = torch_default) -> None:
        super().__init__()
        self.key, self.fill = key, fill
        self.fan_in = math.prod(shape[2:])
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[:2])) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self.weight, f"{self.key}/weight", self.fill)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.fan_in)
            draw(
                self.bias, f"{self.key}/bias", lambda bias, generator: bias.uniform_(-bound, bound, generator=generator)
            )


class StackedConv(StackedLayer):
    """M convolutions: of one image that all share, or of each one's own channels."""

    def __init__(
        self,
        count: int,
        channels: tuple[int, int],
        kernel: int,
        padding: int,
        bias: bool,
        key: str,
        stride: int = 1,
        fill: Fill = torch_default,
    ) -> None:
        super().__init__((count, channels[1], channels[0], kernel, kernel), bias, key, fill)
        self.padding, self.stride = padding, stride

    def forward(self, image: Tensor, shared: bool) -> Tensor:
        """[B, I, H, H] that all networks share, or [B, M I, H, H], to [B, M O, H', H']."""
        groups = 1 if shared else len(self.weight)
        bias = None if self.bias is None else self.bias.flatten()
        return F.conv2d(image, self.weight.flatten(0, 1), bias, self.stride, self.padding, groups=groups)

    def each(self, images: Sequence[Tensor]) -> list[Tensor]:
        """One convolution after the other, each of its own images [B, I, H, H]."""
        biases = [None] * len(self.weight) if self.bias is None else self.bias.unbind()
        pairs = zip(images, self.weight.unbind(), biases, strict=True)
        return [F.conv2d(image, weight, bias, self.stride, self.padding) for image, weight, bias in pairs]

    def one(self, image_BIHH: Tensor, network: int) -> Tensor:
        """The same of a single network, [B, O, H', H']."""
        bias = None if self.bias is None else self.bias[network]
        return F.conv2d(image_BIHH, self.weight[network], bias, self.stride, self.padding)


class StackedLinear(StackedLayer):
    """M linear layers, each of its own input."""

    def __init__(
        self, count: int, features: tuple[int, int], key: str, bias: bool = True, fill: Fill = torch_default
    ) -> None:
        super().__init__((count, features[1], features[0]), bias, key, fill)

    def forward(self, value_MBI: Tensor) -> Tensor:
        """[M, B, O]."""
        if self.bias is None:
            return value_MBI @ self.weight.mT
        return torch.baddbmm(self.bias[:, None], value_MBI, self.weight.mT)

    def shared(self, value_BI: Tensor) -> Tensor:
        """The same of one input that all share: [M, B, O] of one product."""
        bias = None if self.bias is None else self.bias.flatten()
        value_BX = F.linear(value_BI, self.weight.flatten(0, 1), bias)
        return value_BX.view(len(value_BI), len(self.weight), -1).transpose(0, 1)

    def one(self, value_BI: Tensor, network: int) -> Tensor:
        """The same of a single network, [B, O]."""
        return F.linear(value_BI, self.weight[network], None if self.bias is None else self.bias[network])

"""The networks of SMoE-VAE: encoders, and E decoders held as stacked weights.

Nikolic, Oguz & Psaltis 2025, for 28 x 28 images of one channel and 32 latent features; here for any size that can be
halved twice. S is the image's size.

    encoder medium   conv 1-32, 32-64 and 64-128 (k3, stride 1, 2, 2), ReLU; linear heads mu and log variance
    encoder lite     conv 1-16 and 16-8 (k3, stride 2), ELU; the same heads
    decoder lite     linear to 8 x S/4 x S/4; doubled, conv 8-16, ELU; doubled, conv 16-1 (k3); sigmoid
    decoder medium   linear to 32 x S/4 x S/4; doubled, conv 32-64, ELU; doubled, conv 64-32, ELU; conv 32-1; sigmoid
    decoder full     linear to 128 x S/4 x S/4; transposed conv 128-64, 64-32 (k4, stride 2), ReLU; 32-1 (k3); sigmoid

"Doubled" repeats every pixel in both directions.

Legend: B images, E experts, Z latent features, C colour channels, S image size, I channels in, O channels out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2moe.models.vision.stacked import StackedConv, StackedLayer, StackedLinear

Activation = Callable[[Tensor], Tensor]

GATE_WIDTHS = (64, 32)
_ENCODERS: dict[
    str, tuple[tuple[tuple[int, int], ...], Activation]
] = {  # channels and stride of each convolution, activation
    "medium": (((32, 1), (64, 2), (128, 2)), F.relu),
    "lite": (((16, 2), (8, 2)), F.elu),
}
_DECODERS: dict[
    str, tuple[int, tuple[int, ...], Activation]
] = {  # channels after the linear layer and the hidden convolutions, activation
    "lite": (8, (16,), F.elu),
    "medium": (32, (64, 32), F.elu),
    "full": (128, (64, 32), F.relu),
}
ENCODERS, DECODERS = tuple(_ENCODERS), tuple(_DECODERS)


class Encoder(nn.Module):
    """Images to the mean and log variance of their latent features."""

    def __init__(self, size: str, image: tuple[int, int], latent: int) -> None:
        super().__init__()
        layers, self.activation = _ENCODERS[size]
        channels = image[0]
        self.convolutions = nn.ModuleList()
        for number, (width, stride) in enumerate(layers):
            key = f"encoder/{number}"
            self.convolutions.append(StackedConv(1, (channels, width), 3, 1, True, key, stride=stride))
            channels = width
        self.heads = StackedLinear(2, (channels * (image[1] // 4) ** 2, latent), "encoder/heads")

    def forward(self, image_BCSS: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log variance, [B, Z] each."""
        hidden = image_BCSS
        for convolution in self.convolutions:
            hidden = self.activation(convolution(hidden, shared=True))
        mu_BZ, logvar_BZ = self.heads(hidden.flatten(1).expand(2, -1, -1))
        return mu_BZ, logvar_BZ


class Gate(nn.Module):
    """Logits of the experts, from latent features."""

    def __init__(self, latent: int, experts: int) -> None:
        super().__init__()
        widths = (latent, *GATE_WIDTHS, experts)
        pairs = enumerate(pairwise(widths))
        self.layers = nn.ModuleList(StackedLinear(1, pair, f"gate/{number}") for number, pair in pairs)

    def forward(self, z_BZ: Tensor) -> Tensor:
        """[B, E]."""
        hidden_1BI = z_BZ[None]
        for layer in self.layers[:-1]:
            hidden_1BI = F.relu(layer(hidden_1BI))
        return self.layers[-1](hidden_1BI)[0]


class StackedDoubledConv(StackedConv):
    """M convolutions (k3, padding 1) of images whose every pixel is doubled in both directions first.

    Computed without the doubled image: each of the four pixels that come from one sees the same 3 x 3 small pixels,
    through a kernel whose taps are sums of the given one's. Several times faster where there are few output channels.
    """

    def __init__(self, count: int, channels: tuple[int, int], key: str) -> None:
        super().__init__(count, channels, 3, 1, True, key)

    def forward(self, image: Tensor, shared: bool = False) -> Tensor:
        """[B, M I, H, H] to [B, M O, 2 H, 2 H]."""
        return self._doubled(image, self.weight.flatten(0, 1), self.bias, len(self.weight))

    def one(self, image_BIHH: Tensor, network: int) -> Tensor:
        """The same of a single network, [B, O, 2 H, 2 H]."""
        assert self.bias is not None
        return self._doubled(image_BIHH, self.weight[network], self.bias[network], 1)

    def _doubled(self, image: Tensor, weight_OIkk: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        assert bias is not None
        quarters = [part for half in _halves(weight_OIkk, -2) for part in _halves(half, -1)]
        small = torch.stack(quarters, 1).flatten(0, 1)  # [4 O, I, 3, 3]
        image = F.conv2d(image, small, bias.flatten().repeat_interleave(4), padding=1, groups=groups)
        # As F.pixel_shuffle, whose gradient fails for a batch of no images.
        parts = image.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)
        return parts.reshape(len(image), parts.shape[1], 2 * image.shape[2], 2 * image.shape[3])


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What the first and the second of two doubled pixels see of the small pixels before, at and after them."""
    before, at, after = weight.unbind(dim)
    nothing = torch.zeros_like(at)
    return torch.stack((before, at + after, nothing), dim), torch.stack((nothing, before + at, after), dim)


class StackedConvTranspose(StackedLayer):
    """M transposed convolutions, each of its own channels; weights [M, I, O, k, k]."""

    def __init__(self, count: int, channels: tuple[int, int], kernel: int, stride: int, key: str) -> None:
        super().__init__((count, *channels, kernel, kernel), False, key)
        self.stride = stride
        self.bias = nn.Parameter(torch.empty(count, channels[1]))
        self.reset_parameters()

    def forward(self, image: Tensor, shared: bool = False) -> Tensor:
        """[B, M I, H, H] to [B, M O, H', H']."""
        assert self.bias is not None
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten()
        return F.conv_transpose2d(image, weight, bias, self.stride, 1, groups=len(self.weight))

    def one(self, image_BIHH: Tensor, network: int) -> Tensor:
        """The same of a single network, [B, O, H', H']."""
        assert self.bias is not None
        return F.conv_transpose2d(image_BIHH, self.weight[network], self.bias[network], self.stride, 1)


class Decoders(nn.Module):
    """E decoders of latent features to pixels in (0, 1)."""

    def __init__(self, size: str, experts: int, image: tuple[int, int], latent: int) -> None:
        super().__init__()
        self.experts, self.image = experts, image
        self.first, widths, self.activation = _DECODERS[size]
        self.corner = image[1] // 4
        self.linear = StackedLinear(experts, (latent, self.first * self.corner**2), "decoder/linear")
        channels = (self.first, *widths, image[0])
        pairs = list(enumerate(pairwise(channels)))
        last = len(pairs) - 1
        if size == "full":
            layers: list[StackedLayer] = [
                StackedConvTranspose(experts, pair, 3 if i == last else 4, 1 if i == last else 2, f"decoder/{i}")
                for i, pair in pairs
            ]
        else:
            layers = [
                StackedDoubledConv(experts, pair, f"decoder/{i}")
                if i < 2
                else StackedConv(experts, pair, 3, 1, True, f"decoder/{i}")
                for i, pair in pairs
            ]
        self.convolutions = nn.ModuleList(layers)

    def forward(self, z_BZ: Tensor) -> Tensor:
        """What every decoder makes of every image: [B, E, C, S, S]."""
        hidden_EBI = self.linear(z_BZ.expand(self.experts, -1, -1))
        hidden = hidden_EBI.transpose(0, 1).reshape(len(z_BZ), -1, self.corner, self.corner)
        hidden = self._convolve(hidden, [partial(layer, shared=False) for layer in self.convolutions])
        return hidden.unflatten(1, (self.experts, self.image[0]))

    def one(self, z_BZ: Tensor, expert: int) -> Tensor:
        """What one decoder makes of images: [B, C, S, S]."""
        hidden = self.linear.one(z_BZ, expert).view(-1, self.first, self.corner, self.corner)
        layers: list[Any] = list(self.convolutions)
        return self._convolve(hidden, [partial(layer.one, network=expert) for layer in layers])

    def chosen(self, z_BZ: Tensor, expert_B: Tensor) -> Tensor:
        """Each image by its own decoder alone: [B, C, S, S].

        A loop over the experts, since no kernel convolves groups of images of different sizes with different weights.
        Waits for the device once, for the sizes of the groups. An expert without images costs nothing; in training its
        weights get gradients of 0, as if its images had been computed and not used.
        """
        order_B = expert_B.argsort(stable=True)
        counts = torch.bincount(expert_B, minlength=self.experts).tolist()
        parts = z_BZ[order_B].split(counts)
        computed = [self.one(part, expert) for expert, part in enumerate(parts) if len(part) or self.training]
        sorted_BCSS = torch.cat(computed)
        return torch.empty_like(sorted_BCSS).index_copy(0, order_B, sorted_BCSS)

    def _convolve(self, hidden: Tensor, layers: list[Callable[[Tensor], Tensor]]) -> Tensor:
        for layer in layers[:-1]:
            hidden = self.activation(layer(hidden))
        return layers[-1](hidden).sigmoid()

"""The small convolutional networks of Krishnamurthy et al. 2023: experts and gates, stacked.

Convolutions, each followed by batch normalisation (where it has one), ReLU and 2 × 2 max-pooling; then two hidden
linear layers and, for experts and the original gate, an output layer:

    fc1 → ReLU → fc2 (the hidden state h, before its ReLU) → ReLU → out

Legend: B images, M networks, I input channels, S image size, D features, H width of h, C outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from s2moe.models.vision.stacked import StackedConv, StackedLinear


class Conv(NamedTuple):
    """One convolution: output channels, kernel size, padding, batch normalisation after it, bias."""

    channels: int
    kernel: int = 3
    padding: int = 0
    norm: bool = False
    bias: bool = True


class Network(NamedTuple):
    """Convolutions and the widths of the two hidden linear layers."""

    convs: tuple[Conv, ...]
    hidden: tuple[int, int]


class Architecture(NamedTuple):
    """Expert and gate of a data set."""

    experts: int  # as many as the paper has
    expert: Network
    gate: Network
    query_relu: bool = False  # ReLU between fc2 and the query of the attentive gate


_MNIST_EXPERT = Network((Conv(1),), (5, 32))
_CIFAR_EXPERT = (Conv(16, 3, 1), Conv(32, 3, 1, True, False), Conv(64, 3, 1), Conv(128, 3, 1, True, False))
_CIFAR_GATE = (Conv(64, 3, 1), Conv(128, 3, 1, True, False), Conv(256, 3, 1), Conv(512, 3, 1, True, False))

ARCHITECTURES = {
    "mnist": Architecture(5, _MNIST_EXPERT, Network((Conv(1),), (128, 32))),
    # Text and code differ here: the code normalises the gate's convolution and keeps the query's ReLU.
    "fmnist": Architecture(5, Network((Conv(1),), (64, 32)), Network((Conv(8, norm=True),), (512, 32)), True),
    "fmnist_mnist": Architecture(6, _MNIST_EXPERT, Network((Conv(1, 5),), (128, 32))),
    "cifar100": Architecture(20, Network(_CIFAR_EXPERT, (1024, 256)), Network(_CIFAR_GATE, (1024, 256))),
    # Not of the paper: of the same kind, for images of 8 x 8 pixels.
    "digits": Architecture(5, Network((Conv(4, 3, 1),), (8, 32)), Network((Conv(8, 3, 1),), (64, 32))),
}


def features_after(network: Network, image_size: int) -> int:
    """Features that the convolutions leave of an image.

    Raises:
        ValueError: if nothing is left.
    """
    size = image_size
    for conv in network.convs:
        size = (size + 2 * conv.padding - conv.kernel + 1) // 2
    if size < 1:
        raise ValueError(f"image_size {image_size} is too small for the architecture: pooling leaves nothing of it")
    return network.convs[-1].channels * size**2


class StackedNetworks(nn.Module):
    """M such networks, their parameters stacked.

    Args:
        image: input channels and image size.
        outputs: width of the output layer; None: without one.
        key: names the networks for their initialisation.
        batch_statistics: normalise by the batch's own statistics at test too, as the authors' code does.
    """

    def __init__(
        self,
        network: Network,
        count: int,
        image: tuple[int, int],
        outputs: int | None,
        key: str,
        batch_statistics: bool = False,
    ) -> None:
        super().__init__()
        self.count = count
        self.convs, self.norms = nn.ModuleList(), nn.ModuleDict()
        channels = image[0]
        for index, conv in enumerate(network.convs):
            name, shape = f"{key}/conv{index}", (channels, conv.channels)
            self.convs.append(StackedConv(count, shape, conv.kernel, conv.padding, conv.bias, name))
            if conv.norm:
                self.norms[str(index)] = nn.BatchNorm2d(count * conv.channels, track_running_stats=not batch_statistics)
            channels = conv.channels
        features = features_after(network, image[1])
        self.fc1 = StackedLinear(count, (features, network.hidden[0]), f"{key}/fc1")
        self.fc2 = StackedLinear(count, network.hidden, f"{key}/fc2")
        self.out = None if outputs is None else StackedLinear(count, (network.hidden[1], outputs), f"{key}/out")

    def forward(self, image_BISS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each network's h [M, B, H], and its outputs [M, B, C] where it has an output layer."""
        value_MBD = self._separately(image_BISS) if self.separate(image_BISS) else self._together(image_BISS)
        hidden_MBH = self.fc2(F.relu(self.fc1(value_MBD)))
        return hidden_MBH, None if self.out is None else self.out(F.relu(hidden_MBH))

    def separate(self, image_BISS: Tensor) -> bool:
        """Whether the networks convolve one after another.

        They do on a CPU with several convolutions: all networks' channels together do not fit its caches, which costs
        more than the calls do. Statistics over ranks are collective, one call a layer, and keep the networks together.
        """
        local = all(type(norm) is nn.BatchNorm2d for norm in self.norms.values())
        return image_BISS.device.type == "cpu" and self.count > 1 and len(self.convs) > 1 and local

    def _together(self, image_BISS: Tensor) -> Tensor:
        """What the convolutions make of the images, [M, B, D]."""
        value = image_BISS
        for index, conv in enumerate(self.convs):
            value = conv(value, shared=index == 0)
            if str(index) in self.norms:
                value = self.norms[str(index)](value)
            value = F.max_pool2d(F.relu(value), 2)
        return value.reshape(len(value), self.count, -1).transpose(0, 1)

    def _separately(self, image_BISS: Tensor) -> Tensor:
        """The same, network by network."""
        values = [image_BISS] * self.count
        for index, conv in enumerate(self.convs):
            assert isinstance(conv, StackedConv)
            values = conv.each(values)
            if str(index) in self.norms:
                values = _norm_of_each(self.norms[str(index)], values)
            values = [F.max_pool2d(F.relu(value), 2) for value in values]
        return torch.stack([value.flatten(1) for value in values])

    def one(self, image_BISS: Tensor, network: int) -> Tensor:
        """The outputs of one network alone, [B, C], batches normalised by running statistics."""
        assert self.out is not None
        value = image_BISS
        for index, conv in enumerate(self.convs):
            assert isinstance(conv, StackedConv)
            value = conv.one(value, network)
            if str(index) in self.norms:
                value = _norm_of_one(self.norms[str(index)], value, network)
            value = F.max_pool2d(F.relu(value), 2)
        value_BD = F.relu(self.fc1.one(value.flatten(1), network))
        return self.out.one(F.relu(self.fc2.one(value_BD, network)), network)

    def weights(self) -> Tensor:
        """Each network's weight matrices and kernels, flattened: [M, ..]. Without biases and normalisation."""
        layers = [*self.convs, self.fc1, self.fc2, *([] if self.out is None else [self.out])]
        return torch.cat([layer.weight.detach().flatten(1) for layer in layers], dim=1)


def _norm_of_each(norm: nn.Module, values: list[Tensor]) -> list[Tensor]:
    """The normalisation of each network's channels, as ``norm`` does it of all of them."""
    assert isinstance(norm, nn.BatchNorm2d)
    count, mean, variance = len(values), norm.running_mean, norm.running_var
    batch_statistics = norm.training or mean is None
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    means = [None] * count if mean is None else mean.chunk(count)
    variances = [None] * count if variance is None else variance.chunk(count)
    weights, biases = norm.weight.chunk(count), norm.bias.chunk(count)
    parts = zip(values, means, variances, weights, biases, strict=True)
    return [
        F.batch_norm(value, m, v, weight, bias, batch_statistics, norm.momentum or 0.0, norm.eps)
        for value, m, v, weight, bias in parts
    ]


def _norm_of_one(norm: nn.Module, value: Tensor, network: int) -> Tensor:
    assert isinstance(norm, _BatchNorm)
    channels = value.shape[1]
    part = slice(network * channels, (network + 1) * channels)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return F.batch_norm(value, mean[part], variance[part], norm.weight[part], norm.bias[part], eps=norm.eps)

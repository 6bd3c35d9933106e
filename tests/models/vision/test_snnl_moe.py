"""SNNL-MoE against plain layers and the equations, in float64.

Legend: B images, M experts, C classes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from s2moe.models.vision import VISION_KINDS, SNNLMoEConfig, SNNLMoEModel
from s2moe.models.vision.snnl_moe import LOWEST_TEMPERATURE
from s2moe.moe.routing import RoutingContext

IMAGES = {"mnist": (1, 28), "cifar": (3, 32), "digits": (1, 8)}


def build(extractor: str = "digits", **fields: Any) -> SNNLMoEModel:
    channels, size = IMAGES[extractor]
    torch.manual_seed(0)
    return SNNLMoEModel(SNNLMoEConfig(extractor=extractor, num_channels=channels, image_size=size, **fields))


def batch(model: SNNLMoEModel, count: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    config = model.config
    pixels = torch.randn(count, config.num_channels, config.image_size, config.image_size, dtype=dtype)
    return pixels, torch.arange(count) % 3


class Plain:
    """The extractor, gate and experts as plain layers with the model's weights."""

    def __init__(self, model: SNNLMoEModel) -> None:
        kernels, stride_pad = {"mnist": (8, 6), "cifar": (8, 6), "digits": (3, 3)}[model.config.extractor], (2, 1)
        self.parameters: list[tuple[Tensor, int, Tensor]] = []
        self.extractor = []
        for conv, kernel in zip(model.extractor.convs, kernels, strict=True):
            outputs, inputs = conv.weight.shape[1:3]
            self.extractor.append(self.take(nn.Conv2d(inputs, outputs, kernel, *stride_pad), conv, 0))
        self.extractor += [self.linear(layer, 0) for layer in model.extractor.linear]
        self.gate = [self.linear(layer, 0) for layer in (model.gate.fc, model.gate.out)]
        count = model.config.num_experts
        self.experts = [
            [self.linear(layer, i) for layer in (model.experts.fc, model.experts.out)] for i in range(count)
        ]

    def take(self, plain: nn.Module, stacked: nn.Module, index: int) -> nn.Module:
        plain.double()
        with torch.no_grad():
            for name in ("weight", "bias"):
                getattr(plain, name).copy_(getattr(stacked, name)[index])
                self.parameters.append((getattr(stacked, name), index, getattr(plain, name)))
        return plain

    def linear(self, stacked: nn.Module, index: int) -> nn.Module:
        return self.take(nn.Linear(stacked.weight.shape[2], stacked.weight.shape[1]), stacked, index)

    def __call__(self, value: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        layers = []
        for layer in self.extractor:
            value = layer(value if isinstance(layer, nn.Conv2d) else value.flatten(1)).relu()
            layers.append(value.flatten(1))
        gate_BM = self.gate[1](self.gate[0](layers[-1]).relu()).softmax(-1)
        out_BMC = torch.stack([second(first(layers[-1]).relu()) for first, second in self.experts], dim=1)
        return layers, gate_BM, out_BMC


def snnl(value: Tensor, labels: Tensor, temperature: float, distance: str, form: str) -> Tensor:
    """Anchor by anchor."""
    terms = []
    for i in range(len(value)):
        weight = []
        for j in range(len(value)):
            if distance == "cosine":
                d = 1 - (value[i] @ value[j]) / (value[i].norm() * value[j].norm())
            else:
                d = (value[i] - value[j]).square().sum()
            weight.append(torch.exp(-d / temperature))
        others = [j for j in range(len(value)) if j != i]
        same = [j for j in others if labels[j] == labels[i]]
        if form == "eps":
            terms.append(-torch.log(1e-5 + sum(weight[j] for j in same) / (1e-5 + sum(weight[j] for j in others))))
        elif same:
            terms.append(-torch.log(sum(weight[j] for j in same) / sum(weight[j] for j in others)))
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    ("extractor", "fields"),
    [
        ("mnist", {}),
        ("cifar", {"num_experts": 2}),
        ("digits", {"mix": "probabilities", "snnl_reduce": "min"}),
        ("digits", {"snnl_distance": "squared_euclidean", "snnl_reduce": "sum", "temperature": "fixed"}),
        ("digits", {"snnl_form": "eps", "temperature": "learned", "initial_temperature": 2.0}),
        ("digits", {"snnl_loss": -3.0}),
    ],
)
def test_loss_and_gradients_equal_the_equations(extractor: str, fields: dict[str, Any]) -> None:
    model = build(extractor, **fields).double().train()
    config, plain = model.config, Plain(model)
    pixels, labels = batch(model)
    layers, gate_BM, out_BMC = plain(pixels)
    if config.mix == "logits":
        mixed_BC = sum(gate_BM[:, i, None] * out_BMC[:, i] for i in range(config.num_experts))
        task = F.cross_entropy(mixed_BC, labels)
    else:
        mixed_BC = sum(gate_BM[:, i, None] * out_BMC[:, i].softmax(-1) for i in range(config.num_experts))
        task = -torch.log(mixed_BC[range(len(labels)), labels] + 1e-7).mean()
    temperature = (1 + 4) ** -0.55 if config.temperature == "annealed" else config.initial_temperature
    losses = [snnl(z, labels, temperature, config.snnl_distance, config.snnl_form) for z in layers]
    reduced = {"mean": lambda: sum(losses) / len(losses), "sum": lambda: sum(losses), "min": lambda: min(losses)}
    entangled = reduced[config.snnl_reduce]()

    output = model(pixels, labels, RoutingContext(epoch=4))
    torch.testing.assert_close(output.gate, gate_BM)
    torch.testing.assert_close(output.task_loss, task)
    torch.testing.assert_close(output.aux_loss, config.snnl_loss * entangled)
    assert output.figures["snnl"].item() == pytest.approx(entangled.item(), rel=1e-5)
    assert output.figures["snnl_temperature"].item() == pytest.approx(temperature)
    (task + config.snnl_loss * entangled).backward()
    output.loss.backward()
    for stacked, index, reference in plain.parameters:
        torch.testing.assert_close(stacked.grad[index], reference.grad)


@pytest.mark.parametrize(
    ("extractor", "convolved", "widths"), [("mnist", 128 * 5 * 5, [50]), ("cifar", 128 * 6 * 6, [1024, 1024])]
)
def test_published_sizes(extractor: str, convolved: int, widths: list[int]) -> None:
    model = build(extractor)
    assert model.extractor.linear[0].weight.shape == (1, widths[0], convolved)
    assert [layer.weight.shape[1] for layer in model.extractor.linear] == widths
    assert model.experts.fc.weight.shape == (5, 512, widths[-1])
    assert model.experts.out.weight.shape == (5, 10, 512)
    assert model.gate.out.weight.shape == (1, 5, 512)


def test_annealed_temperature_follows_the_epoch() -> None:
    model = build()
    found = [
        model(*batch(model, dtype=torch.float32), RoutingContext(epoch=i)).figures["snnl_temperature"].item()
        for i in (0, 4, 14)
    ]
    assert found == pytest.approx([1.0, 0.4126, 0.2255], abs=1e-4)


def test_learned_temperature_takes_a_step_down_the_loss(tmp_path: Path) -> None:
    model = build(temperature="learned", initial_temperature=2.0, snnl_loss=5.0).double().train()
    pixels, labels = batch(model)
    layers = [layer.detach() for layer in Plain(model)(pixels)[0]]

    def loss(temperature: float) -> float:
        return 5 * sum(snnl(z, labels, temperature, "cosine", "exact") for z in layers).item() / len(layers)

    slope = (loss(2.0 + 1e-5) - loss(2.0 - 1e-5)) / 2e-5
    output = model(pixels, labels)
    assert output.figures["snnl_temperature"].item() == 2.0
    assert model.temperature.value.item() == pytest.approx(2.0 - 0.1 * slope, rel=1e-6)
    output.loss.backward()  # whose graph the step has left alone
    learned = model.temperature.value.item()
    model.eval()(pixels, labels)
    assert model.temperature.value.item() == learned
    model.float().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.temperature.value.item() == pytest.approx(learned)


def test_learned_temperature_stays_positive() -> None:
    temperature = build(temperature="learned", temperature_rate=1e6).temperature
    leaf = temperature.now(0)
    temperature.learn(3 * leaf.sum(), leaf, None)
    assert temperature.value.item() == pytest.approx(LOWEST_TEMPERATURE)


def test_baseline_has_the_same_extractor_and_no_snnl() -> None:
    baseline, conditioned = build(snnl_loss=0.0), build()
    for left, right in zip(baseline.parameters(), conditioned.parameters(), strict=True):
        assert torch.equal(left, right)
    pixels, labels = batch(baseline, dtype=torch.float32)
    output = baseline.train()(pixels, labels)
    assert torch.equal(output.loss, output.task_loss)
    assert "snnl" not in output.figures
    assert baseline.eval()(pixels, labels).figures["snnl"].item() > 0


def test_baseline_on_pixels_is_experts_and_gate_alone() -> None:
    torch.manual_seed(0)
    model = SNNLMoEModel(SNNLMoEConfig(extractor="none", num_channels=2, image_size=5, snnl_loss=0.0)).double()
    assert not list(model.extractor.parameters())
    assert (model.gate.fc.weight.shape, model.experts.fc.weight.shape) == ((1, 512, 50), (5, 512, 50))
    pixels, labels = batch(model)

    def head(stacked: Any, index: int) -> Tensor:
        hidden = F.relu(F.linear(pixels.flatten(1), stacked.fc.weight[index], stacked.fc.bias[index]))
        return F.linear(hidden, stacked.out.weight[index], stacked.out.bias[index])

    gate = head(model.gate, 0).softmax(-1)
    mixed = sum(gate[:, i : i + 1] * head(model.experts, i) for i in range(5))
    torch.testing.assert_close(model(pixels, labels).loss, F.cross_entropy(mixed, labels))


def test_initial_weights() -> None:
    model = build("mnist", num_experts=3)
    assert model.extractor.convs[1].weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 36)), rel=0.02)
    for expert in range(3):
        assert model.experts.fc.weight[expert].std().item() == pytest.approx(math.sqrt(2 / 50), rel=0.03)
        bound = math.sqrt(6 / (512 + 10))
        assert 0.99 * bound < model.experts.out.weight[expert].abs().max().item() <= bound
    assert not torch.equal(model.experts.fc.weight[0], model.experts.fc.weight[1])


def test_one_image_has_no_neighbour() -> None:
    model = build().double().train()
    pixels, labels = batch(model, 1)
    output = model(pixels, labels)
    assert output.aux_loss.item() == 0
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_predictions_of_selected_experts() -> None:
    model = build().double()
    pixels, labels = batch(model)
    output = model(pixels, labels)
    _, gate_BM, out_BMC = Plain(model)(pixels)
    want = [int(out_BMC[n, gate_BM[n].argmax()].argmax()) for n in range(len(pixels))]
    assert output.selected_prediction.tolist() == want
    torch.testing.assert_close(model.expert_logits(pixels), out_BMC.transpose(0, 1))
    assert model.expert_weights().shape == (5, 50 * 512 + 512 * 10)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    model = build().eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels, _ = batch(model, dtype=torch.float32)
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
    assert VISION_KINDS["snnl_moe"].model is type(again)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mix": "logit"}, "mix: must be one of .*did you mean 'logits'"),
        ({"num_experts": 1}, "num_experts must be at least 2"),
        ({"initial_temperature": 0.0}, "initial_temperature must be at least"),
        ({"image_size": 8}, "image_size 8 is too small"),
        ({"extractor": "none"}, "snnl_loss: extractor=none has no layers that it could condition"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SNNLMoEConfig(**fields)

"""Classic mixtures against plain layers and the equations, in float64.

Legend: B images, M experts, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from s2moe.models.vision import VISION_KINDS, MixtureConfig, MixtureModel
from s2moe.models.vision.mixture_networks import ARCHITECTURES
from s2moe.moe.routing import RoutingContext
from s2moe.objectives.balance import importance_loss
from tests.models.vision.mixture_reference import (
    PlainMixture,
    copy_into,
    mixture_loss,
    pairs,
    stochastic_loss,
)

SIZES = {"mnist": (1, 28, 10), "fmnist": (1, 28, 10), "fmnist_mnist": (1, 28, 12), "cifar100": (3, 32, 100)}


def build(architecture: str = "mnist", **fields: Any) -> MixtureModel:
    channels, size, classes = SIZES.get(architecture, (1, 8, 10))
    sizes = {"num_channels": channels, "image_size": size, "num_classes": classes} | fields
    return MixtureModel(MixtureConfig(architecture=architecture, **sizes))


def images(model: MixtureModel, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    config = model.config
    shape = (count, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, dtype=dtype), torch.randint(config.num_classes, (count,))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("architecture", "expert", "gate", "total"),
    [
        ("mnist", 1_382, 26_063, 32_973),
        ("fmnist", 13_300, 709_413, 775_913),
        ("cifar100", 911_012, 3_917_332, 22_137_572),
    ],
)
def test_published_parameter_counts(architecture: str, expert: int, gate: int, total: int) -> None:
    model = build(architecture)
    assert parameters(model.gate) == gate
    assert parameters(model) == total
    assert parameters(build(architecture, num_experts=1)) == expert


def test_published_sizes_of_the_combined_data() -> None:
    model = build("fmnist_mnist")
    assert model.experts.count == 6
    assert model.gate.trunk.convs[0].weight.shape == (1, 1, 1, 5, 5)
    assert model.gate.trunk.fc1.weight.shape == (1, 128, 144)
    assert model.experts.out.weight.shape == (6, 12, 32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["mixture", "stochastic"])
@pytest.mark.parametrize("gate", ["original", "attentive"])
@pytest.mark.parametrize(
    ("architecture", "batch"), [("mnist", 6), ("mnist", 1), ("fmnist", 5), ("fmnist_mnist", 3), ("cifar100", 3)]
)
def test_output_loss_and_gradients_equal_the_plain_mixture(
    architecture: str, batch: int, gate: str, form: str, training: bool
) -> None:
    experts = 3
    model = build(architecture, num_experts=experts, gate=gate, form=form, importance_loss=0.7)
    plain = PlainMixture(architecture, experts, model.config.num_classes, gate == "attentive", architecture == "fmnist")
    for norm in (module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    copy_into(model, plain)
    model, plain = model.double().train(training), plain.double().train(training)
    pixels, labels = images(model, batch)

    context = RoutingContext(seed=3, step=5)
    output = model(pixels, labels, context)
    gate_BM, probability_BMC = plain(pixels)
    task = (mixture_loss if form == "mixture" else stochastic_loss)(gate_BM, probability_BMC, labels)
    sums_M = gate_BM.sum(0)
    importance = ((sums_M - sums_M.mean()) ** 2).sum() / (experts - 1) / sums_M.mean() ** 2
    torch.testing.assert_close(output.gate, gate_BM)
    torch.testing.assert_close(output.task_loss, task)
    torch.testing.assert_close(output.aux_loss, 0.7 * importance)
    torch.testing.assert_close(output.loss, task + 0.7 * importance)
    selected = [probability_BMC[n, gate_BM[n].argmax()].argmax() for n in range(batch)]
    assert output.selected_prediction.tolist() == [int(name) for name in selected]
    if form == "mixture":
        torch.testing.assert_close(output.logits.exp(), torch.einsum("bm,bmc->bc", gate_BM, probability_BMC) + 1e-7)
    else:
        assert all(
            any(torch.allclose(row.exp(), e + 1e-7) for e in probability_BMC[n]) for n, row in enumerate(output.logits)
        )

    output.loss.backward()
    (task + 0.7 * importance).backward()
    for stacked, index, reference in gradient_pairs(model, plain):
        torch.testing.assert_close(stacked[index], reference)


def gradient_pairs(model: MixtureModel, plain: PlainMixture) -> list[tuple[Tensor, int, Tensor]]:
    """``pairs`` of gradients: the same walk over models whose parameters are replaced by their gradients."""
    for module in (model, plain):
        for parameter in module.parameters():
            parameter.data = parameter.grad
    return [(stacked.detach(), index, reference.detach()) for stacked, index, reference in pairs(model, plain)]


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_networks_convolve_alike_together_and_separately(
    training: bool, batch_statistics: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for separate in (True, False):
        torch.manual_seed(0)
        model = build("cifar100", num_experts=3, batch_statistics=batch_statistics).double().train(training)
        monkeypatch.setattr(model.experts, "separate", lambda _, value=separate: value)
        pixels, labels = images(model, 4)
        output = model(pixels, labels)
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((output.logits, gradients, dict(model.named_buffers())))
    torch.testing.assert_close(found[0], found[1])


def test_running_statistics_equal_those_of_plain_layers() -> None:
    model = build("fmnist", num_experts=2)
    plain = PlainMixture("fmnist", 2, 10, False, True)
    copy_into(model, plain)
    pixels, _ = images(model, 4, torch.float32)
    model.train()(pixels)
    plain.train()(pixels)
    torch.testing.assert_close(model.gate.trunk.norms["0"].running_var, plain.trunk.norms["0"].running_var)


def test_sample_similarity_is_added_in_the_published_form() -> None:
    fields = {"sample_similarity": 0.01, "sample_dissimilarity": 0.1, "similarity_reduction": "repo_sum"}
    model = build("mnist", num_experts=3, similarity_scale="none", **fields).double()
    pixels, labels = images(model, 4)
    output = model(pixels, labels)
    together_BB = output.gate @ output.gate.T
    distance_BB = torch.tensor([[(x - y).square().sum().sqrt() for y in pixels] for x in pixels], dtype=torch.float64)
    want = 0.01 * (distance_BB * together_BB).sum() / 3 - 0.1 * (distance_BB * (1 - together_BB)).sum() / 6 / 16
    torch.testing.assert_close(output.aux_loss, want)
    assert output.figures["sample_similarity"].item() == pytest.approx(want.item())


def test_importance_has_the_unbiased_variance() -> None:
    assert importance_loss(torch.tensor([[1.0, 2.0, 3.0]]), unbiased=True).item() == pytest.approx(0.25)


def test_keys_carry_the_gate_s_gradient_into_experts() -> None:
    model = build("mnist", gate="attentive").double()
    pixels, _ = images(model, 4)
    model(pixels).gate[:, 0].sum().backward()
    assert model.experts.fc2.weight.grad.abs().sum() > 0
    assert model.experts.out.weight.grad is None  # which the keys come before


def test_a_stack_is_initialised_as_its_networks_one_by_one() -> None:
    torch.manual_seed(5)
    three = build("mnist", num_experts=3)
    torch.manual_seed(5)
    five = build("mnist", num_experts=5)
    for left, right in zip(three.experts.parameters(), five.experts.parameters(), strict=True):
        assert torch.equal(left, right[:3])
        assert not torch.equal(right[3], right[4])
    torch.manual_seed(6)
    assert not torch.equal(build("mnist").experts.fc1.weight, five.experts.fc1.weight)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_initial_range_is_that_of_plain_layers(part: str) -> None:
    model = build("cifar100", num_experts=2)
    for layer, fan_in in ((model.experts.convs[1], 16 * 9), (model.experts.convs[0], 27), (model.experts.fc1, 512)):
        values = getattr(layer, part)
        if values is not None:
            assert values.abs().max() <= fan_in**-0.5
            assert values.abs().max() > 0.9 * fan_in**-0.5
            assert values.std().item() == pytest.approx((fan_in * 3) ** -0.5, rel=0.25)


def test_single_model_has_no_gate() -> None:
    model = build("mnist", num_experts=1).double()
    pixels, labels = images(model, 3)
    output = model(pixels, labels)
    assert output.gate is None
    assert output.selected_prediction is None
    probability = model.expert_logits(pixels)[0].softmax(-1)
    torch.testing.assert_close(output.loss, -(probability[range(3), labels] + 1e-7).log().mean())


def test_stochastic_draws_follow_the_gate_and_the_context() -> None:
    model = build("mnist", form="stochastic").double()
    pixels = images(model, 1)[0].expand(2000, -1, -1, -1)
    with torch.no_grad():
        output = model(pixels, context=RoutingContext(seed=1))
        again = model(pixels, context=RoutingContext(seed=1))
        other = model(pixels, context=RoutingContext(seed=2))
        expert_MC = model.expert_logits(pixels[:1])[:, 0].softmax(-1)
    assert torch.equal(output.logits, again.logits)
    assert not torch.equal(output.logits, other.logits)
    drawn_B = (output.logits.exp()[:, None] - expert_MC).abs().sum(-1).argmin(1)
    share_M = torch.bincount(drawn_B, minlength=5) / 2000
    torch.testing.assert_close(share_M.double(), output.gate[0], atol=0.04, rtol=0)


def sharpened(architecture: str, **fields: Any) -> MixtureModel:
    """A model whose gate spreads its choices, for tests of sparse inference."""
    model = build(architecture, **fields)
    with torch.no_grad():
        model.gate.trunk.out.weight.mul_(40)
    return model.double().eval()


@pytest.mark.parametrize("architecture", ["fmnist", "cifar100", "digits"])
@pytest.mark.parametrize(("inference", "threshold"), [("top1", 0.0), ("threshold", 0.2), ("threshold", 0.999)])
def test_sparse_inference_equals_the_dense_masked_result(
    architecture: str, inference: str, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sharpened(architecture, num_experts=4, inference=inference, inference_threshold=threshold)
    pixels, labels = images(model, 12)
    with torch.no_grad():
        expert_MBC = model.expert_logits(pixels).softmax(-1)
        calls = count_calls(model, monkeypatch)
        output = model(pixels, labels)
    gate_BM = output.gate
    first_BM = torch.nn.functional.one_hot(gate_BM.argmax(1), 4).bool()
    kept_BM = first_BM if inference == "top1" else first_BM | (gate_BM > threshold)
    weight_BM = gate_BM * kept_BM / (gate_BM * kept_BM).sum(1, keepdim=True)
    want_BC = torch.einsum("bm,mbc->bc", weight_BM, expert_MBC)
    torch.testing.assert_close(output.logits.exp(), want_BC + 1e-7)
    torch.testing.assert_close(output.task_loss, -(want_BC[range(12), labels] + 1e-7).log().mean())
    selected = [int(expert_MBC[first, n].argmax()) for n, first in enumerate(gate_BM.argmax(1).tolist())]
    assert output.selected_prediction.tolist() == selected
    assert calls == [(expert, int(count)) for expert, count in enumerate(kept_BM.sum(0)) if count]
    assert sum(count for _, count in calls) < 12 * 4


def count_calls(model: MixtureModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Which expert computes how many images from now on; the stacked product of all of them must not run."""
    calls: list[tuple[int, int]] = []
    one = model.experts.one

    def counted(image: Tensor, expert: int) -> Tensor:
        calls.append((expert, len(image)))
        return one(image, expert)

    def refused(_: Tensor) -> None:
        raise AssertionError("all experts were computed")

    monkeypatch.setattr(model.experts, "one", counted)
    monkeypatch.setattr(model.experts, "forward", refused)
    return calls


def test_training_is_dense_whatever_inference_is() -> None:
    torch.manual_seed(0)
    sparse = build("digits", inference="top1")
    torch.manual_seed(0)
    dense = build("digits")
    pixels, labels = images(dense, 5, torch.float32)
    torch.testing.assert_close(sparse.train()(pixels, labels).loss, dense.train()(pixels, labels).loss)


def test_batch_statistics_at_test_are_for_replication_alone() -> None:
    proper, published = build("fmnist").eval(), build("fmnist", batch_statistics=True).eval()
    pixels, _ = images(proper, 6, torch.float32)
    with torch.no_grad():
        assert torch.allclose(proper(pixels).gate[:2], proper(pixels[:2]).gate)
        assert not torch.allclose(published(pixels).gate[:2], published(pixels[:2]).gate)
        torch.testing.assert_close(published(pixels).gate, published.train()(pixels).gate)


@pytest.mark.parametrize("frozen", ["experts", "gate"])
def test_frozen_parts_do_not_change(frozen: str) -> None:
    model = build("cifar100", num_experts=2, frozen=frozen).train()
    part, other = (model.experts, model.gate) if frozen == "experts" else (model.gate, model.experts)
    before = {name: value.clone() for name, value in part.state_dict().items()}
    pixels, labels = images(model, 3, torch.float32)
    model(pixels, labels).loss.backward()
    assert all(parameter.grad is None for parameter in part.parameters())
    assert all(parameter.grad is not None for parameter in other.parameters())
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
    assert not part.training
    assert other.training


def test_label_selects_the_expert_of_a_preset_split() -> None:
    model = build("mnist", preset_split="0-7,1-9,2-4,3-8,5-6").double()
    pixels, _ = images(model, 10)
    labels = torch.arange(10)
    output = model(pixels, labels)
    owner = [0, 1, 2, 3, 2, 4, 4, 0, 3, 1]
    probability_MBC = model.expert_logits(pixels).softmax(-1)
    want = -(probability_MBC[owner, range(10), labels] + 1e-7).log().mean()
    torch.testing.assert_close(output.loss, want)
    with pytest.raises(ValueError, match="needs labels"):
        model(pixels)


@pytest.mark.parametrize("gate", ["original", "attentive"])
def test_saved_and_loaded_again(tmp_path: Path, gate: str) -> None:
    model = build("fmnist", gate=gate, frozen="gate").eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(again, MixtureModel)
    pixels, _ = images(model, 3, torch.float32)
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
    assert not any(parameter.requires_grad for parameter in again.gate.parameters())
    assert all(parameter.requires_grad for parameter in again.experts.parameters())


def test_preset_split_is_loaded_again(tmp_path: Path) -> None:
    model = build("mnist", preset_split="0-7,1-9,2-4,3-8,5-6")
    model.save_pretrained(tmp_path)
    assert torch.equal(MixtureModel.from_pretrained(tmp_path).owner_C, model.owner_C)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "mnits"}, "architecture: must be one of .*did you mean 'mnist'"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"importance_loss": -1.0}, "importance_loss must not be negative"),
        ({"importance_loss": float("nan")}, "importance_loss must be a finite number"),
        ({"num_experts": 1, "importance_loss": 0.1}, "importance_loss: num_experts=1 has no gate"),
        ({"num_experts": 1, "gate": "attentive"}, "gate: num_experts=1 has no gate"),
        ({"gate": "attentive", "inference": "top1"}, "distil the model"),
        ({"architecture": "fmnist", "batch_statistics": True, "inference": "top1"}, "running statistics"),
        ({"preset_split": "0-1,2-3"}, "is for 2 experts"),
        ({"preset_split": "0-1,2-3,4-5,6-7,8-8"}, "does not give each"),
        ({"preset_split": "a,b"}, "expected classes"),
        ({"gate_kd": 1.0}, "gate_kd: is for"),
        ({"architecture": "cifar100", "image_size": 8}, "image_size 8 is too small"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureConfig(**fields)


def test_kind_is_known() -> None:
    assert VISION_KINDS["mixture"].model is MixtureModel
    assert set(ARCHITECTURES) == {"mnist", "fmnist", "fmnist_mnist", "cifar100", "digits"}

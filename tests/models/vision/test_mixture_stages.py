"""Distillation, preset splits and stages: what is copied, what is new, what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2moe.models.vision import MixtureConfig, MixtureModel
from s2moe.models.vision.mixture_splits import FMNIST_MNIST_SPLITS, MNIST_SPLITS, owners
from s2moe.models.vision.mixture_stages import distil, experts_of_gate, gate_of_experts


def build(architecture: str = "fmnist", **fields: Any) -> MixtureModel:
    torch.manual_seed(0)
    sizes = {"num_channels": 3, "image_size": 32} if architecture == "cifar100" else {}
    model = MixtureModel(
        MixtureConfig(architecture=architecture, num_experts=fields.pop("num_experts", 5), **sizes, **fields)
    )
    for module in model.modules():  # as if trained
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def batch(model: MixtureModel, count: int = 6) -> tuple[Tensor, Tensor]:
    shape = (count, model.config.num_channels, model.config.image_size, model.config.image_size)
    return torch.randn(shape), torch.arange(count) % 10


def equal(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def train_a_step(model: MixtureModel) -> None:
    """One step of everything that requires a gradient."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(*batch(model)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("gate", ["original", "attentive"])
@pytest.mark.parametrize("architecture", ["fmnist", "cifar100"])
def test_distillation_copies_experts_and_the_gate_s_trunk(architecture: str, gate: str) -> None:
    teacher = build(architecture, num_experts=2, gate=gate, importance_loss=0.2, sample_similarity=0.1)
    student = distil(teacher, seed=1)
    assert equal(student.experts, teacher.experts)
    old, new = teacher.gate.state_dict(), student.gate.state_dict()
    copied = {name for name, value in new.items() if name in old and torch.equal(value, old[name])}
    output = {"trunk.out.weight", "trunk.out.bias"}
    assert set(new) - copied == (output if gate == "attentive" else set())
    assert student.config.gate == "original"
    assert student.config.frozen == "experts"
    assert (student.config.importance_loss, student.config.sample_similarity) == (0, 0)

    before = {name: value.clone() for name, value in student.state_dict().items()}
    train_a_step(student)
    assert equal(student.experts, teacher.experts)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if name.startswith("gate.") and name.endswith("weight")} <= changed


def test_distilled_loss_is_the_task_s_alone() -> None:
    student = distil(build("mnist", gate="attentive"), seed=1)
    output = student.train()(*batch(student))
    assert output.aux_loss.item() == 0
    assert torch.equal(output.loss, output.task_loss)


def test_distillation_from_the_old_gate_s_distribution() -> None:
    teacher = build("mnist", gate="attentive").eval()
    student = distil(teacher, seed=1, gate_kd=0.5).train()
    pixels, labels = batch(teacher)
    output = student(pixels, labels)
    old, new = teacher(pixels).gate.double(), output.gate.double()
    divergence = sum(p * torch.log(p / q) for p, q in zip(old.flatten(), new.flatten(), strict=True)) / len(pixels)
    assert output.aux_loss.item() == pytest.approx(0.5 * divergence.item(), rel=1e-4)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in student.teacher_gate.parameters())
    with pytest.raises(ValueError, match="not attentive"):
        distil(build("mnist"), seed=1, gate_kd=0.5)


@pytest.mark.parametrize("inference", ["top1", "threshold"])
def test_distilled_model_spares_experts(inference: str) -> None:
    student = distil(build(gate="attentive"), seed=1, inference=inference).eval()
    dense = distil(build(gate="attentive"), seed=1).eval()
    pixels, labels = batch(student)
    with torch.no_grad():
        sparse_output, dense_output = student(pixels, labels), dense(pixels, labels)
    torch.testing.assert_close(sparse_output.gate, dense_output.gate)
    assert torch.equal(sparse_output.selected_prediction, dense_output.selected_prediction)


def test_the_experiment_of_preset_splits() -> None:
    preset = build("mnist", preset_split=MNIST_SPLITS[0])
    train_a_step(preset)
    with_gate = gate_of_experts(preset, seed=1)
    assert with_gate.config.preset_split is None
    assert equal(with_gate.experts, preset.experts)
    train_a_step(with_gate)
    assert equal(with_gate.experts, preset.experts)
    with_new = experts_of_gate(with_gate, seed=2)
    assert equal(with_new.gate, with_gate.gate)
    assert not torch.equal(with_new.experts.fc1.weight, preset.experts.fc1.weight)
    assert not torch.equal(with_new.experts.fc1.weight, build("mnist").experts.fc1.weight)
    train_a_step(with_new)
    assert equal(with_new.gate, with_gate.gate)


def test_stages_leave_the_global_generator_alone() -> None:
    trained = build("mnist")
    before = torch.get_rng_state()
    gate_of_experts(trained, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(
        gate_of_experts(trained, 7).gate.trunk.fc1.weight, gate_of_experts(trained, 8).gate.trunk.fc1.weight
    )


def test_a_label_s_expert_alone_learns_it() -> None:
    model = build("mnist", preset_split=MNIST_SPLITS[0])
    pixels, labels = batch(model, 40)
    only = (labels == 0) | (labels == 7)
    model(pixels[only], labels[only]).loss.backward()
    moved = model.experts.out.weight.grad.abs().sum((1, 2)) > 0
    assert moved.tolist() == [True, False, False, False, False]


def test_published_splits() -> None:
    assert owners(MNIST_SPLITS[0], 10, 5) == [0, 1, 2, 3, 2, 4, 4, 0, 3, 1]
    for splits, classes, experts in ((MNIST_SPLITS, 10, 5), (FMNIST_MNIST_SPLITS, 12, 6)):
        assert all(sorted(owners(split, classes, experts)) == [i // 2 for i in range(classes)] for split in splits)
    pairs = {frozenset(part.split("-")) for part in MNIST_SPLITS[3].split(",")}
    assert pairs == {frozenset(pair) for pair in ("58", "69", "13", "02", "47")}


def test_impossible_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be given new ones"):
        experts_of_gate(build("mnist", gate="attentive"), seed=1)
    with pytest.raises(ValueError, match="has no gate"):
        distil(build("mnist", num_experts=1), seed=1)

"""Mixtures trained in stages: the next stage's model, made from the last one's.

Krishnamurthy, Watkins & Gaertner 2023. Each function returns a new model; train it as any other.

    distil           A mixture (with an attentive gate, usually) becomes a conditional model: its experts, frozen, under
                     an original gate whose every tensor that the old gate has too (convolutions, normalisation, fc1,
                     fc2) starts from the old one, and whose output layer is new. It learns from the task's loss alone,
                     the published method; ``gate_kd`` adds KL(old attentive gate ‖ new gate). What the new gate's ReLU
                     after fc2 does, the attentive gate of MNIST and CIFAR-100 did not have.
    gate_of_experts  Section 4.2: a new gate for trained experts (of a preset split, say), which are frozen.
    experts_of_gate  Section 4.2: new experts for a trained gate, which is frozen.

New parts are drawn from ``seed``, which should differ from the one that the last stage began with: from the same,
"new" experts would begin as the old ones did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from s2moe.models.vision.mixture import MixtureModel
from s2moe.models.vision.mixture_config import MixtureConfig
from s2moe.models.vision.mixture_gates import AttentiveGate

STAGES = ("distil", "gate_of_experts", "experts_of_gate")


def distil(teacher: MixtureModel, seed: int, gate_kd: float = 0.0, inference: str = "dense") -> MixtureModel:
    """The conditional model of a trained mixture. ``inference`` top1 or threshold: it then spares experts.

    Raises:
        ValueError: if the teacher has no gate, or ``gate_kd`` is given and its gate is not attentive.
    """
    old = _gate(teacher)
    if gate_kd and not isinstance(old, AttentiveGate):
        raise ValueError("gate_kd: the teacher's gate is not attentive: leave it at 0")
    student = _successor(teacher, seed, gate="original", frozen="experts", gate_kd=gate_kd, inference=inference)
    student.experts.load_state_dict(teacher.experts.state_dict())
    _copy_matching(old, _gate(student))
    if student.teacher_gate is not None:
        student.teacher_gate.load_state_dict(old.state_dict())
    return student


def gate_of_experts(trained: MixtureModel, seed: int, **changes: Any) -> MixtureModel:
    """A new gate over the trained model's experts, frozen. ``changes``: other settings of the configuration."""
    model = _successor(trained, seed, frozen="experts", **changes)
    model.experts.load_state_dict(trained.experts.state_dict())
    return model


def experts_of_gate(trained: MixtureModel, seed: int, **changes: Any) -> MixtureModel:
    """New experts under the trained model's gate, frozen. ``changes``: other settings of the configuration.

    Raises:
        ValueError: if the trained model has no gate, or an attentive one, which is nothing without its experts.
    """
    old = _gate(trained)
    if isinstance(old, AttentiveGate):
        raise ValueError("an attentive gate attends to the experts it was trained with: it cannot be given new ones")
    model = _successor(trained, seed, frozen="gate", **changes)
    _gate(model).load_state_dict(old.state_dict())
    return model


def _gate(model: MixtureModel) -> nn.Module:
    if model.gate is None:
        raise ValueError("the model has no gate: train one for its experts first (gate_of_experts)")
    return model.gate


def _successor(model: MixtureModel, seed: int, **changes: Any) -> MixtureModel:
    """A new model of the same shape, without losses for the gate, in the same place."""
    own = {name: getattr(model.config, name) for name in SHAPE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        successor = MixtureModel(MixtureConfig(**(own | changes)))
    return successor.to(model.device, model.dtype)


SHAPE = (
    "num_channels",
    "image_size",
    "num_classes",
    "architecture",
    "num_experts",
    "form",
    "query_relu",
    "batch_statistics",
)


def _copy_matching(source: nn.Module, target: nn.Module) -> None:
    """Every tensor of ``target`` that ``source`` has too, of the same shape."""
    have, want = source.state_dict(), target.state_dict()
    matching = {name: have[name] for name, value in want.items() if name in have and have[name].shape == value.shape}
    target.load_state_dict(want | matching)

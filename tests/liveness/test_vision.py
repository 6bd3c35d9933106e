"""Every setting of each kind of vision model does something, in the way of test_models.py."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch

from s2moe.config import load
from s2moe.config.vision import VisionRunConfig
from s2moe.models.vision import VISION_KINDS
from s2moe.moe.routing import RoutingContext

from .cases import Tree, context, leaves, others
from .test_models import digest

BASE: dict[str, Tree] = {
    "mixture": {"architecture": "digits"},
    "snnl_moe": {"extractor": "digits", "hidden": 16},
    "vae": {"encoder": "lite", "latent_size": 8},
    "vmoe": {"size": "digits/2", "moe": {"num_experts": 4}},
}
CONTEXTS: dict[str, Tree] = {
    "mixture.similarity_": {"sample_similarity": 0.5, "sample_dissimilarity": 0.5},
    "mixture.inference_threshold": {"inference_threshold": 0.19},
    "mixture.batch_statistics": {"architecture": "cifar100", "image_size": 16},
    "mixture.architecture": {"image_size": 28},
}
VALUES: dict[str, list[Any]] = {
    "mixture.query_relu": [True],
    "mixture.num_experts": [3],
    "mixture.preset_split": ["0-1,2-3,4-5,6-7,8-9"],
    "mixture.inference_threshold": [0.21],
    "snnl_moe.extractor": ["mnist"],
    "snnl_moe.temperature_rate": [1000.0],
    "vae.num_experts": [5],
    "vae.encoder": ["medium"],
    "vae.decoding": ["hard", "straight_through"],
    "vae.reference_batch": [64],
    "vmoe.size": ["mnist/4"],
    "vmoe.patch_size": [4],
    "vmoe.hidden_size": [16],
    "vmoe.num_hidden_layers": [2],
    "vmoe.num_attention_heads": [2],
    "vmoe.intermediate_size": [64],
    "vmoe.representation_size": [8],
    "vmoe.placement": ["every-1", "last-1", "none"],
    "vmoe.auxiliary": ["mean"],
    "vmoe.layer_norm_eps": [1e-2],
    "vmoe.head_bias": [-10.0],
}
ELSEWHERE = {"mixture.gate_kd": "tests/models/vision/test_mixture_stages.py, which has a teacher"}


def vision(kind: str, settings: Tree) -> str:
    """A digest of what a tiny model makes of three training steps and an evaluation."""
    known = VISION_KINDS[kind]
    tree = {"image_size": 8, "num_classes": 10, **BASE[kind], **settings}
    torch.manual_seed(0)
    model: Any = known.model(known.config(**tree))
    draw = torch.Generator().manual_seed(1)
    pixels = torch.rand(12, 1, tree["image_size"], tree["image_size"], generator=draw)
    labels = torch.randint(0, 10, (12,), generator=draw)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(3):
        out = model.train()(
            pixel_values=pixels, labels=labels, context=RoutingContext(seed=1, step=step, steps=3, epoch=step)
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses += [float(out.loss), *(float(value) for value in (out.figures or {}).values())]
    with torch.no_grad():
        out = model.eval()(pixel_values=pixels, labels=labels, context=RoutingContext(seed=1))
    outputs = [tensor for tensor in (out.logits, out.gate) if tensor is not None]
    return digest(losses, float(out.loss), *outputs, *model.state_dict().values())


@functools.cache
def made_of(kind: str, settings: str) -> str:
    try:
        return vision(kind, json.loads(settings))
    except ValueError as error:
        return f"refused: {error}"


def cases() -> list[Any]:
    """(kind, context, another value) of each field of each kind; its SMoE layers are looked at in test_models.py."""
    found = []
    for kind in VISION_KINDS:
        settings = load(VisionRunConfig, None, ["name=x", f"model.kind={kind}"]).described()
        for path, known in leaves(settings.section):
            if path[0] != "model" or len(path) > 2 or path[1] == "kind":
                continue
            key, name = path[1], f"{kind}.{path[1]}"
            if name in ELSEWHERE:
                continue
            where = {
                given.removeprefix("model."): value
                for given, value in context(settings, path).items()
                if given.startswith("model.")
            }
            for start, added in CONTEXTS.items():
                where |= added if name.startswith(start) else {}
            values = VALUES.get(name, others(known))
            assert values, f"{name}: give another value in VALUES, or say in ELSEWHERE which test looks at it"
            found += [
                pytest.param(kind, where, {key: value}, id=f"{name}={value}")
                for value in values
                if where.get(key, BASE[kind].get(key, known.default)) != value
            ]
    return found


@pytest.mark.parametrize(("kind", "where", "other"), cases())
def test_a_setting_of_a_kind_changes_the_model(kind: str, where: Tree, other: Tree) -> None:
    before, after = made_of(kind, json.dumps(where)), made_of(kind, json.dumps(where | other))
    assert after != before
    if after.startswith("refused: "):
        assert next(iter(other)) in after  # by name

"""What is read off a trained SMoE-VAE: counts, information, probes and their controls, and the pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from s2moe.data.images import ImageSet, ImageSplit
from s2moe.metrics.latent import active_experts, linear_partition, linear_probe, purity
from s2moe.models.vision import VAEConfig, VAEModel
from s2moe.moe.routing import RoutingContext
from s2moe.training.vae_report import Latents, examine, figures, vae_report


def test_active_experts_serve_half_a_percent_of_the_images() -> None:
    expert_N = np.repeat([0, 2, 3, 5], [985, 5, 4, 6])
    assert active_experts(expert_N, 7).tolist() == [0, 2, 5]
    assert active_experts(expert_N, 7, share=0.004).tolist() == [0, 2, 3, 5]
    assert active_experts(np.zeros(10, dtype=np.int64), 3).tolist() == [0]  # never those of no image


def test_purity() -> None:
    assert purity(np.array([[5, 0], [0, 5]])) == 1
    assert purity(np.array([[3, 2], [1, 4]])) == pytest.approx(0.7)


def test_a_probe_reads_what_is_linear_and_no_more() -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((1500, 6))
    sign = (features[:, 2] > 0).astype(np.int64)
    found = linear_probe(features, sign)
    assert found["accuracy"] > 0.97
    assert found["labels"] == 2
    xor = ((features[:, 0] > 0) ^ (features[:, 1] > 0)).astype(np.int64)
    assert linear_probe(features, xor)["accuracy"] < 0.62
    chance = linear_probe(features, random.permutation(sign))
    assert abs(chance["accuracy"] - 0.5) < 0.08
    assert linear_probe(features, np.full(1500, 4)) == {"accuracy": 1.0, "majority": 1.0, "labels": 1.0}
    uneven = (random.random(1500) < 0.1).astype(np.int64)
    assert linear_probe(features, uneven)["majority"] == pytest.approx(0.9, abs=0.05)


def test_a_linear_partition_has_the_sizes_and_follows_a_direction() -> None:
    features = np.random.default_rng(0).standard_normal((100, 4))
    group = linear_partition(features, np.array([50, 30, 15]), seed=3)
    assert np.bincount(group).tolist() == [50, 30, 20]  # what is left belongs to the last
    direction = np.random.default_rng(3).standard_normal(4)
    assert (np.diff(group[(features @ direction).argsort()]) >= 0).all()


def test_figures_of_a_case_counted_by_hand() -> None:
    expert_N = np.repeat([0, 0, 2, 2], 100)
    label_N = np.repeat([0, 1, 1, 1], 100)
    error_NE = np.zeros((400, 3))
    error_NE[:] = [[1.0, 5.0, 3.0]]
    error_NE[200:] = [[4.0, 5.0, 2.0]]
    z_NZ = np.random.default_rng(0).standard_normal((400, 3)).astype(np.float32)
    z_NZ[:200, 0] += 50
    latents = Latents(z_NZ, expert_N, label_N, error_NE, np.full(400, 1.25), np.full(400, 7.0))
    found = figures(latents, 3, 2)
    assert found["experts"] == {"configured": 3, "active": 2, "numbers": [0, 2]}
    error = found["error"]
    assert (error["recon"], error["recon_soft"], error["gap"], error["recon_best"]) == (1.5, 1.25, 0.25, 1.5)
    assert error["by_expert"] == {0: 1.0, 2: 2.0}
    assert error["by_pair"] == [[1.0, 3.0], [4.0, 2.0]]
    assert error["recon_shuffled"] == pytest.approx(2.5, abs=0.2)  # (1 + 3 + 4 + 2) / 4 in the mean
    assert error["kl"] == 7
    # H(E) = 1, H(Y) = H(1/4), H(E, Y) of 1/4, 1/4, 1/2
    quarter = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    assert found["bits"]["experts"] == pytest.approx(1)
    assert found["bits"]["classes"] == pytest.approx(quarter)
    assert found["bits"]["information"] == pytest.approx(1 + quarter - 1.5)
    assert found["purity"] == 0.75
    assert found["selection"] == [[100, 100], [0, 0], [0, 200]]
    assert found["probes"]["expert"]["accuracy"] == 1
    assert found["probes"]["random_partition"]["accuracy"] < 0.65


def _set(mean: float = 0.0) -> ImageSet:
    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = random.integers(0, 80, (120, 1, 8, 8), dtype=np.uint8)
    images[labels == 1, :, :4] += 150
    images[labels == 2, :, :, :4] += 150
    split = ImageSplit(images, labels)
    return ImageSet("three", ("a", "b", "c"), split, split, (mean,), (1.0,))


def test_every_image_by_every_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VAEModel(VAEConfig(num_experts=4, latent_size=5, image_size=8, encoder="lite")).train()
    with torch.no_grad():
        model.gate.layers[-1].weight *= 30
    data = _set()
    latents = examine(model, data, seed=2, batch=50)
    assert model.training
    model.eval()
    for number, first in enumerate(range(0, 120, 50)):
        image = torch.from_numpy(data.test.images[first : first + 50]).float() / 255
        context = RoutingContext(seed=2, microbatch=number)
        values = model(image, None, context)
        part = slice(first, first + 50)
        assert values.figures["recon"].item() == pytest.approx(latents.error_N[part].mean(), rel=1e-5)
        assert values.figures["kl"].item() == pytest.approx(latents.kl_N[part].mean(), rel=1e-5)
        assert values.gate.argmax(1).tolist() == latents.expert_N[part].tolist()
        z = torch.from_numpy(latents.z_NZ[part])
        mixed = (values.gate[:, :, None, None, None] * model.decoders(z)).sum(1)
        want = (mixed - image).square().sum((1, 2, 3)).detach().numpy()
        np.testing.assert_allclose(latents.soft_error_N[part], want, rtol=1e-4)


def test_the_report_and_its_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VAEModel(VAEConfig(num_experts=3, latent_size=5, image_size=8, encoder="lite"))
    with torch.no_grad():
        model.gate.layers[-1].weight *= 30
    report = vae_report(model, _set(), tmp_path / "report")
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"vae_report.json", "tsne.png", "reconstructions.png", "selection.png"}
    loaded = json.loads((tmp_path / "report" / "vae_report.json").read_text())
    assert loaded["images"] == 120
    assert loaded["error"]["recon"] == report["error"]["recon"]
    assert sum(map(sum, loaded["selection"])) == 120
    assert (tmp_path / "report" / "tsne.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        vae_report(model, _set(0.5), tmp_path)

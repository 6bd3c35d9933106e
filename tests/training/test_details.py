"""A report on a finished vision run: its figures against plain computations, its files, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2moe.config import ConfigError, load, to_dict, to_yaml
from s2moe.config.vision import VisionRunConfig
from s2moe.data import CorpusError
from s2moe.data.images import ImageSet, batch_in_order
from s2moe.data.images.corruption import corrupt_images
from s2moe.models.vision import VisionModel
from s2moe.models.vision.vit_cost import image_flops
from s2moe.moe.routing import RoutingContext
from s2moe.training.details import is_reported, report_on
from s2moe.training.export import write_model
from s2moe.training.image_evaluation import evaluate_images
from s2moe.training.processes import Processes
from s2moe.training.vision import build_model, weight_similarity, write_evaluation
from s2moe.training.vision_initial import load_vision_model

DIGITS = {"data.name": "digits", "data.max_test": 120, "evaluation.batch": 50, "seed": 3}
STROKES = {"data.name": "synthetic_strokes", "data.options": "{train: 4, test: 20}", "evaluation.batch": 30, "seed": 3}
KINDS: dict[str, dict[str, Any]] = {
    "mixture": {**DIGITS, "model.kind": "mixture", "model.architecture": "digits", "model.num_experts": 3},
    "stochastic": {
        **DIGITS,
        "model.kind": "mixture",
        "model.architecture": "digits",
        "model.num_experts": 3,
        "model.form": "stochastic",
    },
    "single": {**DIGITS, "model.kind": "mixture", "model.architecture": "digits", "model.num_experts": 1},
    "snnl_moe": {**DIGITS, "model.kind": "snnl_moe", "model.extractor": "digits", "model.hidden": 16},
    "vmoe": {**DIGITS, "model.kind": "vmoe", "model.size": "digits/2", "model.moe": "{num_experts: 4}"},
    "smoe": {**DIGITS, "model.kind": "vmoe", "model.size": "digits/2", "model.moe": "{method: smoe, num_experts: 4}"},
    "vae": {**STROKES, "model.kind": "vae", "model.num_experts": 3, "model.encoder": "lite"},
    "vae_single": {**STROKES, "model.kind": "vae", "model.num_experts": 1, "model.encoder": "lite"},
}
SETTINGS = {"name": "run", "training.steps": 1}


def finished(output: Path, settings: dict[str, Any]) -> Path:
    """The directory of a run as training leaves it, of a model with its initial weights."""
    overrides = {**SETTINGS, "output_dir": output, **settings}
    config = load(VisionRunConfig, None, [f"{key}={value}" for key, value in overrides.items()])
    images = config.open_images()
    model_config = config.model_config(images)
    torch.manual_seed(1)
    model = build_model(config, model_config, parallel=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head"):  # which begins at zero
                torch.nn.init.normal_(parameter)
    config.directory.mkdir(parents=True)
    (config.directory / "config.yaml").write_text(to_yaml(to_dict(config)), encoding="utf-8")
    score = evaluate_images(model, images, config.evaluation.batch, Processes(0, 0, 1, torch.device("cpu")), 3)
    write_evaluation(config.directory, 1, score, images, weight_similarity(model))
    with torch.device("meta"):
        empty = build_model(config, model_config, parallel=False)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    write_model(empty, state, config.directory / "hf", {"run": "run", "step": 1})
    return config.directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: finished(tmp_path_factory.mktemp(name), settings) for name, settings in KINDS.items()}


@pytest.fixture(scope="module")
def reports(runs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: json.loads((report_on(run) / "report.json").read_text()) for name, run in runs.items()}


def files_of(run: Path) -> set[str]:
    return {path.name for path in (run / "report").iterdir()}


def opened(run: Path) -> tuple[VisionModel, ImageSet]:
    return load_vision_model(run), load(VisionRunConfig, run / "config.yaml").open_images()


def test_every_kind_has_its_files(runs: dict[str, Path], reports: dict[str, Any]) -> None:
    always, experts = {"report.json", "report.md"}, {"corruption.png", "similarity.png", "selection.png"}
    vae = {"vae_report.json", "tsne.png", "reconstructions.png", "selection.png"}
    curve = {"corruption.png", "vmoe_curve.csv", "vmoe_curve.png"}
    more = {"single": {"corruption.png"}, "smoe": {"corruption.png"}, "vmoe": curve, "vae": vae, "vae_single": vae}
    for name, run in runs.items():
        assert files_of(run) == always | more.get(name, experts), name
        text = (run / "report" / "report.md").read_text()
        for picture in (file for file in files_of(run) if file.endswith(".png")):
            assert f"]({picture})" in text, (name, picture)
        assert is_reported(run)


def test_clean_figures_are_those_of_the_evaluation(runs: dict[str, Path], reports: dict[str, Any]) -> None:
    for name, run in runs.items():
        there = json.loads((run / "evaluation.json").read_text())["figures"]
        for figure, value in reports[name]["clean"].items():
            assert value == pytest.approx(there[figure], rel=1e-6), (name, figure)
    for name in ("vae", "vae_single"):
        found = reports[name]
        assert found["vae"]["error"]["recon"] == pytest.approx(found["clean"]["recon"], rel=1e-5)
        assert found["vae"]["experts"]["active"] == found["clean"]["active_experts"]


@pytest.mark.parametrize("name", ["mixture", "stochastic", "snnl_moe", "vmoe"])
def test_accuracy_of_corrupted_images(runs: dict[str, Path], reports: dict[str, Any], name: str) -> None:
    rows = reports[name]["corruption"]
    kinds = ["noise", "blur", "contrast", "occlusion"]
    assert [(r["kind"], r["severity"]) for r in rows] == [(k, s) for k in kinds for s in (1, 2, 3, 4, 5)]
    model, images = opened(runs[name])
    pixels, label_N = batch_in_order(images, 0, 120)
    for row in (rows[4], rows[17]):  # noise 5, occlusion 3
        raw = corrupt_images(images.test.images, row["kind"], row["severity"], 0).astype(np.float64) / 255
        value = torch.from_numpy((raw - images.mean[0]) / images.std[0]).float()
        assert not value.allclose(pixels)
        right = 0
        for block, first in enumerate((0, 50, 100)):
            label_B = label_N[first : first + 50]
            output = model(value[first : first + 50], label_B, RoutingContext(seed=3, microbatch=block))
            right += (output.logits.argmax(-1) == label_B).sum().item()
        assert row["accuracy"] == pytest.approx(right / 120)


@pytest.mark.parametrize("name", ["mixture", "snnl_moe"])
def test_experts_against_plain_computations(runs: dict[str, Path], reports: dict[str, Any], name: str) -> None:
    model, images = opened(runs[name])
    pixels, label_N = batch_in_order(images, 0, 120)
    with torch.no_grad():
        out_MNC = model.expert_logits(pixels).double().numpy()
        gate_NM = model(pixels, label_N).gate.double().numpy()
    found = reports[name]["experts"]
    centred_MNC = out_MNC - out_MNC.mean(1, keepdims=True)
    norm_M = np.sqrt((centred_MNC**2).sum((1, 2)))
    cosine = np.einsum("inc,jnc->ij", centred_MNC, centred_MNC) / np.outer(norm_M, norm_M)
    np.testing.assert_allclose(found["similarity"]["outputs_cosine"]["matrix"], cosine, atol=1e-5)
    first, second = centred_MNC[0], centred_MNC[1]
    cka = (first.T @ second).__pow__(2).sum() / np.sqrt(
        ((first.T @ first) ** 2).sum() * ((second.T @ second) ** 2).sum()
    )
    assert found["similarity"]["outputs_cka"]["matrix"][0][1] == pytest.approx(cka, abs=1e-5)
    weight_MX = model.expert_weights().double().numpy()
    one, two = weight_MX[0], weight_MX[1]
    want = one @ two / math.sqrt((one @ one) * (two @ two))
    assert found["similarity"]["weights_cosine"]["matrix"][0][1] == pytest.approx(want, abs=1e-5)
    entropy = -(gate_NM * np.log(gate_NM)).sum(1).mean()
    assert found["ese_routing"] == pytest.approx(entropy, rel=1e-4)
    assert found["ese_normalised"] == pytest.approx(entropy / math.log(gate_NM.shape[1]), rel=1e-4)
    counts = np.zeros((gate_NM.shape[1], 10), dtype=int)
    np.add.at(counts, (gate_NM.argmax(1), label_N.numpy()), 1)
    assert found["selection"] == counts.tolist()
    share = counts / counts.sum()
    given = [row / row.sum() for row in counts if row.sum()]
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in given]
    usage = [row.sum() for row in share if row.sum()]
    assert found["ese_class"] == pytest.approx(np.dot(usage, entropies), rel=1e-6)


def test_the_curve_goes_over_capacities_experts_and_priorities(runs: dict[str, Path], reports: dict[str, Any]) -> None:
    rows = reports["vmoe"]["curve"]
    settings = [(r["experts_per_token"], r["priority"], r["capacity_factor"]) for r in rows]
    factors = [0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 4.0]
    assert settings == [
        setting
        for k in (1, 2, 4)
        for setting in (
            *((k, p, c) for p in (("none", "max", "sum") if k > 1 else ("none", "max")) for c in factors),
            (k, "none", None),
        )
    ]
    trained = next(row for row in rows if (row["experts_per_token"], row["capacity_factor"]) == (2, None))
    assert trained["accuracy"] == pytest.approx(1 - reports["vmoe"]["clean"]["error"])
    assert trained["dropped"] == 0
    assert trained["flops"] == pytest.approx(image_flops(load_vision_model(runs["vmoe"]).config))
    tight = rows[0]
    assert tight["capacity"] == round(0.1 * 50 * 17 / 4)  # blocks of 50 images, 17 tokens each, 4 experts
    assert tight["dropped"] > 0.8
    csv = (runs["vmoe"] / "report" / "vmoe_curve.csv").read_text().splitlines()
    assert len(csv) == len(rows) + 1


def test_some_test_images_and_other_noise(runs: dict[str, Path], tmp_path: Path) -> None:
    run = finished(tmp_path, KINDS["mixture"])
    found = [
        json.loads((report_on(run, corrupt_seed=seed, samples=60) / "report.json").read_text()) for seed in (0, 0, 5)
    ]
    assert found[0] == found[1]
    assert [row["images"] for row in found[0]["corruption"]] == [60] * 20
    assert len(set(map(tuple, found[0]["experts"]["selection"]))) > 1
    losses = [[row["loss"] for row in report["corruption"]] for report in found]
    changed = [kind for kind, rows in (("noise", slice(0, 5)), ("blur", slice(5, 10)), ("occlusion", slice(15, 20)))
               if losses[0][rows] != losses[2][rows]]  # fmt: skip
    assert changed == ["noise", "occlusion"]
    assert not is_reported(run)  # not on all of its images
    report_on(run)
    assert is_reported(run)
    evaluation = run / "evaluation.json"
    evaluation.write_text(evaluation.read_text() + "\n")  # the run was made anew
    assert not is_reported(run)


def test_images_that_were_not_evaluated_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = finished(tmp_path, KINDS["mixture"])
    config, evaluation = run / "config.yaml", run / "evaluation.json"
    settings = config.read_text()
    config.write_text(settings.replace("max_test: 120", "max_test: 100"))
    with pytest.raises(ConfigError, match="evaluated on 120 images"):
        report_on(run)
    config.write_text(settings)
    found = json.loads(evaluation.read_text())
    found["figures"]["error"] -= 0.02
    evaluation.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="not the images, or not the weights"):
        report_on(run)
    assert not is_reported(run)
    config.write_text(settings.replace("name: digits", "name: mnist"))
    with pytest.raises((ConfigError, CorpusError), match="/nowhere"):
        report_on(run, source="/nowhere")


@pytest.mark.parametrize("missing", ["config.yaml", "evaluation.json", "hf/training.json"])
def test_what_is_no_finished_run_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "hf").mkdir()
    for name in ("config.yaml", "evaluation.json", "hf/training.json"):
        if name != missing:
            (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"is no finished vision run: it has no {missing}"):
        report_on(tmp_path)
    with pytest.raises(ConfigError, match="--samples: must be at least 1, got 0"):
        report_on(tmp_path, samples=0)
    with pytest.raises(ConfigError, match="--corrupt-seed: must be at least 0, got -1"):
        report_on(tmp_path, corrupt_seed=-1)

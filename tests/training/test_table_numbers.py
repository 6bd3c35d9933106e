"""The numbers of the published tables, typed a second time: settings, figures, class splits.

From Krishnamurthy, Watkins & Gaertner 2023 (tables 1, 2, 3 and 7, and their result files) and Nikolic, Oguz & Psaltis
2025. What a row's runs come to is planned as for training, so that a wrong setting anywhere above it is found.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from s2moe.config import ConfigError, load
from s2moe.config.vision import VisionRunConfig
from s2moe.models.vision.mixture_splits import FMNIST_MNIST_SPLITS, MNIST_SPLITS
from s2moe.objectives.sample_similarity import sample_distance, sample_similarity_loss
from s2moe.training.tables.spec import FOLDER, Stage, Table, plan_runs, read_table

CONFIGS = FOLDER.parent
STUDENT = {"gate": "original", "frozen": "experts"}  # of a distilled row, and no loss for the gate

# epochs, batch, runs; L_s as published there
SETTINGS = {
    "mnist": ("mnist", "mnist", 20, 512, 10, "none"),
    "fmnist": ("fashion_mnist", "fmnist", 20, 512, 10, "none"),
    "cifar100": ("cifar100", "cifar100", 40, 256, 5, "batch_max"),
}

# Of each row: gate, L_importance, beta_s, beta_d, of the first stage; whether a distillation follows.
HYPERPARAMETERS: dict[str, dict[str, tuple[str, float, float, float, bool]]] = {
    "mnist": {
        "single": ("original", 0, 0, 0, False),
        "vanilla": ("original", 0, 0, 0, False),
        "importance": ("original", 0.2, 0, 0, False),
        "similarity": ("original", 0, 1e-6, 1e-6, False),
        "attentive": ("attentive", 0, 0, 0, False),
        "attentive_importance": ("attentive", 0.2, 0, 0, False),
        "attentive_similarity": ("attentive", 0, 1e-6, 1e-2, False),
        "distilled_importance": ("attentive", 0.4, 0, 0, True),
        "distilled_similarity": ("attentive", 0, 1e-6, 1e-3, True),
        "experts15_importance": ("original", 1.0, 0, 0, False),
        "experts15_similarity": ("original", 0, 1e-5, 1e-4, False),
    },
    "fmnist": {
        "single": ("original", 0, 0, 0, False),
        "vanilla": ("original", 0, 0, 0, False),
        "importance": ("original", 0.2, 0, 0, False),
        "similarity": ("original", 0, 1e-7, 1e-2, False),
        "attentive": ("attentive", 0, 0, 0, False),
        "attentive_importance": ("attentive", 0.8, 0, 0, False),
        "attentive_similarity": ("attentive", 0, 1e-6, 1e-6, False),
        "distilled_importance": ("attentive", 1.0, 0, 0, True),
        "distilled_similarity": ("attentive", 0, 1e-6, 1e-6, True),
        "attentive_importance_02": ("attentive", 0.2, 0, 0, False),
    },
    "cifar100": {
        "single": ("original", 0, 0, 0, False),
        "vanilla": ("original", 0, 0, 0, False),
        "importance": ("original", 0.2, 0, 0, False),
        "similarity": ("original", 0, 1e-5, 1e-6, False),
        "attentive": ("attentive", 0, 0, 0, False),
        "attentive_importance": ("attentive", 0.2, 0, 0, False),
        "attentive_similarity": ("attentive", 0, 1e-4, 1e-6, False),
        "distilled_importance": ("attentive", 0.2, 0, 0, True),
        "distilled_similarity": ("attentive", 0, 1e-3, 1e-3, True),
    },
}

# error, its deviation, I(E; Y), H_s, H_u
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "mnist": {
        "single": (0.096, 0.071),
        "vanilla": (0.038, 0.009, 2.022, 0.092, 2.172),
        "importance": (0.032, 0.008, 2.262, 0.061, 2.320),
        "similarity": (0.029, 0.009, 2.244, 0.051, 2.246),
        "attentive": (0.033, 0.006, 1.797, 0.071, 2.055),
        "attentive_importance": (0.035, 0.005, 2.260, 0.055, 2.266),
        "attentive_similarity": (0.032, 0.006, 2.275, 0.039, 2.321),
        "distilled_importance": (0.030, 0.007, 2.301, 0.036, 2.320),
        "distilled_similarity": (0.028, 0.007, 2.191, 0.056, 2.319),
    },
    "fmnist": {
        "single": (0.132, 0.011),
        "vanilla": (0.104, 0.006, 2.034, 0.081, 2.048),
        "importance": (0.103, 0.006, 2.301, 0.172, 2.321),
        "similarity": (0.095, 0.007, 2.198, 0.110, 2.225),
        "attentive": (0.098, 0.013, 2.071, 0.114, 2.249),
        "attentive_importance": (0.098, 0.006, 2.233, 0.101, 2.319),
        "attentive_similarity": (0.096, 0.008, 2.296, 0.109, 2.321),
        "distilled_importance": (0.087, 0.007, 2.227, 0.101, 2.318),
        "distilled_similarity": (0.089, 0.008, 2.304, 0.076, 2.321),
    },
    "cifar100": {
        "single": (0.575, 0.006),
        "vanilla": (0.460, 0.010, 0.967, 0.306, 1.023),
        "importance": (0.483, 0.007, 4.177, 1.135, 3.981),
        "similarity": (0.457, 0.012, 1.424, 0.381, 1.279),
        "attentive": (0.450, 0.006, 1.792, 0.463, 2.178),
        "attentive_importance": (0.447, 0.005, 3.684, 1.036, 4.141),
        "attentive_similarity": (0.451, 0.016, 3.117, 0.770, 3.357),
        "distilled_importance": (0.531, 0.131, 3.179, 1.750, 3.843),
        "distilled_similarity": (0.482, 0.065, 1.605, 0.718, 2.541),
    },
}

# All runs of the configuration: mean and deviation (None: not known) of error, I(E; Y), H_s, H_u
Pair = tuple[float, float | None]
CORRECTED: dict[str, dict[str, tuple[Pair | None, ...]]] = {
    "mnist": {
        "single": ((0.134, 0.071),),
        "vanilla": ((0.0443, 0.0085), (1.606, 0.395), (0.136, 0.100), (1.838, 0.241)),
        "importance": ((0.0384, 0.0061), (1.970, 0.225), (0.142, 0.096), (2.270, 0.053)),
        "similarity": ((0.0374, 0.0078),),
        "attentive": ((0.0425, 0.0061), (1.828, 0.221), (0.065, 0.023), (1.953, 0.182)),
        "attentive_importance": ((0.0372, 0.0034), (2.182, 0.056), (0.061, 0.019), (2.235, 0.041)),
        "attentive_similarity": ((0.0380, 0.0051),),
        "distilled_importance": ((0.0381, 0.0082),),
        "distilled_similarity": ((0.0345, 0.0061),),
        "experts15_importance": ((0.061, None), (2.58, None), (1.04, None), (3.89, None)),
        "experts15_similarity": ((0.064, None), (2.34, None), (0.20, None), (2.66, None)),
    },
    "fmnist": {
        "single": ((0.149, 0.011),),
        "vanilla": ((0.1104, 0.0059), (2.061, 0.133), (0.091, 0.027), (2.130, 0.083)),
        "importance": ((0.1041, 0.0049), (2.091, 0.179), (0.179, 0.064), (2.302, 0.029)),
        "similarity": ((0.1067, 0.0071),),
        "attentive": ((0.1140, 0.0131), (1.841, 0.140), (0.085, 0.040), (2.006, 0.102)),
        "attentive_importance": ((0.1057, 0.0049),),
        "attentive_similarity": ((0.1048, 0.0055),),
        "distilled_importance": ((0.1058, 0.0082),),
        "distilled_similarity": ((0.1024, 0.0062),),
        "attentive_importance_02": (None, (2.175, 0.064), (0.106, 0.017), (2.297, 0.026)),
    },
    "cifar100": {
        "vanilla": ((0.469, None),),
        "attentive": ((0.459, None),),
        "attentive_importance": ((0.446, None),),
    },
}
FIGURES = ("error", "mi_pred", "h_s", "h_u")


def planned(name: str, directory: Path, runs: int | None = None) -> dict[str, list[list[Stage]]]:
    """The runs of each row, as stages."""
    table = read_table(name)
    chains: dict[str, list[list[Stage]]] = {row.name: [] for row in table.rows}
    for chain in plan_runs(table, directory, table.runs if runs is None else runs):
        chains[chain[0].row].append(chain)
    return chains


def optimisation(config: VisionRunConfig) -> tuple[Any, ...]:
    optimizer = config.optimizer
    moments = (optimizer.name, optimizer.lr, optimizer.betas, optimizer.eps)
    return *moments, optimizer.weight_decay, optimizer.clip, config.training.steps, config.training.precision


SHAPES = {  # channels, size and classes
    "mnist": (1, 28, 10),
    "mnist_10k": (1, 28, 10),
    "fashion_mnist": (1, 28, 10),
    "fmnist_mnist": (1, 28, 12),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
    "quickdraw_strokes": (1, 28, 5),
}


def model_of(config: VisionRunConfig) -> dict[str, Any]:
    """Every field of the model's configuration, and its kind."""
    channels, size, classes = SHAPES[config.data.name]
    images: Any = SimpleNamespace(channels=channels, image_size=size, classes=range(classes))
    return {**vars(config.model_config(images)), "kind": config.model["kind"]}


ADAM = ("adam", 1e-3, (0.9, 0.999), 1e-8, 0.0, 0.0, None, "fp32")  # no weight decay, no clipping


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_settings_of_the_mixtures(name: str, tmp_path: Path) -> None:
    data, architecture, epochs, batch, runs, scale = SETTINGS[name]
    assert read_table(name).runs == runs
    chains = planned(name, tmp_path)
    assert list(chains) == list(HYPERPARAMETERS[name])
    for row, (gate, importance, same, different, distilled) in HYPERPARAMETERS[name].items():
        assert [chain[0].seed for chain in chains[row]] == list(range(1, runs + 1))
        for chain in chains[row]:
            assert len(chain) == 1 + distilled
            for stage in chain:
                config = stage.config
                assert (config.data.name, config.model["kind"]) == (data, "mixture"), row
                assert (config.data.fraction, config.data.max_train, config.data.max_test) == (1, None, None)
                assert (config.data.augmentation, config.data.normalise) == (None, True)
                assert (config.training.epochs, config.training.global_batch) == (epochs, batch), row
                assert config.training.micro_batch is None  # L_s is of a whole batch
                assert optimisation(config) == ADAM, row
                schedule = config.schedule
                if name == "cifar100":
                    assert (schedule.kind, schedule.step_epochs, schedule.step_factor) == ("step", 20, 1 / 3), row
                else:
                    assert schedule.kind == "constant", row
                assert schedule.warmup_steps == 0
                model = model_of(config)
                assert (model["architecture"], model["form"]) == (architecture, "mixture"), row
                assert (model["similarity_reduction"], model["similarity_scale"]) == ("repo_sum", scale), row
                assert (model["similarity_distance"], model["batch_statistics"]) == ("euclidean", False), row
                assert (model["inference"], model["gate_kd"], model["preset_split"]) == ("dense", 0, None), row
            first = model_of(chain[0].config)
            assert (first["gate"], first["frozen"]) == (gate, "none"), row
            assert (first["importance_loss"], first["sample_similarity"]) == (importance, same), row
            assert first["sample_dissimilarity"] == different, row
            experts = 1 if row == "single" else 15 if row.startswith("experts15") else 20 if name == "cifar100" else 5
            assert first["num_experts"] == experts, row
            assert chain[0].config.init.stage == "all"
            if distilled:
                student = model_of(chain[1].config)
                assert {key: student[key] for key in STUDENT} == STUDENT, row
                assert chain[1].config.init.stage == "distil"
                losses = ("importance_loss", "sample_similarity", "sample_dissimilarity")
                assert [student[loss] for loss in losses] == [0, 0, 0], row


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_figures_of_the_mixtures(name: str) -> None:
    for row in read_table(name).rows:
        error, *others = PUBLISHED[name].get(row.name, (None,))
        printed: dict[str, Pair] = {}
        if error is not None:
            printed["error"] = (error, others[0])
            printed |= {figure: (value, None) for figure, value in zip(FIGURES[1:], others[1:], strict=False)}
        assert row.published == printed, row.name
        corrected = zip(FIGURES, CORRECTED[name].get(row.name, ()), strict=False)
        assert row.corrected == {figure: pair for figure, pair in corrected if pair is not None}, row.name


def test_gates_with_and_without_trained_experts(tmp_path: Path) -> None:
    table, chains = read_table("fmnist_mnist"), planned("fmnist_mnist", tmp_path)
    rows = {"end_to_end": None, "a": "end_to_end", "experts_and_gate": None, "b": "experts_and_gate"}
    assert set(chains) == {f"{data}_{row}" for data in ("mnist", "combined") for row in rows}
    runs = {row: len(found) for row, found in chains.items()}
    assert [runs[f"mnist_{row}"] for row in rows] == [5, 5, 5, 5]
    assert [runs[f"combined_{row}"] for row in rows] == [10, 10, 3, 3]  # three preset splits, each once
    for data, architecture in (("mnist_10k", "mnist"), ("fmnist_mnist", "fmnist_mnist")):
        prefix = "mnist" if architecture == "mnist" else "combined"
        for row, after in rows.items():
            assert table.row(f"{prefix}_{row}").after == (after and f"{prefix}_{after}")
            for chain in chains[f"{prefix}_{row}"]:
                for stage in chain:
                    config, model = stage.config, model_of(stage.config)
                    assert (config.data.name, model["architecture"]) == (data, architecture)
                    assert (config.data.augmentation, config.data.max_train) == (None, None)
                    assert (config.training.epochs, config.training.global_batch) == (20, 64)
                    assert optimisation(config) == ADAM
                    assert config.schedule.kind == "constant"
                    assert (model["gate"], model["num_experts"]) == ("original", 5 if prefix == "mnist" else 6)
                    assert model["importance_loss"] == model["sample_similarity"] == 0
                stages = [(model_of(stage.config)["frozen"], stage.config.init.stage) for stage in chain]
                assert (
                    stages
                    == {
                        "end_to_end": [("none", "all")],
                        "a": [("gate", "experts_of_gate")],
                        "experts_and_gate": [("none", "all"), ("experts", "gate_of_experts")],
                        "b": [("gate", "experts_of_gate")],
                    }[row]
                )
    figures = {row.name: (row.published, row.corrected) for row in table.rows if row.published or row.corrected}

    def both(error: float, loss: float) -> dict[str, Pair]:
        return {"error": (error, None), "train_task_loss": (loss, None)}

    assert figures == {
        "mnist_a": (both(0.12, 0.19), both(0.09, 0.13)),
        "mnist_b": (both(0.08, 0.05), both(0.08, 0.04)),
        "combined_a": (both(0.15, 0.28), {}),
        "combined_b": (both(0.10, 0.13), {}),
    }


# Classes of each expert, as section 4.2 has them; digits 4 to 9 of MNIST are classes 6 to 11 of the combined set.
SPLITS = {
    "mnist": ("07 19 24 38 56", "46 17 29 38 05", "47 06 38 12 59", "58 69 13 02 47", "28 36 05 47 19"),
    "combined": ("01 23 45 67 89 AB", "03 14 25 69 7B 8A", "05 12 34 68 7A 9B"),
}


def test_preset_splits_are_the_published_ones(tmp_path: Path) -> None:
    chains = planned("fmnist_mnist", tmp_path)
    for prefix, constant in (("mnist", MNIST_SPLITS), ("combined", FMNIST_MNIST_SPLITS)):
        typed = tuple(
            ",".join("-".join(str(int(name, 12)) for name in pair) for pair in split.split())
            for split in SPLITS[prefix]
        )
        assert constant == typed
        trained = [model_of(chain[0].config)["preset_split"] for chain in chains[f"{prefix}_experts_and_gate"]]
        assert tuple(trained) == typed
        assert {model_of(chain[1].config)["preset_split"] for chain in chains[f"{prefix}_experts_and_gate"]} == {None}


SHARES = (0.05, 0.1, 0.2, 0.4)
# The lowest mean of each part of train.
NOTED = "5 %: 22.085 (3 active)|10 %: 19.278 (6)|20 %: 17.496 (8)|40 %: 16.545 (8)"
BY_ACTIVE = (  # experts: mean, deviation, runs
    "1: 17.719 .145 8|2: 17.013 .200 12|3: 16.601 .149 8|4: 16.266 .100 13|5: 15.957 .109 7|6: 15.911 .228 2|"
    "7: 15.689 .059 2|8: 16.362 1.114 3|9: 15.877 .111 3|10: 16.017 .492 3|12: 15.771 .095 2|17: 15.801 .404 2"
)


def test_autoencoders(tmp_path: Path) -> None:
    table, chains = read_table("vae"), planned("vae", tmp_path)
    experts: dict[str, tuple[int, str, float]] = {"one": (1, "quickdraw_strokes", 1)}
    experts |= {f"experts_{n}": (n, "quickdraw_strokes", 1) for n in (*range(2, 11), *range(15, 55, 5))}
    experts |= {
        f"experts_{n}_of_{round(100 * share)}_percent": (n, "quickdraw_strokes", share)
        for n, share in itertools.product((5, 10), SHARES)
    }
    controls = ("experts_5_straight_through", "supervised", "supervised_soft", "supervised_10", "supervised_1")
    experts |= dict.fromkeys(controls, (5, "quickdraw_strokes", 1))
    experts |= {f"mnist_{n}": (n, "mnist", 1) for n in (1, 5, 15)}
    experts |= {f"fmnist_{n}": (n, "fashion_mnist", 1) for n in (1, 12)}
    assert set(chains) == set(experts)
    gathered = table.gathered
    assert gathered is not None
    assert set(gathered.rows) == {
        row for row, (*_, share) in experts.items() if share == 1 and row.startswith(("one", "experts"))
    } - {"experts_5_straight_through"}
    assert (gathered.by, gathered.figure) == ("active_experts", "recon")
    assert gathered.published == {
        int(active): (float(mean), float(sd), int(n))
        for active, mean, sd, n in (entry.replace(":", "").split() for entry in BY_ACTIVE.split("|"))
    }
    for row, (count, data, share) in experts.items():
        assert len(chains[row]) == (3 if row.startswith("fmnist") else 5)
        for chain in chains[row]:
            (stage,) = chain
            config, model = stage.config, model_of(stage.config)
            assert (config.data.name, config.data.fraction, config.data.normalise) == (data, share, False), row
            assert (config.training.epochs, config.training.global_batch) == (20, 128)
            assert (config.data.max_train, config.data.max_test, config.schedule.kind) == (None, None, "constant")
            assert optimisation(config) == ADAM
            assert (model["kind"], model["num_experts"]) == ("vae", count), row
            assert model["supervised"] is row.startswith("supervised"), row
            given = {"supervised_10": 10, "supervised_1": 1}
            assert model["label_loss"] == given.get(row, 200), row
            decoding = {"experts_5_straight_through": "straight_through", "supervised_soft": "soft"}
            usual = "hard" if row.startswith("supervised") else "soft"
            assert model["decoding"] == decoding.get(row, usual), row
    assert {row.name: row.published for row in table.rows if row.published} == {
        "one": {"recon": (17.719, 0.145)},
        "supervised": {"recon": (16.561, 0.098)},
        "mnist_1": {"recon": (73.68, 1.01)},
        "mnist_5": {"recon": (72.28, 0.43)},
        "mnist_15": {"recon": (73.44, 0.69)},
        "fmnist_1": {"recon": (223.04, 0.42)},
        "fmnist_12": {"recon": (221.97, 0.41)},
    }
    assert not any(row.corrected for row in table.rows)
    note = " ".join(table.note.split())
    for text in NOTED.split("|"):
        assert text in note, text


def test_conditioned_features(tmp_path: Path) -> None:
    seeds = [42, 1234, 73, 1024, 86400, 31415, 2718, 30, 22, 17]
    sets = {
        "mnist": ("mnist", "mnist", 5, 20),
        "fmnist": ("fashion_mnist", "mnist", 5, 20),
        "cifar10": ("cifar10", "cifar", 5, 50),
        "cifar100": ("cifar100", "cifar", 5, 100),
        "cifar100_m10": ("cifar100", "cifar", 10, 100),
    }
    kinds = {"pixels": ("none", 0), "baseline": ("", 0), "snnl_1": ("", 1), "snnl_10": ("", 10), "snnl_100": ("", 100)}
    chains = planned("snnl", tmp_path)
    assert set(chains) == {f"{prefix}_{kind}" for prefix, kind in itertools.product(sets, kinds)}
    for (prefix, (data, extractor, experts, epochs)), (kind, (other, alpha)) in itertools.product(
        sets.items(), kinds.items()
    ):
        found = chains[f"{prefix}_{kind}"]
        assert [chain[0].seed for chain in found] == [chain[0].config.seed for chain in found] == seeds
        for (stage,) in found:
            config, model = stage.config, model_of(stage.config)
            assert (config.data.name, config.training.epochs, config.training.global_batch) == (data, epochs, 256)
            assert config.data.augmentation == "none"
            assert optimisation(config) == ADAM
            assert (model["kind"], model["num_experts"]) == ("snnl_moe", experts)
            assert (model["extractor"], model["snnl_loss"]) == (other or extractor, alpha)
            assert (model["temperature"], model["snnl_reduce"], model["mix"]) == ("annealed", "mean", "logits")


def test_sparse_methods_are_compared_at_the_k_that_their_labels_say(tmp_path: Path) -> None:
    table = read_table("vmoe")
    experts = {}
    for chain in plan_runs(table, tmp_path, 1):
        (stage,) = chain
        moe = model_of(stage.config)["moe"]
        if stage.row != "dense":
            experts[stage.row] = moe["experts_per_token"]
            assert table.row(stage.row).label.endswith(f"k {experts[stage.row]}"), stage.row
            assert moe["num_experts"] == 8
        router = moe["router"]
        if stage.row in ("smoe", "smoe_k_1", "momentum", "s2moe", "s2moe_k2"):
            assert (router["combine"], router["renormalise"]) == ("softmax_then_topk", False)
    assert (experts["s2moe"], experts["s2moe_k2"], experts["smoe"], experts["smoe_k_1"]) == (1, 2, 2, 1)
    for order in table.orders:
        if {order.lower, order.higher} <= set(experts) and experts[order.lower] != experts[order.higher]:
            assert "k differs" in order.claim or order.claim == "a second expert helps"


def test_the_mean_form_of_sample_similarity_has_the_published_gradient() -> None:
    """configs/vision/mnist_similarity.yaml: batches of 512, 5 experts, raw distances, 1e-6 and 1e-2."""
    config = load(VisionRunConfig, str(CONFIGS / "mnist_similarity.yaml"), [])
    model = model_of(config)
    assert (config.training.global_batch, config.training.micro_batch) == (512, None)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(512, 784, generator=generator, dtype=torch.float64) * 3
    gradients = []
    for same, different, reduction, scale in (
        (1e-6, 1e-2, "repo_sum", "none"),
        (
            model["sample_similarity"],
            model["sample_dissimilarity"],
            model["similarity_reduction"],
            model["similarity_scale"],
        ),
    ):
        logits = torch.randn(
            512, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
        )
        distance = sample_distance(pixels, model["similarity_distance"], scale)
        loss = sample_similarity_loss(logits.softmax(-1), distance, same, different, reduction)
        gradients.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)


SMALL: dict[str, Any] = {
    "title": "small", "runs": 3, "figures": {"error": "test error"},
    "base": {"data": {"name": "digits"}, "model": {"kind": "mixture", "architecture": "digits"}},
    "rows": {"first": {"runs": 2}, "second": {"runs": 2, "after": "first"}, "third": {}},
}  # fmt: skip


def small(tmp_path: Path, **changes: Any) -> Table:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes), encoding="utf-8")
    return read_table(str(path))


def test_a_row_may_have_fewer_runs_and_a_table_its_seeds(tmp_path: Path) -> None:
    stages = [
        {"by_seed": [{"model": {"gate": "original"}}, {"model": {"gate": "attentive"}}, {"training": {"epochs": 3}}]}
    ]
    table = small(tmp_path, seeds=[7, 3, 5, 9], rows={**SMALL["rows"], "third": {"stages": stages}})
    found = [(chain[0].row, chain[0].seed, chain[0].config.seed) for chain in plan_runs(table, tmp_path, 4)]
    rows = {"first": (7, 3), "second": (7, 3), "third": (7, 3, 5, 9)}
    assert sorted(found) == sorted((row, seed, seed) for row, seeds in rows.items() for seed in seeds)
    thirds = [chain[0].config for chain in plan_runs(table, tmp_path, 4) if chain[0].row == "third"]
    assert [config.model.get("gate") for config in thirds] == ["original", "attentive", None, "original"]
    assert [config.training.epochs for config in thirds] == [20, 20, 3, 20]
    assert len(plan_runs(table, tmp_path, 1)) == 3
    with pytest.raises(ConfigError, match="lists 4 seeds, which is fewer than 5"):
        plan_runs(table, tmp_path, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 2]}, "seeds: must be at least as many as its 3 runs, not 2"),
        ({"seeds": [1, 2, 1]}, "seeds: must be different whole numbers"),
        ({"seeds": [1, 2, -1]}, "seeds: must be different whole numbers"),
        ({"runs": 0}, "runs: must be a whole number from 1, got 0"),
        ({"rows": {"first": {"runs": 1.5}}}, r"rows.first.runs: must be a whole number from 1, got 1.5"),
        (
            {"rows": {"first": {"runs": 1}, "second": {"after": "first"}}},
            "rows.second.runs: must be at most the 1 of row",
        ),
    ],
)
def test_impossible_runs_and_seeds_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(tmp_path, **changes)

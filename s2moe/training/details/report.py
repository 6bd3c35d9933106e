"""What a finished vision run has become: `report.json`, `report.md` and pictures in its directory's `report/`.

    every kind that classifies   accuracy under graded corruption of the test images
    mixture, snnl_moe            how alike experts are, in their weights and in what they say; whom the gate selects
    vmoe with its own router     accuracy against compute, at other capacities, experts per token and priorities
    vae                          training/vae_report.py

Test images are evaluated in the blocks of the run's own evaluation, with what is drawn keyed by the run's seed, so that
the figures on clean images are those of its `evaluation.json`.

Legend: M experts, C classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2moe.config import ConfigError, load
from s2moe.config.vision import VisionRunConfig
from s2moe.data.images import ImageSet, batches_in_order
from s2moe.data.images.corruption import IMAGE_CORRUPTIONS, SEVERITIES, corrupted
from s2moe.metrics.specialisation import OutputProducts, ese_class, ese_of_bits, pes_activation, pes_weights
from s2moe.models.vision import VAEModel, VisionModel, VMoEForImageClassification
from s2moe.models.vision.vmoe_curve import CAPACITIES, CurveRow, draw_curve, robustness, vmoe_curve, write_curve
from s2moe.moe.config import MoEConfig
from s2moe.training.console import Console
from s2moe.training.export import HF_DIRECTORY, ORIGIN_FILE
from s2moe.training.image_evaluation import ImageScore, evaluate_images
from s2moe.training.processes import Processes
from s2moe.training.run_directory import report_directory, write_json
from s2moe.training.vae_report import vae_report
from s2moe.training.vision import EVALUATION_FILE, read_evaluation
from s2moe.training.vision_initial import load_vision_model

from . import figures, text

REPORT_DIRECTORY, REPORT_FILE, REPORT_TEXT, CURVE_FILE = "report", "report.json", "report.md", "vmoe_curve.csv"
CURVE_PICTURE = "vmoe_curve.png"
TOLERANCE = 0.01  # on clean images, between this report and the run's own evaluation on another machine
EVENT_EVERY = 5  # forward passes over the test images between two lines of a log file

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def report_on(
    run: Path,
    source: str | None = None,
    corrupt_seed: int = 0,
    samples: int | None = None,
    downloads: str | None = None,
) -> Path:
    """Examine the run in this process, write its report, and return the report's directory.

    Args:
        source: a local copy of the images; None: where the run had them.
        corrupt_seed: keys noise and places of occlusion.
        samples: test images to look at, drawn by chance; None: all.
        downloads: where downloaded images are; None: where the run had them.

    Raises:
        ConfigError, CorpusError: it is no finished vision run, or its images are not there.
    """
    for name, value, least in (("--corrupt-seed", corrupt_seed, 0), ("--samples", samples, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name}: must be at least {least}, got {value}")
    finished = Finished.open(run, {"source": source, "dir": downloads}, samples)
    directory = run / REPORT_DIRECTORY
    try:
        with report_directory(directory, REPORT_FILE, ()):
            found = finished.examine(directory, corrupt_seed)
            report = {"of": _digest(run), "settings": _settings(corrupt_seed, samples), **found}
            (directory / REPORT_TEXT).write_text(text.to_markdown(report), encoding="utf-8")
            write_json(directory / REPORT_FILE, report, indent=1)  # it says that the others are there
    except OSError as error:
        raise ConfigError(f"cannot write the report to {directory}: {error}") from error
    return directory


def is_reported(run: Path) -> bool:
    """Whether the run as it is now has a report on all of its test images."""
    try:
        report = json.loads((run / REPORT_DIRECTORY / REPORT_FILE).read_text(encoding="utf-8"))
        return bool(report["of"] == _digest(run) and report["settings"] == _settings(0, None))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _settings(corrupt_seed: int, samples: int | None) -> dict[str, int | None]:
    return {"corrupt_seed": corrupt_seed, "samples": samples}


def _digest(run: Path) -> str:
    """Of the run's results: a run that was made anew has others."""
    return hashlib.sha256((run / EVALUATION_FILE).read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Finished:
    """A finished run: its settings, figures, images and model, in evaluation mode."""

    name: str
    config: VisionRunConfig
    evaluation: dict[str, Any]
    images: ImageSet
    model: VisionModel

    @classmethod
    def open(cls, run: Path, places: dict[str, str | None], samples: int | None) -> Finished:
        """Read the run, its images from other places where `places` names them. Raises as `report_on`."""
        for name in ("config.yaml", EVALUATION_FILE, f"{HF_DIRECTORY}/{ORIGIN_FILE}"):
            if not (run / name).is_file():
                raise ConfigError(
                    f"--report: {run} is no finished vision run: it has no {name}. Give a run's directory, "
                    "output_dir/name; the command that began a run also finishes it"
                )
        config = load(VisionRunConfig, run / "config.yaml", written=True)
        changes: dict[str, Any] = {name: place for name, place in places.items() if place is not None}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
        images, evaluation = config.open_images(), read_evaluation(run)
        if (images.name, len(images.test)) != (evaluation["set"], evaluation["images"]):
            raise ConfigError(
                f"--report: {run} was evaluated on {evaluation['images']:,} images of {evaluation['set']}; here are "
                f"{len(images.test):,} of {images.name}: give the images of the run with --source"
            )
        model = load_vision_model(run)
        if torch.cuda.is_available():
            model = model.to("cuda")
        return cls(run.name, config, evaluation, images if samples is None else drawn(images, samples), model)

    def examine(self, directory: Path, corrupt_seed: int) -> dict[str, Any]:
        """All that the kind of model has, with its pictures and tables in `directory`."""
        classifies = "error" in self.evaluation["figures"]
        has_experts = hasattr(self.model, "expert_logits") and self.model.config.num_experts > 1
        curves = curve_settings(self.model)
        corruptions = len(IMAGE_CORRUPTIONS) * len(SEVERITIES) * classifies
        passes = Passes(1 + corruptions + has_experts + sum(len(setting[1]) * len(setting[2]) for setting in curves))
        try:
            score = self._clean(passes)
            report: dict[str, Any] = {
                "run": self.name,
                "kind": self.config.model["kind"],
                "step": self.evaluation["step"],
                "set": self.images.name,
                "images": len(self.images.test),
                "block": self.config.evaluation.batch,
                "classes": list(self.images.classes),
                "clean": score.figures,
            }
            if classifies:
                report["corruption"] = self._corruption(corrupt_seed, passes)
                figures.corruption(report, directory)
            if has_experts:
                report["experts"] = self._experts(score, passes)
                figures.experts(report, directory)
            if curves:
                rows = self._curve(curves, passes)
                report["curve"] = [dataclasses.asdict(row) for row in rows]
                write_curve(rows, directory / CURVE_FILE)
                draw_curve(rows, directory / CURVE_PICTURE)
            if isinstance(self.model, VAEModel):
                passes.say("examining the latent space")
                report["vae"] = vae_report(self.model, self.images, directory, self.config.seed, report["block"])
        finally:
            passes.close()
        return report

    def _batches(self, images: ImageSet) -> Batches:
        return list(batches_in_order(images, self.config.evaluation.batch))

    def _clean(self, passes: Passes) -> ImageScore:
        device, block = self.model.device, self.config.evaluation.batch
        batch = self.config.training.global_batch
        epoch = (self.evaluation["step"] * batch - 1) // len(self.images.train)  # of the last training image
        score = evaluate_images(self.model, self.images, block, Processes(0, 0, 1, device), self.config.seed, epoch)
        if score.images == self.evaluation["images"]:
            for name, relative in (("error", False), ("recon", True)):
                if name in score.figures:
                    here, there = score.figures[name], self.evaluation["figures"][name]
                    if abs(here - there) > TOLERANCE * (abs(there) if relative else 1):
                        raise ConfigError(
                            f"--report: {name} on {self.images.name} is {here:.4f}, in the run's {EVALUATION_FILE} "
                            f"{there:.4f}: these are not the images, or not the weights, that were evaluated"
                        )
        passes.done(score.figures.get("error"))
        return score

    def _corruption(self, seed: int, passes: Passes) -> list[dict[str, Any]]:
        return robustness(
            self.model,
            lambda kind, severity: self._batches(corrupted(self.images, kind, severity, seed)),
            IMAGE_CORRUPTIONS,
            SEVERITIES,
            self.config.seed,
            lambda row: passes.done(1 - row["accuracy"]),
        )

    @torch.no_grad()
    def _experts(self, score: ImageScore, passes: Passes) -> dict[str, Any]:
        """How alike experts are, and what they are selected for."""
        model: Any = self.model
        experts = model.config.num_experts
        products = OutputProducts.zero(experts, len(self.images.classes), model.device)
        for pixels, _ in self._batches(self.images):
            products.add(model.expert_logits(pixels.to(model.device)))
        outputs, cka = pes_activation(products)
        alike = {"weights_cosine": pes_weights(model.expert_weights()), "outputs_cosine": outputs, "outputs_cka": cka}
        passes.done()
        before = self.evaluation["figures"].get("pes_before")
        return {
            **ese_of_bits(score.figures["h_s"], experts),
            "ese_class": ese_class(torch.tensor(score.selection)).item(),
            "selection": score.selection,
            "similarity": {
                name: {"mean": of.mean, "mean_absolute": of.mean_absolute, "matrix": of.matrix_MM.tolist()}
                for name, of in alike.items()
            },
            "weights_cosine_before_training": before,
        }

    def _curve(self, settings: list[CurveSetting], passes: Passes) -> list[CurveRow]:
        assert isinstance(self.model, VMoEForImageClassification)
        batches, rows = self._batches(self.images), []
        for choices, priorities, capacities in settings:
            rows += vmoe_curve(
                self.model,
                batches,
                capacities,
                (choices,),
                priorities,
                lambda row: passes.done(1 - row.accuracy),
                self.config.seed,
            )
        return rows


CurveSetting = tuple[int, tuple[str, ...], tuple[float | None, ...]]  # k, priorities, capacities


def curve_settings(model: VisionModel) -> list[CurveSetting]:
    """k from 1 to that of training and twice it, C for each priority, and dropless, where nobody's priority matters.

    Of a token's single expert, the highest weight is also the sum.
    """
    if not isinstance(model, VMoEForImageClassification) or model.config.placement == "none":
        return []
    moe: MoEConfig = model.config.moe_config()
    if moe.router["name"] != "vmoe":
        return []
    trained = moe.experts_per_token
    settings: list[CurveSetting] = []
    for k in (*range(1, trained + 1), *([2 * trained] if 2 * trained <= moe.num_experts else [])):
        settings.append((k, ("none", "max") if k == 1 else ("none", "max", "sum"), CAPACITIES))
        settings.append((k, ("none",), (None,)))
    return settings


def drawn(images: ImageSet, samples: int) -> ImageSet:
    """The set with so many of its test images, drawn by chance, since some sets come class by class."""
    if samples >= len(images.test):
        return images
    return dataclasses.replace(images, name=f"{images.name}, {samples:,} test images", test=images.test.drawn(samples))


class Passes:
    """Passes over the test images, for the person who waits."""

    def __init__(self, total: int) -> None:
        self._console, self._done, self._total = Console(total), 0, total
        self.say: Callable[[str], None] = self._console.say

    def done(self, error: float | None = None) -> None:
        """One more is done, with that error."""
        self._done += 1
        self._console.step()
        if self._done % EVENT_EVERY == 0 or self._done == self._total:
            self._console.event(self._done, {"val/error": error})

    def close(self) -> None:
        self._console.close()

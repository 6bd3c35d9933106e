"""What an SMoE-VAE has learnt: how many experts it uses, what they stand for, how well they draw; with pictures.

`vae_report.json`, beside `tsne.png`, `reconstructions.png` and `selection.png`. Figures are of the test images, each
with its expert of the highest gate value; latent features are sampled.

Legend: N images, E experts, C classes, Z latent features, X pixels of an image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from s2moe import drawing
from s2moe.data.images import ImageSet, batch_in_order
from s2moe.metrics.latent import active_experts, linear_partition, linear_probe, purity
from s2moe.metrics.selection import entropy_bits, mutual_information_bits
from s2moe.models.vision.vae import VAEModel
from s2moe.moe.routing import RoutingContext
from s2moe.training.heat_map import selection

REPORT_FILE = "vae_report.json"
TSNE_POINTS = 2_000
SHOWN_EXPERTS, SHOWN_IMAGES = 12, 8


@dataclass(frozen=True)
class Latents:
    """The test images as a model sees them."""

    z_NZ: NDArray[np.float32]
    expert_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    error_NE: NDArray[np.float64]  # squared error of every image by every decoder
    soft_error_N: NDArray[np.float64]  # of the mixture of all decoders
    kl_N: NDArray[np.float64]

    @property
    def error_N(self) -> NDArray[np.float64]:
        """Squared error by the image's own expert."""
        return self.error_NE[np.arange(len(self.expert_N)), self.expert_N]


def vae_report(
    model: VAEModel, data: ImageSet, directory: Path, seed: int = 0, batch: int = 100, pictures: bool = True
) -> dict[str, Any]:
    """Examine a trained model on the test images of a set, write report and pictures, and return the report.

    Args:
        seed: of sampling, of the probes' held-out images and of the controls.
        pictures: t-SNE takes a minute.

    Raises:
        ValueError: the set is normalised, or has another number of classes.
    """
    if set(data.mean) != {0.0} or set(data.std) != {1.0}:
        raise ValueError(f"{data.name}: kind vae needs pixels in [0, 1]: set the images' mean to 0, std to 1")
    latents = examine(model, data, seed, batch)
    report = figures(latents, model.config.num_experts, len(data.classes), seed)
    report = {"set": data.name, "images": len(data.test), "classes": list(data.classes), **report}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / REPORT_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")
    if pictures:
        draw(model, data, latents, report, directory, seed)
    return report


@torch.no_grad()
def examine(model: VAEModel, data: ImageSet, seed: int = 0, batch: int = 100) -> Latents:
    """Compute every decoder on every test image. The model is left in the mode it was in."""
    training = model.training
    model.eval()
    parts = []
    for number, first in enumerate(range(0, len(data.test), batch)):
        pixels, label_B = batch_in_order(data, first, batch)
        image_BCSS = pixels.to(model.device, model.dtype)
        mu_BZ, logvar_BZ, z_BZ = model.encode(image_BCSS, RoutingContext(seed=seed, microbatch=number))
        gate_BE = model.gate(z_BZ).float().softmax(-1)
        decoded_BEX = model.decoders(z_BZ).float().flatten(2)
        wanted_BX = image_BCSS.float().flatten(1)
        mixed_BX = torch.einsum("be,bex->bx", gate_BE, decoded_BEX)
        kl_B = -0.5 * (1 + logvar_BZ - mu_BZ.square() - logvar_BZ.exp()).sum(1)
        errors = ((decoded_BEX - wanted_BX[:, None]).square().sum(-1), (mixed_BX - wanted_BX).square().sum(-1))
        parts.append((z_BZ.float(), gate_BE.argmax(-1), label_B, *(x.double() for x in (*errors, kl_B))))
    model.train(training)
    return Latents(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def figures(latents: Latents, experts: int, classes: int, seed: int = 0) -> dict[str, Any]:
    """Everything of a report that is a number."""
    counts_EC = np.zeros((experts, classes), dtype=np.int64)
    np.add.at(counts_EC, (latents.expert_N, latents.label_N), 1)
    active = active_experts(latents.expert_N, experts)
    shuffled_N = np.random.default_rng(seed).permutation(latents.expert_N)
    own = {int(i): latents.expert_N == i for i in active}
    joint_EC = torch.from_numpy(counts_EC / counts_EC.sum())
    partition_N = linear_partition(latents.z_NZ, counts_EC[active].sum(1), seed)
    return {
        "experts": {"configured": experts, "active": len(active), "numbers": active.tolist()},
        "error": {
            "recon": float(latents.error_N.mean()),
            "recon_soft": float(latents.soft_error_N.mean()),
            "gap": float((latents.error_N - latents.soft_error_N).mean()),
            # Of an expert that another image was given, and of the best expert for each: the space between the two is
            # what choosing can gain.
            "recon_shuffled": float(latents.error_NE[np.arange(len(shuffled_N)), shuffled_N].mean()),
            "recon_best": float(latents.error_NE.min(1).mean()),
            "by_expert": {i: float(latents.error_N[of].mean()) for i, of in own.items()},
            # Row i, column j: images of expert i, drawn by expert j.
            "by_pair": [[float(latents.error_NE[of, j].mean()) for j in own] for of in own.values()],
            "kl": float(latents.kl_N.mean()),
        },
        "bits": {
            "information": float(mutual_information_bits(torch.from_numpy(counts_EC))),
            "experts": float(entropy_bits(joint_EC.sum(1))),
            "classes": float(entropy_bits(joint_EC.sum(0))),
        },
        "purity": purity(counts_EC),
        "selection": counts_EC.tolist(),
        "probes": {
            "expert": linear_probe(latents.z_NZ, latents.expert_N, seed),
            "class": linear_probe(latents.z_NZ, latents.label_N, seed),
            # Controls for the probe of experts, with groups as large: cut by a random direction, and at random.
            "linear_partition": linear_probe(latents.z_NZ, partition_N, seed),
            "random_partition": linear_probe(latents.z_NZ, shuffled_N, seed),
        },
    }


def draw(
    model: VAEModel, data: ImageSet, latents: Latents, report: dict[str, Any], directory: Path, seed: int = 0
) -> list[Path]:
    """Write the pictures and return their paths."""
    paths = []
    canvases = {
        "tsne": _tsne(latents, data.classes, seed),
        "reconstructions": _reconstructions(model, data, latents, report["experts"]["numbers"], seed),
        "selection": _selection(report, data.classes),
    }
    for name, canvas in canvases.items():
        path = directory / f"{name}.png"
        drawing.save(canvas, path)
        paths.append(path)
    return paths


def _tsne(latents: Latents, classes: tuple[str, ...], seed: int) -> Any:
    from sklearn.manifold import TSNE

    chosen = np.random.default_rng(seed).permutation(len(latents.z_NZ))[:TSNE_POINTS]
    perplexity = min(30, (len(chosen) - 1) / 3)
    point_N2 = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(latents.z_NZ[chosen])
    canvas, axes = drawing.subplots(1, 2, figsize=(13, 6))
    experts = np.unique(latents.expert_N[chosen])
    panels = (
        ("expert", latents.expert_N[chosen], {int(i): str(i) for i in experts}),
        ("class", latents.label_N[chosen], dict(enumerate(classes))),
    )
    for axis, (title, group_N, names) in zip(axes, panels, strict=True):
        name = "tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "turbo"
        colours = drawing.colour_map(name).resampled(len(names))
        for place, (group, label) in enumerate(names.items()):
            of = group_N == group
            axis.scatter(*point_N2[of].T, s=5, color=colours(place), label=label)
        axis.set(title=f"latent features of test images, by {title}", xticks=[], yticks=[])
        axis.legend(frameon=False, markerscale=3, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title=title)
    return canvas


@torch.no_grad()
def _reconstructions(model: VAEModel, data: ImageSet, latents: Latents, active: list[int], seed: int) -> Any:
    """For each of the most used experts some of its images, above what it makes of their (kept) latent features."""
    counts_E = np.bincount(latents.expert_N, minlength=model.config.num_experts)
    shown = sorted(active, key=lambda expert: -counts_E[expert])[:SHOWN_EXPERTS]
    canvas, axes = drawing.subplots(len(shown), 1, figsize=(SHOWN_IMAGES, 2.1 * len(shown)), layout=None, squeeze=False)
    for axis, expert in zip(axes[:, 0], shown, strict=True):
        (own,) = np.nonzero(latents.expert_N == expert)
        own = np.sort(np.random.default_rng(seed).permutation(own)[:SHOWN_IMAGES])
        z_BZ = torch.from_numpy(latents.z_NZ[own]).to(model.device, model.dtype)
        made = model.decoders.one(z_BZ, expert).float().cpu().numpy()
        rows = np.stack((data.test.images[own] / 255, made))  # [2, B, C, S, S]
        picture = np.concatenate(np.concatenate(rows, axis=2), axis=2).transpose(1, 2, 0)
        axis.imshow(picture[..., 0] if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
        share, error = counts_E[expert] / counts_E.sum(), latents.error_N[latents.expert_N == expert].mean()
        axis.set_title(f"expert {expert}: {share:.1%} of the images, squared error {error:.2f}", fontsize=9)
        axis.axis("off")
    canvas.tight_layout()
    return canvas


def _selection(report: dict[str, Any], classes: tuple[str, ...]) -> Any:
    bits, experts = report["bits"]["information"], report["experts"]
    counts = np.asarray(report["selection"])[experts["numbers"]]
    title = f"{experts['active']} of {experts['configured']} experts active, I(E; Y) {bits:.2f} bits"
    return selection(counts, experts["numbers"], classes, title)

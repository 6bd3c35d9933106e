"""SMoE-VAE against its equations in float64: values, gradients, published sizes, and what training and evaluation do.

Legend: B images, E experts, Z latent features, C colour channels.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModel

from s2moe.config.vision import VisionDataConfig, VisionRunConfig
from s2moe.models.vision import VISION_KINDS, VAEConfig, VAEModel
from s2moe.moe.routing import RoutingContext
from tests.models.vision import vae_reference as reference

B, SIZE = 6, 8


def model(seed: int = 0, **settings: object) -> VAEModel:
    torch.manual_seed(seed)
    built = VAEModel(
        VAEConfig(**({"num_experts": 4, "latent_size": 5, "image_size": SIZE, "encoder": "lite"} | settings))
    )
    with torch.no_grad():  # a gate that decides
        built.gate.layers[-1].weight *= 8
    return built.double()


def images(count: int = B, channels: int = 1, size: int = SIZE) -> Tensor:
    return torch.rand(count, channels, size, size, dtype=torch.float64)


def noise_of(context: RoutingContext, count: int, latent: int = 5) -> Tensor:
    return torch.randn(count, latent, generator=context.generator(torch.device("cpu"), "latent")).double()


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes() -> None:
    built = VAEModel(VAEConfig())
    assert count(built.encoder) == 494_144
    assert count(built.decoders) == 10 * 14_249
    assert count(built.gate) == (32 * 64 + 64) + (64 * 32 + 32) + (32 * 10 + 10)
    sizes = {"lite": 14_249, "medium": 88_993, "full": 371_201}
    for name, size in sizes.items():
        assert count(VAEModel(VAEConfig(decoder=name, num_experts=3)).decoders) == 3 * size
    lite = (16 * 9 + 16) + (8 * 16 * 9 + 8) + 2 * (8 * 49 * 32 + 32)
    assert count(VAEModel(VAEConfig(encoder="lite")).encoder) == lite


@pytest.mark.parametrize("encoder", ["lite", "medium"])
@pytest.mark.parametrize("decoder", ["lite", "medium", "full"])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_are_those_of_the_paper(encoder: str, decoder: str, channels: int) -> None:
    built = model(encoder=encoder, decoder=decoder, num_channels=channels, image_size=12)
    image = images(channels=channels, size=12)
    for got, want in zip(built.encoder(image), reference.encode(built, image), strict=True):
        torch.testing.assert_close(got, want)
    z = torch.randn(B, 5, dtype=torch.float64)
    torch.testing.assert_close(built.gate(z), reference.gate(built, z))
    want = torch.stack([reference.decode(built, z, expert) for expert in range(4)], 1)
    assert want.shape == (B, 4, channels, 12, 12)
    torch.testing.assert_close(built.decoders(z), want)
    for expert in range(4):
        torch.testing.assert_close(built.decoders.one(z, expert), want[:, expert])
    expert_B = torch.tensor([2, 0, 2, 1, 0, 2])  # none for 3
    torch.testing.assert_close(built.decoders.chosen(z, expert_B), want[torch.arange(B), expert_B])


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("decoding", ["soft", "hard", "straight_through"])
@pytest.mark.parametrize("decoder", ["lite", "full"])
def test_loss_and_gradients_are_the_published_ones(supervised: bool, decoding: str, decoder: str) -> None:
    built = model(supervised=supervised, decoding=decoding, decoder=decoder)
    image, label = images(), torch.tensor([0, 1, 6, 3, 4, 9])  # labels mod 4: 0 1 2 3 0 1
    context = RoutingContext(seed=3, step=5, microbatch=1)
    output = built(image, label, context)
    want = reference.published_loss(
        built, image, label if supervised else None, noise_of(context, B), decoding, batch_scale=B / 128
    )
    torch.testing.assert_close(output.loss * B, want)
    torch.testing.assert_close(output.loss, output.task_loss + output.aux_loss)
    parameters = list(built.parameters())
    got_gradients = torch.autograd.grad(output.loss * B, parameters)
    want_gradients = torch.autograd.grad(want, parameters, materialize_grads=True)
    for got, wanted in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(got, wanted)
    moves_the_gate = decoding != "hard" or not supervised or built.config.label_loss > 0
    assert moves_the_gate == any(gradient.abs().sum() > 0 for gradient in got_gradients)


def test_at_the_published_batch_the_loss_is_the_published_one_per_image() -> None:
    built = model(num_experts=3)
    image, context = images(128), RoutingContext(step=2)
    want = reference.published_loss(built, image, None, noise_of(context, 128), "soft")
    torch.testing.assert_close(built(image, None, context).loss * 128, want)


def test_a_repeated_batch_weighs_gate_and_pixels_as_before() -> None:
    """Twice the images, twice the published sums: the loss of an image stays, as it would not with fixed weights."""
    built = model().eval()
    image = images()
    mean = built.encoder(image)[0]
    built.encode = lambda x, context: (mu := built.encoder(x)[0], torch.zeros_like(mu), mu)  # without sampling
    once, twice = built(image), built(torch.cat((image, image)))
    assert len(mean) == B
    for name in ("loss", "task_loss", "aux_loss"):
        torch.testing.assert_close(getattr(once, name), getattr(twice, name))


def test_hard_supervised_training_gives_the_gate_no_gradient_of_the_reconstruction() -> None:
    image, label = images(), torch.arange(B) % 4
    for settings, moves in (
        ({"supervised": True}, False),
        ({"supervised": True, "decoding": "soft"}, True),
        ({"decoding": "straight_through"}, True),
        ({}, True),
    ):
        built = model(**settings)
        gate_weight = built.gate.layers[0].weight
        (gradient,) = torch.autograd.grad(built(image, label).task_loss, [gate_weight], allow_unused=True)
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == moves, settings


def test_evaluation_computes_the_chosen_decoder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model(seed=1).eval()
    image = images(40)
    computed: list[tuple[int, int]] = []
    one = type(built.decoders).one

    def counted(self: object, z: Tensor, expert: int) -> Tensor:
        computed.append((expert, len(z)))
        return one(self, z, expert)  # type: ignore[arg-type]

    monkeypatch.setattr(type(built.decoders), "one", counted)
    monkeypatch.setattr(type(built.decoders), "forward", lambda *_: pytest.fail("all decoders were computed"))
    context = RoutingContext(seed=9)
    output = built(image, None, context)
    mu, logvar = reference.encode(built, image)
    z = mu + (logvar / 2).exp() * noise_of(context, 40)  # sampled in evaluation too
    best = reference.gate(built, z).argmax(1)
    assert dict(computed) == {int(i): int(n) for i, n in zip(*best.unique(return_counts=True), strict=True)}
    assert len(computed) > 1
    made = torch.stack([reference.decode(built, z[n : n + 1], int(best[n]))[0] for n in range(40)])
    torch.testing.assert_close(output.figures["recon"].double(), (made - image).square().sum((1, 2, 3)).mean())
    torch.testing.assert_close(output.gate, reference.gate(built, z).softmax(1))
    assert "gap" not in output.figures


@pytest.mark.parametrize("decoding", ["soft", "straight_through"])
def test_the_gap_is_hard_minus_soft(decoding: str) -> None:
    built, image, context = model(decoding=decoding), images(), RoutingContext(step=1)
    values = {
        mode: reference.published_loss(built, image, None, noise_of(context, B), mode).item()
        for mode in ("hard", "soft")
    }
    gap = built(image, None, context).figures["gap"].item()
    assert gap * B == pytest.approx(values["hard"] - values["soft"], rel=1e-4)
    assert abs(gap) > 1e-4


def test_figures_of_closed_form() -> None:
    built = model(num_experts=3).eval()
    built.encode = lambda x, context: tuple(  # type: ignore[method-assign]
        torch.full((len(x), 5), value, dtype=torch.float64) for value in (0.3, 2 * torch.tensor(0.7).log().item(), 0.0)
    )
    probability = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    built.gate.forward = lambda z: probability.log().expand(len(z), 3)  # type: ignore[method-assign]
    values = built(images()).figures
    assert values["balance"].item() == pytest.approx(0.14)  # E Σ (p̄ − 1/E)², the squared variation of p̄
    assert values["entropy"].item() == pytest.approx(-(probability * probability.log()).sum().item())
    assert values["kl"].item() == pytest.approx(5 * reference.gaussian_kl(0.3, 0.7))
    sharp = torch.tensor([0.0, -2000.0, -3000.0], dtype=torch.float64)
    built.gate.forward = lambda z: sharp.expand(len(z), 3)  # type: ignore[method-assign]
    assert built(images()).figures["entropy"].item() == 0


def test_supervised_figures_and_a_model_without_labels() -> None:
    built = model(supervised=True).eval()
    image = images(20)
    context = RoutingContext()
    predicted = built(image, torch.zeros(20, dtype=torch.int64), context).gate.argmax(1)
    right = predicted + 4 * torch.arange(20)  # the same expert, mod 4
    assert built(image, right, context).figures["gate_accuracy"] == 1
    assert built(image, right + 1, context).figures["gate_accuracy"] == 0
    unlabelled = built(image, None, context)
    assert unlabelled.loss is None
    torch.testing.assert_close(unlabelled.gate, built(image, right, context).gate)


def test_sampling_is_keyed_by_the_step() -> None:
    built, image = model(), images()
    losses = [
        built(image, None, RoutingContext(seed=seed, step=step)).loss.item() for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(losses)) == 3
    assert built(image, None, RoutingContext(seed=0, step=1)).loss.item() == losses[1]


def test_decoders_without_images_get_gradients_of_nothing() -> None:
    built = model(supervised=True)
    with torch.no_grad():
        built.gate.layers[-1].bias[0][2] = 1000
    built(images(), torch.arange(B) % 4).loss.backward()
    assert all(parameter.grad is not None for parameter in built.parameters())
    weight = built.decoders.convolutions[0].weight.grad
    assert [bool(part.abs().sum() > 0) for part in weight] == [False, False, True, False]


def test_experts_start_differently_and_do_not_depend_on_their_number() -> None:
    few, many = model(num_experts=2), model(num_experts=4)
    weight = many.decoders.convolutions[0].weight
    assert not torch.equal(weight[0], weight[1])
    assert torch.equal(few.decoders.convolutions[0].weight, weight[:2])
    bound = 1 / 5**0.5  # torch's default for 5 features
    assert 0.9 * bound < many.decoders.linear.weight.abs().max() <= bound


def test_normalised_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        model()(images() * 3 - 1)


@pytest.mark.parametrize(("kind", "mean"), [("vae", 0.0), ("mixture", 0.3053)])
def test_a_run_gives_it_images_without_normalisation(kind: str, mean: float) -> None:
    config = VisionRunConfig(name="x", data=VisionDataConfig(name="digits"), model={"kind": kind})
    assert config.open_images().mean == (mean,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "lit"}, "decoder: must be one of lite, medium, full.*did you mean 'lite'"),
        ({"decoding": "top1"}, "decoding: must be one of"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"kl_loss": -1.0}, "kl_loss must not be negative"),
        ({"image_size": 30}, "image_size: .* multiple of 4, got 30"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        VAEConfig(**settings)


def test_it_is_a_kind_and_comes_back_from_disk(tmp_path: Path) -> None:
    assert VISION_KINDS["vae"].model is VAEModel
    assert VAEConfig().decoding == "soft"
    assert VAEConfig(supervised=True).decoding == "hard"
    built = model(supervised=True, decoder="medium").float().eval()
    built.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).decoding == "hard"
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, VAEModel)
    image, label = images().float(), torch.zeros(B, dtype=torch.int64)
    torch.testing.assert_close(again(image, label).loss, built(image, label).loss)


def test_it_learns_and_a_second_expert_comes_to_be_used() -> None:
    """Two kinds of images, light and dark: the loss falls, and both kinds find an expert."""
    torch.manual_seed(0)
    built = VAEModel(VAEConfig(num_experts=2, latent_size=4, image_size=8, encoder="lite"))
    kind = torch.arange(64) % 2
    image = (0.15 + 0.7 * kind).view(-1, 1, 1, 1) + 0.1 * torch.rand(64, 1, 8, 8)
    start = copy.deepcopy(built).eval()(image).figures["recon"].item()
    optimizer = torch.optim.Adam(built.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        built(image, None, RoutingContext(step=step)).loss.backward()
        optimizer.step()
    output = built.eval()(image)
    assert output.figures["recon"].item() < 0.1 * start
    assert output.figures["entropy"].item() < 0.1
    assert len(output.gate.argmax(1).unique()) == 2

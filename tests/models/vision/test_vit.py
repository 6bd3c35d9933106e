"""The vision Transformer with experts: its equations, sizes, methods, and what it is evaluated with.

Legend: B images, C classes, S tokens of an image, E experts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from s2moe.models.vision import VISION_KINDS
from s2moe.models.vision.vit import VMoEForImageClassification
from s2moe.models.vision.vit_config import VMoEConfig
from s2moe.models.vision.vit_cost import image_flops
from s2moe.models.vision.vit_transfer import transfer, zoom_positions
from s2moe.models.vision.vmoe_curve import CAPACITIES, draw_curve, evaluate, robustness, vmoe_curve, write_curve
from s2moe.moe.feedback import update_routers
from s2moe.moe.methods import METHODS
from s2moe.moe.routing import RoutingContext
from s2moe.options import deep_merge
from tests.methods.cases import CASES
from tests.models.vision import vit_reference

SIZES = {
    "image_size": 8,
    "num_channels": 2,
    "num_classes": 5,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
TEXT_ONLY = {"stablemoe", "similarity_aware", "attention_aware"}
VISION_CASES = {name: moe for name, moe in CASES.items() if name not in TEXT_ONLY}
EVERY_METHOD = pytest.mark.parametrize("moe", VISION_CASES.values(), ids=VISION_CASES)
STEPS = 6


def tiny(moe: dict[str, Any] | None = None, **given: Any) -> VMoEForImageClassification:
    """A random model, in float64 and training mode, with nothing at zero."""
    torch.manual_seed(0)
    config = VMoEConfig(**{**SIZES, **given}, moe=deep_merge({"num_experts": 4}, moe or {}))
    model = VMoEForImageClassification(config).double()
    for name, parameter in model.named_parameters():
        if "router" not in name and "experts.w" not in name:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
        elif "experts.w" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def images(count: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 2, 8, 8, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(5, (count,), generator=generator)


def gradients(model: VMoEForImageClassification, context: RoutingContext) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(*images(), context=context)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- equations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sparse"),
    [
        ({"placement": "every-2", "representation_size": 12}, {1, 3}),
        ({"placement": "last-1"}, {3}),
        ({"placement": "none"}, set()),
    ],
    ids=["every-2", "last-1", "dense"],
)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_logits_loss_and_gradients_equal_the_equations(given: dict[str, Any], sparse: set[int], loss: str) -> None:
    model = tiny(loss=loss, **given).eval()
    pixels, labels = images()
    out = model(pixels, labels)
    want_BC = vit_reference.logits(model, pixels, sparse, 2)
    torch.testing.assert_close(out.logits, want_BC)
    power_BC = torch.exp(want_BC)
    if loss == "softmax":
        want = sum(-torch.log(power_BC[b, y] / power_BC[b].sum()) for b, y in enumerate(labels)) / 3
    else:
        chance_BC = power_BC / (1 + power_BC)
        want = 0
        for b, y in enumerate(labels):
            for c in range(5):
                want = want - torch.log(chance_BC[b, c] if c == y else 1 - chance_BC[b, c]) / 3
    torch.testing.assert_close(out.task_loss, want)
    assert out.aux_loss.item() == 0
    found = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
    exact = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    for (name, _), left, right in zip(model.named_parameters(), found, exact, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if left is None else left.sum() * 0 + left,
            torch.zeros(()) if left is None else torch.zeros_like(left) if right is None else right,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_auxiliary_losses_are_summed_for_v_moe_and_averaged_for_others() -> None:
    context = RoutingContext(step=1)
    for moe, setting, factor in (
        ({"method": "vmoe"}, None, 1),
        ({"method": "vmoe"}, "mean", 2),
        ({"method": "smoe"}, None, 2),
        ({"method": "smoe"}, "sum", 1),
    ):
        out = tiny(moe, auxiliary=setting)(*images(), context=context)
        total = sum(layer.loss for layer in out.routing)
        torch.testing.assert_close(out.aux_loss, (total / factor).to(out.aux_loss.dtype))
        torch.testing.assert_close(out.loss, out.task_loss + out.aux_loss)
        assert total.item() > 0


def test_a_fresh_model_gives_every_class_the_same_probability() -> None:
    model = VMoEForImageClassification(VMoEConfig(**SIZES))
    out = model(images()[0].float(), images()[1], context=RoutingContext())
    assert out.task_loss.item() == pytest.approx(math.log(5), rel=1e-6)
    assert model.head.bias.tolist() == pytest.approx([-math.log(5)] * 5)
    assert VMoEForImageClassification(VMoEConfig(**SIZES, head_bias=-10.0)).head.bias.tolist() == [-10.0] * 5
    experts = model.blocks[1].moe.experts
    assert (experts.w1 == experts.w1[:1]).all()  # V-MoE's experts start alike
    assert experts.w1.std().item() == pytest.approx((2 / (16 + 24)) ** 0.5, rel=0.1)
    assert model.blocks[0].attention.q_proj.weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    other = VMoEForImageClassification(VMoEConfig(**SIZES, moe={"method": "smoe"})).blocks[1].moe.experts
    assert not (other.w1 == other.w1[:1]).all()


# --- sizes ----------------------------------------------------------------------------------------------


JFT = {"image_size": 224, "num_channels": 3, "num_classes": 18291}
PUBLISHED = [  # millions of parameters, with 32 experts (Riquelme et al. 2021)
    ("S/32", "none", 36.5),
    ("S/32", "every-2", 296.9),
    ("B/16", "none", 100.5),
    ("B/16", "every-2", 979.0),
    ("L/16", "none", 323.1),
    ("L/16", "every-2", 3446.0),
    ("H/14", "none", 655.8),
    ("H/14", "last-5", 2688.6),
    ("H/14", "every-2", 7160.8),
]


@pytest.mark.parametrize(("size", "placement", "millions"), PUBLISHED)
def test_published_numbers_of_parameters(size: str, placement: str, millions: float) -> None:
    plain = VMoEConfig(**JFT, size=size)
    config = VMoEConfig(
        **JFT, size=size, placement=placement, representation_size=plain.hidden_size, moe={"num_experts": 32}
    )
    with torch.device("meta"):
        model = VMoEForImageClassification(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("placement", "layers", "want"),
    [
        ("every-2", 8, [1, 3, 5, 7]),
        ("every-1", 3, [0, 1, 2]),
        ("every-3", 8, [2, 5]),
        ("last-2", 8, [5, 7]),
        ("last-5", 32, [23, 25, 27, 29, 31]),
        ("last-1", 5, [3]),
        ("last-2", 5, [1, 3]),
        ("none", 4, []),
    ],
)
def test_placement(placement: str, layers: int, want: list[int]) -> None:
    config = VMoEConfig(**{**SIZES, "num_hidden_layers": layers}, placement=placement)
    with torch.device("meta"):
        model = VMoEForImageClassification(config)
    assert [number for number, block in enumerate(model.blocks) if block.is_sparse] == want


@pytest.mark.parametrize(("size", "pixels"), [("digits/2", 8), ("mnist/4", 28), ("cifar/4", 32)])
def test_small_presets_run(size: str, pixels: int) -> None:
    model = VMoEForImageClassification(VMoEConfig(size=size, image_size=pixels, num_channels=1))
    out = model(torch.randn(2, 1, pixels, pixels), torch.tensor([0, 1]))
    assert len(out.routing) == len(model.blocks) // 2
    out.loss.backward()


def test_flops_count_the_products_that_run() -> None:
    """Against torch's own counter of matrix products, for k = 1 and 2 and both placements."""
    for given, moe in (
        ({"representation_size": 12}, {"experts_per_token": 1}),
        ({"placement": "last-1"}, {"shared_experts": 2}),
        ({"placement": "none"}, {}),
    ):
        model = tiny(moe, **given).float().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(images(4)[0].float())
        assert image_flops(model.config) == pytest.approx(counter.get_total_flops() / 4, rel=1e-9)


# --- every method ---------------------------------------------------------------------------------------


@EVERY_METHOD
def test_every_method_trains_all_its_parameters(moe: dict[str, Any]) -> None:
    model = tiny(moe)
    names = set()
    for step in range(STEPS):
        context = RoutingContext(step=step, steps=STEPS)
        loss, found = gradients(model, context)
        assert torch.isfinite(loss)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.isfinite(found[name]).all(), (step, name)
        out = model(*images(), context=context)
        assert [layer.layer for layer in out.routing] == [1, 3]
        names.add(tuple(tuple(layer.values) for layer in out.routing))
        update_routers(model, [out.routing])
    assert len(names) == 1
    assert any(found[name].abs().max() > 0 for name in found if "experts.w1" in name)


@EVERY_METHOD
def test_every_method_evaluates_saves_and_loads(moe: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(moe)
    for step in range(2):
        out = model(*images(), context=RoutingContext(step=step, steps=2))
        update_routers(model, [out.routing])
    model = model.float().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.moe == model.config.moe
    pixels = images(seed=9)[0].float()  # not those whose scores some thresholds are
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits)
    exact, pixels = model.double(), pixels.double()
    torch.testing.assert_close(exact(pixels[:1]).logits, exact(pixels).logits[:1])  # whatever else is in the batch


@EVERY_METHOD
def test_recomputing_activations_changes_nothing(moe: dict[str, Any]) -> None:
    for step in (1, 4):
        context = RoutingContext(seed=3, step=step, steps=STEPS)
        dropped = deep_merge(moe, {"expert_dropout": 0.2})
        plain, again = tiny(dropped, dropout=0.2), tiny(dropped, dropout=0.2)
        again.load_state_dict(plain.state_dict())
        again.activation_checkpointing_enable()
        loss, wanted = gradients(plain, context)
        recomputed, found = gradients(again, context)
        torch.testing.assert_close(recomputed, loss)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("method", sorted(TEXT_ONLY))
def test_methods_for_text_alone_are_refused(method: str) -> None:
    assert method in METHODS
    with pytest.raises(ValueError, match="patches of an image have neither"):
        VMoEConfig(**SIZES, moe={"method": method})


def test_momentum_carries_over_dense_blocks() -> None:
    """x ← x + p in the second SMoE block, p = mu u1 + u2, where plain residuals have x + u2."""
    plain, heavy = tiny({"method": "smoe"}), tiny({"method": "momentum_smoe", "momentum": {"mu": 0.5}})
    heavy.load_state_dict(plain.state_dict())
    outputs: dict[str, list[Tensor]] = {}
    for name, model in (("plain", plain.eval()), ("heavy", heavy.eval())):
        seen = outputs[name] = []
        hooks = [
            block.register_forward_hook(lambda _, args, out, to=seen: to.append((args[0], out[0])))
            for block in model.blocks
        ]
        model(images()[0])
        for hook in hooks:
            hook.remove()
    first = outputs["plain"][1]
    for number in (0, 1, 2):  # until then there is nothing to carry
        torch.testing.assert_close(outputs["heavy"][number][1], outputs["plain"][number][1])
    attended = plain.blocks[1].attention(plain.blocks[1].attention_norm(first[0]))
    u1 = first[1] - first[0] - attended
    torch.testing.assert_close(outputs["heavy"][3][1] - outputs["plain"][3][1], 0.5 * u1)


def test_soft_nearest_neighbours_take_the_image_s_class() -> None:
    moe = {"method": "snnl_smoe", "regularisers": {"snnl_loss": 1.0, "samples": 15, "snnl_schedule": "fixed"}}
    model = tiny(moe)
    with_labels = model(*images(), context=RoutingContext()).routing[0].values["snnl_loss"]
    other = model(images()[0], torch.tensor([0, 0, 1]), context=RoutingContext()).routing[0].values["snnl_loss"]
    assert with_labels != other
    with pytest.raises(ValueError, match="labels"):
        model(images()[0], context=RoutingContext())


def test_dropout_follows_the_context() -> None:
    model = tiny({"router": {"noise": 0.0, "load_loss": 0.0}}, dropout=0.3)
    first, again, other = (model(*images(), context=RoutingContext(step=step)).loss.item() for step in (1, 1, 2))
    assert first == again
    assert first != other
    model.eval()
    assert model(*images()).loss.item() == model(*images()).loss.item()


# --- inference -------------------------------------------------------------------------------------------


def test_a_checkpoint_at_other_capacities_and_experts() -> None:
    model = tiny().eval()
    pixels, labels = images(16)
    full = model(pixels).logits
    model.set_inference(experts_per_token=1)
    torch.testing.assert_close(model(pixels[:2]).logits, vit_reference.logits(model, pixels[:2], {1, 3}, 1))
    model.set_inference(capacity_factor=0.2, priority="max")
    out = model(pixels, labels)
    assert out.routing[0].values["dropped_fraction"] > 0.5
    assert not torch.allclose(out.logits, full)
    model.set_inference(capacity_factor=math.inf)
    torch.testing.assert_close(model(pixels).logits, full)
    model.set_inference()
    torch.testing.assert_close(model(pixels).logits, full)
    model.train()
    model.set_inference(experts_per_token=1, capacity_factor=0.1)
    assert model(pixels, labels).routing[0].counts_E.sum() == 2 * 16 * 5  # training is as it was


def test_settings_of_inference_that_cannot_be_are_refused() -> None:
    model = tiny({"method": "smoe"})
    with pytest.raises(ValueError, match=r"router\.name=vmoe"):
        model.set_inference(capacity_factor=0.5)
    with pytest.raises(ValueError, match="experts_per_token"):
        model.set_inference(experts_per_token=5)
    model.set_inference(experts_per_token=1)
    with pytest.raises(ValueError, match="priority"):
        tiny().set_inference(priority="best")


def test_the_configured_capacity_at_inference() -> None:
    model = tiny({"router": {"inference_capacity": 0.5, "priority": "max"}}).eval()
    assert model(images(16)[0]).routing[0].values["capacity"] == round(0.5 * 2 * 16 * 5 / 4)
    model.set_inference(capacity_factor=math.inf)
    assert "capacity" not in model(images()[0]).routing[0].values


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images whose class is the place of a bright square, on noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    pixels = 0.5 * torch.randn(count, 2, 8, 8, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[:, label // 2 * 4 : label // 2 * 4 + 3, label % 2 * 4 : label % 2 * 4 + 3] += 1.0
    return pixels, labels


@pytest.fixture(scope="module")
def learned() -> VMoEForImageClassification:
    """A small V-MoE that has learned to find the square."""
    torch.manual_seed(0)
    given = {**SIZES, "patch_size": 2, "num_classes": 4}
    model = VMoEForImageClassification(VMoEConfig(**given, moe={"num_experts": 4}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(180):
        out = model(*blobs(64, 100 + step), context=RoutingContext(step=step, steps=180))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return model.eval()


def test_the_curve_of_one_checkpoint(learned: VMoEForImageClassification, tmp_path: Path) -> None:
    batches = [blobs(100, 1), blobs(100, 2), blobs(40, 3)]
    whole = evaluate(learned, batches)
    assert whole.accuracy > 0.9
    assert whole.images == 240
    assert math.isnan(whole.capacity)
    capacities = [*CAPACITIES, None]
    rows = vmoe_curve(learned, batches, capacities, experts_per_token=(None, 1))
    assert [(row.experts_per_token, row.priority, row.capacity_factor) for row in rows] == [
        (k, priority, factor) for k in (2, 1) for priority in ("none", "max") for factor in capacities
    ]
    for start in range(0, len(rows), len(capacities)):
        part = rows[start : start + len(capacities)]
        assert [row.dropped for row in part] == sorted((row.dropped for row in part), reverse=True)
        assert [row.flops for row in part] == sorted(row.flops for row in part)
        assert part[0].capacity == round(0.1 * part[0].experts_per_token * 100 * 17 / 4)
        assert part[0].dropped > 0.85
        assert part[-1].dropped == 0
    assert rows[len(capacities) - 1].accuracy == whole.accuracy
    assert rows[len(capacities) - 1].flops == pytest.approx(image_flops(learned.config))
    tight = {row.priority: row for row in rows if row.capacity_factor == 0.1 and row.experts_per_token == 2}
    assert tight["max"].dropped == pytest.approx(tight["none"].dropped, abs=0.02)  # the same cost
    assert learned.inference == (None, None, None)
    assert not learned.training

    write_curve(rows, tmp_path / "curve.csv")
    draw_curve(rows, tmp_path / "curve.png")
    assert len((tmp_path / "curve.csv").read_text().splitlines()) == len(rows) + 1
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_the_curve_refuses_what_has_none(learned: VMoEForImageClassification) -> None:
    with pytest.raises(ValueError, match=r"router\.name=vmoe"):
        vmoe_curve(tiny({"method": "smoe"}), [images()])
    with pytest.raises(ValueError, match="list"):
        vmoe_curve(learned, iter([blobs(4, 1)]))
    with pytest.raises(ValueError, match="no images"):
        evaluate(learned, [])
    with pytest.raises(ValueError, match="capacity_factor"):
        vmoe_curve(learned, [blobs(4, 1)], capacities=[-1.0])
    assert learned.inference == (None, None, None)


def test_accuracy_falls_with_corruption(learned: VMoEForImageClassification) -> None:
    def noisy(kind: str, severity: int) -> list[tuple[Tensor, Tensor]]:
        pixels, labels = blobs(200, 7)
        generator = torch.Generator().manual_seed(0)
        return [(pixels + severity * torch.randn(pixels.shape, generator=generator), labels)]

    rows = robustness(learned, noisy, ["noise"], [0, 1, 3])
    assert [(row["kind"], row["severity"]) for row in rows] == [("noise", 0), ("noise", 1), ("noise", 3)]
    assert rows[0]["accuracy"] > rows[1]["accuracy"] > rows[2]["accuracy"]


# --- other images and classes -----------------------------------------------------------------------------


def test_zoomed_positions_keep_class_token_and_corners() -> None:
    positions = torch.randn(1, 1 + 9, 3)
    zoomed = zoom_positions(positions, 25)
    torch.testing.assert_close(zoomed[:, 0], positions[:, 0])
    grid, big = positions[0, 1:].view(3, 3, 3), zoomed[0, 1:].view(5, 5, 3)
    for i in range(5):
        for j in range(5):  # linear between neighbours, half a step apart
            rows, columns = {i // 2, (i + 1) // 2}, {j // 2, (j + 1) // 2}
            want = sum(grid[r, c] for r in rows for c in columns) / (len(rows) * len(columns))
            torch.testing.assert_close(big[i, j], want)
    assert zoom_positions(positions, 9) is positions
    with pytest.raises(ValueError, match="squares"):
        zoom_positions(positions, 8)


def test_fine_tuning_on_other_images_and_classes() -> None:
    source = tiny(representation_size=12).float()
    model = transfer(source, image_size=16, num_classes=3)
    assert model.config.representation_size is None
    assert model.config.moe == source.config.moe
    assert (
        model(torch.randn(2, 2, 16, 16), torch.tensor([0, 2])).logits.tolist()
        == [[pytest.approx(-math.log(3))] * 3] * 2
    )
    before = source.state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith("head.") and name != "embedding.positions":
            assert torch.equal(value, before[name]), name
    again = transfer(source, num_classes=3)
    assert torch.equal(again.embedding.positions, source.embedding.positions)
    with pytest.raises(ValueError, match="hidden_size"):
        transfer(source, hidden_size=32)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        transfer(source, num_hidden_layers=2)


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": "S/31"}, "did you mean 'S/32'"),
        ({"patch_size": 3}, "patch_size 3 does not divide image_size 8"),
        ({"placement": "every"}, "placement"),
        ({"placement": "last-3"}, "at most last-2"),
        ({"placement": "every-5"}, "at most every-4"),
        ({"hidden_size": 18}, "hidden_size 18"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_classes": 0}, "num_classes"),
        ({"dropout": 1.0}, "dropout"),
        ({"loss": "hinge"}, "loss"),
        ({"auxiliary": "max"}, "auxiliary"),
        ({"activation": "tanh"}, "activation"),
        ({"moe": {"every": 3}}, "placement decides"),
        ({"moe": {"method": "vmoo"}}, "did you mean 'vmoe'"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VMoEConfig(**{**SIZES, **given})


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="2 channels and 8 x 8"):
        tiny()(torch.randn(1, 2, 12, 12))


def test_resolving_twice_changes_nothing() -> None:
    for given in ({}, {"placement": "last-1", "moe": {"method": "s2moe"}}, {"placement": "none", "size": "digits/2"}):
        config = VMoEConfig(**{**SIZES, **given})
        again = VMoEConfig(**config.to_dict())
        assert again.to_dict() == config.to_dict()
    assert VISION_KINDS["vmoe"].config is VMoEConfig
    assert VMoEConfig(**SIZES).moe_config().expert_hidden == SIZES["intermediate_size"]


def test_half_precision_is_finite() -> None:
    model = tiny().to(torch.bfloat16)
    pixels, labels = images()
    out = model(pixels.float(), labels, context=RoutingContext())
    out.loss.backward()
    assert out.logits.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert F.cross_entropy(out.logits, labels).item() == pytest.approx(out.task_loss.item())


def test_micro_batches_whose_experts_would_have_no_place_are_refused_before_training() -> None:
    moe = {"router": {"capacity_factor": 0.02}}
    tokens = VMoEConfig().patches + 1
    VMoEConfig(moe=moe).check_micro_batch(4 * 50)
    with pytest.raises(ValueError, match=rf"capacity_factor=0\.02 .* group of {tokens} tokens"):
        VMoEConfig(moe=moe).check_micro_batch(1)
    grouped = VMoEConfig(moe={"router": {**moe["router"], "group_size": 1}})
    with pytest.raises(ValueError, match=rf"group of {tokens} tokens.*group_size"):
        grouped.check_micro_batch(200)
    VMoEConfig(placement="none", moe=moe).check_micro_batch(1)

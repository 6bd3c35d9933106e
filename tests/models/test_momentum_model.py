"""MomentumSMoE in the language model: against the equations, recomputed, cached, and beside S2MoE and dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.models.sizes import model_sizes
from s2moe.moe.routing import RoutingContext
from tests.models.decoder import SIZES, attention, dense_mlp, rms_norm, tiny
from tests.models.test_causality import assert_causal
from tests.models.test_generation import PAD, PROMPTS, greedy, left_padded
from tests.moe import reference
from tests.moe.momentum_reference import Reference

IDS = torch.randint(19, (2, 6), generator=torch.Generator().manual_seed(5))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the rotary angles are float32 in the model, float64 in the reference

KINDS: dict[str, dict[str, Any]] = {
    "heavy_ball": {"kind": "heavy_ball"},
    "negative": {"kind": "negative"},
    "nag": {"kind": "nag"},
    "robust": {"kind": "robust"},
    "adam": {"kind": "adam", "epsilon": 1e-2},
    "adam in all layers": {"kind": "adam", "adam_layers": "all", "epsilon": 1e-2, "bias_correction": True},
    "rms": {"kind": "rms", "epsilon": 1e-2},
    "double residual": {"kind": "heavy_ball", "legacy_double_residual": True},
    "released adam": {
        "kind": "adam",
        "epsilon": 1e-2,
        "decay": 1.0,
        "sign": "subtract",
        "legacy_double_residual": True,
    },
    "plain double residual": {"legacy_double_residual": True},
}
EVERY_KIND = pytest.mark.parametrize("momentum", KINDS.values(), ids=KINDS)


def model_of(momentum: dict[str, Any], **given: Any) -> S2MoEForCausalLM:
    return tiny(**{"num_hidden_layers": 5, "moe_momentum": momentum, **given}).double()


def logits(model: S2MoEForCausalLM, ids: list[int]) -> Tensor:
    """[S, V] from the equations, for a plain top-k router: each token carries its own p and v up the layers."""
    config, moe, eps = model.config, model.config.moe_config(), model.config.rms_norm_eps
    rows = [model.model.embed_tokens.weight[i] for i in ids]
    carried = [Reference(moe.momentum) for _ in ids]
    for number, layer in enumerate(model.model.layers):
        attended = attention(layer.attention, [rms_norm(x, layer.attention_norm.weight, eps) for x in rows], config)
        rows = [x + a for x, a in zip(rows, attended, strict=True)]

        def mlp(y_D: Tensor, layer: Any = layer, number: int = number) -> Tensor:
            z_D = rms_norm(y_D, layer.mlp_norm.weight, eps)
            if not moe.is_sparse(number):
                return dense_mlp(layer.mlp, z_D, moe.expert_form, moe.activation)
            experts = [layer.moe.experts.w1, layer.moe.experts.w2, layer.moe.experts.w3]
            choices = [reference.choose(layer.moe.router.scores.weight @ z_D, moe.experts_per_token)]
            out_D = reference.mixture(z_D[None], choices, experts, moe.expert_form, moe.activation)[0]
            if moe.shared_experts:
                out_D = out_D + dense_mlp(layer.moe.shared, z_D, moe.expert_form, moe.activation)
            return out_D

        if not moe.is_sparse(number):
            rows = [x + mlp(x) for x in rows]
            continue
        moved = [state.layer(x, mlp) for x, state in zip(rows, carried, strict=True)]
        if moe.momentum.legacy_double_residual:
            inner = [rms_norm(x, layer.residual_norm.weight, eps) for x in moved]
            moved = [x + z for x, z in zip(rows, inner, strict=True)]
        rows = moved
    return torch.stack([model.lm_head.weight @ rms_norm(x, model.model.norm.weight, eps) for x in rows])


@EVERY_KIND
@pytest.mark.parametrize(
    "given",
    [
        {"moe_every": 2},
        {"moe_first_dense": 1, "moe_experts_per_token": 1, "moe_shared_experts": 1},
        {"moe_experts_per_token": 4},
    ],
    ids=str,
)
def test_logits_and_gradients_equal_the_equations(momentum: dict[str, Any], given: dict[str, Any]) -> None:
    model = model_of(momentum, **given)  # in training mode: the same but for the auxiliary loss
    got_BSV = model(IDS).logits
    want_BSV = torch.stack([logits(model, row) for row in IDS.tolist()])
    torch.testing.assert_close(got_BSV, want_BSV, **CLOSE)
    torch.testing.assert_close(model.eval()(IDS).logits, got_BSV, rtol=0, atol=1e-12)

    direction_BSV = torch.randn_like(got_BSV)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = [torch.autograd.grad((value * direction_BSV).sum(), parameters) for value in (got_BSV, want_BSV)]
    for name, left, right in zip(names, *pairs, strict=True):
        torch.testing.assert_close(left, right, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
        assert right.any(), name


def gradients(model: S2MoEForCausalLM, context: RoutingContext) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)  # dropout draws from the global generator
    model.zero_grad()
    loss = model(IDS, labels=IDS, context=context).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@EVERY_KIND
@pytest.mark.parametrize("method", ["smoe", "s2moe"])
def test_activation_checkpointing_changes_nothing(momentum: dict[str, Any], method: str) -> None:
    """The state is an input of each block; its gradient flows through the recomputed blocks."""
    given = {"method": method, "moe_every": 2, "num_hidden_layers": 6, "hidden_dropout": 0.2}
    plain, checkpointed = model_of(momentum, **given), model_of(momentum, **given)
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.gradient_checkpointing_enable()
    context = RoutingContext(seed=3, step=5)
    loss, wanted = gradients(plain, context)
    again, found = gradients(checkpointed, context)
    torch.testing.assert_close(again, loss)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
        assert gradient.any(), name


@EVERY_KIND
@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 3, 1]], ids=str)
def test_decoding_with_the_cache_equals_a_full_pass(momentum: dict[str, Any], steps: list[int]) -> None:
    model = model_of(momentum, moe_every=2).eval()
    ids = torch.randint(19, (2, 9))
    cache, start, pieces = None, 0, []
    for step in steps:
        out = model(ids[:, start : start + step], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + step
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits)


@EVERY_KIND
def test_a_token_sees_neither_later_tokens_nor_padding(momentum: dict[str, Any]) -> None:
    assert_causal(model_of(momentum, moe_first_dense=1))  # in training, too
    model = model_of(momentum, method="s2moe", moe_first_dense=1).eval()
    assert_causal(model, experts_per_token=2)
    padded_BSV = model(**left_padded()).logits
    for row_SV, prompt in zip(padded_BSV, PROMPTS, strict=True):
        torch.testing.assert_close(row_SV[-len(prompt) :], model(torch.tensor([prompt])).logits[0], **CLOSE)
    batch = model.generate(**left_padded(), max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    assert batch[1].tolist()[-7:] == greedy(model, PROMPTS[1], 5)


def test_heavy_ball_without_momentum_is_the_plain_layer() -> None:
    plain = tiny().double()
    for momentum in ({"kind": "heavy_ball", "mu": 0.0}, {"kind": "nag", "mu": 0.0}, {"kind": "negative", "mu": 0.0}):
        model = tiny(moe_momentum=momentum).double()
        model.load_state_dict(plain.state_dict())
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "heavy_ball", "nag", "robust", "adam", "rms"])
def test_the_released_sign_is_a_model_with_negated_experts(kind: str) -> None:
    added = model_of({"kind": kind}, moe_shared_experts=1)
    subtracted = model_of({"kind": kind, "sign": "subtract"}, moe_shared_experts=1)
    subtracted.load_state_dict(added.state_dict())
    assert not torch.allclose(subtracted(IDS).logits, added(IDS).logits)
    with torch.no_grad():
        for layer in subtracted.model.layers:
            layer.moe.experts.w2.neg_()
            layer.moe.shared.down.weight.neg_()
    torch.testing.assert_close(subtracted(IDS).logits, added(IDS).logits)


def test_dropout_comes_before_momentum() -> None:
    """What is dropped of a layer's output is missing from the velocity ever after, as in the released code."""
    model = model_of({"kind": "heavy_ball", "mu": 0.6, "gamma": 0.5}, hidden_dropout=0.4)
    dropped: list[Tensor] = []
    for layer in model.model.layers:
        layer.dropout.register_forward_hook(lambda module, given, out: dropped.append(out))
    hidden = model(IDS, output_hidden_states=True).hidden_states
    velocity = torch.zeros_like(hidden[0])
    for before, after, attended, mixed in zip(hidden[:-2], hidden[1:-1], dropped[::2], dropped[1::2], strict=False):
        assert (mixed == 0).double().mean() > 0.2
        velocity = 0.6 * velocity + mixed
        torch.testing.assert_close(after - before, attended + 0.5 * velocity)


def test_s2moes_mixture_is_what_moves_the_velocity() -> None:
    """In training u is the gated mixture of clean and noisy path."""
    model = model_of({"kind": "heavy_ball"}, method="s2moe")
    mixtures: list[Tensor] = []
    for layer in model.model.layers:
        layer.moe.register_forward_hook(lambda module, given, out: mixtures.append(out[0]))
    attended: list[Tensor] = []
    for layer in model.model.layers:
        layer.attention.register_forward_hook(lambda module, given, out: attended.append(out[0]))
    hidden = model(IDS, output_hidden_states=True, context=RoutingContext(step=2)).hidden_states
    velocity = torch.zeros_like(hidden[0])
    for before, after, a, u in zip(hidden[:-2], hidden[1:-1], attended, mixtures, strict=False):
        velocity = 0.7 * velocity + u
        torch.testing.assert_close(after - before, a + velocity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [{"kind": "robust"}, {"kind": "rms"}, {"kind": "adam"}], ids=str)
def test_half_precision_models_carry_float32(momentum: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(momentum, moe_every=2, initializer_range=0.1).to(dtype).eval()
    states: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, given, out: states.append(out[3]))
    out = model(IDS)
    assert out.logits.dtype == dtype
    assert torch.isfinite(out.logits).all()
    assert states[0] is None  # dense
    tensors = [tensor for state in states[1:] for tensor in state if tensor is not None]
    assert len(tensors) == 4
    assert all(tensor.dtype == torch.float32 and tensor.shape == (2, 6, 16) for tensor in tensors)
    assert states[2] is states[1]  # handed on by the dense layer


@pytest.mark.parametrize("method", ["momentum_smoe", "adam_smoe", "robust_momentum_smoe"])
def test_overfits_a_tiny_batch(method: str) -> None:
    sizes = {**SIZES, "initializer_range": 0.02}
    model = S2MoEForCausalLM(S2MoEConfig(**sizes, moe={"method": method, "num_experts": 4, "expert_hidden": 32}))
    ids = torch.randint(19, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(300):
        loss = model(ids, labels=ids, context=RoutingContext(step=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.eval()(ids, labels=ids).task_loss.item() < 0.1


@EVERY_KIND
def test_sizes_count_every_parameter(momentum: dict[str, Any]) -> None:
    model = model_of(momentum, moe_every=2)
    assert model_sizes(model.config).total == sum(parameter.numel() for parameter in model.parameters())

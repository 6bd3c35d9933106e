"""The whole model against the equations; attention variants against one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2moe import S2MoEConfig, S2MoEForCausalLM
from tests.models.decoder import SIZES, logits, tiny

IDS = torch.randint(19, (2, 7), generator=torch.Generator().manual_seed(5))
# The rotary angles are float32 in the model, float64 in the reference.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "head_dim": 6},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-2},
        {"moe_every": 2},
        {"moe_first_dense": 1, "moe_shared_experts": 2},
        {"moe_first_dense": 3},
        {"moe_expert_form": "mlp", "moe_activation": "gelu", "moe_first_dense": 1, "moe_shared_experts": 1},
        {"moe_experts_per_token": 1},
        {"method": "s2moe"},
        {"method": "s2moe_k2", "num_key_value_heads": 2},
    ],
    ids=str,
)
def test_logits_and_gradients_equal_the_equations(given: dict[str, Any]) -> None:
    model = tiny(**given).double().eval()
    got_BSV = model(IDS).logits
    want_BSV = torch.stack([logits(model, row) for row in IDS.tolist()])
    torch.testing.assert_close(got_BSV, want_BSV, **CLOSE)
    assert got_BSV.abs().max() > 0.1

    direction_BSV = torch.randn_like(got_BSV)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = [
        torch.autograd.grad((value * direction_BSV).sum(), parameters, allow_unused=True, materialize_grads=True)
        for value in (got_BSV, want_BSV)
    ]
    for name, left, right in zip(names, *pairs, strict=True):
        torch.testing.assert_close(left, right, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
        assert right.any() or "mix_gate" in name


@pytest.mark.parametrize("method", ["smoe", "s2moe"])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_slimmed_evaluation_equals_the_equations(method: str, k: int) -> None:
    model = tiny(method).double().eval()
    got_BSV = model(IDS, experts_per_token=k).logits
    torch.testing.assert_close(got_BSV[0], logits(model, IDS[0].tolist(), k), **CLOSE)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_sdpa_equals_eager(groups: int, padded: bool) -> None:
    model = tiny(num_key_value_heads=groups).eval()  # float32: eager attention takes its softmax in float32
    mask = torch.ones_like(IDS)
    mask[0, : 3 * padded] = 0
    model.set_attn_implementation("sdpa")
    fused = model(IDS, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    plain = model(IDS, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(fused[mask.bool()], plain.logits[mask.bool()], rtol=1e-4, atol=1e-5)
    for probability in plain.attentions:
        assert probability.shape == (2, 4, 7, 7)
        torch.testing.assert_close(probability[1].sum(-1), torch.ones(4, 7))
        assert not probability[1].triu(1).any()


def test_grouped_queries_equal_repeated_heads() -> None:
    grouped, full = tiny(num_key_value_heads=2).double().eval(), tiny().double().eval()
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 4, -1).repeat_interleave(2, dim=0).reshape(16, -1)
    full.load_state_dict(state)
    torch.testing.assert_close(full(IDS).logits, grouped(IDS).logits)


def test_positions_are_relative() -> None:
    model = tiny().double().eval()
    shifted = model(IDS, position_ids=torch.arange(20, 27)[None]).logits
    torch.testing.assert_close(shifted, model(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_keeps_exact_positions(dtype: torch.dtype) -> None:
    """Frequencies rounded to bfloat16 turn position 2000 by the wrong angle altogether.

    ``model.bfloat16()`` converts buffers too.
    """
    model = S2MoEForCausalLM(S2MoEConfig(**{**SIZES, "head_dim": 16, "max_position_embeddings": 4096})).to(dtype)
    positions = torch.tensor([[0, 1, 77, 2000, 4095]])
    cos, sin = model.model.rotary_emb(torch.zeros(1, 5, 16, dtype=dtype), positions)
    angle = positions[..., None].double() * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    angle = torch.cat((angle, angle), -1)
    tolerance = {"rtol": 0, "atol": 2**-8, "check_dtype": False}
    torch.testing.assert_close(cos, angle.cos(), **tolerance)
    torch.testing.assert_close(sin, angle.sin(), **tolerance)


@pytest.mark.parametrize("method", ["smoe", "s2moe"])
def test_bfloat16_stays_near_float64(method: str) -> None:
    model = tiny(method, initializer_range=0.1).eval()
    exact = tiny(method, initializer_range=0.1).eval()
    model.bfloat16()
    exact.double().load_state_dict(model.state_dict())
    error = (model(IDS).logits.double() - exact(IDS).logits).norm() / exact(IDS).logits.norm()
    assert error < 0.05


def test_embeddings_may_be_given_instead_of_ids() -> None:
    model = tiny().eval()
    embedded = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(IDS).logits)
    for both in ({}, {"input_ids": IDS, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**both)


def test_hidden_states_are_one_for_each_depth() -> None:
    model = tiny().eval()
    out = model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(out.hidden_states[0], model.get_input_embeddings()(IDS))


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 4])])
def test_only_the_wanted_logits_are_computed(keep: Any) -> None:
    model = tiny().eval()
    every = model(IDS).logits
    want = every[:, keep] if isinstance(keep, torch.Tensor) else every[:, -keep:]
    torch.testing.assert_close(model(IDS, logits_to_keep=keep).logits, want)

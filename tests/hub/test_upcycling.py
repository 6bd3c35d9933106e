"""Dense models made sparse: the same function at first, one that can be trained, saved and loaded afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import s2moe
from s2moe import S2MoEForCausalLM, upcycle
from s2moe.hub.block import sparse_blocks
from s2moe.moe.layer import SMoELayer
from s2moe.moe.methods import METHODS
from tests.hub.foreign import DENSE, VOCABULARY, foreign, ids
from tests.models.decoder import tiny

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
WAYS: dict[str, dict[str, Any]] = {
    "copies": {"experts": 4},
    "one expert": {"experts": 4, "experts_per_token": 1},
    "slices": {"experts": 8, "slices": 4},
    "slices of two groups": {"experts": 12, "slices": 3, "experts_per_token": 6},
    "s2moe": {"method": "s2moe", "experts": 4},
    "s2moe of slices": {"method": "s2moe", "experts": 8, "slices": 2},
    "deepseek_v3": {"method": "deepseek_v3", "experts": 4, "slices": 2},
    "xmoe": {"method": "xmoe", "experts": 4},
    "xmoe of two": {"method": "xmoe_sigmoid", "experts": 4, "experts_per_token": 2},
    "some layers": {"experts": 4, "every": 2},
    "later layers": {"experts": 4, "first_dense": 2},
}
REFUSED = {  # methods of which no token's weights need sum to the same, or that need more of a block
    "expert_choice": "the weights of a token sum to",
    "vmoe": "the weights of a token sum to",
    "base": "the weights of a token sum to",
    "stablemoe": "only S2MoEForCausalLM's blocks",
    "similarity_aware": "only S2MoEForCausalLM's blocks",
    "attention_aware": "only S2MoEForCausalLM's blocks",
    "momentum_smoe": "momentum.kind=none",
    "adam_smoe": "momentum.kind=none",
    "robust_momentum_smoe": "momentum.kind=none",
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", DENSE)
def test_the_function_is_the_dense_model_s(name: str, way: dict[str, Any]) -> None:
    dense = foreign(name)
    wanted = dense(ids()).logits
    sparse = upcycle(dense, **way)
    layers = [module for module in sparse.modules() if isinstance(module, SMoELayer)]
    assert len(layers) == {"every": 1, "first_dense": 1}.get(
        next((k for k in way if k in ("every", "first_dense")), ""), 3
    )
    torch.testing.assert_close(sparse(ids()).logits, wanted, **CLOSE)
    torch.testing.assert_close(dense(ids()).logits, wanted, rtol=0, atol=0)  # left as it was
    for layer in layers:  # the test would fail if the experts did not matter
        layer.experts.w2.data.mul_(1.5)
    assert not torch.allclose(sparse(ids()).logits, wanted, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact_or_refused(method: str) -> None:
    dense = foreign("llama").double()
    if method in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method]):
            upcycle(dense, method, experts=4)
        return
    sparse = upcycle(dense, method, experts=4)
    torch.testing.assert_close(sparse(ids()).logits, dense(ids()).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", ["copies", "slices", "s2moe"])
@pytest.mark.parametrize("form", ["gated", "mlp"])
def test_a_dense_model_of_our_own_stays_one_of_ours(form: str, way: str) -> None:
    dense = tiny(moe_first_dense=3, moe_expert_form=form).double().eval()
    sparse = upcycle(dense, **WAYS[way])
    assert type(sparse) is S2MoEForCausalLM
    torch.testing.assert_close(sparse(ids() % 19).logits, dense(ids() % 19).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_stays(dtype: torch.dtype) -> None:
    dense = foreign("qwen3").to(dtype)
    sparse = upcycle(dense, experts=4, slices=2)
    assert {parameter.dtype for parameter in sparse.parameters()} == {dtype}
    tolerance = 1e-10 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(sparse(ids()).logits, dense(ids()).logits, rtol=tolerance, atol=tolerance)


def test_noise_changes_the_function_by_about_as_much() -> None:
    dense = foreign("llama")
    wanted = dense(ids()).logits
    small, large = (
        (upcycle(dense, experts=4, noise=noise)(ids()).logits - wanted).abs().mean().item() for noise in (1e-4, 1e-2)
    )
    assert 0 < small < large < wanted.abs().mean()
    assert 20 < large / small < 500
    experts = next(sparse_blocks(upcycle(dense, experts=4, noise=0.1)).__iter__()).moe.experts
    assert not torch.equal(experts.w1[0], experts.w1[1])


@pytest.mark.parametrize(
    ("k", "rule"), [(None, ("straight_through", False)), (1, ("straight_through", False)), (2, ("gate", True))]
)
@pytest.mark.parametrize("method", ["xmoe", "sbase"])
def test_a_rule_of_weights_that_sum_to_1_is_chosen(method: str, k: int | None, rule: tuple[str, bool]) -> None:
    router = upcycle(foreign("llama"), method, experts=4, experts_per_token=k).config.moe["router"]
    assert (router["combine"], router["renormalise"]) == rule


def test_sigmoid_weights_are_made_to_sum_to_1() -> None:
    """As loss-free balancing's are not by themselves."""
    assert upcycle(foreign("llama"), "loss_free", experts=4).config.moe["router"]["renormalise"]


@pytest.mark.parametrize("way", ["copies", "slices", "s2moe"])
def test_experts_part_in_training(way: str) -> None:
    torch.manual_seed(1)
    sparse = upcycle(foreign("llama"), **WAYS[way]).train()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = sparse(ids(8, 12), labels=ids(8, 12)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    slices = WAYS[way].get("slices", 1)
    for block in sparse_blocks(sparse):
        experts = block.moe.experts
        assert not torch.allclose(experts.w1[0], experts.w1[slices])
        rows = block.moe.router.scores.weight
        assert not torch.allclose(rows[0], rows[1])


def test_saving_loading_and_refusing_to_be_taken_for_the_dense_model(tmp_path: Path) -> None:
    sparse = upcycle(foreign("gpt2"), "s2moe", experts=4, slices=2, noise=0.1).eval()
    sparse.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "s2moe_gpt2"
    assert config.moe["method"] == "s2moe"
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(loaded(ids()).logits, sparse(ids()).logits)
    assert loaded(ids(), labels=ids()).routing[0].counts_E.sum() == ids().numel() * 2


@pytest.mark.parametrize(
    ("name", "given", "way", "message"),
    [
        ("llama", {"mlp_bias": True}, {}, "mlp_bias=true"),
        ("llama", {"hidden_act": "gelu_fast"}, {}, "'gelu_fast' is not among"),
        ("llama", {}, {"slices": 5}, "slices must divide the MLP's hidden width 24, got 5"),
        ("llama", {}, {"experts": 6, "slices": 4}, "must be multiples of slices"),
        ("llama", {}, {"experts": 8, "slices": 4, "experts_per_token": 2}, "must be multiples of slices"),
        ("llama", {}, {"experts": 4, "noise": -1.0}, "noise must be a number, not negative"),
        ("llama", {}, {"experts": 4, "noise": float("nan")}, "noise must be a number"),
        ("llama", {}, {"moe": {"num_experts": 16}}, "'num_experts', which is the argument experts"),
        ("llama", {}, {"moe": {"expert_hidden": 16}}, "'expert_hidden', which follows from the dense model"),
        ("llama", {}, {"experts": 4, "every": 9}, "leave no SMoE layer among 3 layers"),
        ("llama", {}, {"experts": 4, "moe": {"router": {"renormalise": False}}}, "the weights of a token sum to"),
        ("llama", {}, {"method": "s2moe", "moe": {"stochastic": {"inference": "gated"}}}, "plain mixture"),
        ("llama", {}, {"method": "noisy_topk", "experts": 12, "slices": 3}, "router.zero_init=false"),
        ("llama", {}, {"method": "xmoe", "moe": {"router": {"combine": "gate"}}}, "the weights of a token sum to"),
        ("llama", {}, {"method": "xmoe", "slices": 2}, "use slices=1"),
        ("llama", {}, {"method": "smoee"}, "did you mean 'smoe'"),
        ("olmoe", {}, {}, "is a mixture of experts already"),
    ],
)
def test_what_cannot_be_is_refused(name: str, given: dict[str, Any], way: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(foreign(name, **given), **way)


def test_other_models_are_refused() -> None:
    sparse = upcycle(foreign("llama"), experts=4)
    with pytest.raises(ValueError, match="is a mixture of experts already"):
        upcycle(sparse)
    with pytest.raises(ValueError, match="has SMoE layers already"):
        upcycle(tiny())
    with pytest.raises(ValueError, match="none of the architectures known here: LlamaForCausalLM"):
        upcycle(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    assert s2moe.upcycle is upcycle
    assert sparse.config.vocab_size == VOCABULARY

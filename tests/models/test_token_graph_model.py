"""Routing over a graph of tokens inside the model: causality, decoding, masks, and the attention it is given.

Legend: B batch, S sequence, H heads, V vocabulary, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.models.sizes import model_sizes
from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.training.evaluation import attention_mask
from tests.models.decoder import SIZES, tiny
from tests.models.test_causality import assert_causal
from tests.models.test_generation import PAD, PROMPTS, greedy, left_padded

SIMILARITY: dict[str, dict[str, Any]] = {
    "similarity": {},
    "low_rank": {"rank": 3, "temperature": 0.5},
    "window": {"window": 3, "chunk": 2},
    "bounded": {"entropy_bound": True, "chunk": 4},
}
ATTENTION: dict[str, dict[str, Any]] = {
    "attention": {"sigma": 0.5},
    "attention_chunks": {"chunk": 3},
    "attention_alone": {"posterior": False, "head": "running"},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("similarity_aware", options) for name, options in SIMILARITY.items()},
    **{name: ("attention_aware", options) for name, options in ATTENTION.items()},
}
EVERY = pytest.mark.parametrize(("method", "router"), CASES.values(), ids=CASES)


def model_of(method: str, router: dict[str, Any], **given: Any) -> S2MoEForCausalLM:
    """In float64 and training mode, each layer with another sharpest head, where it goes by heads."""
    model = tiny(method, router, num_key_value_heads=2, **given).double()
    for name, parameter in model.named_parameters():
        if name.endswith("_RD"):
            torch.nn.init.normal_(parameter)
    for number, layer in enumerate(model.model.layers):
        if method == "attention_aware":
            layer.moe.router.entropy_H.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]).roll(number))
    return model


@pytest.mark.parametrize("name", SIMILARITY)
def test_similarity_aware_is_causal_in_training(name: str) -> None:
    assert_causal(model_of("similarity_aware", SIMILARITY[name]))


@pytest.mark.parametrize("posterior", [True, False])
def test_attention_aware_with_the_running_head_is_causal_in_training(posterior: bool) -> None:
    assert_causal(model_of("attention_aware", {"head": "running", "posterior": posterior}))


def test_attention_aware_by_batch_sees_the_future_in_its_choice_of_the_head_alone() -> None:
    """Causal as long as the choice is the same, which one head far sharper than the others makes sure of."""
    model = model_of("attention_aware", {"chunk": 3})
    for layer in model.model.layers:
        with torch.no_grad():
            layer.attention.q_proj.weight[:4] *= 30
    assert_causal(model)


@EVERY
def test_evaluation_is_causal(method: str, router: dict[str, Any]) -> None:
    assert_causal(model_of(method, router).eval())


@EVERY
@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 1, 3], [8, 1]], ids=str)
def test_decoding_with_the_cache_equals_a_full_pass(method: str, router: dict[str, Any], steps: list[int]) -> None:
    model = model_of(method, router).eval()
    ids = torch.randint(19, (2, 9))
    whole_BSV = model(ids, use_cache=False).logits
    for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
        start, pieces = 0, []
        for step in steps:
            out = model(ids[:, start : start + step], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + step
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole_BSV)


@EVERY
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padded_sequences_equal_unpadded_ones(method: str, router: dict[str, Any], implementation: str) -> None:
    model = model_of(method, router).float().eval()
    model.set_attn_implementation(implementation)
    padded_BSV = model(**left_padded()).logits
    assert torch.isfinite(padded_BSV).all()
    for row_SV, prompt in zip(padded_BSV, PROMPTS, strict=True):
        alone_SV = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(row_SV[-len(prompt) :], alone_SV, rtol=1e-4, atol=1e-4)


@EVERY
def test_generation_equals_full_passes(method: str, router: dict[str, Any]) -> None:
    """Greedy and padded, and beams with and without the cache."""
    model = model_of(method, router).eval()
    batch = model.generate(**left_padded(), max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    for row, prompt in zip(batch.tolist(), PROMPTS, strict=True):
        assert row[-len(prompt) - 5 :] == greedy(model, prompt, 5)
    beams = [
        model.generate(
            torch.tensor([PROMPTS[0]]),
            max_new_tokens=5,
            num_beams=2,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for use_cache in (True, False)
    ]
    assert beams[0].sequences.tolist() == beams[1].sequences.tolist()
    torch.testing.assert_close(beams[0].sequences_scores, beams[1].sequences_scores)


@EVERY
def test_an_evaluations_attention_window_holds_for_routing_too(method: str, router: dict[str, Any]) -> None:
    """A window of w reaches w − 1 positions back in attention, and as many again in routing; and no further."""
    model, window, length = model_of(method, router, num_hidden_layers=1).eval(), 3, 9
    mask = attention_mask(length, window, torch.float64, torch.device("cpu"))
    ids = torch.randint(19, (1, length))
    changed = ids.clone()
    changed[0, 1] = (changed[0, 1] + 7) % 19
    boolean = model(ids, attention_mask=mask == 0, use_cache=False).logits
    first, second = (model(tokens, attention_mask=mask, use_cache=False).logits[0] for tokens in (ids, changed))
    torch.testing.assert_close(boolean[0], first)
    moved_S = (first - second).abs().amax(-1)
    reach = 2 * (window - 1)
    assert (moved_S[1 : 1 + window] > 1e-9).all()
    assert (moved_S[1 + window : 2 + reach] > 1e-9).any()  # through the routing
    assert (moved_S[2 + reach :] < 1e-12).all()


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_attention_that_is_shared_is_the_attention_that_was_computed(padded: bool) -> None:
    """r = A p with the probabilities that eager attention returns, of the head with the lowest running entropy."""
    model = model_of("attention_aware", {"posterior": False}).float().eval()  # eager attention's softmax is float32
    model.set_attn_implementation("eager")
    found: dict[int, tuple[Tensor, Routing]] = {}

    class Recorder:
        def record(self, layer: SMoELayer, hidden_TD: Tensor, routing: Routing, context: RoutingContext) -> None:
            found[layer.layer] = hidden_TD, routing

    given = left_padded() if padded else {"input_ids": torch.randint(19, (2, 7))}
    out = model(**given, output_attentions=True, use_cache=False, context=RoutingContext(probe=Recorder()))
    assert len(found) == 3
    for number, probability_BHSS in enumerate(out.attentions):
        router = model.model.layers[number].moe.router
        hidden_TD, routing = found[number]
        head = router.entropy_H.tolist().index(min(router.entropy_H.tolist()))
        p_BSE = (hidden_TD @ router.scores.weight.T).softmax(-1).view(*given["input_ids"].shape, -1)
        mixed_BSE = probability_BHSS[:, head] @ p_BSE
        real_BS = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        got_BSE = routing.prob_TE.view_as(mixed_BSE)
        torch.testing.assert_close(got_BSE[real_BS], mixed_BSE[real_BS], rtol=1e-4, atol=1e-5)


@EVERY
def test_recomputed_layers_with_recomputed_chunks_have_the_same_gradients(method: str, router: dict[str, Any]) -> None:
    ids = torch.randint(19, (2, 8))
    gradients = []
    plain = model_of(method, {**router, "chunk": None})
    for chunk, recompute in ((None, False), (3, False), (3, True)):
        model = model_of(method, {**router, "chunk": chunk})
        model.load_state_dict(plain.state_dict())
        if recompute:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, context=RoutingContext()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
    assert all(gradient.norm() > 0 for name, gradient in gradients[0].items() if "router" in name)


def test_number_of_heads_is_filled_in_and_kept() -> None:
    moe = {"method": "attention_aware"}
    config = S2MoEConfig(**SIZES, moe=moe)
    assert config.moe["router"]["num_attention_heads"] == 4
    assert S2MoEConfig(**config.to_dict()).moe == config.moe
    with pytest.raises(ValueError, match="leave it null"):
        S2MoEConfig(**SIZES, moe={**moe, "router": {"num_attention_heads": 3}})


@EVERY
@pytest.mark.parametrize("k", [1, 2])
def test_s2moe_trains_with_it(method: str, router: dict[str, Any], k: int) -> None:
    """Both passes are routed over graphs, and the running entropies are means whichever number of passes there is."""
    model = model_of("s2moe_k2", {"name": method, **router}, moe_experts_per_token=k)
    ids = torch.randint(19, (2, 8))
    out = model(ids, labels=ids, context=RoutingContext())
    out.loss.backward()
    model.update_routers([out.routing])
    for layer in model.model.layers:
        assert all(parameter.grad.norm() > 0 for parameter in layer.moe.router.parameters())
        if method == "attention_aware":
            entropy_H = layer.moe.router.entropy_H
            assert ((entropy_H > 0) & (entropy_H < torch.tensor(8.0).log())).all()


def test_matrices_of_the_similarity_are_counted() -> None:
    macs = {
        str(rank): model_sizes(
            S2MoEConfig(**SIZES, moe={"method": "similarity_aware", "num_experts": 4, "router": {"rank": rank}})
        ).macs_per_token
        for rank in (None, 2)
    }
    assert macs["None"] - macs["2"] == 3 * (16 * 16 - 2 * 2 * 16)

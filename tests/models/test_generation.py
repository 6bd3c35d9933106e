"""Decoding with the cache, padding on the left, and generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.decoder import ROTARY, tiny
from tests.ties import watch

MODELS: dict[str, dict[str, Any]] = {
    "smoe": {},
    "s2moe": {"method": "s2moe"},
    "gated": {"method": "s2moe", "moe_stochastic": {"inference": "gated"}},
    "grouped": {"num_key_value_heads": 2, "moe_every": 2},
    "sigmoid": {"router": {"combine": "sigmoid", "renormalise": True, "bias_update_rate": 1e-3}},
    "capacity": {"router": {"capacity_factor": 0.5}},
    "tied": {"tie_word_embeddings": True},
}
PARAMETERS = pytest.mark.parametrize("given", MODELS.values(), ids=MODELS)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]
PAD = 0


def left_padded() -> dict[str, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    ids = [[PAD] * (longest - len(p)) + p for p in PROMPTS]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def greedy(model: Any, prompt: list[int], new: int, **given: Any) -> list[int]:
    """Argmax of a full forward pass for each new token, without any cache."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(model(torch.tensor([ids]), use_cache=False, **given).logits[0, -1].argmax().item())
    return ids


@PARAMETERS
@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 1, 3], [8, 1]], ids=str)
def test_decoding_with_the_cache_equals_a_full_pass(given: dict[str, Any], steps: list[int]) -> None:
    model = tiny(**given).double().eval()
    ids = torch.randint(19, (2, 9))
    whole_BSV = model(ids, use_cache=False).logits
    cache, start, pieces = None, 0, []
    for step in steps:
        out = model(ids[:, start : start + step], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + step
        pieces.append(out.logits)
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(pieces, 1), whole_BSV, **ROTARY)


@PARAMETERS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padded_sequences_equal_unpadded_ones(given: dict[str, Any], implementation: str) -> None:
    model = tiny(**given).double().eval()
    model.set_attn_implementation(implementation)
    clear = watch(model.float()) if implementation == "eager" else []  # whose softmax and mask are float32's
    padded_BSV = model(**left_padded()).logits
    assert torch.isfinite(padded_BSV).all()
    for row_SV, prompt in zip(padded_BSV, PROMPTS, strict=True):
        alone_SV = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(row_SV[-len(prompt) :], alone_SV, rtol=1e-4, atol=1e-4)
    assert all(clear)


@PARAMETERS
def test_greedy_generation_is_the_argmax_of_full_passes(given: dict[str, Any]) -> None:
    model = tiny(**given).double().eval()
    for prompt in PROMPTS:
        made = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert made[0].tolist() == greedy(model, prompt, 8)


@PARAMETERS
def test_a_padded_batch_generates_what_each_prompt_does_alone(given: dict[str, Any]) -> None:
    model = tiny(**given).double().eval()
    batch = model.generate(**left_padded(), max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    for row, prompt in zip(batch.tolist(), PROMPTS, strict=True):
        assert row[-len(prompt) - 8 :] == greedy(model, prompt, 8)


@pytest.mark.parametrize("k", [1, 4])
def test_generation_with_another_number_of_experts(k: int) -> None:
    model = tiny("s2moe_k2").double().eval()
    made = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=8, do_sample=False, experts_per_token=k)
    assert made[0].tolist() == greedy(model, PROMPTS[0], 8, experts_per_token=k)


@pytest.mark.parametrize("method", ["smoe", "s2moe"])
def test_sampling_is_repeatable_and_follows_the_distribution(method: str) -> None:
    model, prompt = tiny(method).eval(), torch.tensor([PROMPTS[0]])
    draws = []
    for _ in range(2):
        torch.manual_seed(4)
        draws.append(model.generate(prompt.repeat(2000, 1), max_new_tokens=1, do_sample=True, top_k=0)[:, -1])
    assert torch.equal(draws[0], draws[1])
    frequency_V = torch.bincount(draws[0], minlength=19) / 2000
    prob_V = model(prompt).logits[0, -1].softmax(-1)
    assert (frequency_V - prob_V).abs().sum() < 0.1


def test_generation_stops_at_the_end_symbol_and_beams_do_not_lose_the_cache() -> None:
    model = tiny().double().eval()
    made = greedy(model, PROMPTS[0], 8)
    ended = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=8, do_sample=False, eos_token_id=made[7], pad_token_id=PAD
    )
    assert ended[0].tolist() == made[: made.index(made[7], 5) + 1]

    def score(ids: list[int]) -> float:
        log_prob_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(log_prob_SV[s, ids[s + 1]].item() for s in range(4, len(ids) - 1))

    beams = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4, num_beams=8, do_sample=False)
    assert score(beams[0].tolist()) >= score(made[:9]) - 1e-9


def test_generation_leaves_a_training_models_mode_and_weights_alone() -> None:
    model = tiny(router={"combine": "sigmoid", "bias_update_rate": 1e-3}).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name

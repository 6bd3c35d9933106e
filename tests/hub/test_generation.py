"""`generate` in all its ways, on models of our own and of other architectures with our layers.

What transformers' GenerationTesterMixin checks of a model: that is not in the source distribution, whose other common
tests test_common_model_tests.py runs. Simple greedy search, sampling and beams are in test_standard_tools.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from s2moe import from_transformers, upcycle
from tests.hub.foreign import foreign
from tests.models.decoder import tiny

VOCABULARY, BATCH, LENGTH, NEW = 50, 2, 7, 5
FOREIGN = ("llama", "gpt2", "qwen2_moe")
FAST = ("smoe", "similarity_aware", "llama")
SLOW = ("s2moe", "xmoe", "stablemoe", "momentum_smoe", "gpt2", "qwen2_moe")
MODELS = pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
IDS = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
PLAIN = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def build(name: str, seed: int = 0, layers: int = 3) -> Any:
    """A model in evaluation mode and float64, where no tie is near; another `seed` gives other weights."""
    torch.manual_seed(seed)
    if name in FOREIGN:
        theirs = foreign(name, vocab_size=VOCABULARY, num_hidden_layers=layers)
        if name == "qwen2_moe":
            return from_transformers(theirs).double().eval()
        return upcycle(theirs, "s2moe", experts=4, experts_per_token=2, noise=0.2).double().eval()
    return tiny(name, vocab_size=VOCABULARY, num_hidden_layers=layers).double().eval()


def generate(model: Any, ids: Tensor | None = IDS, **given: Any) -> Any:
    if ids is not None:
        given = {"attention_mask": torch.ones_like(ids), **given}
    return model.generate(ids, **{**PLAIN, **given})


def same(found: Any, wanted: Any, new: int = NEW) -> None:
    """Equal sequences and, of the last `new` tokens, equal logits."""
    assert torch.equal(found.sequences[:, -new:], wanted.sequences[:, -new:])
    for ours, theirs in zip(found.logits[-new:], wanted.logits[-new:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@MODELS
def test_logits_are_those_of_one_forward_pass(name: str) -> None:
    model = build(name)
    found = generate(model)
    logits = model(found.sequences, use_cache=False).logits[:, LENGTH - 1 : -1].float()  # as generate hands them out
    torch.testing.assert_close(torch.stack(found.logits, 1), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.sequences[:, LENGTH:], logits.argmax(-1))


@MODELS
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_every_output_has_its_shape(name: str, use_cache: bool, beams: int) -> None:
    model = build(name)
    model.set_attn_implementation("eager")
    wants = {"output_scores": True, "output_hidden_states": True, "output_attentions": True}
    found = generate(model, num_beams=beams, use_cache=use_cache, **wants)
    rows = BATCH * beams
    assert [tuple(step.shape) for step in found.scores] == [(rows, VOCABULARY)] * NEW
    for step, (states, attentions) in enumerate(zip(found.hidden_states, found.attentions, strict=True)):
        keys = LENGTH + step
        queries = keys if step == 0 or not use_cache else 1
        assert [tuple(state.shape) for state in states] == [(rows, queries, 16)] * 4
        assert [tuple(attention.shape) for attention in attentions] == [(rows, 4, queries, keys)] * 3
    cache = found.past_key_values
    if not use_cache:
        assert cache is None
        return
    config = model.config
    shape = (rows, getattr(config, "num_key_value_heads", 4), LENGTH + NEW - 1, 16 // 4)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == LENGTH + NEW - 1
    for layer in cache.layers[:3]:
        assert (tuple(layer.keys.shape), tuple(layer.values.shape)) == (shape, shape)


@MODELS
def test_beams_and_samples_without_the_cache_are_those_with_it(name: str) -> None:
    model = build(name)
    for given in ({"num_beams": 3}, {"num_beams": 3, "do_sample": True}, {"do_sample": True, "top_k": 10}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            found.append(
                generate(model, use_cache=use_cache, num_return_sequences=2 if "num_beams" in given else 1, **given)
            )
        assert torch.equal(found[0].sequences, found[1].sequences), given


@MODELS
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model = build(name)
    padded = torch.nn.functional.pad(IDS, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(IDS), (3, 0))
    same(generate(model, padded, attention_mask=mask), generate(model))


@MODELS
def test_going_on_from_a_cache(name: str) -> None:
    """In two calls, and with a prompt that is read in chunks."""
    model = build(name)
    wanted = generate(model)
    first = generate(model, max_new_tokens=2)
    mask = torch.ones_like(first.sequences)
    second = generate(
        model, first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=NEW - 2
    )
    same(second, wanted, NEW - 2)
    same(generate(model, prefill_chunk_size=3), wanted)


@MODELS
def test_positions_that_are_given(name: str) -> None:
    """Those that it would count itself; rotary ones matter by their differences alone."""
    model = build(name)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    same(generate(model, position_ids=positions), generate(model))
    if name != "gpt2":
        same(generate(model, position_ids=positions + 3), generate(model))


@MODELS
def test_beams_go_on_from_a_cache(name: str) -> None:
    model = build(name)
    wanted = generate(model, num_beams=2)
    cache = DynamicCache(config=model.config)
    model(IDS[:, :-2], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    found = generate(model, past_key_values=cache, num_beams=2)
    assert torch.equal(found.sequences, wanted.sequences)


@MODELS
@pytest.mark.parametrize("kind", ["model", "other model", "prompt lookup"])
def test_candidates_of_a_helper_change_nothing(name: str, kind: str) -> None:
    """Assisted decoding: what is rejected has to leave the cache again."""
    model = build(name)
    helpers = {"model": lambda: model, "other model": lambda: build(name, seed=1, layers=1)}
    given = {"prompt_lookup_num_tokens": 2} if kind not in helpers else {"assistant_model": helpers[kind]()}
    ids = IDS[:1, [0, 1, 2, 0, 1, 2, 0]]  # which repeats itself
    same(generate(model, ids, **given), generate(model, ids))


@MODELS
def test_embeddings_in_place_of_ids(name: str) -> None:
    model = build(name)
    embeddings = model.get_input_embeddings()(IDS)
    if name == "stablemoe":
        with pytest.raises(ValueError, match="input_ids"):
            generate(model, None, inputs_embeds=embeddings)
        return
    for given in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        found = generate(model, None, inputs_embeds=embeddings, **given)
        same(found, generate(model, **given))
    same(generate(model, IDS, inputs_embeds=embeddings), generate(model))
    first = generate(model, None, inputs_embeds=embeddings, max_new_tokens=2)
    longer = torch.cat((embeddings, model.get_input_embeddings()(first.sequences)), 1)
    again = generate(model, None, inputs_embeds=longer, past_key_values=first.past_key_values, max_new_tokens=NEW - 2)
    same(again, generate(model), NEW - 2)


@MODELS
def test_a_static_cache_is_one(name: str) -> None:
    model = build(name)
    found = generate(model, cache_implementation="static")
    assert isinstance(found.past_key_values, StaticCache)
    assert found.past_key_values.layers[0].keys.shape[2] == LENGTH + NEW - 1  # the last token is not read again
    same(found, generate(model))


@MODELS
def test_only_the_logits_that_are_asked_for(name: str) -> None:
    model = build(name)
    wanted = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, wanted[:, -1:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([2, 4])).logits, wanted[:, [2, 4]])


@MODELS
def test_a_mask_of_four_dimensions(name: str) -> None:
    """Three texts with a common beginning, in one row: each is as if it was alone."""
    model = build(name)
    start, ends = IDS[:1, :4], IDS[0, 4:]
    alone = torch.cat([model(torch.cat((start, end.view(1, 1)), 1)).logits[:, -1] for end in ends])
    together = torch.cat((start, ends[None]), 1)
    length = together.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[4:, 4:] = torch.eye(3, dtype=torch.bool)
    mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 4, 4, 4]])
    found = model(together, attention_mask=mask, position_ids=positions).logits[0, 4:]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@MODELS
def test_generation_from_nothing(name: str) -> None:
    """From the token of the beginning."""
    model = build(name)
    found = generate(model, None, bos_token_id=3)
    assert (found.sequences[:, 0] == 3).all()
    same(found, generate(model, torch.tensor([[3]])))

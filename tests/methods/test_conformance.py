"""What every published method must stand in one process: causality, decoding, padding, recomputation, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from s2moe import S2MoEForCausalLM
from s2moe.moe.config import resolve_moe
from s2moe.moe.routing import RoutingContext
from s2moe.options import deep_merge
from tests.methods.cases import CASES, S2MOE_CASES, WITHOUT_DRAWS
from tests.models.decoder import ROTARY, tiny
from tests.models.test_causality import assert_causal
from tests.models.test_generation import PAD, PROMPTS, greedy, left_padded
from tests.ties import watch

STEPS = 6
EVERY_METHOD = pytest.mark.parametrize("moe", CASES.values(), ids=CASES)
EVERY_COMBINATION = pytest.mark.parametrize("moe", [*CASES.values(), *S2MOE_CASES.values()], ids=[*CASES, *S2MOE_CASES])


def model_of(moe: dict[str, Any], **given: Any) -> S2MoEForCausalLM:
    """A tiny random model, in float64 and training mode."""
    settings = dict(moe)
    method, router = settings.pop("method"), settings.pop("router", {})
    return tiny(method, router, **{f"moe_{key}": value for key, value in settings.items()}, **given).double()


def trained(moe: dict[str, Any], **given: Any) -> S2MoEForCausalLM:
    """The model after a few steps on random sequences, in evaluation mode: thresholds and stages are set."""
    model = model_of(moe, **given)
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(STEPS):
        ids = torch.randint(19, (4, 12), generator=generator)
        out = model(ids, labels=ids, context=RoutingContext(step=step, steps=STEPS))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update_routers([out.routing])
    return model.eval()


@EVERY_COMBINATION
def test_evaluation_is_causal(moe: dict[str, Any]) -> None:
    """No logit depends on a later token, nor on another sequence, before training and after."""
    assert_causal(model_of(moe, num_hidden_layers=2).eval())
    assert_causal(trained(moe, num_hidden_layers=2))


@EVERY_METHOD
def test_evaluation_with_one_expert_is_causal(moe: dict[str, Any]) -> None:
    assert_causal(trained(moe, num_hidden_layers=2), experts_per_token=1)


@EVERY_METHOD
@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 3, 1]], ids=str)
def test_decoding_with_the_cache_equals_a_full_pass(moe: dict[str, Any], steps: list[int]) -> None:
    model = trained(moe, moe_every=2, num_hidden_layers=4)
    ids = torch.randint(19, (2, 9))
    whole_BSV = model(ids, use_cache=False).logits
    cache, start, pieces = None, 0, []
    for step in steps:
        out = model(ids[:, start : start + step], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + step
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole_BSV, **ROTARY)


@EVERY_METHOD
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padded_sequences_equal_unpadded_ones(moe: dict[str, Any], implementation: str) -> None:
    model = trained(moe)
    model.set_attn_implementation(implementation)
    clear = watch(model.float()) if implementation == "eager" else []  # whose softmax and mask are float32's
    padded_BSV = model(**left_padded()).logits
    for row_SV, prompt in zip(padded_BSV, PROMPTS, strict=True):
        alone_SV = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(row_SV[-len(prompt) :], alone_SV, rtol=1e-4, atol=1e-4)
    assert all(clear)


@EVERY_METHOD
def test_a_padded_batch_generates_what_each_prompt_does_alone(moe: dict[str, Any]) -> None:
    model = trained(moe)
    batch = model.generate(**left_padded(), max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    for row, prompt in zip(batch.tolist(), PROMPTS, strict=True):
        assert row[-len(prompt) - 6 :] == greedy(model, prompt, 6)


@EVERY_METHOD
def test_beam_search_with_the_cache_equals_beam_search_without(moe: dict[str, Any]) -> None:
    model = trained(moe)
    prompt = torch.tensor([PROMPTS[0]])
    beams = [
        model.generate(prompt, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=cached).tolist()
        for cached in (True, False)
    ]
    assert beams[0] == beams[1]


def gradients(model: S2MoEForCausalLM, context: RoutingContext, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(19, (3, 8), generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    out = model(ids, labels=ids, context=context, **given)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EVERY_COMBINATION
def test_recomputing_activations_changes_nothing(moe: dict[str, Any]) -> None:
    for step in (1, 4):  # before and after a change of stage
        context = RoutingContext(seed=3, step=step, steps=STEPS)
        plain, again = model_of(moe), model_of(moe)
        again.load_state_dict(plain.state_dict())
        again.activation_checkpointing_enable()
        loss, wanted = gradients(plain, context)
        recomputed, found = gradients(again, context)
        torch.testing.assert_close(recomputed, loss)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
        for (name, left), right in zip(plain.named_buffers(), again.buffers(), strict=True):
            torch.testing.assert_close(left, right, msg=lambda text, name=name: f"{name}: {text}")


@EVERY_COMBINATION
def test_every_parameter_gets_a_finite_gradient_at_every_step(moe: dict[str, Any]) -> None:
    """Zero for what a stage does not train, but never none: the optimizer's groups must be complete on all ranks."""
    model = model_of(moe)
    for step in range(STEPS):
        _, found = gradients(model, RoutingContext(step=step, steps=STEPS))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert name in found, (step, name)
                assert torch.isfinite(found[name]).all(), (step, name)


@EVERY_COMBINATION
def test_what_layers_report_has_the_same_names_at_every_step(moe: dict[str, Any]) -> None:
    model = model_of(moe)
    ids = torch.randint(19, (3, 8))
    names = set()
    for step in range(STEPS):
        out = model(ids, labels=ids, context=RoutingContext(step=step, steps=STEPS))
        names.add(tuple(tuple(layer.values) for layer in out.routing))
        for layer in out.routing:
            assert all(value.dim() == 0 and not value.requires_grad for value in layer.values.values())
            assert layer.counts_E.shape == (4,)
    assert len(names) == 1


@EVERY_METHOD
def test_padding_changes_no_loss(moe: dict[str, Any]) -> None:
    """Right padding that is masked out: the same task and auxiliary losses as without it."""
    model = model_of(deep_merge(moe, {"stochastic": {"enabled": False}, **WITHOUT_DRAWS.get(moe["method"], {})}))
    context = RoutingContext(seed=2, step=1, steps=STEPS)
    ids = torch.randint(1, 19, (2, 8))
    plain = model(ids, labels=ids, context=context)
    padded = torch.nn.functional.pad(ids, (0, 3), value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    labels = torch.nn.functional.pad(ids, (0, 3), value=-100)
    with_padding = model(padded, attention_mask=mask, labels=labels, context=context)
    torch.testing.assert_close(with_padding.task_loss, plain.task_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(with_padding.aux_loss, plain.aux_loss, rtol=1e-5, atol=1e-6)
    for left, right in zip(with_padding.routing, plain.routing, strict=True):
        assert left.counts_E.tolist() == right.counts_E.tolist()


@EVERY_METHOD
def test_saved_and_loaded_model_gives_the_same_logits(moe: dict[str, Any], tmp_path: Path) -> None:
    model = trained(moe).float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(19, (2, 9))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert {name for name, _ in loaded.named_buffers()} == {name for name, _ in model.named_buffers()}
    for (name, left), right in zip(loaded.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(left, right), name


@EVERY_METHOD
def test_half_precision_forward_and_backward_are_finite(moe: dict[str, Any]) -> None:
    """Weights in bfloat16, routers and their state in float32."""
    model = model_of(moe).to(torch.bfloat16)
    loss, found = gradients(model, RoutingContext(step=1, steps=STEPS))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    for name, buffer in model.named_buffers():
        assert buffer.dtype != torch.bfloat16, name


@EVERY_COMBINATION
def test_resolving_twice_changes_nothing(moe: dict[str, Any]) -> None:
    """A saved configuration holds the resolved options and is resolved again when loaded."""
    config = model_of(moe).config
    assert type(config)(**config.to_dict()).moe == config.moe
    assert resolve_moe(config.moe).method == moe["method"]

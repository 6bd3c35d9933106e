"""What reaches an SMoE layer in a block of another architecture, and what of it reaches the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from s2moe import upcycle
from s2moe.hub.block import sparse_blocks
from s2moe.moe.routing import RoutingContext
from tests.hub.foreign import foreign, ids

NAMES = pytest.mark.parametrize("name", ["llama", "gpt2"])


def sparse(name: str = "llama", method: str = "smoe", **given: Any) -> Any:
    return upcycle(foreign(name), method, experts=4, noise=0.2, **given).train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: Any, **given: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids(), labels=ids(), **given).loss.backward()
    return gradients(model)


@NAMES
def test_padding_takes_no_part_in_statistics_and_losses(name: str) -> None:
    model = sparse(name)
    mask = torch.ones_like(ids())
    mask[0, :4] = 0
    padded = model(ids(), attention_mask=mask)
    for layer in padded.routing:
        assert layer.counts_E.sum() == mask.sum() * 2
    other = ids().clone()
    other[0, :4] = 7  # what stands under padding does not matter
    again = model(other, attention_mask=mask)
    torch.testing.assert_close(again.aux_loss, padded.aux_loss)
    assert [layer.layer for layer in padded.routing] == [0, 1, 2]


@NAMES
def test_the_loss_holds_the_auxiliary_losses_and_trains_the_routers(name: str) -> None:
    def of(coefficient: float) -> tuple[Any, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        model = sparse(name, moe={"router": {"balance_loss": coefficient}}).double()
        torch.manual_seed(3)
        output = model(ids(), labels=ids())
        torch.testing.assert_close(output.loss, output.task_loss + output.aux_loss)
        output.loss.backward()
        return output, {key: value for key, value in gradients(model).items() if "router" in key}

    (_, none), (one, small), (two, large) = of(0.0), of(0.5), of(1.0)
    torch.testing.assert_close(one.aux_loss * 2, two.aux_loss)
    assert len(none) == 3
    for key in none:
        assert (small[key] - none[key]).abs().max() > 1e-4, key
        torch.testing.assert_close(large[key] - none[key], 2 * (small[key] - none[key]))


def test_accumulated_batches_share_the_auxiliary_loss() -> None:
    """A trainer divides summed losses by the scored tokens of all its batches."""
    model = sparse()
    scored = ids()[:, 1:].numel()
    whole = model(ids(), labels=ids())
    half = model(ids(), labels=ids(), num_items_in_batch=torch.tensor(2 * scored))
    torch.testing.assert_close(half.loss, whole.loss / 2)


def test_evaluation_at_another_number_of_experts() -> None:
    model = sparse().double().eval()
    assert model(ids(), experts_per_token=1).routing[0].counts_E.sum() == ids().numel()
    made = model.generate(ids()[:1], max_new_tokens=4, do_sample=False, experts_per_token=1, use_cache=True)
    prompt = ids()[:1]
    for _ in range(4):
        following = model(prompt, experts_per_token=1).logits[:, -1].argmax(-1, keepdim=True)
        prompt = torch.cat((prompt, following), 1)
    assert torch.equal(made, prompt)


@NAMES
def test_randomness_is_keyed_by_the_context(name: str) -> None:
    model = sparse(name, "s2moe")
    context = RoutingContext(seed=1, step=5)
    first, second = (model(ids(), context=context).logits for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, model(ids(), context=RoutingContext(seed=1, step=6)).logits)
    assert not torch.equal(model(ids()).logits, model(ids()).logits)  # without one, every training forward is another


def test_nothing_is_left_behind_in_the_layers() -> None:
    model = sparse()
    model(ids(), labels=ids())
    blocks = sparse_blocks(model)
    assert all(block.context is None and block.statistics is None for block in blocks)
    with pytest.raises(IndexError):
        model(ids() + 1000)
    with pytest.raises(RuntimeError):  # within a block
        model(inputs_embeds=torch.zeros(1, 3, 5))
    assert all(block.context is None for block in blocks)


@NAMES
@pytest.mark.parametrize("method", ["smoe", "s2moe"])
def test_recomputed_activations_route_as_the_first_pass_did(name: str, method: str) -> None:
    model = sparse(name, method)
    contexts = [RoutingContext(seed=1, step=number) for number in (5, 6)]
    wanted = [step(model, context=context) for context in contexts]
    model.gradient_checkpointing_enable()
    model.zero_grad()
    losses = [model(ids(), labels=ids(), context=context).loss for context in contexts]
    for loss, gradient in zip(losses, wanted, strict=True):  # both backward passes come after both forward passes
        model.zero_grad()
        loss.backward()
        got = gradients(model)
        assert got.keys() == gradient.keys()
        for key in gradient:
            torch.testing.assert_close(got[key], gradient[key], msg=key)
    with pytest.raises(ValueError, match="use_reentrant=True would drop"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_routers_take_their_feedback_after_a_step() -> None:
    model = sparse(method="loss_free")
    output = model(ids(), labels=ids())
    model.update_routers([output.routing])
    for block, layer in zip(sparse_blocks(model), output.routing, strict=True):
        bias, load = block.moe.router.bias_E, layer.counts_E.float()
        assert (bias[load > load.mean()] < bias[load < load.mean()].min()).all()
        assert bias.any()


def test_a_trainer_needs_nothing_of_ours(tmp_path: Any) -> None:
    """Routers learn, and accumulated micro-batches weigh the auxiliary losses about as one batch does."""
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 12).tolist()]
    weights = []
    for batch, accumulated in ((4, 1), (2, 2)):
        torch.manual_seed(2)
        model = sparse(moe={"router": {"balance_loss": 1.0, "balance_scope": "local"}}, method="noisy_topk")
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(batch)),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
        assert trainer.model_accepts_loss_kwargs
        assert trainer.predict(rows).predictions.shape == (8, 12, model.config.vocab_size)  # logits, nothing else
        before = [block.moe.router.scores.weight.clone() for block in sparse_blocks(model)]
        trainer.train()
        after = [block.moe.router.scores.weight for block in sparse_blocks(model)]
        assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        losses = [event["train_loss"] for event in trainer.state.log_history if "train_loss" in event]
        weights.append(losses[-1])
        trainer.save_model(tmp_path / "saved")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(loaded(ids()).logits, model.eval()(ids()).logits, rtol=1e-4, atol=1e-4)
    assert abs(weights[0] - weights[1]) < 0.1 * weights[0]


def test_weights_not_in_a_checkpoint_are_drawn(tmp_path: Any) -> None:
    """Not left as whatever the memory held."""
    model = sparse().eval()
    state = {name: value for name, value in model.state_dict().items() if "router" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = type(model).from_pretrained(tmp_path)
    for block in sparse_blocks(loaded):
        assert 0.1 < block.moe.router.scores.weight.std() < 0.6  # initializer_range is 0.3
    built = type(model)(model.config)
    for block in sparse_blocks(built):
        for parameter in block.moe.experts.parameters():
            assert 0.2 < parameter.std() < 0.4

"""What a Trainer may meet: batches without labels, other ranks, nothing logged, experts frozen without DeepSpeed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM, Trainer

import s2moe
from s2moe import S2MoEConfig, S2MoEForCausalLM, upcycle
from s2moe.finetuning import callback
from s2moe.finetuning.callback import RoutingCallback
from s2moe.finetuning.trainer import S2MoETrainer
from s2moe.moe.freezing import freeze

from .trainer_jobs import Lines, arguments, logged

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def own(**settings: Any) -> S2MoEForCausalLM:
    torch.manual_seed(1)
    moe = {"method": "smoe", "num_experts": 4, "expert_hidden": 8}
    return S2MoEForCausalLM(S2MoEConfig(**SIZES, moe=moe, **settings))


def upcycled() -> Any:
    torch.manual_seed(1)
    return upcycle(LlamaForCausalLM(LlamaConfig(intermediate_size=32, **SIZES)), method="smoe", experts=4)


class WithoutLabels(Lines):
    """In every second batch of four no position has a label."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return {**row, "labels": torch.full_like(row["labels"], -100)} if index // 4 % 2 else row


@pytest.mark.parametrize("build", [own, upcycled])
@pytest.mark.parametrize(("base", "smoothing"), [(S2MoETrainer, 0.0), (S2MoETrainer, 0.1), (Trainer, 0.0)])
def test_a_step_without_labels_changes_nothing_for_the_worse(
    build: Any, base: type[Any], smoothing: float, tmp_path: Path
) -> None:
    class InOrder(base):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = build()
    made = InOrder(
        model=model,
        args=arguments(tmp_path, label_smoothing_factor=smoothing),
        train_dataset=WithoutLabels(),
        callbacks=[RoutingCallback(write=False)] if base is Trainer else None,
        **({} if base is Trainer else {"routing": RoutingCallback(write=False)}),
    )
    made.train()
    losses = logged(made, "loss")
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] > 1
    assert losses[1] == pytest.approx(0.0, abs=1e-6)
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


@pytest.mark.parametrize("build", [own, upcycled])
def test_a_batch_without_labels_has_the_auxiliary_loss_alone(build: Any) -> None:
    ids = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))
    output = build().train()(input_ids=ids, labels=torch.full_like(ids, -100))
    assert output.task_loss.item() == 0.0
    assert output.loss.item() == pytest.approx(output.aux_loss.item())
    assert output.aux_loss.item() > 0


def test_ranks_draw_different_dropout_and_the_trainers_own_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer seeds all ranks alike, so its own draws would make the same mask for each of them."""
    batch = {key: torch.stack([row[key] for row in Lines().rows[:4]]) for key in ("input_ids", "attention_mask")}

    def first_losses(rank: int) -> list[Tensor]:
        monkeypatch.setattr(callback.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(callback.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(callback.dist, "get_rank", lambda: rank)
        model, routing = own(hidden_dropout=0.5).train(), RoutingCallback(write=False)
        made = Trainer(model=model, args=arguments(tmp_path), train_dataset=Lines())
        monkeypatch.setattr(callback, "connect", lambda _: None)
        routing.on_train_begin(made.args, made.state, made.control, model=model)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        found = [model(**batch, labels=batch["input_ids"]).task_loss.detach() for _ in range(2)]
        assert torch.get_rng_state().equal(before)
        routing.on_train_end(made.args, made.state, made.control)
        return found

    zero, again, one = first_losses(0), first_losses(0), first_losses(1)
    torch.testing.assert_close(zero, again)
    assert len({round(loss.item(), 4) for loss in (*zero, *one)}) == 4  # micro-batches and ranks all differ


def test_without_log_events_memory_does_not_grow(tmp_path: Path) -> None:
    made = S2MoETrainer(
        model=own(),
        args=arguments(tmp_path, logging_strategy="no"),
        train_dataset=Lines(),
        routing=RoutingCallback(write=False),
    )
    made.train()
    assert isinstance(made._losses, Tensor)
    assert made._losses.shape == (2,)


@pytest.mark.parametrize("parts", [{"routers": False}, {"routers": True}])
def test_frozen_experts_need_no_gradient_without_deepspeed(parts: dict[str, bool], tmp_path: Path) -> None:
    """DDP would wait for the gradient that they never get."""
    model = own()
    freeze(model, experts=True, **parts)
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    made = S2MoETrainer(
        model=model, args=arguments(tmp_path), train_dataset=Lines(), routing=RoutingCallback(write=False)
    )
    made.create_optimizer()
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == wanted
    assert not any("experts" in name for name in wanted)


def test_router_logits_are_refused_by_name() -> None:
    """transformers' own outputs of that name are of routers that are gone."""
    sizes = {**SIZES, "intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None}
    ids = torch.randint(32, (2, 12))
    theirs = OlmoeForCausalLM(OlmoeConfig(**sizes, eos_token_id=None, output_router_logits=True)).eval()
    with pytest.warns(UserWarning, match="output_router_logits"):
        ours = s2moe.from_transformers(theirs)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    with pytest.raises(ValueError, match="output_router_logits=True: our layers have none"):
        ours(ids, output_router_logits=True)
    ours.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True: our layers have none"):
        ours(ids)

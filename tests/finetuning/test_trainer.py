"""Fine-tuning through transformers' Trainer, in one process: losses, gradients, schedules, logs, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from s2moe import S2MoEForCausalLM, S2MoEForSequenceClassification, upcycle
from s2moe.config import ConfigError, load
from s2moe.config.finetune import FinetuneConfig
from s2moe.config.learning_rates import LearningRates
from s2moe.finetuning.callback import RoutingCallback
from s2moe.finetuning.loading import load_pretrained
from s2moe.finetuning.optimizer import parameter_groups
from s2moe.finetuning.trainer import COMPLETE, S2MoETrainer, check_arguments, newest_checkpoint
from s2moe.training.errors import TrainingError
from tests.ties import watch

from .trainer_jobs import Lines, Texts, arguments, logged, pretrained, trainer, weights

SST2 = Path(__file__).parents[2] / "configs" / "finetune" / "sst2.yaml"
NO_AUX = {"moe": {"router": {"balance_loss": 0.0}}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("smoe"))


@pytest.fixture(scope="module")
def learning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose routers learn between steps."""
    router = {"bias_update_rate": 0.01, "combine": "sigmoid"}
    return pretrained(tmp_path_factory.mktemp("loss_free"), router=router)


def router_gradient(made: Any, inputs: dict[str, Any], num_items: int | None) -> torch.Tensor:
    made.model.zero_grad()
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    made.compute_loss(made.model, dict(inputs), num_items_in_batch=num_items).backward()
    return made.model.model.layers[0].moe.router.scores.weight.grad.clone()


def batch(count: int = 8, width: int = 12) -> dict[str, Any]:
    rows = Texts(count, width).rows
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_router_feels_the_auxiliary_loss(tmp_path: Path, source: Path, smoothing: float) -> None:
    """Also under label smoothing, where transformers' Trainer drops it; in proportion to its coefficient."""
    found = {}
    for coefficient in (0.0, 0.5, 1.0):
        changes = {"moe": {"router": {"balance_loss": coefficient}}}
        made = trainer(tmp_path, source, changes, label_smoothing_factor=smoothing)
        found[coefficient] = router_gradient(made, batch(), 8)
    assert not torch.allclose(found[0.5], found[0.0], atol=1e-6)
    torch.testing.assert_close(found[1.0] - found[0.0], 2 * (found[0.5] - found[0.0]), rtol=1e-3, atol=1e-7)


def test_label_smoothing_is_of_the_task_loss_alone(tmp_path: Path, source: Path) -> None:
    made = trainer(tmp_path, source, label_smoothing_factor=0.2)
    made.current_gradient_accumulation_steps = 1
    inputs = batch()
    made.model.train()
    loss, outputs = made.compute_loss(made.model, dict(inputs), return_outputs=True, num_items_in_batch=8)
    smoothed = F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.2)
    torch.testing.assert_close(loss, smoothed + outputs.aux_loss)


def test_padding_changes_nothing(tmp_path: Path, source: Path) -> None:
    """Neither losses, nor the router's gradient and statistics, however wide the batch is padded, on either side."""
    results = []
    for width, left in ((12, False), (30, False), (30, True)):
        made = trainer(tmp_path, source, NO_AUX | {"moe": {"router": {"balance_loss": 0.5, "z_loss": 0.1}}})
        clear = watch(made.model)
        inputs = batch(width=width)
        if left:
            shift = width - inputs["attention_mask"].sum(1)
            for key in ("input_ids", "attention_mask"):
                inputs[key] = torch.stack([row.roll(int(by)) for row, by in zip(inputs[key], shift, strict=True)])
        gradient = router_gradient(made, inputs, 8)
        made.model.train()
        outputs = made.model(**inputs)
        counts = torch.stack([layer.counts_E for layer in outputs.routing])
        assert counts.sum(1).tolist() == [2 * int(inputs["attention_mask"].sum())] * 2
        results.append((outputs.logits, outputs.aux_loss, gradient, counts))
        assert all(clear)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulation_equals_one_batch(tmp_path: Path, source: Path, smoothing: float) -> None:
    """Losses as logged, and weights. The z-loss is a mean over tokens: with texts of one length the same either way."""
    data = Texts()
    for row in data.rows:
        row["attention_mask"][:] = 1
    changes = {"moe": {"router": {"balance_loss": 0.0, "z_loss": 0.1}}}
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        made = trainer(
            tmp_path / str(size),
            source,
            changes,
            data=data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=smoothing,
        )
        clear = watch(made.model)
        made.train()
        assert all(clear)
        runs.append(made)
    whole, parts = runs
    for name in ("loss", "task_loss", "aux_loss", "grad_norm"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4)
    assert logged(whole, "aux_loss")[0] > 0.01
    for loss, task, aux in zip(*(logged(whole, name) for name in ("loss", "task_loss", "aux_loss")), strict=True):
        assert loss == pytest.approx(task + aux, rel=1e-5)
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_layers_follow_the_trainers_steps(tmp_path: Path, learning: Path) -> None:
    """Step, length and micro-batch reach the layers; routers learn from a step once, from all its micro-batches."""
    made = trainer(tmp_path, learning, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    seen, loads = [], []
    layer = made.model.model.layers[0].moe
    layer.register_forward_pre_hook(lambda module, args: seen.append((args[1].step, args[1].microbatch, args[1].steps)))
    after_step = layer.router.after_step
    layer.router.after_step = lambda load_E: (loads.append(int(load_E.sum())), after_step(load_E))
    made.train()
    assert seen == [(step, index, 4) for step in range(4) for index in range(2)]
    assert len(loads) == 4
    assert min(loads) > 2 * 2 * 4  # two micro-batches of two texts of at least four tokens
    assert layer.router.bias_E.abs().max() > 0


@pytest.mark.parametrize("noise", [True, False])
def test_the_noise_of_s2moe_can_be_left_out(tmp_path: Path, noise: bool) -> None:
    """model.noise of a fine-tuning run: two passes in training differ by the noise alone, and without it not at all."""
    source = pretrained(tmp_path / "s2moe", method="s2moe", stochastic={"samples": 8})
    config = load(FinetuneConfig, SST2, [f"model.noise={str(noise).lower()}"])
    moe = config.model_changes({"name": "topk", "balance_loss": 0.01}, ("a", "b", "c"))["moe"]
    made = trainer(tmp_path / "run", source, {"moe": moe})
    model, inputs = made.model.train(), batch()
    first, second = (model(**inputs) for _ in range(2))
    assert first.loss.equal(second.loss) != noise
    tokens = int(inputs["attention_mask"].sum())
    assert [int(layer.counts_E.sum()) for layer in first.routing] == [tokens * (2 if noise else 1)] * 2  # k = 1
    evaluated = model.eval()(**inputs)
    assert evaluated.logits.equal(first.logits) != noise  # what is trained is what is evaluated

    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    made.train()
    assert len(logged(made, "loss")) == 4
    assert all(math.isfinite(loss) for loss in logged(made, "loss"))
    assert all(("routing/infonce_loss" in event) == noise for event in made.state.log_history if "loss" in event)
    still = {name for name, value in model.named_parameters() if value.equal(before[name])}
    assert not still


def test_schedules_see_the_runs_length(tmp_path: Path) -> None:
    """SMoE-Dropout's k grows over the Trainer's steps, which it cannot know without a context."""
    directory = pretrained(tmp_path / "dropout", method="smoe_dropout")
    made = trainer(tmp_path / "run", directory)
    made.train()
    assert logged(made, "routing/load_entropy")
    counts = []
    again = trainer(tmp_path / "again", directory)
    again.model.register_forward_hook(
        lambda module, args, out: counts.append(int(out.routing[0].counts_E.sum())) if module.training else None
    )
    again.train()
    assert counts[-1] / counts[0] > 1.2


def test_a_plain_trainer_needs_only_the_callback(tmp_path: Path, learning: Path) -> None:
    model = load_pretrained(S2MoEForSequenceClassification, learning, changes={"num_labels": 3})
    made = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=Texts(),
        eval_dataset=Texts(),
        callbacks=[RoutingCallback()],
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    router = model.model.layers[0].moe.router
    learned = []
    after_step = router.after_step
    router.after_step = lambda load_E: (learned.append(load_E), after_step(load_E))
    made.train()
    assert len(learned) == 4
    assert 0 <= made.evaluate()["eval_accuracy"] <= 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"layer_0/load_entropy", "layer_1/balance_loss"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("layer_0/load_entropy")] == [1, 2, 3, 4]
    assert "load/heat_map" in tags["images"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_language_models(tmp_path: Path, source: Path, smoothing: float) -> None:
    """Ours and a dense model of transformers made sparse: losses add up, evaluation is of the task loss."""
    llama = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    models = (load_pretrained(S2MoEForCausalLM, source), upcycle(LlamaForCausalLM(llama), method="smoe", experts=4))
    for model in models:
        args = arguments(tmp_path, gradient_accumulation_steps=2, label_smoothing_factor=smoothing)
        made = S2MoETrainer(
            model=model, args=args, train_dataset=Lines(), eval_dataset=Lines(), routing=RoutingCallback(write=False)
        )
        made.train()
        for loss, task, aux in zip(*(logged(made, name) for name in ("loss", "task_loss", "aux_loss")), strict=True):
            assert loss == pytest.approx(task + aux, rel=1e-5)
            assert aux > 0.005
        evaluated = made.evaluate()["eval_loss"]
        assert evaluated == pytest.approx(smoothed_loss(model, smoothing), rel=1e-5)
        if smoothing == 0 and isinstance(model, S2MoEForCausalLM):
            plain = Trainer(model=model, args=args, eval_dataset=Lines()).evaluate()
            assert plain["eval_loss"] == pytest.approx(evaluated, rel=1e-5)


@torch.no_grad()
def smoothed_loss(model: Any, smoothing: float) -> float:
    """The mean over Lines in batches of four."""
    model.eval()
    losses = []
    for start in range(0, 16, 4):
        rows = [Lines()[index] for index in range(start, start + 4)]
        ids, mask, labels = (
            torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask", "labels")
        )
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        losses.append(F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=smoothing))
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize(
    ("freeze", "moved"),
    [("routers_and_experts", (False, False)), ("routers", (False, True)), ("none", (True, True))],
)
def test_freezing(tmp_path: Path, source: Path, freeze: str, moved: tuple[bool, bool]) -> None:
    made = trainer(tmp_path, source, freeze=freeze, weight_decay=0.1)
    layer = made.model.model.layers[0]
    parts = (layer.moe.router.scores.weight, layer.moe.experts.w1, layer.attention.q_proj.weight)
    before = [part.detach().clone() for part in parts]
    made.train()
    changed = tuple(not part.equal(old) for part, old in zip(parts, before, strict=True))
    assert changed == (*moved, True)


@pytest.mark.parametrize("parameters", [None, ["experts.w1", "experts.w2"]])
def test_an_adapter_is_trained_alone(tmp_path: Path, source: Path, parameters: list[str] | None) -> None:
    model = load_pretrained(S2MoEForCausalLM, source)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, lora)
    before = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    routing = RoutingCallback(write=False)
    S2MoETrainer(model=tuned, args=arguments(tmp_path), train_dataset=Lines(), routing=routing).train()
    moved = {name for name, parameter in tuned.named_parameters() if not parameter.equal(before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert any("experts" in name for name in moved) is (parameters is not None)


def test_the_learning_rates_of_gpt2(tmp_path: Path) -> None:
    """Its blocks and embeddings have other names."""
    factor = LearningRates(head=2.0, layer_decay=0.5, embedding=0.1).factors(2)
    names = ("transformer.h.0.moe.router.scores.weight", "transformer.h.1.attn.c_attn.weight", "lm_head.weight")
    assert [factor(name) for name in names] == [0.5, 1.0, 2.0]
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "model.embed_tokens.weight"):
        assert factor(name) == pytest.approx(0.025)


def test_discriminative_learning_rates(tmp_path: Path, source: Path) -> None:
    rates = LearningRates(head=2.0, layer_decay=0.5, embedding=0.0)
    model = load_pretrained(S2MoEForSequenceClassification, source, changes={"num_labels": 3})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: group["lr"]
        for group in parameter_groups(model, 0.1, 0.01, rates)
        for parameter in group["params"]
    }
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["score.weight"] == 0.2
    assert found["model.norm.weight"] == 0.1
    assert found["model.layers.1.moe.experts.w2"] == found["model.layers.1.moe.router.scores.weight"] == 0.1
    assert found["model.layers.0.attention.q_proj.weight"] == found["model.layers.0.mlp_norm.weight"] == 0.05
    assert found["model.embed_tokens.weight"] == 0.0
    made = trainer(tmp_path, source, extras={"learning_rates": rates}, lr_scheduler_type="constant")
    before = made.model.model.embed_tokens.weight.detach().clone()
    made.train()
    assert made.model.model.embed_tokens.weight.equal(before)
    assert {group["lr"] for group in made.optimizer.param_groups} == {0.01, 0.005, 0.0025, 0.0}


def test_resuming_equals_not_stopping(tmp_path: Path) -> None:
    directory = pretrained(tmp_path / "source", dropout=0.1, method="s2moe")
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = trainer(tmp_path / "whole", directory, **settings)
    whole.train()
    resumed = trainer(tmp_path / "whole", directory, **settings)
    # A checkpoint that was cut short is passed over.
    (tmp_path / "whole" / "checkpoint-6" / COMPLETE).unlink()
    assert newest_checkpoint(tmp_path / "whole") == str(tmp_path / "whole" / "checkpoint-3")
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "loss") == logged(whole, "loss")
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert one.equal(other)
    again = trainer(tmp_path / "whole", directory, **settings)
    with pytest.raises(ValueError, match="is not complete"):
        again.train(resume_from_checkpoint=str(tmp_path / "source"))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, source: Path) -> None:
    made = trainer(
        tmp_path,
        source,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        learning_rate=1.0,  # it gets worse after the first step
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    made.train()
    losses = {event["step"]: event["eval_loss"] for event in made.state.log_history if "eval_loss" in event}
    best = min(losses, key=losses.__getitem__)
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    saved = weights(tmp_path / f"checkpoint-{best}")
    for name, value in made.model.named_parameters():
        assert value.equal(saved[name]), name


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, source: Path) -> None:
    made = trainer(tmp_path, source)
    with torch.no_grad():
        made.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite at step 1"):
        made.train()


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's DataParallel would gather statistics that it does not understand."""
    args = arguments(tmp_path, use_cpu=True)
    monkeypatch.setattr(type(args), "n_gpu", 2)
    with pytest.raises(ConfigError, match="one process with 2 GPUs"):
        check_arguments(SimpleNamespace(args=args, model=load_pretrained(S2MoEForCausalLM, source)))


def test_sixteen_bit_weights_are_warned_of(tmp_path: Path, source: Path) -> None:
    model = load_pretrained(S2MoEForCausalLM, source).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="weights in torch.bfloat16 are trained as they are"):
        S2MoETrainer(model=model, args=arguments(tmp_path, use_cpu=True), train_dataset=Lines())

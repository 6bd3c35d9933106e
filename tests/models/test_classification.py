"""The classifier: what it pools, what it takes over from a language model, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from s2moe import S2MoEConfig, S2MoEForCausalLM, S2MoEForSequenceClassification
from s2moe.config import ConfigError
from s2moe.finetuning.loading import load_pretrained
from s2moe.models.classification import last_real
from s2moe.parallel import ExpertParallel


def config(**changes: object) -> S2MoEConfig:
    moe = {"method": "s2moe", "num_experts": 4, "expert_hidden": 16}
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return S2MoEConfig(**{**sizes, "num_labels": 3, "moe": moe, **changes})


def test_it_pools_the_last_real_token() -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert last_real(hidden, right).tolist() == [hidden[0, 1].tolist(), hidden[1, 3].tolist()]
    left = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    assert last_real(hidden, left).equal(hidden[:, 3])
    assert last_real(hidden, None).equal(hidden[:, 3])
    with pytest.raises(ValueError, match="no real token"):
        last_real(hidden, torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))


def test_a_text_counts_alone() -> None:
    """Logits do not depend on what is padded, on the padding's ids, or on the batch."""
    model = S2MoEForSequenceClassification(config()).eval()
    text = torch.randint(0, 32, (1, 6))
    alone = model(input_ids=text).logits
    padded = torch.cat((text, torch.full((1, 3), 7)), 1)
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    both = model(input_ids=torch.cat((padded, torch.randint(0, 32, (1, 9)))), attention_mask=mask).logits
    torch.testing.assert_close(both[:1], alone)
    marked = S2MoEForSequenceClassification(config(pad_token_id=7)).eval()
    marked.load_state_dict(model.state_dict())
    text[text == 7] = 8
    torch.testing.assert_close(
        marked(input_ids=torch.cat((text, torch.full((1, 3), 7)), 1)).logits, model(input_ids=text).logits
    )


def test_loss_is_the_mean_over_texts_and_layers() -> None:
    model = S2MoEForSequenceClassification(config()).train()
    ids, labels = torch.randint(0, 32, (4, 6)), torch.tensor([0, 2, -100, 1])
    out = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(out.task_loss, torch.nn.functional.cross_entropy(out.logits, labels))
    torch.testing.assert_close(out.aux_loss, torch.stack([layer.loss for layer in out.routing]).mean())
    torch.testing.assert_close(out.loss, out.task_loss + out.aux_loss)
    out.loss.backward()
    assert model.model.layers[0].moe.router.scores.weight.grad.abs().sum() > 0


def test_a_batch_without_a_class_has_no_task_loss() -> None:
    """It may be a micro-batch of many."""
    model = S2MoEForSequenceClassification(config()).train()
    ids, labels = torch.randint(0, 32, (2, 6)), torch.tensor([-100, -100])
    for items in (None, torch.tensor(4)):
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, num_items_in_batch=items)
        assert out.task_loss == 0
        out.loss.backward()
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_it_starts_from_a_language_model(tmp_path: Path) -> None:
    """Through from_pretrained, and through load_pretrained, whole and by experts; the head alone is new."""
    language = S2MoEForCausalLM(config())
    language.save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert isinstance(auto, S2MoEForSequenceClassification)
    ours = load_pretrained(S2MoEForSequenceClassification, tmp_path, changes={"num_labels": 5})
    half = load_pretrained(S2MoEForSequenceClassification, tmp_path, ExpertParallel(2, 1), {"num_labels": 5})
    for name, value in language.model.state_dict().items():
        assert auto.model.state_dict()[name].equal(value), name
        assert ours.model.state_dict()[name].equal(value), name
        expected = value[2:] if ".experts." in name else value
        assert half.model.state_dict()[name].equal(expected), name
    assert auto.score.weight.shape == ours.score.weight.shape == (5, 16)
    ours.save_pretrained(tmp_path / "tuned")
    again = load_pretrained(S2MoEForSequenceClassification, tmp_path / "tuned")
    assert again.score.weight.equal(ours.score.weight)
    with pytest.raises(ConfigError, match="score"):
        load_pretrained(S2MoEForSequenceClassification, tmp_path / "tuned", changes={"num_labels": 4})


def test_noise_can_be_switched_off(tmp_path: Path) -> None:
    """What the model computes stays the same, as S2MoE's evaluation is the clean path."""
    model = S2MoEForCausalLM(config()).eval()
    model.save_pretrained(tmp_path)
    quiet = load_pretrained(S2MoEForCausalLM, tmp_path, changes={"moe": {"stochastic": {"enabled": False}}})
    ids = torch.randint(0, 32, (2, 9))
    torch.testing.assert_close(quiet.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    assert "noise_std" not in quiet.train()(input_ids=ids).routing[0].values
    quiet.save_pretrained(tmp_path / "quiet")
    with pytest.raises(ConfigError, match="mix_gate"):
        load_pretrained(S2MoEForCausalLM, tmp_path / "quiet", changes={"moe": {"stochastic": {"enabled": True}}})


def test_noise_stays_where_the_gate_is_part_of_inference(tmp_path: Path) -> None:
    moe = {"method": "s2moe", "num_experts": 4, "expert_hidden": 16, "stochastic": {"inference": "gated"}}
    S2MoEForCausalLM(config(moe=moe)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="would change what it computes"):
        load_pretrained(S2MoEForCausalLM, tmp_path, changes={"moe": {"stochastic": {"enabled": False}}})


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    S2MoEForCausalLM(config()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.layers\.2"):
        load_pretrained(S2MoEForSequenceClassification, tmp_path, changes={"num_hidden_layers": 3})
    with pytest.raises(ConfigError, match="has no place for"):
        load_pretrained(S2MoEForSequenceClassification, tmp_path, changes={"num_hidden_layers": 1})
    with pytest.raises(ConfigError, match="bogus"):
        load_pretrained(S2MoEForSequenceClassification, tmp_path, changes={"moe": {"bogus": 1}})
    with pytest.raises(ConfigError, match="no weights"):
        load_pretrained(S2MoEForSequenceClassification, tmp_path / "absent")

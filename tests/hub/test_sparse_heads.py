"""Models of other architectures without a head, and with a classifier."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import s2moe
from s2moe.moe.layer import SMoELayer
from tests.hub.foreign import DENSE, foreign, ids

CONVERTED = ("qwen2_moe", "qwen3_moe", "olmoe")


def sparse(name: str) -> Any:
    if name in CONVERTED:
        return s2moe.from_transformers(foreign(name))
    return s2moe.upcycle(foreign(name), experts=4, noise=0.2, moe={"router": {"balance_loss": 0.5}})


@pytest.mark.parametrize("name", [*DENSE, *CONVERTED])
def test_the_auto_classes_find_all_heads(name: str, tmp_path: Path) -> None:
    """The classifier scores the headless model's last hidden state, which is the language model's."""
    model = sparse(name).eval()
    model.save_pretrained(tmp_path)
    headless = AutoModel.from_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    hidden = model(ids(), output_hidden_states=True)
    output = headless(ids())
    torch.testing.assert_close(output.last_hidden_state, hidden.hidden_states[-1])
    assert [layer.layer for layer in output.routing] == [layer.layer for layer in hidden.routing]
    logits = classifier(ids()).logits
    torch.testing.assert_close(logits, classifier.score(output.last_hidden_state[:, -1]))

    classifier.save_pretrained(tmp_path / "tuned")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert type(again) is type(pickle.loads(pickle.dumps(classifier)))
    # Close, not equal: weights mapped from a file start at other addresses, where a product may round otherwise.
    torch.testing.assert_close(again(ids()).logits, logits)
    language = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(language(ids(), return_dict=False)[0], hidden.logits)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_does_not_reach_a_classifier(name: str, left: bool, tmp_path: Path) -> None:
    model = sparse(name)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    real = slice(4, None) if left else slice(None, 5)
    alone = classifier(ids()[:1, real]).logits
    mask = torch.zeros_like(ids())
    mask[0, real] = 1
    mask[1] = 1
    padded = classifier(ids(), attention_mask=mask, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(padded.logits[:1], alone, rtol=1e-4, atol=1e-5)
    assert all(layer.counts_E.sum() == 2 * mask.sum() for layer in padded.routing)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_classifier_trains_its_routers(name: str, tmp_path: Path) -> None:
    """The loss is the task's and the layers', and a batch has its share of both."""
    sparse(name).save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).train()
    labels = torch.tensor([2, 0])
    output = classifier(ids(), labels=labels)
    assert output.aux_loss > 0.1
    torch.testing.assert_close(output.loss, output.task_loss + output.aux_loss)
    torch.testing.assert_close(output.task_loss, torch.nn.functional.cross_entropy(output.logits, labels))
    half = classifier(ids(), labels=labels, num_items_in_batch=4)
    torch.testing.assert_close(half.loss, output.loss / 2)
    output.aux_loss.backward()
    for layer in classifier.modules():
        if isinstance(layer, SMoELayer):
            assert layer.router.scores.weight.grad.abs().max() > 0


def test_a_classifier_is_converted_no_further(tmp_path: Path) -> None:
    model = sparse("llama")
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    with pytest.raises(ValueError, match="mixture of experts already"):
        s2moe.upcycle(classifier)
    with pytest.raises(ValueError, match="no causal language model"):
        s2moe.to_transformers(classifier)

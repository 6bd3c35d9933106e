"""Task loss, auxiliary loss and their sum; labels in either convention; accumulation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe.moe.routing import RoutingContext
from tests.models.decoder import tiny

IDS = torch.randint(19, (3, 8), generator=torch.Generator().manual_seed(5))


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> list[Tensor]:
    """−log softmax at the target, for each position whose target is not −100."""
    return [
        torch.logsumexp(logits_BSV[b, s], 0) - logits_BSV[b, s, targets_BS[b, s]]
        for b in range(logits_BSV.shape[0])
        for s in range(logits_BSV.shape[1])
        if targets_BS[b, s] >= 0
    ]


def test_labels_are_shifted_and_minus_100_is_ignored() -> None:
    model, labels = tiny().eval(), IDS.clone()
    labels[0, 3] = labels[1, :5] = labels[2, 0] = -100
    out = model(IDS, labels=labels)
    terms = cross_entropy(out.logits[:, :-1], labels[:, 1:])
    assert out.task_loss.item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-5)


def test_shift_labels_are_taken_as_they_are() -> None:
    model, targets = tiny().eval(), torch.randint(19, (3, 8))
    targets[1, 2:6] = -100
    out = model(IDS, shift_labels=targets)
    terms = cross_entropy(out.logits, targets)
    assert out.task_loss.item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-5)
    aligned = torch.cat((IDS[:, 1:], torch.full((3, 1), -100)), 1)
    torch.testing.assert_close(model(IDS, shift_labels=aligned).loss, model(IDS, labels=IDS).loss)


def test_without_labels_there_is_no_loss() -> None:
    out = tiny()(IDS)
    assert out.loss is None
    assert out.task_loss is None
    assert out.aux_loss is not None  # of the routers, for those who compute the task loss themselves


@pytest.mark.parametrize("method", ["smoe", "s2moe", "s2moe_k2"])
def test_auxiliary_losses_are_averaged_over_layers_and_added(method: str) -> None:
    model = tiny(method, {"z_loss": 0.1}, moe_first_dense=1)
    out = model(IDS, labels=IDS)
    assert [layer.layer for layer in out.routing] == [1, 2]
    assert out.aux_loss.item() == pytest.approx(sum(layer.loss.item() for layer in out.routing) / 2)
    assert out.aux_loss.item() > 0
    torch.testing.assert_close(out.loss, out.task_loss + out.aux_loss)
    for layer in out.routing:
        assert ("infonce_loss" in layer.values) == (method != "smoe")
        assert not any(value.requires_grad for value in layer.values.values())


@pytest.mark.parametrize("method", ["smoe", "s2moe", "s2moe_k2"])
def test_logged_losses_add_up_to_the_one_that_is_trained(method: str) -> None:
    """Who reads the log has to be able to tell what the loss is made of."""
    coefficients = {"balance_loss": 0.01, "z_loss": 0.1, "infonce_loss": 0.05}
    for layer in tiny(method, {"z_loss": 0.1})(IDS, labels=IDS).routing:
        raw = sum(factor * layer.values.get(name, 0.0) for name, factor in coefficients.items())
        assert layer.loss.item() == pytest.approx(raw.item(), rel=1e-5)


def test_evaluation_has_the_task_loss_alone() -> None:
    out = tiny("s2moe", {"z_loss": 0.1}).eval()(IDS, labels=IDS)
    assert out.aux_loss.item() == 0
    assert out.loss.item() == out.task_loss.item()


def test_a_dense_model_has_no_auxiliary_loss() -> None:
    out = tiny(moe_first_dense=3)(IDS, labels=IDS)
    assert out.aux_loss is None
    assert out.routing == ()
    assert out.loss.item() == out.task_loss.item()


def test_an_untrained_model_costs_log_of_the_vocabulary() -> None:
    out = tiny(initializer_range=1e-4)(IDS, labels=IDS)
    assert out.task_loss.item() == pytest.approx(math.log(19), rel=1e-2)


def test_losses_are_float32_in_half_precision() -> None:
    out = tiny("s2moe", {"z_loss": 0.1}).bfloat16()(IDS, labels=IDS)
    for loss in (out.loss, out.task_loss, out.aux_loss):
        assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for layer in out.routing for value in layer.values.values())


def test_num_items_in_batch_divides_the_summed_loss() -> None:
    model, labels = tiny().eval(), IDS.clone()
    labels[0, 3:] = -100
    out = model(IDS, labels=labels, num_items_in_batch=50)
    terms = cross_entropy(out.logits[:, :-1], labels[:, 1:])
    assert out.task_loss.item() == pytest.approx((sum(terms) / 50).item(), rel=1e-5)


@pytest.mark.parametrize("method", ["smoe", "s2moe"])
def test_accumulated_gradients_weigh_the_auxiliary_loss_once(method: str) -> None:
    """A trainer divides by the items of all its micro-batches and sums their losses.

    The sum has to be the mean task loss plus the mean auxiliary loss, however many micro-batches there
    are: the coefficient of a balance loss must not grow with gradient accumulation.
    """
    model = tiny(method, {"z_loss": 0.1})
    micro, contexts = IDS.split(1), [RoutingContext(microbatch=m) for m in range(3)]
    given: Any = {"num_items_in_batch": torch.tensor(3 * 7)}
    alone = [model(x, labels=x, context=c) for x, c in zip(micro, contexts, strict=True)]
    shared = [model(x, labels=x, context=c, **given) for x, c in zip(micro, contexts, strict=True)]
    want = sum(out.task_loss + out.aux_loss for out in alone) / 3
    torch.testing.assert_close(sum(out.task_loss for out in shared), sum(out.task_loss for out in alone) / 3)
    torch.testing.assert_close(sum(out.loss for out in shared), want)


@pytest.mark.parametrize("method", ["smoe", "s2moe"])
def test_padded_batches_have_the_loss_of_their_real_tokens(method: str) -> None:
    """Right padding that holds anything at all, with its labels ignored."""
    model, losses = tiny(method, {"z_loss": 0.1, "importance_loss": 0.1}), []
    mask = torch.ones_like(IDS)
    mask[1, 5:] = mask[2, 3:] = 0
    for filling in (0, 7, 18):
        ids = torch.where(mask.bool(), IDS, filling)
        labels = torch.where(mask.bool(), IDS, -100)
        losses.append(model(ids, attention_mask=mask, labels=labels, context=RoutingContext()).loss)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])

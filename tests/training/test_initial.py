"""A new run begins with the weights it is given, and does what they did as far as that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from s2moe.config import ConfigError
from s2moe.config.run import InitConfig
from s2moe.data import ByteTokenizer, CharacterTokenizer
from s2moe.models import S2MoEForCausalLM
from s2moe.models.configuration import S2MoEConfig
from s2moe.parallel import ExpertParallel
from s2moe.training import initial
from s2moe.training.export import write_hf
from s2moe.training.initial import InitialWeights
from tests.distributed_harness import run_distributed

from .jobs import tiny_run

TOKENIZER = ByteTokenizer()


def config(moe: dict[str, Any], **sizes: Any) -> S2MoEConfig:
    """Two layers, four experts."""
    options = {"method": "smoe", "num_experts": 4, "expert_hidden": 24, **moe}
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return S2MoEConfig(moe=options, **{**shape, **sizes})


def exported(folder: Path, source: S2MoEConfig, tokenizer: Any = TOKENIZER) -> S2MoEForCausalLM:
    """A model whose router has preferences, written to `folder`."""
    torch.manual_seed(3)
    model = S2MoEForCausalLM(source).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
    write_hf(source, model.state_dict(), folder, tokenizer, {"run": "x", "step": 1})
    return model


def begun(
    folder: Path, target: S2MoEConfig, noise: float = 0.0, parallel: ExpertParallel | None = None
) -> tuple[S2MoEForCausalLM, InitialWeights]:
    weights = InitialWeights(InitConfig(str(folder), noise), target, TOKENIZER.fingerprint(), seed=1)
    torch.manual_seed(9)
    model = S2MoEForCausalLM(target, parallel).eval()
    weights.fill(model)
    return model, weights


def logits(model: S2MoEForCausalLM) -> torch.Tensor:
    tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=tokens).logits


def difference(ours: S2MoEForCausalLM, theirs: S2MoEForCausalLM) -> float:
    """Of most logits, relative to their spread. A few tokens have two experts that are as good as equal."""
    expected = logits(theirs)
    return float((logits(ours) - expected).abs().flatten().quantile(0.8) / expected.std())


def largest_difference(ours: S2MoEForCausalLM, theirs: S2MoEForCausalLM) -> float:
    """Of any logit."""
    expected = logits(theirs)
    return float((logits(ours) - expected).abs().max() / expected.std())


@pytest.mark.parametrize("tied", [False, True])
def test_the_same_sizes(tmp_path: Path, tied: bool) -> None:
    source = config({"router": {"bias_update_rate": 0.01}}, tie_word_embeddings=tied)
    theirs = exported(tmp_path, source)
    ours, weights = begun(tmp_path, source)
    for name, tensor in ours.state_dict().items():
        assert tensor.equal(theirs.state_dict()[name]), name
    assert weights.description == f"begun with the weights of {tmp_path}"


def test_tied_embeddings_for_a_model_without(tmp_path: Path) -> None:
    theirs = exported(tmp_path, config({}, tie_word_embeddings=True))
    assert largest_difference(begun(tmp_path, config({}))[0], theirs) < 1e-6


KEPT = [  # combine, renormalise, choices before and after
    ("topk_then_softmax", False, 2, 4),
    ("softmax_then_topk", False, 2, 4),
    ("softmax_then_topk", True, 2, 4),
    ("sigmoid", False, 2, 4),
    ("sigmoid", True, 2, 4),
    ("softmax_then_topk", False, 1, 1),
    ("sigmoid", False, 1, 1),
    ("straight_through", False, 1, 1),
]


@pytest.mark.parametrize(("combine", "renormalise", "before", "after"), KEPT)
@pytest.mark.parametrize("form", ["gated", "mlp"])
def test_twice_the_experts_do_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    combine: str,
    renormalise: bool,
    before: int,
    after: int,
    form: str,
) -> None:
    moe = {"expert_form": form, "activation": "gelu", "router": {"combine": combine, "renormalise": renormalise}}
    theirs = exported(tmp_path, config({**moe, "experts_per_token": before}))
    target = config({**moe, "experts_per_token": after, "num_experts": 8})
    ours, weights = begun(tmp_path, target)
    assert difference(ours, theirs) < 0.02
    assert weights.description.endswith("each of its 4 experts twice")
    weight = ours.state_dict()["model.layers.0.moe.router.scores.weight"]
    assert not (weight[:4] == weight[4:]).any()
    assert not any(one.equal(other) for one, other in zip(weight[:4].bfloat16(), weight[4:].bfloat16(), strict=True))
    monkeypatch.setattr(initial, "TIE_BREAK", 0.0)
    assert largest_difference(begun(tmp_path, target)[0], theirs) < 1e-4


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    theirs = exported(tmp_path, config({"experts_per_token": 2}))
    ours, weights = begun(tmp_path, config({"experts_per_token": 2, "num_experts": 8}))
    assert difference(ours, theirs) > 0.05
    assert "loss begins higher, which model.moe.experts_per_token=4 avoids" in weights.description


def test_copies_differ_by_opposite_noise_and_buffers_are_doubled(tmp_path: Path) -> None:
    theirs = exported(tmp_path, config({"router": {"bias_update_rate": 0.01}})).state_dict()
    ours = begun(tmp_path, config({"num_experts": 8, "router": {"bias_update_rate": 0.01}}), 0.1)[0].state_dict()
    name = "model.layers.1.moe.experts.w1"
    difference = ours[name][:4] - theirs[name]
    torch.testing.assert_close(ours[name][4:] - theirs[name], -difference, rtol=1e-4, atol=1e-6)
    assert float(difference.std() / theirs[name].std()) == pytest.approx(0.1, rel=0.1)
    bias = "model.layers.1.moe.router.bias_E"
    assert ours[bias].equal(theirs[bias].repeat(2))


@pytest.mark.parametrize("form", ["gated", "mlp"])
@pytest.mark.parametrize("combine", ["topk_then_softmax", "softmax_then_topk", "sigmoid"])
def test_a_dense_model_becomes_sparse(tmp_path: Path, form: str, combine: str) -> None:
    moe = {"expert_form": form, "activation": "gelu", "experts_per_token": 2, "router": {"combine": combine}}
    theirs = exported(tmp_path, config({**moe, "first_dense": 2}))
    target = config(moe)
    ours, weights = begun(tmp_path, target)
    # A new router has next to no preference, so where weights do not add up to 1, they are about equal.
    assert difference(ours, theirs) < (1e-4 if combine == "topk_then_softmax" else 0.15)
    assert weights.description.endswith("each of the 4 experts a copy of its dense layer's MLP")
    noisy = begun(tmp_path, target, 0.1)[0].state_dict()["model.layers.0.moe.experts.w1"]
    assert all(not noisy[one].equal(noisy[other]) for one in range(4) for other in range(one))


def test_only_some_layers_become_sparse(tmp_path: Path) -> None:
    moe = {"experts_per_token": 2, "router": {"combine": "topk_then_softmax"}}
    theirs = exported(tmp_path, config({**moe, "first_dense": 2}))
    ours, _ = begun(tmp_path, config({**moe, "first_dense": 1}))
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("moe", [{"first_dense": 2}, {"num_experts": 4}, {"num_experts": 2}], ids=str)
def test_each_rank_takes_its_own_experts(tmp_path: Path, moe: dict[str, Any]) -> None:
    """The same values at every expert-parallel degree, noise included."""
    exported(tmp_path, config(moe))
    whole = begun(tmp_path, config({}), 0.1)[0].state_dict()
    for rank in (0, 1):
        for name, tensor in begun(tmp_path, config({}), 0.1, ExpertParallel(2, rank))[0].state_dict().items():
            expected = whole[name][2 * rank : 2 * rank + 2] if ".experts.w" in name else whole[name]
            if ".router." not in name or "first_dense" not in moe:
                assert tensor.equal(expected), name


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            config({}, hidden_size=32),
            config({}),
            r"embed_tokens.weight has the shape \[256, 32\] there and \[256",
        ),
        (config({}), config({"expert_hidden": 16}), r"layers.0.moe.experts.w1 has the shape \[4, 24, 16\] there and"),
        (config({}), config({"num_experts": 6}), r"layers.0.moe.router.scores.weight .* or twice the experts"),
        (config({}), config({"num_experts": 16}), r"scores.weight .* or twice the experts"),
        (config({}), config({"router": {"bias_update_rate": 0.1}}), "has no model.layers.0.moe.router.bias_E, which"),
        (config({"router": {"bias_update_rate": 0.1}}), config({}), "no place for model.layers.0.moe.router.bias_E"),
        (config({}), config({"first_dense": 2}), "has no model.layers.0.mlp"),
        (config({"first_dense": 2}), config({"expert_hidden": 32}), r"set model.moe.expert_hidden=24"),
        (
            config({"first_dense": 2, "expert_form": "mlp", "activation": "relu"}),
            config({}),
            "another form than model.moe.expert_form",
        ),
        (config({}, num_hidden_layers=3), config({}), "the model has no place for model.layers.2"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, source: S2MoEConfig, target: S2MoEConfig, message: str) -> None:
    exported(tmp_path, source)
    with pytest.raises(ConfigError, match=rf"^init.weights: .*{message}"):
        begun(tmp_path, target)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, config({}), CharacterTokenizer(["a", "b"]))
    with pytest.raises(
        ConfigError, match=r"init.weights: .* was trained with the tokenizer char.* the corpus has byte"
    ):
        begun(tmp_path, config({}))


def test_runs_begin_where_another_ended(tmp_path: Path) -> None:
    """On two ranks that share the experts: fine-tuning with frozen parts, and twice the experts."""
    path, common = tiny_run(tmp_path)
    common += ["training.steps=2", "model.moe.method=smoe", "logging.tensorboard=false", "logging.sample_tokens=0"]
    assert run_distributed("tests.training.jobs:train", 1, path, [*common, "name=first"])[0]["finished"]
    first = tmp_path / "runs" / "first"
    still = [*common, "training.expert_parallel=2", "optimizer.lr=1e-12", "init.noise=0", f"init.weights={first}"]
    answers = {}
    for name, settings in {
        "same": ["training.freeze=routers_and_experts", "training.zero_stage=3"],
        "twice": ["model.moe.num_experts=8", "model.moe.experts_per_token=4", "model.moe.router.noise=none"],
    }.items():
        answers[name] = run_distributed("tests.training.jobs:train", 2, path, [*still, *settings, f"name={name}"])[0]
    bpc = run_distributed("tests.training.jobs:train", 1, path, [*common, "name=first"])[0]["bpc"]
    assert answers["same"]["bpc"] == pytest.approx(bpc, rel=1e-5)
    assert answers["twice"]["bpc"] == pytest.approx(bpc, rel=1e-3)
    (first / "hf" / "config.json").unlink()
    error = run_distributed("tests.training.jobs:train", 1, path, [*common, "name=x", f"init.weights={first}"])[0]
    assert "init.weights: " in error["error"]
    assert "is not exported: python launcher/export.py --checkpoint" in error["error"]

"""launcher/compare.py: k' side by side with its costs, and run against run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launcher import compare, evaluate
from s2moe import S2MoEConfig
from s2moe.config import ConfigError
from s2moe.data import ByteTokenizer
from s2moe.models.macs import CONVENTIONS, conventions, inference_macs, mean_positions
from s2moe.training import slim as slim_module
from s2moe.training.compare_runs import compare_runs
from s2moe.training.slim import compare_slim, distinct_labels, mean_experts
from s2moe.training.standalone import evaluate_weights
from s2moe.training.stopwatch import Timing, take_turns
from tests.distributed_harness import run_distributed
from tests.models.decoder import tiny

from .jobs import tiny_corpus, tiny_run, train
from .test_launcher import one_message, start


def save(model: Any, directory: Path) -> Path:
    model.eval().save_pretrained(directory)
    ByteTokenizer().save(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, data/, and models: s2moe/hf (k = 1), smoe/hf (k = 2) and dense/hf."""
    directory = tmp_path_factory.mktemp("compare")
    tiny_corpus(directory / "data")
    torch.manual_seed(0)
    for method in ("s2moe", "smoe"):
        save(tiny(method, vocab_size=256), directory / method / "hf")
    save(tiny("smoe", vocab_size=256, moe_first_dense=3), directory / "dense" / "hf")
    return directory


def arguments(models: Path, out: Path, *names: str, **more: str) -> list[str]:
    given = {"--data": models / "data", "--out": out, "--context": 32, "--segment": 32, "--repeats": 3} | {
        f"--{key.replace('_', '-')}": value for key, value in more.items()
    }
    checkpoints = [str(models / name / "hf") for name in names]
    return ["slim", "--checkpoint", *checkpoints, *(str(part) for pair in given.items() for part in pair)]


def slim(models: Path, out: Path, *names: str, **more: str) -> dict[str, Any]:
    return compare_slim(compare.parse(arguments(models, out, *names, **more)))


def test_two_checkpoints_side_by_side(models: Path, tmp_path: Path) -> None:
    report = slim(models, tmp_path / "new" / "out", "s2moe", "smoe", experts_per_token="1,3,9", latency_batch="2")
    assert [Path(name).name for name in report["files"]] == ["slim.json", "slim.md", "slim.png"]
    stored = json.loads(Path(report["files"][0]).read_text())
    assert stored == {key: value for key, value in report.items() if key != "files"}
    assert Path(report["files"][2]).stat().st_size > 5000
    assert [checkpoint["label"] for checkpoint in report["checkpoints"]] == ["s2moe", "smoe"]
    for checkpoint, trained in zip(report["checkpoints"], (1, 2), strict=True):
        assert checkpoint["trained"] == trained
        assert [point["experts_per_token"] for point in checkpoint["points"]] == sorted({1, 3, trained})
        assert checkpoint["left_out"] == {"9": "there are 4 experts"}
        for point in checkpoint["points"]:
            k = point["experts_per_token"]
            alone = [
                "--data",
                str(models / "data"),
                "--context",
                "32",
                "--segment",
                "32",
                "--experts-per-token",
                str(k),
            ]
            options = evaluate.parse(["--checkpoint", str(models / checkpoint["label"] / "hf"), *alone])
            assert point["bpc"] == pytest.approx(evaluate_weights(options)["bpc"], rel=1e-6)
            assert point["mean_experts"] == k
            assert set(point["macs"]) == set(CONVENTIONS)
            assert 0 < point["fastest_ms"] <= point["ms"]
            assert point["repeats"] == 3
            if k == trained:
                assert point["latency_ratio"] == 1
                assert set(point["macs_ratio"].values()) == {1}
            else:
                assert all((ratio > 1) == (k > trained) for ratio in point["macs_ratio"].values())
    rows = [line for line in Path(report["files"][1]).read_text().splitlines() if line.startswith("| s")]
    assert [re.split(r" *\| *", row)[2] for row in rows] == ["**1**", "3", "1", "**2**", "3"]
    assert "s2moe, k' = 9 left out: there are 4 experts." in Path(report["files"][1]).read_text()


def test_the_forward_passes_of_all_checkpoints_take_turns(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that becomes slower with every pass changes no ratio by much, in whatever order they are given."""
    passes: list[tuple[str, int | None]] = []

    def forward(model: Any, tokens_BS: torch.Tensor, **at: int) -> Callable[[], None]:
        return lambda: passes.append((model.config.moe["method"], at.get("experts_per_token")))

    def clock(work: Callable[[], object]) -> float:
        work()
        return (2 if passes[-1][0] == "smoe" else 1) * (1 + len(passes) / 100)

    monkeypatch.setattr(slim_module, "_forward", forward)
    monkeypatch.setattr(slim_module, "stopwatch", lambda device: clock)
    report = slim(models, tmp_path, "s2moe", "smoe", experts_per_token="1,2", latency_batch="2", repeats="8")
    timed = passes[4 * slim_module.WARM_UP :]
    rounds = [timed[start : start + 4] for start in range(0, len(timed), 4)]
    assert len(rounds) == 8
    assert all(set(one) == {("s2moe", None), ("s2moe", 2), ("smoe", 1), ("smoe", None)} for one in rounds)
    assert {one[0] for one in rounds} == set(rounds[0])
    assert rounds[4] == [rounds[0][place] for place in (0, 1, 2, 3)]
    assert rounds[1] == [rounds[0][place] for place in (1, 0, 3, 2)]  # backwards
    for checkpoint, factor in zip(report["checkpoints"], (1, 2), strict=True):
        for point in checkpoint["points"]:
            assert point["latency_ratio"] == pytest.approx(1, abs=0.02)
            assert point["latency_to_first"] == pytest.approx(factor, rel=0.02)
    rows = [line.split(" | ") for line in (tmp_path / "slim.md").read_text().splitlines() if line.startswith("| s")]
    assert [row[-1] for row in rows] == ["1.00 |", "1.00 |", "2.00 |", "2.00 |"]
    assert "all checkpoints and k' take turns" in (tmp_path / "slim.md").read_text()


def test_a_router_that_decides_how_many_is_counted_as_it_routes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slim_module, "mean_experts", lambda model, tokens_BS, **at: 1.5 if at else 2.0)
    report = slim(models, tmp_path, "smoe", experts_per_token="1", latency_batch="2", memory="32")
    point = report["checkpoints"][0]["points"][0]
    config = S2MoEConfig.from_pretrained(models / "smoe" / "hf")
    assert point["macs"] == inference_macs(config, 1.5, mean_positions(64), whole=96)
    assert "MACs, transformer_xl (M)" in (tmp_path / "slim.md").read_text()
    assert "over 32 positions of memory and the whole sequence" in (tmp_path / "slim.md").read_text()
    assert "smoe, k' = 1: 1.50 experts a token." in (tmp_path / "slim.md").read_text()


@pytest.mark.parametrize("form", ["gated", "mlp"])
@pytest.mark.parametrize("k", [1, 3])
def test_macs_are_what_torch_counts(form: str, k: int) -> None:
    """All products of a forward pass with eager attention, which computes the masked scores as well."""
    torch.manual_seed(1)
    model = tiny(
        "s2moe",
        moe_expert_form=form,
        moe_every=2,
        moe_shared_experts=1,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
    ).eval()
    ids = torch.randint(19, (2, 12))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(ids, experts_per_token=k, use_cache=False)
    macs = inference_macs(model.config, k, positions=12)
    rotary = 4 * 12  # positions times frequencies of one sequence: a product that no convention counts
    assert abs(counter.get_total_flops() / 2 - macs["model"] * ids.numel()) <= rotary
    by_module = counter.get_flop_counts()

    def counted(*names: str) -> float:
        found = [
            sum(by_module[name].values())
            for name in by_module
            if name.rsplit(".", 1)[-1] in names and not name.startswith("Global")
        ]
        return sum(found) / 2 / ids.numel()

    assert counted("lm_head") == macs["model"] - macs["layers"]
    linear = counted("q_proj", "k_proj", "v_proj", "o_proj", "moe", "mlp")
    assert linear == macs["linear"]
    assert counted("q_proj", "k_proj", "v_proj", "experts", "shared", "mlp") == macs["qkv_experts"]
    assert mean_experts(model, ids, experts_per_token=k) == k


def test_the_published_saving_is_one_of_the_conventions() -> None:
    """One expert fewer at the lineage's size: 20 % of a layer, 25 % of linear maps, 28.6 % of qkv and experts.

    With a Transformer-XL's memory as long as the sequence 10 %: of its three products of attention 512 multiply-
    accumulates for each of 1,024 positions.
    """
    moe = {"method": "smoe", "num_experts": 16, "expert_hidden": 512, "expert_form": "mlp"}
    config = S2MoEConfig(
        vocab_size=256, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, head_dim=64, moe=moe
    )
    two, one = (inference_macs(config, k, mean_positions(512), whole=1024) for k in (2, 1))
    saved = {name: 1 - one[name] / two[name] for name in two}
    assert saved["layers"] == pytest.approx(0.199, abs=5e-4)
    assert saved["linear"] == pytest.approx(0.249, abs=5e-4)
    assert saved["qkv_experts"] == pytest.approx(2 / 7)
    assert saved["transformer_xl"] == pytest.approx(0.0998, abs=5e-5)
    assert two["transformer_xl"] - two["linear"] == 4 * 3 * 512 * 1024
    assert set(two) == set(conventions(512))
    assert set(inference_macs(config, 1, mean_positions(512))) == set(conventions()) == set(CONVENTIONS)


def test_what_makes_no_sense_is_refused(models: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (("dense",), {}, "has no SMoE layer, so there is no number of experts per token to change"),
        (("smoe",), {"experts_per_token": "5,6"}, "trained with k = 2, has nothing to compare: k' = 5: there are 4"),
        (("smoe",), {"latency_tokens": "65"}, "--latency-tokens 65: .* was trained on at most 64"),
        (("smoe",), {"latency_batch": "99"}, "99 sequences of 64 tokens are to be timed, and test has 400 tokens"),
        (("smoe", "smoe"), {}, "smoe/hf is given twice"),
        (("absent",), {}, "no weights in"),
        (("smoe",), {"split": "tests"}, "tests"),
    ]
    for names, more, message in cases:
        with pytest.raises(Exception, match=message) as caught:
            slim(models, tmp_path, *names, **({"latency_batch": "2"} | more))
        assert type(caught.value).__name__ in ("ConfigError", "CorpusError"), caught.value
    without = [part for part in arguments(models, tmp_path, "smoe") if part not in ("--out", str(tmp_path))]
    with pytest.raises(ConfigError, match="say where to write with --out"):
        compare_slim(compare.parse(without))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the report"):
        slim(models, tmp_path / "file", "smoe", experts_per_token="1", latency_batch="2")
    with pytest.raises(SystemExit):
        compare.parse(arguments(models, tmp_path, "smoe", experts_per_token="0"))


def test_labels_tell_checkpoints_apart() -> None:
    assert distinct_labels([Path("a/one/hf"), Path("a/two")]) == ["one", "two"]
    assert distinct_labels([Path("a/one"), Path("b/one")]) == ["a/one", "b/one"]


def test_turns_begin_with_another_each_round() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = take_turns(["a", "b"], measure, 3, slow=["b"])
    assert order == ["a", "b", "a", "a"]
    assert samples == {"a": [1, 3, 4], "b": [2]}
    order.clear()
    take_turns(["a", "b", "c"], measure, 4)
    assert "".join(order) == "abc" + "bac" + "cab" + "acb"
    assert Timing.of([4.0, 1.0, 3.0]) == Timing(3.0, 1.5, 1.0, 3)


def test_runs_side_by_side(tmp_path: Path) -> None:
    config, overrides = tiny_run(tmp_path)
    for more in (["name=one"], ["name=two", "model.moe.method=smoe", "training.steps=3"]):
        run_distributed(train, 1, config, [*overrides, *more])
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    report = compare_runs([one, two], tmp_path / "out")
    assert [Path(name).stat().st_size > 0 for name in report["files"]] == [True] * 3
    first, second = report["runs"]
    last = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()][-1]
    assert (first["label"], first["method"], first["bpc"]) == ("one", "s2moe", last["val/bpc"])
    assert (first["tokens"], second["tokens"]) == (6 * 4 * 32, 3 * 4 * 32)
    assert second["active"] > first["active"]  # two experts a token
    text = (tmp_path / "out" / "runs.md").read_text()
    assert f"| two | smoe | {second['bpc']:.4f} | 600 | " in text
    slimmed = compare_slim(
        compare.parse(
            [
                "slim",
                "--checkpoint",
                str(one),
                "--data",
                str(tmp_path / "data"),
                "--repeats",
                "1",
                "--latency-batch",
                "2",
            ]
        )
    )
    assert Path(slimmed["files"][0]).parent == one / "slim"
    (two / "config.yaml").write_text((two / "config.yaml").read_text().replace("validation: valid", "validation: test"))
    with pytest.raises(ConfigError, match="their figures do not compare"):
        compare_runs([one, two], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no run of launcher/pretrain\.py"):
        compare_runs([tmp_path], tmp_path / "out")


@pytest.mark.slow
def test_the_launcher(models: Path, tmp_path: Path) -> None:
    done = start(*arguments(models, tmp_path, "smoe", latency_batch="2"), cwd=tmp_path, script="compare")
    assert done.returncode == 0, done.stderr
    assert "| smoe | **2** | " in done.stdout
    assert Path(json.loads(done.stdout.splitlines()[-1])["files"][0]).is_file()
    wrong = start(*arguments(models, tmp_path, "dense"), cwd=tmp_path, script="compare")
    assert "dense/hf has no SMoE layer" in one_message(wrong)
    told = start("slim", "--help", cwd=tmp_path, script="compare").stdout
    assert all(part in told for part in ("What does a model lose with fewer experts", "--experts-per-token", "slim.md"))

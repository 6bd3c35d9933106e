"""Probes: their figures against the formulas on captured hidden states, any layout, resuming, the report.

Legend: T tokens of the probe set, E experts, M sampled tokens, D model width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.evaluate import parse
from s2moe.config import ConfigError, load
from s2moe.config.run import RunConfig
from s2moe.data import TokenStream
from s2moe.metrics.collapse import THRESHOLD
from s2moe.metrics.similarity import SIGMA
from s2moe.moe.methods import METHODS
from s2moe.moe.routers.topk import TopKRouter
from s2moe.moe.routing import Routing
from s2moe.training.evaluation import Protocol, evaluate
from s2moe.training.metrics_log import read as read_log
from s2moe.training.probe import LayerProbe, ProbeSet, cross_layer, heaviest, probe, warnings
from s2moe.training.probe_files import (
    Assignments,
    assignments_of,
    changes,
    files,
    latest,
    read,
    read_all,
    remove_after,
    write,
)
from s2moe.training.report_collapse import accumulated_loads, consistency, fluctuations, report_collapse, slimmability
from s2moe.training.standalone import Loaded
from s2moe.training.weights import Weights
from tests.distributed_harness import run_distributed
from tests.metrics import reference

from .jobs import tiny_run
from .probe_jobs import everything, probe_engine, tiny_model, tiny_probe_set

CPU = torch.device("cpu")
LIVE = ("probe.every=2", "probe.tokens=128", "probe.samples=32", "model.moe.experts_per_token=2")


def capture(model: torch.nn.Module) -> dict[int, list[tuple[torch.Tensor, Routing]]]:
    """What enters each router from now on, and what it answers."""
    seen: dict[int, list[tuple[torch.Tensor, Routing]]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.moe.router.register_forward_hook(
            lambda module, inputs, routing, at=number: seen.setdefault(at, []).append((inputs[0], routing))
        )
    return seen


def test_figures_are_those_of_the_formulas() -> None:
    model, probe_set = tiny_model().eval(), tiny_probe_set()
    seen = capture(model)
    layers = probe(model, probe_set, 5, CPU)
    targets = probe_set.token_WS[:, 1:].reshape(-1).tolist()
    for number, layer in enumerate(layers):
        (hidden_TD, routing), moe = seen[number][0], model.model.layers[number].moe
        rows = hidden_TD.double().numpy()
        figures, matrix = layer.figures, layer.matrix
        weights: list[dict[int, float]] = [{} for _ in rows]
        for token, expert, weight in zip(*(part.tolist() for part in routing[:3]), strict=True):
            weights[token][expert] = weight
        heaviest_T = [max(own, key=own.__getitem__) for own in weights]
        load = [sum(expert in own for own in weights) for expert in range(4)]
        assert layer.load_E == pytest.approx([4 * count / sum(load) for count in load])
        assert layer.target_T.tolist() == heaviest_T
        assert [set(row) for row in layer.order_TK.tolist()] == [set(own) for own in weights]
        prob_TE = routing.prob_TE.double().numpy()
        want = {
            "token_entropy": np.mean([reference.entropy(row) for row in prob_TE]),
            "margin": reference.margin(prob_TE, [2] * len(rows)),
            "weight_entropy": np.mean([reference.entropy(list(own.values())) for own in weights]),
            "collapse_by_expert": reference.collapse(rows, heaviest_T, THRESHOLD),
            "collapse_by_target": reference.collapse(rows, targets, THRESHOLD),
        }
        spectrum = reference.spectrum(reference.singular_values(rows))
        want |= {f"hidden_{name}": value for name, value in spectrum.items()}

        outputs = expert_outputs(moe, hidden_TD[torch.from_numpy(probe_set.sample_M)])
        spectra = [reference.spectrum(reference.singular_values(rows)) for rows in outputs]
        want |= {f"output_{name}": np.mean([one[name] for one in spectra]) for name in spectra[0]}
        pooled = reference.spectrum(reference.singular_values(np.concatenate(outputs)))
        want |= {f"pooled_output_{name}": value for name, value in pooled.items()}
        experts = moe.experts
        flat = [torch.cat([w[e].flatten() for w in experts.parameters()]).detach().double().numpy() for e in range(4)]
        kernels = [reference.linear_kernel(rows) for rows in outputs]
        rbf_kernels = [reference.rbf_kernel(rows, SIGMA) for rows in outputs]
        matrices = {
            "router_cosine": reference.pairs(list(moe.router.scores.weight.detach().numpy()), reference.cosine),
            "weight_cosine": reference.pairs(flat, reference.cosine),
            "output_cosine": reference.pairs(
                outputs, lambda a, b: np.mean([reference.cosine(x, y) for x, y in zip(a, b, strict=True)])
            ),
            "output_linear_cka": reference.pairs(kernels, reference.cka),
            "output_rbf_cka": reference.pairs(rbf_kernels, reference.cka),
        }
        want |= {name: reference.off_diagonal(value) for name, value in matrices.items()}
        together = [[sum(i in own and j in own for own in weights) / load[i] for j in range(4)] for i in range(4)]
        matrices["coselection"] = np.array(together)
        for name, value in matrices.items():
            np.testing.assert_allclose(matrix[name].numpy(), value, atol=2e-6, err_msg=name)
        assert {name: figures[name] for name in want} == pytest.approx(want, rel=1e-4)
        assert set(figures) - set(want) == {
            *("load_entropy", "load_perplexity", "max_violation", "load_cv", "min_load", "max_load", "dead_experts")
        }


def expert_outputs(moe: Any, sample_MD: torch.Tensor) -> list[np.ndarray]:
    """W2 (silu(W1 x) ⊙ W3 x) of every expert."""
    found = []
    for w1, w2, w3 in zip(moe.experts.w1, moe.experts.w2, moe.experts.w3, strict=True):
        hidden = torch.nn.functional.silu(sample_MD @ w1.T) * (sample_MD @ w3.T)
        found.append((hidden @ w2.T).detach().double().numpy())
    return found


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_figures_do_not_depend_on_the_batch(batch: int) -> None:
    """Batches of 2 and 3 do not divide the five windows: the last pass is filled up with windows that do not count."""
    model = tiny_model().eval()
    whole, parts = (everything(probe(model, tiny_probe_set(), size, CPU)) for size in (5, batch))
    assert_same(parts, whole)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.distributed
def test_figures_do_not_depend_on_the_layout_and_probes_do_not_disturb_training() -> None:
    shapes = [(1, 1), (2, 1), (2, 2), (1, 3), (2, 3)]
    alone = everything(probe(tiny_model().eval(), tiny_probe_set(), 5, CPU))
    probed = run_distributed(probe_engine, 2, shapes, 2, True)
    plain = run_distributed(probe_engine, 2, [shapes[-1]], 2, False)
    for shape in shapes:
        assert probed[1][shape]["probes"] == [{}] * 3  # process 0 has the figures
        first, *later = probed[0][shape]["probes"]
        assert_same(first, alone)
        for after, reference_after in zip(later, probed[0][shapes[0]]["probes"][1:], strict=True):
            assert_same(after, reference_after)
        assert later[0]["0/weight_cosine"] != first["0/weight_cosine"]
        for rank in (0, 1):
            assert probed[rank][shape]["losses"] == pytest.approx(plain[rank][shapes[-1]]["losses"], rel=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_probed(method: str) -> None:
    try:
        model = tiny_model(method=method).eval()
    except ValueError:
        model = tiny_model(method=method, experts_per_token=1).eval()
    layers = probe(model, tiny_probe_set(), 3, CPU)
    assert len(layers) == 2
    for layer in layers:
        assert sum(layer.load_E) == pytest.approx(4)
        for name, value in layer.figures.items():
            assert math.isfinite(value) or name in ("margin", "weight_entropy", "collapse_by_expert"), name
        assert layer.matrix["router_cosine"].shape == (4, 4)  # a new router may have to say expert_embeddings()


def test_k_of_an_evaluation() -> None:
    model = tiny_model().eval()
    selected_TE = probe(model, tiny_probe_set(), 5, CPU, experts_per_token=3)[0].selected_TE
    assert (selected_TE.sum(-1) == 3).all()


def test_the_probe_set_is_whole_windows_with_their_targets() -> None:
    probe_set = ProbeSet.take(np.arange(100), 50, 16, 10)
    assert probe_set.token_WS.shape == (3, 17)
    assert probe_set.token_WS[1].tolist() == list(range(16, 33))
    assert (probe_set.tokens, len(probe_set.sample_M), probe_set.sample_M[-1]) == (48, 10, 43)
    assert len(ProbeSet.take(np.arange(100), 1000, 16, 999).sample_M) == 96
    assert probe_set.fingerprint() != ProbeSet.take(np.arange(100), 32, 16, 10).fingerprint()
    with pytest.raises(ConfigError, match=r"probe\.tokens: a window takes 16 tokens and the one after"):
        ProbeSet.take(np.arange(16), 50, 16, 10)
    with pytest.raises(ConfigError, match=r"probe\.samples: must be at least 2"):
        ProbeSet.take(np.arange(99), 50, 16, 1)


def test_few_tokens_are_warned_of() -> None:
    layers = probe(tiny_model().eval(), tiny_probe_set(), 5, CPU)
    few = warnings(layers, tiny_probe_set(), 32)
    assert [text.split(" are from ")[1].split(",")[0] for text in few] == ["80 tokens", "20 tokens"]
    assert warnings(layers, tiny_probe_set(samples=80), 20) == []


def test_heaviest_first_and_ragged() -> None:
    selected = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    weight = torch.tensor([[0.2, 9.0, 0.7], [1.0, 1.0, 1.0], [0.5, 0.5, 0.6]])
    assert heaviest(selected, weight).tolist() == [[2, 0, 3], [3, 3, 3], [2, 0, 1]]


def layer_of(targets: list[int], layer: int = 0) -> LayerProbe:
    """A layer with four experts and one of them for each token (4: none)."""
    target_T = torch.tensor(targets)
    selected_TE = torch.nn.functional.one_hot(target_T, 5)[:, :4].bool()
    order_TK = target_T.masked_fill(target_T == 4, -1)[:, None]
    return LayerProbe(layer, {}, {}, [], [], selected_TE, target_T, order_TK)


def test_cross_layer_tables_are_those_of_each_pair() -> None:
    tables = cross_layer([layer_of([0, 1, 2, 3]), layer_of([3, 2, 1, 0], 1), layer_of([0, 1, 0, 4], 2)])
    assert tables["overlap"].tolist() == [[1, 0, 0.5], [0, 1, 0], [0.5, 0, 1]]
    assert tables["information"][0, 1] == pytest.approx(1)
    assert tables["information"][0, 2] == pytest.approx(1)  # of the tokens that have an expert in both


def test_assignments_survive_their_file(tmp_path: Path) -> None:
    ragged = LayerProbe(
        3,
        {},
        {},
        [],
        [],
        torch.tensor([[True, False, True, False], [False, False, False, False]]),
        torch.tensor([2, 4]),
        torch.tensor([[2, 0], [-1, -1]]),
    )
    written = assignments_of(70, "abc", [layer_of([1, 4], 1), ragged])
    found = read(write(tmp_path, written))
    assert (found.step, found.fingerprint, found.num_experts, found.layers) == (70, "abc", 4, (1, 3))
    assert found.target_LT.tolist() == [[1, -1], [2, -1]]
    assert found.selected_LTE.tolist() == [layer_of([1, 4]).selected_TE.tolist(), ragged.selected_TE.tolist()]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000070.npz"]


def series(targets: dict[int, list[list[int]]], fingerprint: str = "abc") -> list[Assignments]:
    """Probes by step, of targets by layer."""
    return [
        assignments_of(step, fingerprint, [layer_of(own, number) for number, own in enumerate(by_layer)])
        for step, by_layer in targets.items()
    ]


def test_what_a_resumed_run_repeats_is_removed(tmp_path: Path) -> None:
    for assignments in series({10: [[0]], 20: [[1]], 30: [[2]]}):
        write(tmp_path, assignments)
    (tmp_path / ".tmp-step-00000040.npz").write_bytes(b"half")
    assert latest(tmp_path, 30, "abc").step == 20
    assert latest(tmp_path, 10, "abc") is None
    assert latest(tmp_path, 30, "another probe set") is None
    remove_after(tmp_path, 20)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000010.npz", "step-00000020.npz"]
    assert [assignments.step for assignments in read_all(tmp_path)] == [10, 20]
    write(tmp_path, series({30: [[2]]}, "another")[0])
    assert [assignments.step for assignments in read_all(tmp_path)] == [30]  # those of the last one's probe set
    assert files(tmp_path / "absent") == []


def test_fluctuations_of_a_series() -> None:
    kept = series({10: [[0, 1], [2, 2]], 20: [[0, 2], [2, 2]], 30: [[0, 1], [2, 3]]})
    assert changes(kept[0], kept[1]) == {"fluctuation": [0.5, 0.0], "set_fluctuation": [0.5, 0.0]}
    answer = fluctuations(kept)
    assert answer["fluctuation"] == [0.25, 0.5]
    assert answer["fluctuation_by_layer"] == [[0.5, 0.5], [0.0, 0.5]]
    assert answer["last_fluctuation"] == [10, 10]  # means of (0, 20) and (0, 20)
    assert answer["settled"] == [0.5, 1, 1]


# --- a run, and its report ------------------------------------------------------------------------


def train(directory: Path, *overrides: str, ranks: int = 1) -> dict[str, Any]:
    path, common = tiny_run(directory)
    return run_distributed("tests.training.jobs:train", ranks, path, [*common, *LIVE, *overrides], None)[0]


def probe_events(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_log(run / "metrics.jsonl") if "layer_0/probe_load" in event]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run `whole` on two ranks with expert parallelism, and one with another seed."""
    directory = tmp_path_factory.mktemp("probed")
    for name, seed in (("whole", 1), ("other", 2)):
        shape = ("training.expert_parallel=2", "training.micro_batch=null")
        assert train(directory, f"name={name}", f"seed={seed}", *shape, ranks=2)["finished"]
    return directory


def report(directory: Path, *arguments: str, run: str = "whole") -> dict[str, Any]:
    common = ["--checkpoint", str(directory / "runs" / run), "--data", str(directory / "data"), "--device", "cpu"]
    sizes = ["--probe-tokens", "128", "--probe-samples", "32", "--context", "32", "--segment", "32"]
    return report_collapse(parse([*common, *sizes, "--report", "collapse", *arguments]))


def test_a_run_logs_its_probes(finished: Path) -> None:
    run = finished / "runs" / "whole"
    events = probe_events(run)
    assert [event["step"] for event in events] == [2, 4, 6]
    assert [path.name for path in files(run / "probes")] == [f"step-0000000{step}.npz" for step in (2, 4, 6)]
    for layer in (0, 1):
        assert "layer_0/probe_fluctuation" not in events[0]
        want = changes(*(read(path) for path in files(run / "probes")[1:]))
        for name in ("fluctuation", "set_fluctuation"):
            assert events[2][f"layer_{layer}/probe_{name}"] == want[name][layer]
    assert events[2]["probe/fluctuation"] == sum(want["fluctuation"]) / 2
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    for name in ("coselection", "router_cosine", "weight_cosine", "output_cosine", "output_linear_cka"):
        assert [image.step for image in board.Images(f"layer_1/probe_{name}")] == [2, 4, 6]
    assert [image.step for image in board.Images("probe/cross_layer_information")] == [2, 4, 6]
    assert [event.step for event in board.Scalars("layer_1/probe_collapse_by_expert")] == [2, 4, 6]


@pytest.fixture(scope="module")
def straight(finished: Path) -> Path:
    """A run on one process, not interrupted."""
    assert train(finished, "name=straight")["finished"]
    return finished / "runs" / "straight"


def test_resumed_equals_uninterrupted(finished: Path, straight: Path) -> None:
    """Interrupted after each of three steps; a probe of a step that was lost is removed, and none is counted twice."""
    for _ in range(3):
        assert not train(finished, "name=parts", "training.stop_after_minutes=1e-9")["finished"]
    parts = finished / "runs" / "parts"
    write(parts / "probes", series({5: [[0] * 128] * 2})[0])
    assert train(finished, "name=parts")["finished"]
    assert probe_events(parts) == probe_events(straight)
    kept = [files(run / "probes") for run in (straight, parts)]
    assert [path.name for path in kept[0]] == [path.name for path in kept[1]]
    for one, other in zip(*kept, strict=True):
        assert torch.equal(read(one).order_LTK, read(other).order_LTK)


def test_probes_do_not_change_the_run(finished: Path, straight: Path) -> None:
    path, common = tiny_run(finished)
    blind = run_distributed("tests.training.jobs:train", 1, path, [*common, LIVE[-1], "name=blind"], None)[0]
    assert blind["finished"]
    blind = finished / "runs" / "blind"
    losses = [
        [event["train/loss"] for event in read_log(run / "metrics.jsonl") if "train/loss" in event]
        for run in (blind, straight)
    ]
    assert losses[0] == losses[1]
    assert not (blind / "probes").exists()


def test_report_of_a_run(finished: Path, tmp_path: Path) -> None:
    answer = report(
        finished, "--against", str(finished / "runs" / "other"), "--slim", "1,3,9", "--out", str(tmp_path / "r")
    )
    names = ("consistency", "coselection", "fluctuation", "load", "similarity", "slimmability", "spectrum")
    assert answer["files"] == [str(tmp_path / "r" / name) for name in ("collapse.json", *(f"{n}.png" for n in names))]
    assert all(Path(name).stat().st_size > 1000 for name in answer["files"])
    stored = json.loads((tmp_path / "r" / "collapse.json").read_text())
    assert stored == {key: value for key, value in answer.items() if key != "files"}

    last = probe_events(finished / "runs" / "whole")[-1]
    for layer in answer["layers"]:  # of two ranks and one
        for name in answer["mean"]:
            live = last[f"layer_{layer['layer']}/probe_{name}"]
            assert layer[name] == (live and pytest.approx(live, rel=1e-4, abs=1e-6)), name
    slim = answer["slimmability"]
    assert list(slim["bpc"]) == ["1", "2", "3"]
    assert slim["left_out"] == {"9": "there are 4 experts"}
    validation = read_log(finished / "runs" / "whole" / "metrics.jsonl")[-1]
    assert slim["bpc"]["2"] == pytest.approx(validation["val/bpc"], rel=1e-5)
    assert slim["bpc"]["1"] != slim["bpc"]["2"]
    assert answer["fluctuation"]["steps"] == [2, 4, 6]
    assert answer["fluctuation"]["fluctuation"][-1] == last["probe/fluctuation"]
    assert {"gate_mean", "noise_std", "noise_cosine", "agreement", "infonce_accuracy", "dead_experts_window"} <= set(
        answer["training"]["layers"]["1"]
    )
    assert answer["consistency"]["steps"] == [100]
    assert answer["settings"]["window"] == 32


def test_report_of_an_exported_model_alone(finished: Path, tmp_path: Path) -> None:
    """Without a run there is no fluctuation, training or consistency, and nowhere to write."""
    alone = tmp_path / "model"
    alone.symlink_to(finished / "runs" / "whole" / "hf")
    arguments = ["--data", str(finished / "data"), "--device", "cpu", "--report", "collapse", "--max-symbols", "99"]
    with pytest.raises(ConfigError, match="is not in a run directory: say where to write with --out"):
        report_collapse(parse(["--checkpoint", str(alone), *arguments]))
    out = tmp_path / "out"
    answer = report_collapse(parse(["--checkpoint", str(alone), *arguments, "--out", str(out), "--slim", "2"]))
    assert [answer[part] for part in ("fluctuation", "training", "consistency")] == [None] * 3
    assert not (out / "fluctuation.png").exists()
    assert answer["slimmability"]["symbols"] == 99
    with pytest.raises(ConfigError, match="--against compares the logs of runs"):
        report_collapse(
            parse(
                ["--checkpoint", str(alone), *arguments, "--out", str(out), "--against", str(finished / "runs/other")]
            )
        )


@pytest.fixture
def no_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router refuses three experts per token."""
    choices = TopKRouter.choices

    def not_three(router: TopKRouter, context: Any) -> int:
        if context.experts_per_token == 3:
            raise ValueError("this router knows 1, 2 and 4")
        return choices(router, context)

    monkeypatch.setattr(TopKRouter, "choices", not_three)


@pytest.mark.usefixtures("no_three")
def test_a_report_at_a_k_that_the_router_refuses_says_why(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this router knows 1, 2 and 4"):
        report(finished, "--experts-per-token", "3", "--out", str(tmp_path))


@pytest.mark.usefixtures("no_three")
def test_a_k_that_the_router_refuses_is_left_out_of_the_curve() -> None:
    model = tiny_model().eval()
    stream = TokenStream("valid", np.random.default_rng(0).integers(0, 32, 120), 120)
    corpus = SimpleNamespace(metadata=SimpleNamespace(vocab_size=32))
    loaded = Loaded(corpus, stream, Weights(), model, CPU)  # type: ignore[arg-type]
    protocol = Protocol(context=16, segment=16, max_symbols=60)
    answer = slimmability(loaded, [4, 3, 1, 8], protocol, 2)
    assert answer["left_out"] == {"3": "this router knows 1, 2 and 4", "8": "there are 4 experts"}
    assert (answer["trained"], answer["symbols"]) == (2, 60)
    for number, bpc in answer["bpc"].items():
        at = Protocol(context=16, segment=16, max_symbols=60, experts_per_token=int(number))
        assert bpc == evaluate(model, stream, 32, at, CPU).bits_per_symbol
    assert len(set(answer["bpc"].values())) == 3


def events_of(loads: dict[int, list[float]]) -> list[dict[str, Any]]:
    return [{"step": step, "train/loss": 1.0, "layer_2/load": load} for step, load in loads.items()]


def test_loads_are_accumulated_over_100_steps() -> None:
    loads = accumulated_loads(events_of({1: [2, 0], 50: [1, 1], 100: [0, 2], 150: [2, 0], 200: [2, 0], 250: [0, 2]}))
    assert loads == {2: {100: [1 * 2 + 49, 49 + 2 * 50], 200: [200, 0]}}
    assert accumulated_loads(events_of({1: [2, 0], 5: [1, 1]})) == {2: {100: [2 + 4, 4]}}  # all there is


def test_consistency_of_runs() -> None:
    one, same = (events_of({100: [3.0, 1.0, 0.0], 200: [1.0, 2.0, 1.5]}) for _ in range(2))
    opposite = events_of({100: [0.0, 2.0, 3.0], 200: [1.0, 2.0, 1.5]})
    assert consistency([one, same], ["a", "b"])["by_layer"] == {"2": [pytest.approx(1), pytest.approx(1)]}
    answer = consistency([one, opposite], ["a", "b"])
    assert answer["by_layer"]["2"] == [
        pytest.approx((1 + reference.pearson([3, 1, 0], [0, 2, 3])) / 2),
        pytest.approx(1),
    ]
    with pytest.raises(ConfigError, match=r"--against b: experts by layer are \{2: 2\}, of a they are \{2: 3\}"):
        consistency([one, events_of({100: [1.0, 1.0]})], ["a", "b"])
    with pytest.raises(ConfigError, match="no 100 steps of training in common"):
        consistency([one, events_of({500: [1.0, 1.0, 1.0]})], ["a", "b"])


def test_a_probe_takes_a_window(tmp_path: Path) -> None:
    path, overrides = tiny_run(tmp_path)
    with pytest.raises(ConfigError, match=r"probe\.tokens: must be at least training\.sequence_length=32, one window"):
        load(RunConfig, path, [*overrides, "probe.every=2", "probe.tokens=31"])
    with pytest.raises(ConfigError, match=r"probe\.tokens: matters only with probe\.every, and probe\.every is 0"):
        load(RunConfig, path, [*overrides, "probe.tokens=31"])
    with pytest.raises(ConfigError, match=r"probe\.samples: must be at least 2, got 1"):
        load(RunConfig, path, [*overrides, "probe.samples=1"])


def test_arguments_of_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--checkpoint", "x", "--data", "y"]
    plain, asked = parse(common), parse([*common, "--report", "collapse"])
    assert (plain.split, plain.max_symbols) == ("test", None)
    assert (asked.split, asked.max_symbols, asked.slim) == ("valid", 100_000, [1, 2, 4, 8, 16])
    assert parse([*common, "--report", "collapse", "--split", "test", "--slim", "2,1"]).slim == [2, 1]
    with pytest.raises(SystemExit):
        parse([*common, "--slim", "1,0"])
    assert "argument --slim: must be at least 1, got 0" in capsys.readouterr().err

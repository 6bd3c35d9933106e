"""The settings of a pre-training run: the model section, impossible combinations, the shipped files."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from data_prep.__main__ import build_parser
from s2moe.config import ConfigError, load, to_yaml
from s2moe.config.explain import explain
from s2moe.config.run import RunConfig, check_world
from s2moe.data import CorpusError
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.sizes import model_sizes

REPOSITORY = Path(__file__).resolve().parents[2]
OTHERS = ("papers", "finetune", "vision")  # parts of configurations, and those with tests of their own
SHIPPED = sorted(
    p for p in REPOSITORY.glob("configs/**/*.yaml") if not set(p.relative_to(REPOSITORY).parts) & set(OTHERS)
)
MINIMAL = (
    "name=trial",
    "data.dir=data/x",
    "training.steps=10",
    "training.global_batch=8",
    "training.sequence_length=64",
)


def minimal(*overrides: str) -> RunConfig:
    return load(RunConfig, None, [*MINIMAL, *overrides])


def test_model_section_is_resolved_and_builds_the_configuration() -> None:
    config = minimal("model.hidden_size=64", "model.num_attention_heads=4", "model.moe.num_experts=4")
    built = config.model_config(vocab_size=27)
    assert isinstance(built, S2MoEConfig)
    assert (built.vocab_size, built.hidden_size, built.moe["num_experts"]) == (27, 64, 4)
    assert built.max_position_embeddings == 64  # from the training sequence length
    assert built.moe["experts_per_token"] == 1  # of method s2moe, not MoEConfig's own default
    assert minimal("model.moe.method=smoe").model["moe"]["experts_per_token"] == 2


def test_given_vocabulary_must_hold_the_corpus() -> None:
    assert minimal("model.vocab_size=32").model_config(27).vocab_size == 32
    with pytest.raises(ConfigError, match=r"model.vocab_size: .* has 27 symbols, got 16"):
        minimal("model.vocab_size=16").model_config(27)


def test_router_options_are_typed_and_reach_the_model() -> None:
    config = minimal("model.moe.router.z_loss=1e-3")
    assert config.model["moe"]["router"]["z_loss"] == 0.001
    assert config.model_config(27).moe["router"]["z_loss"] == 0.001


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=8", r"model.hiden_size: unknown key; did you mean model.hidden_size\?"),
        ("model.torch_dtype=x", r"model.torch_dtype: unknown key"),
        ("model.moe.num_expert=8", r"model.moe.num_expert: unknown key; did you mean model.moe.num_experts\?"),
        ("model.moe.router.z_los=1", r"model.moe.router.z_los: unknown key; did you mean model.moe.router.z_loss\?"),
        ("model.moe.router.z_loss=x", r"model.moe.router.z_loss: expected float, got 'x'"),
        ("model.moe.router.name=topp", r"model.moe: .*topk"),
        ("model.moe.router.renormalise=true", r"model: renormalise with experts_per_token=1 .*: use combine="),
        ("model.moe.method=smo", r"model.moe.method: expected one of smoe, .*, got 'smo'"),
        ("model.moe.experts_per_token=99", r"model.moe: .*experts_per_token must lie in 1..num_experts"),
        ("model.hidden_size=100", r"model: .*hidden_size 100 is not a multiple of num_attention_heads 8"),
        ("steps=3", r"steps: unknown key; did you mean training.steps\?"),
        ("training.zero_stage=0", r"training.zero_stage: 0 is not supported: .*clips.*Use 1"),
        ("training.zero_stage=4", r"training.zero_stage: must be 1, 2 or 3, got 4"),
        ("training.micro_batch=3", r"training.micro_batch: must divide training.global_batch=8, got 3"),
        ("training.precision=fp8", r"training.precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        ("training.expert_parallel=3", r"training.expert_parallel: must divide model.moe.num_experts=16, got 3"),
        ("model.max_position_embeddings=32", r"training.sequence_length: must not exceed .*=32, got 64"),
        ("schedule.warmup_steps=11", r"schedule.warmup_steps: must not exceed training.steps=10, got 11"),
        ("optimizer.lr=0", r"optimizer.lr: must be positive, got 0.0"),
        ("training.timeout_minutes=0", r"training.timeout_minutes: must be positive, got 0.0"),
        ("training.sequence_parallel=0", r"training.sequence_parallel: must be at least 1, got 0"),
        (
            "training.sequence_parallel=2",  # with the default method, s2moe
            r"training.sequence_parallel: does not go with model.moe.stochastic.enabled, which needs whole sequences, "
            r"got 2: use a router among smoe_dropout, topk, xmoe .* training.activation_check",
        ),
        ("name=a/b", r"name: must be a file name, got 'a/b'"),
    ],
)
def test_impossible_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        minimal(override)


def test_bf16_needs_rows_of_sixteen_bytes() -> None:
    odd = ("model.moe.expert_hidden=36", "model.hidden_size=64")
    assert minimal(*odd).model["moe"]["expert_hidden"] == 36
    with pytest.raises(ConfigError, match=r"model.moe.expert_hidden: must be a multiple of 8 with bf16"):
        minimal(*odd, "training.precision=bf16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("training.sequence_parallel=3",), r"must divide training.sequence_length=64, got 3"),
        (("training.sequence_parallel=16",), r"must divide model.num_attention_heads=8, got 16"),
        (
            ("training.sequence_parallel=4", "model.num_attention_heads=12", "model.num_key_value_heads=6"),
            r"must divide model.num_key_value_heads=6, or be a multiple of it, got 4",
        ),
        (("training.sequence_parallel=2", "training.compile=true"), r"does not go with training.compile, which"),
        (("training.sequence_parallel=2", "model.moe.router.sequence_loss=0.1"), r"not go with .*sequence_loss, which"),
        (("training.sequence_parallel=2", "model.moe.method=usmoe"), r"not go with model.moe.router.name=usmoe, which"),
    ],
)
def test_impossible_sequence_parallelism(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        minimal("model.moe.method=smoe", "model.hidden_size=96", "model.num_attention_heads=8", *overrides)


def test_sequence_parallel_world() -> None:
    config = minimal("model.moe.method=smoe", "training.sequence_parallel=2", "training.micro_batch=2")
    check_world(config, 4)
    assert (config.micro_batch(4), config.accumulation_steps(4)) == (2, 2)
    assert minimal("model.moe.method=smoe", "training.sequence_parallel=2").micro_batch(4) == 4
    with pytest.raises(ConfigError, match=r"sequence_parallel: must divide the number of processes, 3, got 2: start"):
        check_world(config, 3)
    with pytest.raises(ConfigError, match=r"multiple of processes / sequence_parallel x micro_batch = 3 x 2, got 8"):
        check_world(config, 6)


def test_world_size() -> None:
    check_world(minimal("training.expert_parallel=2"), 4)
    with pytest.raises(
        ConfigError,
        match=r"must divide the number of processes, 3, got 2: start a multiple of 2",
    ):
        check_world(minimal("training.expert_parallel=2"), 3)
    with pytest.raises(ConfigError, match=r"global_batch: must be a multiple of .* 4 x 4, got 8: .*global_batch=16 or"):
        check_world(minimal("training.micro_batch=4"), 4)
    with pytest.raises(ConfigError, match=r"training.global_batch: .* got 8: .*training.global_batch=6$"):
        check_world(minimal(), 3)


def test_accumulation() -> None:
    config = minimal("training.micro_batch=2")
    assert (config.micro_batch(2), config.accumulation_steps(2)) == (2, 2)
    assert (minimal().micro_batch(2), minimal().accumulation_steps(2)) == (4, 1)


def test_resolved_configuration_loads_to_itself(tmp_path: Path) -> None:
    config = minimal("model.moe.method=s2moe_k2", "model.moe.router.balance_loss=0.5", "optimizer.lr=1e-4")
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(RunConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configurations_load(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(RunConfig, path)
    assert capsys.readouterr().err == ""  # nothing in it is without effect
    check_world(config, config.training.expert_parallel)
    config.model_config(config.model["vocab_size"] or 256)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configurations_say_how_their_corpus_is_prepared(path: Path, tmp_path: Path) -> None:
    config = load(RunConfig, path, [f"data.dir={tmp_path / 'absent'}"])
    assert config.data.prepare is not None
    with pytest.raises(CorpusError) as error:
        config.data.open()
    command = str(error.value).partition("prepare it with: python -m data_prep ")[2]
    assert command == f"{config.data.prepare} --out {tmp_path / 'absent'}"
    build_parser().parse_args(shlex.split(command))


def test_text8_prompts_are_in_its_alphabet() -> None:
    for path in SHIPPED:
        if path.parent.name == "text8":
            assert set(load(RunConfig, path).logging.sample_prompt) <= set("abcdefghijklmnopqrstuvwxyz ")


def test_sizes_of_shipped_models() -> None:
    def total(name: str) -> int:
        config = load(RunConfig, REPOSITORY / "configs" / name)
        return model_sizes(config.model_config(config.model["vocab_size"] or 256)).total

    assert 90e6 < total("medium_100m.yaml") < 110e6
    assert total("large_10b.yaml") >= 10e9
    assert total("enwik8/s2moe_k2.yaml") == total("enwik8/s2moe_flop_matched.yaml")


def test_papers_runs_differ_in_the_method_alone() -> None:
    configs = [load(RunConfig, path) for path in SHIPPED if path.parent.name == "enwik8"]
    assert len(configs) == 4
    for config in configs[1:]:
        assert config.training == configs[0].training
        assert config.optimizer == configs[0].optimizer
    assert len({str(config.model["moe"]) for config in configs}) == 4


def test_help_covers_router_options() -> None:
    text = explain()
    for key in ("training.zero_stage", "model.moe.num_experts", "model.moe.router.balance_loss", "s2moe_k2  "):
        assert key in text


def test_help_shows_the_defaults_of_the_default_method() -> None:
    text, defaults = explain(), minimal().model["moe"]
    assert f"model.moe.experts_per_token = int; default {defaults['experts_per_token']}\n" in text
    assert f"model.moe.stochastic.enabled = bool; default {str(defaults['stochastic']['enabled']).lower()}\n" in text
    balance = float(defaults["router"]["balance_loss"])
    assert f"model.moe.router.balance_loss = float; default {balance}\n" in text

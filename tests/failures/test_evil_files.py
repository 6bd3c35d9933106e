"""Nothing that is read is executed: traps in place of every file of every kind of checkpoint, and of hf/."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from s2moe.config import ConfigError
from s2moe.data import load_tokenizer
from s2moe.finetuning.loading import load_pretrained
from s2moe.training.probe_files import read as read_probes
from s2moe.training.weights import find_weights, load_weights
from tests.distributed_harness import run_distributed
from tests.finetuning.finetune_jobs import language_model

from .evil import Trap, as_pickle, as_torch_saves, readings
from .evil_jobs import Told, accelerated, pretraining, trainers

# What nothing reads on continuing. Every other file is an error, one that is new here too.
FOR_PEOPLE = {"training_args.bin", "zero_to_fp32.py", "zero_to_torch.py"}
HEADERS = {1: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}  # universal, by stage


def assert_one_error(found: dict[str, Told], unread: set[str]) -> None:
    """Each file's trap ends in one line for the user, whichever reader needs the file."""
    for name in {name for of_reader in found.values() for name in of_reader}:
        said = [of_reader[name] for of_reader in found.values()]
        for text in said:
            assert text == "nothing" or (text.startswith("error: ") and "\n" not in text), f"{name}: {text}"
        assert Path(name).name in unread or set(said) != {"nothing"}, f"{name} is read by nothing"


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoints_of_pretraining(tmp_path: Path, stage: int) -> None:
    """Resumed, converted, exported; in the universal form."""
    (found,) = run_distributed(pretraining, 1, str(tmp_path), stage)
    assert any("expert" in name for name in found["resume"]) == (stage == 1)
    assert_one_error({"universal": found.pop("universal")}, {HEADERS[4 - stage], *(["step.pt"] if stage == 3 else [])})
    assert_one_error({"resume": found["resume"]}, set())
    assert_one_error(found, set())


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_checkpoints_of_the_trainer(tmp_path: Path, stage: int) -> None:
    """With DeepSpeed the weights are in its files, and the model is there already."""
    (found,) = run_distributed(trainers, 1, str(tmp_path), stage)
    assert_one_error(found, FOR_PEOPLE | ({"config.json", "model.safetensors"} if stage else set()))


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1])
def test_states_of_accelerate(tmp_path: Path, stage: int) -> None:
    (found,) = run_distributed(accelerated, 1, str(tmp_path), stage)
    assert_one_error(found, FOR_PEOPLE | {"latest"})


def test_exported_models(tmp_path: Path) -> None:
    """Whatever is asked of an hf/ directory, nothing in it is executed; what a reader needs of it is missed."""
    language_model(hf := tmp_path / "hf")

    def read() -> None:
        errors: list[Exception] = []
        for reader in (
            lambda: load_weights(find_weights(hf)),
            lambda: load_tokenizer(hf),
            lambda: AutoModelForCausalLM.from_pretrained(hf),
            lambda: AutoTokenizer.from_pretrained(hf),
            lambda: load_pretrained(AutoModelForSequenceClassification, hf),
        ):
            try:
                reader()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    for name, error in readings(hf, read):
        assert error is not None or name == "generation_config.json", name
    # Files that are not there, and that transformers would take as well.
    (hf / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt"):
        for put in (as_torch_saves, as_pickle):
            put(hf / name, Trap(tmp_path / "sprung"))
            with contextlib.suppress(Exception):
                read()
            assert not (tmp_path / "sprung").exists(), name


def test_probes_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "step-00000001.npz"
    for put in (as_torch_saves, as_pickle):
        put(file, Trap(tmp_path / "sprung"))
        with pytest.raises(ConfigError, match=r"step-00000001\.npz is damaged"):
            read_probes(file)
    np.savez(file, order=np.array([Trap(tmp_path / "sprung")], dtype=object))
    with pytest.raises(ConfigError, match=r"step-00000001\.npz is damaged"):
        read_probes(file)
    assert not (tmp_path / "sprung").exists()

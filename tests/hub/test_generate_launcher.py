"""launcher/generate.py: a run's model, from its checkpoint and from hf/, continues a text, in colours if asked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher import generate
from s2moe import upcycle
from s2moe.config import ConfigError
from s2moe.data import ByteTokenizer, CharacterTokenizer, CorpusError
from s2moe.data.tokenizers import TEXT8_ALPHABET
from s2moe.hub import save_tokenizer
from s2moe.moe.layer import SMoELayer
from s2moe.training.generation import colour, coloured, continue_text, first_experts, load_model_and_tokenizer
from s2moe.training.weights import find_weights
from tests.distributed_harness import run_distributed
from tests.hub.foreign import foreign, ids
from tests.models.decoder import tiny
from tests.training.jobs import tiny_run, train

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def told(*arguments: str) -> str:
    return continue_text(generate.parse(list(arguments)))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    tiny("s2moe_k2", vocab_size=256, max_position_embeddings=32).eval().save_pretrained(tmp_path)
    save_tokenizer(ByteTokenizer(), tmp_path)
    return tmp_path


def test_a_run_continues_a_text_from_its_checkpoint_and_from_its_export(tmp_path: Path) -> None:
    config, overrides = tiny_run(tmp_path)
    run_distributed(train, 2, config, [*overrides, "training.expert_parallel=2"])
    run = tmp_path / "runs" / "tiny"
    from_hf = told("--checkpoint", str(run), "the ab", "--tokens", "12", "--temperature", "0")
    assert from_hf.startswith("the ab")
    assert len(from_hf.encode()) >= 18
    shutil.rmtree(run / "hf")
    assert find_weights(run).checkpoint is not None
    assert told("--checkpoint", str(run), "the ab", "--tokens", "12", "--temperature", "0") == from_hf


def test_sampling_follows_its_settings(hf: Path) -> None:
    common = ["--checkpoint", str(hf), "abc", "--tokens", "10"]
    assert told(*common) == told(*common)
    assert told(*common) != told(*common, "--seed", "1")
    assert told(*common, "--temperature", "0") == told(*common, "--temperature", "0")
    assert told(*common, "--top-p", "0.0001") == told(*common, "--temperature", "0")
    assert told(*common, "--temperature", "0", "--experts-per-token", "1") != told(*common, "--temperature", "0")


def test_a_continuation_may_be_longer_than_the_model_s_window(hf: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(hf, None)
    text = told("--checkpoint", str(hf), "abc", "--tokens", "80", "--temperature", "0", "--color-by-expert", "1")
    plain = told("--checkpoint", str(hf), "abc", "--tokens", "80", "--temperature", "0")
    assert ESCAPE.sub("", text.split("\n", 1)[1]) == plain
    made = tokenizer(plain)["input_ids"]
    del model
    assert made[:3] == [97, 98, 99]


def test_every_token_has_the_colour_of_its_first_expert(hf: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(hf, None)
    layer = next(module for module in model.modules() if isinstance(module, SMoELayer) and module.layer == 1)
    text = "a quick test"
    made = torch.tensor(tokenizer(text)["input_ids"])
    with torch.no_grad():
        found = first_experts(model, layer, made, {})
        states: list[Any] = []
        hook = layer.register_forward_hook(lambda module, given, output: states.append(given[0]))
        model(made[None])
        hook.remove()
    wanted = (states[0][0] @ layer.router.scores.weight.T).argmax(-1).tolist()
    assert found == wanted
    shown = coloured(tokenizer, made.tolist(), found, 4)
    pieces = re.findall(r"(\x1b\[38;5;\d+m)(.)\x1b\[0m", shown)
    assert "".join(piece for _, piece in pieces) == text
    assert [code for code, _ in pieces] == [colour(expert, 4) for expert in found]
    assert len({colour(expert, 16) for expert in range(16)}) == 16


def test_characters_of_several_tokens_stay_whole(hf: Path) -> None:
    _, tokenizer = load_model_and_tokenizer(hf, None)
    made = tokenizer("é東x")["input_ids"]
    shown = coloured(tokenizer, made, list(range(len(made))), 8)
    assert ESCAPE.sub("", shown) == "é東x"
    assert shown.count("\x1b[0m") == 3


def test_an_upcycled_model_generates_too(tmp_path: Path) -> None:
    upcycle(foreign("llama", vocab_size=256), experts=4).save_pretrained(tmp_path)
    save_tokenizer(ByteTokenizer(), tmp_path)
    assert told("--checkpoint", str(tmp_path), "ab", "--tokens", "5", "--color-by-expert", "2").startswith("experts of")
    assert ids().shape == (2, 9)


def test_an_unreadable_tokenizer_is_told(hf: Path) -> None:
    (hf / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (hf / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=f"the tokenizer in {hf} cannot be read"):
        told("--checkpoint", str(hf), "ab")


def test_a_prompt_that_the_vocabulary_cannot_express_is_refused(tmp_path: Path) -> None:
    tiny("smoe", vocab_size=27).save_pretrained(tmp_path)
    save_tokenizer(CharacterTokenizer(TEXT8_ALPHABET), tmp_path)
    with pytest.raises(ConfigError, match="the prompt's 'T' is not among the tokenizer's symbols: leave it out"):
        told("--checkpoint", str(tmp_path), "a The")


def test_added_tokens_reach_the_prompt(hf: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hf)
    tokenizer.add_tokens(["<sep>"])
    model = AutoModelForCausalLM.from_pretrained(hf)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(hf)
    _, found = load_model_and_tokenizer(hf, None)
    assert found("a<sep>b")["input_ids"] == [97, 256, 98]
    assert told("--checkpoint", str(hf), "a<sep>b", "--tokens", "2").startswith("a<sep>b")


def test_mistakes_end_with_what_to_do(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--color-by-expert", "7"], "the SMoE layers are 0, 1, 2"),
        (["--experts-per-token", "9"], "must lie in 1..4, got 9"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            told("--checkpoint", str(hf), "ab", *arguments)
    with pytest.raises(ConfigError, match="the prompt has no token"):
        told("--checkpoint", str(hf), "")
    with pytest.raises(ConfigError, match="no weights in"):
        told("--checkpoint", str(tmp_path / "nothing"), "ab")
    foreign("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="without SMoE layers of this project"):
        told("--checkpoint", str(tmp_path / "dense"), "ab")
    with pytest.raises(ConfigError, match=r"--data: .* has its own tokenizer: leave it out"):
        told("--checkpoint", str(hf), "ab", "--data", str(tmp_path / "nothing"))
    (hf / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer: give the corpus"):
        told("--checkpoint", str(hf), "ab")
    with pytest.raises(CorpusError):
        told("--checkpoint", str(hf), "ab", "--data", str(tmp_path / "nothing"))
    for wrong in (["--tokens", "0"], ["--temperature", "-1"], ["--top-p", "0"]):
        with pytest.raises(SystemExit):
            generate.parse(["--checkpoint", str(hf), "ab", *wrong])
        assert wrong[0] in capsys.readouterr().err

"""Directories that are converted, and the cards that say what is in them."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher import export
from s2moe import S2MoEForSequenceClassification
from s2moe.config import ConfigError
from s2moe.data import ByteTokenizer
from s2moe.hub import save_tokenizer
from s2moe.hub.card import source_commit, write_card
from s2moe.hub.directories import export_directory, import_directory, upcycle_directory
from s2moe.moe.layer import SMoELayer
from s2moe.training.generation import load_model_and_tokenizer
from s2moe.training.weights import load_run_weights
from tests.hub.foreign import foreign, ids
from tests.models.decoder import tiny
from tests.training.jobs import tiny_corpus


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path)


def test_a_file_that_decides_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router of one's own, which git does not know yet, is; notes beside the package are none."""
    (tmp_path / "s2moe").mkdir()
    (tmp_path / "s2moe" / "old.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True, timeout=60)
    monkeypatch.setattr("s2moe.hub.card.ROOT", tmp_path)
    commit = source_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "notes.txt").write_text("")
    assert source_commit() == commit
    (tmp_path / "s2moe" / "router.py").write_text("")
    assert source_commit() == f"{commit} + changes"


def test_a_directory_is_upcycled_with_its_tokenizer_and_a_card(tmp_path: Path) -> None:
    source, target = tmp_path / "dense", tmp_path / "sparse"
    dense = foreign("llama", vocab_size=256)
    dense.save_pretrained(source)
    save_tokenizer(ByteTokenizer(), source)
    assert upcycle_directory(source, target, method="s2moe", experts=4, slices=2) == target
    torch.testing.assert_close(load(target)(ids()).logits, dense(ids()).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(target)("ab")["input_ids"] == [97, 98]
    card = ModelCard.load(target / "README.md")
    assert card.data.tags == ["mixture-of-experts", "s2moe"]
    for text in ("| Upcycled from | dense |", "4 experts, 2 a token", "llama with SMoE layers"):
        assert text in card.text
    assert not {"base_model", "license", "datasets"} & set(card.data.to_dict())  # nothing of them is known
    back = tmp_path / "theirs"
    export_directory(target, back)
    assert json.loads((back / "config.json").read_text())["model_type"] == "mixtral"
    torch.testing.assert_close(load(back)(ids()).logits, dense(ids()).logits, rtol=1e-4, atol=1e-4)
    card = ModelCard.load(back / "README.md")
    assert card.data.tags == ["mixture-of-experts"]
    for text in ("| Converted from | sparse |", "MixtralForCausalLM", "| Upcycled from | dense |", "4 experts"):
        assert text in card.text
    assert "import s2moe" not in card.text  # it loads without
    theirs = AutoTokenizer.from_pretrained(back)
    assert type(theirs).__module__.startswith("transformers.")
    assert theirs("abü")["input_ids"] == [97, 98, *"ü".encode()]
    again = tmp_path / "ours"
    import_directory(back, again)
    assert json.loads((again / "config.json").read_text())["model_type"] == "s2moe"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "ours", "sparse", "theirs"]


def test_a_directory_that_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    foreign("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is no Hugging Face directory"):
        upcycle_directory(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="dense exists: give another"):
        upcycle_directory(tmp_path / "dense", tmp_path / "dense")
    with pytest.raises(ValueError, match="slices must divide"):
        upcycle_directory(tmp_path / "dense", tmp_path / "out", slices=5)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    """transformers would give it a random head, with a warning."""
    S2MoEForSequenceClassification(tiny(num_labels=3).config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="has a S2MoEForSequenceClassification, which is no language model"):
        export_directory(tmp_path / "classifier", tmp_path / "out")
    with pytest.raises(ConfigError, match="which is no language model"):
        load_run_weights(tmp_path / "classifier")
    with pytest.raises(ConfigError, match="which is no language model"):
        load_model_and_tokenizer(tmp_path / "classifier", None)
    assert [path.name for path in tmp_path.iterdir()] == ["classifier"]


def test_a_part_of_the_experts_is_not_saved_as_a_model(tmp_path: Path) -> None:
    model = tiny()
    for layer in model.modules():
        if isinstance(layer, SMoELayer):
            layer.parallel = dataclasses.replace(layer.parallel, size=2)
    with pytest.raises(ValueError, match="this process has 1/2 of the experts"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_upcycles_alike_for_the_same_seed(tmp_path: Path) -> None:
    foreign("llama", vocab_size=256).save_pretrained(tmp_path / "dense")
    routers = []
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        words = ["upcycle", "--model", str(tmp_path / "dense"), "--out", str(tmp_path / name), "--experts", "4"]
        export.main([*words, "--noise", "0.1", "--seed", str(seed)])
        state = load(tmp_path / name).state_dict()
        routers.append([value for key, value in state.items() if "router" in key or "experts" in key])
    assert all(map(torch.equal, routers[0], routers[1]))
    assert not any(map(torch.equal, routers[0], routers[2]))


def test_the_command_takes_other_options_of_the_layers_as_settings(tmp_path: Path) -> None:
    dense = foreign("llama", vocab_size=256)
    dense.save_pretrained(tmp_path / "dense")
    words = ["--model", str(tmp_path / "dense"), "model.moe.router.balance_loss=2e-2", "--experts", "4"]
    export.main(["upcycle", *words, "--out", str(tmp_path / "out"), "model.moe.shared_experts=1", "--method", "s2moe"])
    sparse = load(tmp_path / "out")
    moe = sparse.config.moe
    assert (moe["router"]["balance_loss"], moe["shared_experts"], moe["num_experts"]) == (0.02, 1, 4)
    assert moe["router"]["combine"] == "straight_through"  # what is left open is chosen as without settings
    torch.testing.assert_close(sparse(ids()).logits, dense(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.moe.router.balance_los=0.02", r"did you mean model\.moe\.router\.balance_loss\?"),
        ("model.moe.shared_expert=1", r"did you mean model\.moe\.shared_experts\?"),
        ("model.moe.router.gate=sigmoid", r"model\.moe\.router\.gate: unknown key"),
        ("moe.shared_experts=1", "moe: unknown key; did you mean model"),
        ("model.hidden_size=8", r"model\.hidden_size: unknown key"),
        ("model.moe.shared_experts=one", "expected int, got 'one'"),
        ("model.moe.num_experts=8", "is given as --experts"),
        ("model.moe.expert_hidden=8", "follows from the dense model"),
        ("balance_loss", r"of the form section\.key=value"),
        ("model.moe.router.renormalise=true", "renormalise with experts_per_token=1"),
    ],
)
def test_impossible_settings_of_the_command_are_named(tmp_path: Path, setting: str, message: str) -> None:
    foreign("llama", vocab_size=256).save_pretrained(tmp_path / "dense")
    words = ["--model", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), "--method", "s2moe"]
    with pytest.raises(ConfigError, match=message):
        export.main(["upcycle", *words, setting])
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_misspelt_form_of_the_command_names_the_forms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.parse(["upcycl", "--model", "dense", "--out", "out"])
    said = capsys.readouterr().err
    assert "'upcycl'" in said
    assert "to-transformers" in said


def test_the_card_of_a_run_says_what_was_done(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path / "data")
    settings = {
        "data": {"dir": str(corpus), "train": "train"},
        "training": {"steps": 60, "global_batch": 4, "sequence_length": 32, "precision": "fp32"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    events = [
        {"step": 30, "val/bpc": 4.0},
        {"step": 40, "train/loss": 2.0},
        {"step": 60, "val/bpc": 3.21, "val/symbols": 600},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    hf = tmp_path / "hf"
    hf.mkdir()
    config = tiny("s2moe", vocab_size=256).config
    write_card(hf, config, {"run": "tiny", "step": 60}, tmp_path, "byte")
    card = ModelCard.load(hf / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    for text in (
        "# tiny",
        "| Step | 60 |",
        "| Method | s2moe (S2MoE, flop-matched",
        "| Tokenizer | byte |",
        "| Data | tiny, 6,000 tokens of training",
        "| Validation | 3.2100 bits per byte over 600 bytes, at step 60 |",
        "| Training | 60 steps of 4 sequences of 32 tokens, fp32 |",
        '"num_experts": 4',
        "global_batch: 4",
    ):
        assert text in card.content, text
    earlier = write_card(hf, config, {"run": "tiny", "step": 50}, tmp_path).read_text()
    assert "4.0000 bits per byte, at step 30" in earlier
    bare = write_card(hf, config, {}).read_text()
    assert "Validation" not in bare
    assert "# hf" in bare


def saved_as_from_the_hub(directory: Path, front: str) -> Path:
    """A dense model where the Hub's cache keeps it, with a card of its own."""
    path = directory / "hub" / "models--some-lab--Tiny-1.5" / "snapshots" / "0123abc"
    foreign("llama", vocab_size=256).save_pretrained(path)
    save_tokenizer(ByteTokenizer(), path)
    (path / "README.md").write_text(f"---\n{front}\n---\n# Tiny\n")
    return path


def test_the_card_names_what_a_model_is_made_of_and_keeps_its_licence(tmp_path: Path) -> None:
    front = "license: other\nlicense_name: tiny-licence\nlicense_link: LICENSE\nbase_model: some-lab/Tiny-0\ntags: [a]"
    target = upcycle_directory(saved_as_from_the_hub(tmp_path, front), tmp_path / "sparse", experts=4)
    card = ModelCard.load(target / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "s2moe", "smoe"],
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "LICENSE",
        "base_model": "some-lab/Tiny-1.5",
    }
    validate_repo_id(card.data.base_model)
    assert "| Upcycled from | some-lab/Tiny-1.5 |" in card.text
    assert str(tmp_path) not in card.content
    # One step further the nearest model that has a name on the Hub is the same.
    export_directory(target, tmp_path / "theirs")
    theirs = ModelCard.load(tmp_path / "theirs" / "README.md")
    assert (theirs.data.base_model, theirs.data.license_name) == ("some-lab/Tiny-1.5", "tiny-licence")
    assert str(tmp_path) not in theirs.content
    import_directory(tmp_path / "theirs", tmp_path / "ours")
    again = ModelCard.load(tmp_path / "ours" / "README.md")
    assert (again.data.base_model, again.data.license) == ("some-lab/Tiny-1.5", "other")
    assert "| Converted from | theirs |" in again.text


def test_a_card_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    source = saved_as_from_the_hub(tmp_path, "license: [")
    (source / "README.md").write_bytes(b"---\nlicense: [\n---\n")
    data = ModelCard.load(upcycle_directory(source, tmp_path / "sparse", experts=4) / "README.md").data
    assert (data.license, data.base_model) == (None, "some-lab/Tiny-1.5")


def test_the_card_of_a_classifier_names_task_and_base_and_no_place(tmp_path: Path) -> None:
    base = saved_as_from_the_hub(tmp_path, "license: mit")
    model = S2MoEForSequenceClassification(tiny("s2moe", num_labels=2, vocab_size=256).config)
    results = {
        "task": "sst2",
        "texts": {"train": 6920, "validation": 872, "test": 1821},
        "test_accuracy": 0.8,
        "validation_accuracy": 0.81,
    }
    for official in (True, False):
        run = {"data": {"task": "sst2", "official": official, "source": "/some/where/sst.zip"}, "output_dir": "~/runs"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**run, "model": {"checkpoint": str(base)}}))
        write_card(tmp_path, model.config, {"run": "tuned", "step": 9}, tmp_path, "byte", results)
        card = ModelCard.load(tmp_path / "README.md")
        assert (card.data.pipeline_tag, card.data.base_model, card.data.license) == (
            "text-classification",
            "some-lab/Tiny-1.5",
            "mit",
        )
        assert card.data.datasets == (["stanfordnlp/sst2"] if official else None)  # another set under its name
        assert "| Fine-tuned from | some-lab/Tiny-1.5 |" in card.text
        for text in ("source: sst.zip", "output_dir: runs", "6,920 / 872 / 1,821 texts"):
            assert text in card.text
        assert not [place for place in (str(tmp_path), "/some", "~") if place in card.content]


@pytest.mark.parametrize(("corpus", "dataset"), [("enwik8", ["LTCB/enwik8"]), ("text", None)])
def test_the_card_names_a_corpus_that_the_hub_has(tmp_path: Path, corpus: str, dataset: list[str] | None) -> None:
    data = tiny_corpus(tmp_path / "enwik8")  # the directory's name is the user's, whatever lies in it
    metadata = json.loads((data / "metadata.json").read_text())
    metadata |= {
        "request": {"corpus": corpus},
        "command": f"python -m data_prep {corpus} --source={tmp_path}/raw.zip --out {data}",
    }
    (data / "metadata.json").write_text(json.dumps(metadata))
    model = tiny("smoe")
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "dense" / "hf").mkdir(parents=True)
    settings = {"data": {"dir": str(data)}, "init": {"weights": str(tmp_path / "dense" / "hf")}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    write_card(tmp_path / "hf", model.config, {"run": "tiny"}, tmp_path)
    export_directory(tmp_path / "hf", tmp_path / "theirs")
    for directory in ("hf", "theirs"):  # what is known of the data goes along when the model leaves
        card = ModelCard.load(tmp_path / directory / "README.md")
        assert card.data.datasets == dataset
        assert card.data.base_model is None
        assert f"`python -m data_prep {corpus} --source=raw.zip --out enwik8`" in card.text
        assert "| Begun with | dense |" in card.text
        assert ("dir: enwik8" in card.text) == (directory == "hf")
        assert str(tmp_path) not in card.content


def test_the_commit_is_this_tree_s() -> None:
    commit = source_commit()
    assert commit == "" or len(commit.split()[0]) == 40

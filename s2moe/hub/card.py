"""A model card, README.md in the Hub's form: what was trained how, on what, how good it is, and from which commit."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import s2moe
from s2moe.config.options import ConfigError
from s2moe.config.plain_yaml import read_yaml
from s2moe.data.corpus import METADATA_FILE
from s2moe.data.tokenizers import TOKENIZERS
from s2moe.data.units import UNKNOWN_SYMBOL, unit_of
from s2moe.hub.provenance import (
    CARD_FILE,
    HUB_DATASETS,
    card_table,
    command_without_places,
    inherited,
    public_name,
    without_places,
)
from s2moe.models import S2MoEConfig
from s2moe.models.sizes import model_sizes
from s2moe.moe.methods import METHODS
from s2moe.places import ROOT

GENERATE = (
    "import s2moe  # registers the architecture with transformers",
    "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline",
    "",
    'path = "."  # this directory, or its name on the Hub',
    "model = AutoModelForCausalLM.from_pretrained(path)",
    "tokenizer = AutoTokenizer.from_pretrained(path)",
    'pipeline("text-generation", model=model, tokenizer=tokenizer)("the ", max_new_tokens=40)',
)
CLASSIFY = (
    "import s2moe  # registers the architecture with transformers",
    "from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline",
    "",
    'path = "."  # this directory, or its name on the Hub',
    "model = AutoModelForSequenceClassification.from_pretrained(path)",
    "tokenizer = AutoTokenizer.from_pretrained(path)",
    'pipeline("text-classification", model=model, tokenizer=tokenizer)("A fine film.", truncation=True)',
)


def write_card(
    directory: Path,
    config: Any,
    origin: dict[str, Any],
    run_directory: Path | None = None,
    tokenizer: str = "",
    tuned: dict[str, Any] | None = None,
) -> Path:
    """Write README.md into a directory that holds an exported model.

    Args:
        config: the model's configuration, with the layers' options.
        origin: what the weights are, e.g. {"run": name, "step": n}, or {"upcycled from": path}; of a path the name.
        run_directory: where they were trained, whose config.yaml and metrics.jsonl say the rest.
        tokenizer: kind of the tokenizer that goes along.
        tuned: of a classifier, what a fine-tuning run writes to results.json.
    """
    step = origin.get("step")
    run = _read_run(run_directory)
    made_from = _made_from(origin, run)
    facts = {
        **{name.capitalize(): value for name, value in (origin | _names(made_from)).items()},
        "Method": _method(config),
        **(_sizes(config) if tuned is None else _tuning(tuned)),
        **({"Tokenizer": tokenizer} if tokenizer else {}),
        **_data(run),
        **_score(run_directory, step, _symbol(tokenizer, run)),
        **_training(run),
        "Made with": _made_with(),
    }
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if tuned is None else "text-classification",
        "tags": list(dict.fromkeys(["mixture-of-experts", "s2moe", config.moe_config().method])),
        **{key: value for directory in made_from.values() for key, value in inherited(directory).items()},
        **_datasets(run),
    }
    return _save(
        directory,
        front,
        origin.get("run", directory.name),
        [
            f"A {'language model' if tuned is None else 'text classifier'} with sparse mixture-of-experts layers.",
            "",
            *_table_lines(facts),
            "",
            *_code("python", GENERATE if tuned is None else CLASSIFY),
            "",
            "The layers' options:",
            "",
            *_code("json", [json.dumps(config.moe, indent=2)]),
            *_settings(run),
        ],
    )


def write_card_of_leaving(directory: Path, config: Any, name: str, source: Path) -> Path:
    """Write README.md beside a model of transformers' own that ``source``, one of ours, was converted to.

    What the card of ``source`` says in its table stands in it, so that data, method and score go along.
    """
    converted_from, table = public_name(source), card_table(source)
    facts = {
        "Converted from": converted_from,
        "Architecture": f"{config.architectures[0]}, of transformers itself",
        "Made with": _made_with(),
    }
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts"],
        **inherited(source, "datasets"),
    }
    return _save(
        directory,
        front,
        name,
        [
            "A language model with sparse mixture-of-experts layers. Loading it takes no other library.",
            "",
            *_table_lines(facts),
            *(["", f"What the card of {converted_from} says:", "", *table] if table else []),
            "",
            *_code("python", GENERATE[1:]),
        ],
    )


def _save(directory: Path, front: dict[str, Any], title: str, lines: list[str]) -> Path:
    path = directory / CARD_FILE
    matter = yaml.safe_dump(front, sort_keys=False).strip()
    path.write_text("\n".join(["---", matter, "---", "", f"# {title}", "", *lines, ""]), encoding="utf-8")
    return path


def _made_with() -> str:
    """This project's version and the commit of its source."""
    return f"S2MoE {s2moe.__version__}" + (f", commit {commit}" if (commit := source_commit()) else "")


def _code(language: str, lines: Iterable[str]) -> list[str]:
    return [f"```{language}", *lines, "```"]


def _table_lines(facts: dict[str, Any]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in facts.items())]


def _tuning(results: dict[str, Any]) -> dict[str, str]:
    texts = results["texts"]
    return {
        "Task": f"{results['task']}, {texts['train']:,} / {texts['validation']:,} / {texts['test']:,} texts",
        "Test accuracy": f"{100 * results['test_accuracy']:.2f} %, at the best validation accuracy, "
        f"{100 * results['validation_accuracy']:.2f} %",
    }


def _made_from(origin: dict[str, Any], run: dict[str, Any]) -> dict[str, Path]:
    """The directory of the model that this one was made of, under the way in which; empty for one that began anew."""
    ways = {
        **{name: value for name, value in origin.items() if name.endswith(" from")},
        "fine-tuned from": (run.get("model") or {}).get("checkpoint"),
        "begun with": (run.get("init") or {}).get("weights"),
    }
    return {way: Path(path) for way, path in ways.items() if path}


def _names(directories: dict[str, Path]) -> dict[str, str]:
    return {way: public_name(directory) for way, directory in directories.items()}


def _datasets(run: dict[str, Any]) -> dict[str, list[str]]:
    """The data's name on the Hub, where it is what is known there: verified content, or a task's official texts."""
    data = run.get("data") or {}
    name = data.get("task") if data.get("official", True) else None
    if data.get("dir"):
        name = (_metadata(data["dir"]).get("request") or {}).get("corpus")
    return {"datasets": [HUB_DATASETS[name]]} if name in HUB_DATASETS else {}


def _metadata(folder: str) -> dict[str, Any]:
    """Of a prepared corpus; empty where it is gone."""
    path = Path(folder) / METADATA_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def source_commit() -> str:
    """The commit of this source tree, with "+ changes" where its files differ; empty outside of a clone.

    A file that git does not know counts where it is a part of this package, as a router of one's own is.
    """
    if not (ROOT / ".git").exists():
        return ""
    try:
        commit = _git(ROOT, "rev-parse", "HEAD")
        changed = _git(ROOT, "status", "--porcelain", "--untracked-files=no")
        added = _git(ROOT, "status", "--porcelain", "--untracked-files=all", "--", "s2moe", "launcher")
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + (" + changes" if changed or added else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _read_run(run_directory: Path | None) -> dict[str, Any]:
    """The run's settings as resolved, if they are there."""
    path = run_directory / "config.yaml" if run_directory is not None else None
    if path is None or not path.is_file():
        return {}
    return read_yaml(path) or {}


def _settings(run: dict[str, Any]) -> list[str]:
    if not run:
        return []
    settings = yaml.safe_dump(without_places(run), sort_keys=False).strip()
    return ["", "The run's settings:", "", *_code("yaml", [settings])]


def _method(config: Any) -> str:
    moe = config.moe_config()
    summary = METHODS[moe.method].summary
    return f"{moe.title()} ({summary}), {moe.num_experts} experts, {moe.experts_per_token} a token"


def _sizes(config: Any) -> dict[str, str]:
    if not isinstance(config, S2MoEConfig):
        return {"Architecture": config.model_type.replace("s2moe_", "") + " with SMoE layers in place of MLPs"}
    sizes = model_sizes(config)
    return {"Parameters": f"{sizes.total:,}, of which {sizes.active:,} take part in a token"}


def _data(run: dict[str, Any]) -> dict[str, str]:
    folder = (run.get("data") or {}).get("dir")
    if not folder:
        return {}
    metadata = _metadata(folder)
    if not metadata:
        return {"Data": Path(folder).name}
    train = metadata["splits"].get(run["data"].get("train", "train"), {})
    command = command_without_places(metadata["command"])
    facts = {"Data": f"{metadata['name']}, {train.get('tokens', 0):,} tokens of training, `{command}`"}
    if metadata.get("notes"):
        facts["Note on the data"] = " ".join(metadata["notes"])
    return facts


def _symbol(tokenizer: str, run: dict[str, Any]) -> str:
    """What figures per symbol are divided by, as the tokenizer that goes along says, or else the data."""
    if tokenizer in TOKENIZERS:
        return TOKENIZERS[tokenizer].symbol
    folder = (run.get("data") or {}).get("dir")
    return _metadata(folder).get("symbol", UNKNOWN_SYMBOL) if folder else UNKNOWN_SYMBOL


def _score(run_directory: Path | None, step: int | None, symbol: str) -> dict[str, str]:
    """The last validation up to this step."""
    path = run_directory / "metrics.jsonl" if run_directory is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        scored = [e for e in events if e.get("val/bpc") is not None and (step is None or e["step"] <= step)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): bring back a copy, or move it away") from error
    if not scored:
        return {}
    last = scored[-1]
    symbols = last.get("val/symbols")
    over = f" over {symbols:,.0f} {symbol}s" if symbols and math.isfinite(symbols) else ""
    return {"Validation": f"{last['val/bpc']:.4f} {unit_of(symbol)}{over}, at step {last['step']:,}"}


def _training(run: dict[str, Any]) -> dict[str, str]:
    training = run.get("training")
    if not training or "sequence_length" not in training:
        return {}
    return {
        "Training": f"{training['steps']:,} steps of {training['global_batch']} sequences of "
        f"{training['sequence_length']} tokens, {training['precision']}"
    }


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")

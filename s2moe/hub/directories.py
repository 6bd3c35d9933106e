"""The conversions on directories, as `launcher/export.py` offers them: read a model, write another beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from s2moe.hub.auto_tokenizer import has_tokenizer, read_tokenizer
from s2moe.hub.card import write_card, write_card_of_leaving
from s2moe.hub.interchange import from_transformers, to_transformers
from s2moe.hub.reading import read_model, require_config
from s2moe.hub.tokenization import S2MoETokenizer
from s2moe.hub.upcycling import upcycle


def upcycle_directory(source: Path, target: Path, **options: Any) -> Path:
    """Write the model of ``source`` with SMoE layers to ``target``; options as those of ``upcycle``.

    Raises:
        ValueError: there is no such model, it cannot be upcycled, or ``target`` holds something.
    """
    return _convert(source, target, lambda model: upcycle(model, **options), "upcycled from")


def import_directory(source: Path, target: Path) -> Path:
    """Write transformers' model of ``source`` as one of ours to ``target``; ValueError as above."""
    return _convert(source, target, from_transformers, "converted from")


def export_directory(source: Path, target: Path) -> Path:
    """Write our model of ``source`` as one of transformers' own to ``target``; ValueError as above."""
    return _convert(source, target, to_transformers, "converted from")


def require_language_model(directory: Path) -> None:
    """ValueError if this directory has another model: transformers would load it with a random head."""
    kinds = require_config(directory).get("architectures") or []
    if kinds and not any("CausalLM" in kind or "LMHead" in kind for kind in kinds):
        raise ValueError(f"{directory} has a {kinds[0]}, which is no language model")


def _convert(source: Path, target: Path, change: Callable[[PreTrainedModel], PreTrainedModel], how: str) -> Path:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists: give another directory")
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} is no Hugging Face directory: it has no config.json")
    require_language_model(source)
    made = change(read_model(AutoModelForCausalLM, source))
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(made, source, temporary, {"run": target.name, how: str(source)})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    os.rename(temporary, target)
    return target


def _write(made: PreTrainedModel, source: Path, temporary: Path, origin: dict[str, str]) -> None:
    made.save_pretrained(temporary)
    _convert_tokenizer(source, temporary, leaves=not hasattr(made.config, "moe_config"))
    if hasattr(made.config, "moe_config"):
        write_card(temporary, made.config, origin)
    else:
        write_card_of_leaving(temporary, made.config, origin["run"], source)


def _convert_tokenizer(source: Path, target: Path, leaves: bool) -> None:
    """Write the tokenizer that goes along, under transformers' own name where the model ``leaves`` the project."""
    if not has_tokenizer(source):
        return
    tokenizer = read_tokenizer(source)
    tokenizer.save_pretrained(target)
    if leaves and isinstance(tokenizer, S2MoETokenizer):
        PreTrainedTokenizerFast.from_pretrained(target).save_pretrained(target)

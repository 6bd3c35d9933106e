"""What a model card may say of where a model and its data come from: names that others know, no places on this disk."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

CARD_FILE = "README.md"
HF_DIRECTORY = "hf"  # of a run
INHERITED = ("license", "license_name", "license_link", "base_model")
HUB_DATASETS = {  # corpora of data_prep whose content is verified, and the classification tasks
    "enwik8": "LTCB/enwik8",
    "wikitext103": "Salesforce/wikitext",
    "sst2": "stanfordnlp/sst2",
    "sst5": "stanfordnlp/sst",
    "imdb": "stanfordnlp/imdb",
    "banking77": "PolyAI/banking77",
}


def hub_name(directory: Path) -> str | None:
    """The name on the Hub of a directory in its cache, models--ORGANISATION--NAME/snapshots/COMMIT; None elsewhere."""
    parts = directory.expanduser().resolve().parts
    for part, below in pairwise(parts):
        if part.startswith("models--") and below == "snapshots":
            return part.removeprefix("models--").replace("--", "/")
    return None


def public_name(directory: Path) -> str:
    """What a model's directory is called: on the Hub, if it comes from its cache, else by its last part."""
    place = directory.expanduser().resolve()
    own = place.parent.name if place.name == HF_DIRECTORY else place.name
    return hub_name(directory) or own


def inherited(directory: Path, *more: str) -> dict[str, Any]:
    """What a model made of the one in a run's or Hugging Face directory has from it, as front matter.

    The licence and the base model of its card, the latter replaced by its own name where that is known, and ``more``.
    """
    card = _card_of(directory)
    front = {} if card is None else _front_matter(card)
    found = {name: front[name] for name in (*INHERITED, *more) if front.get(name)}
    name = hub_name(directory)
    return found | ({"base_model": name} if name else {})


def card_table(directory: Path) -> list[str]:
    """The lines of the tables in a model's card; none where it has no card that can be read."""
    card = _card_of(directory)
    try:
        text = "" if card is None else card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    return [line for line in text.splitlines() if line.startswith("|")]


def _card_of(directory: Path) -> Path | None:
    """The card in a run's or Hugging Face directory."""
    cards = (directory / CARD_FILE, directory / HF_DIRECTORY / CARD_FILE)
    return next((card for card in cards if card.is_file()), None)


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML at the head of a card; nothing where it has none that can be read."""
    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def without_places(value: Any) -> Any:
    """Settings with the last part of each absolute path in its place."""
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and len(value) > 1:
        return Path(value).name
    return value


def command_without_places(command: str) -> str:
    """The same for the words of a command line, --option=PATH included."""
    words = [word.partition("=") for word in shlex.split(command)]
    return shlex.join(f"{without_places(name)}{equals}{without_places(value)}" for name, equals, value in words)

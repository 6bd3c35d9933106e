"""`launcher/generate.py`: a trained model continues a text, its tokens coloured by expert where that is asked for."""

from __future__ import annotations

import argparse
import colorsys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from s2moe.config import ConfigError
from s2moe.data import Corpus
from s2moe.data.tokenizer_base import REPLACEMENT
from s2moe.hub import S2MoETokenizer
from s2moe.hub.auto_tokenizer import has_tokenizer, read_tokenizer
from s2moe.hub.reading import read_model
from s2moe.hub.tokenization import left_out
from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import Routing

from .quiet import no_progress_bars
from .standalone import find_device
from .weights import check_language_model, find_weights, load_weights

RESET = "\x1b[0m"


@torch.no_grad()
def continue_text(options: argparse.Namespace) -> str:
    """The prompt and what the model adds to it, as `launcher/generate.py` was asked to.

    Raises:
        ConfigError, CorpusError: weights or tokenizer not found, an option impossible, or the prompt not expressible.
    """
    device = find_device(options.device)
    model, tokenizer = load_model_and_tokenizer(options.checkpoint, options.data)
    model = model.to(device)
    moe = model.config.moe_config()
    choices = options.experts_per_token
    if choices is not None and not 1 <= choices <= moe.num_experts:
        raise ConfigError(f"--experts-per-token must lie in 1..{moe.num_experts}, got {choices}")
    layer = None if options.color_by_expert is None else find_layer(model, options.color_by_expert)
    if isinstance(tokenizer, S2MoETokenizer) and (lacking := left_out(tokenizer, options.prompt)):
        raise ConfigError(f"the prompt's {lacking[0]!r} is not among the tokenizer's symbols: leave it out")
    prompt = tokenizer(options.prompt, return_tensors="pt")["input_ids"].long().to(device)
    if prompt.shape[1] == 0:
        raise ConfigError("the prompt has no token: give some text")
    if int(prompt.max()) >= model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer gives the prompt the id {int(prompt.max())}, and the model in {options.checkpoint} has "
            f"{model.config.vocab_size}: they do not belong together"
        )
    torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    slim = {} if choices is None else {"experts_per_token": choices}
    ids = extend(model, prompt, options.tokens, **sampling, **slim)[0]
    if layer is None:
        return tokenizer.decode(ids)
    expert_S = first_experts(model, layer, ids, slim)
    return f"{legend(layer.layer, moe.num_experts)}\n{coloured(tokenizer, ids.tolist(), expert_S, moe.num_experts)}"


def load_model_and_tokenizer(path: Path, data: Path | None) -> tuple[Any, Any]:
    """The model in evaluation mode on the CPU, and its tokenizer as one of transformers'.

    Raises:
        ConfigError, CorpusError: there is none under `path`, a tokenizer cannot be read, or a checkpoint's corpus is
            gone.
    """
    weights = find_weights(path)
    if weights.hf is None:
        assert weights.checkpoint is not None
        corpus = Corpus.open(data or weights.checkpoint.state.config["data"]["dir"])
        if corpus.tokenizer.fingerprint() != weights.tokenizer:
            raise ConfigError(f"{weights.description} was trained with another tokenizer than that of {corpus.name}")
        return load_weights(weights), S2MoETokenizer(corpus.tokenizer)
    check_language_model(weights.hf)
    with no_progress_bars():
        model = read_model(AutoModelForCausalLM, weights.hf)
    if not hasattr(model.config, "moe_config"):
        raise ConfigError(f"{weights.hf} is a {type(model).__name__} without SMoE layers of this project")
    if has_tokenizer(weights.hf):
        if data is not None:
            raise ConfigError(f"--data: {weights.hf} has its own tokenizer: leave it out")
        return model, read_tokenizer(weights.hf)
    if data is None:
        raise ConfigError(f"{weights.hf} has no tokenizer: give the corpus it was trained on, --data")
    return model, S2MoETokenizer(Corpus.open(data).tokenizer)


def extend(model: Any, ids: Tensor, tokens: int, **settings: Any) -> Tensor:
    """``ids`` [1, S] and so many further tokens.

    The model never sees more tokens at once than it is meant for: a long continuation is drawn in pieces, each from
    the half window before it.
    """
    half = max(1, model.config.max_position_embeddings // 2)
    total = ids.shape[1] + tokens
    settings = {"pad_token_id": 0, "eos_token_id": model.generation_config.eos_token_id} | settings
    while (left := total - ids.shape[1]) > 0:
        seen = ids if total <= 2 * half else ids[:, -half:]
        drawn = model.generate(
            seen, attention_mask=torch.ones_like(seen), max_new_tokens=min(left, 2 * half - seen.shape[1]), **settings
        )
        new = drawn[:, seen.shape[1] :]
        ids = torch.cat((ids, new), dim=1)
        ends = settings["eos_token_id"]
        if ends is not None and new[0, -1].item() in (ends if isinstance(ends, list) else [ends]):
            break
    return ids


def find_layer(model: torch.nn.Module, number: int) -> SMoELayer:
    """The SMoE layer of block `number`; ConfigError where that has none."""
    layers = {module.layer: module for module in model.modules() if isinstance(module, SMoELayer)}
    if number not in layers:
        raise ConfigError(f"--color-by-expert {number}: the SMoE layers are {', '.join(map(str, layers)) or 'none'}")
    return layers[number]


def first_experts(model: Any, layer: SMoELayer, ids: Tensor, slim: dict[str, int]) -> list[int | None]:
    """The expert with the largest weight for each token in this layer; None for a token without any."""
    seen: list[Routing] = []
    hook = layer.router.register_forward_hook(lambda module, given, routing: seen.append(routing))
    half = max(1, model.config.max_position_embeddings // 2)
    experts: list[int | None] = []
    try:
        for start in range(0, len(ids), half):  # as the tokens were drawn, from the half window before
            before = min(start, half)
            model(ids[None, start - before : start + half], use_cache=False, **slim)
            experts += _heaviest(seen.pop())[before:]
    finally:
        hook.remove()
    return experts


def _heaviest(routing: Routing) -> list[int | None]:
    best: list[tuple[float, int] | None] = [None] * routing.num_tokens
    for token, expert, weight in zip(
        routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True
    ):
        known = best[token]
        if known is None or weight > known[0]:
            best[token] = weight, expert
    return [None if found is None else found[1] for found in best]


def coloured(tokenizer: Any, ids: list[int], expert_S: list[int | None], num_experts: int) -> str:
    """The text of the tokens, each in its expert's colour. A character of several tokens has that of the first."""
    parts, before, start = [], 0, 0  # tokens since `before` say how the next ones join, such as with a space
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:stop])
        if text.endswith(REPLACEMENT) and stop < len(ids):
            continue  # perhaps in the middle of a character
        written = tokenizer.decode(ids[before:start])
        parts.append(colour(expert_S[start], num_experts) + text[len(written) :] + RESET)
        before, start = start, stop
    return "".join(parts)


def colour(expert: int | None, num_experts: int) -> str:
    """The escape sequence of an expert's colour: hues around the circle, from the 216 colours terminals agree on."""
    if expert is None:
        return RESET
    red, green, blue = (round(5 * part) for part in colorsys.hsv_to_rgb(expert / num_experts, 0.8, 1.0))
    return f"\x1b[38;5;{16 + 36 * red + 6 * green + blue}m"


def legend(layer: int, num_experts: int) -> str:
    """Which colour is which expert."""
    names = (f"{colour(expert, num_experts)}{expert}{RESET}" for expert in range(num_experts))
    return f"experts of layer {layer}: {' '.join(names)}"

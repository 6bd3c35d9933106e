"""Begin a run with given weights: those of the same model, of one with half the experts, or of a dense one.

Three cases, decided layer by layer:

- The same sizes: every weight and buffer is copied.
- Half the experts: expert e becomes e and E + e, which keeps copies on different ranks. Copies get opposite noise,
  and the router's rows opposite tiny changes, so that ties break. A token's best expert is then two, with equal
  logits, and both are chosen before the second best. With twice the experts per token the mixture is what it was:
  each weight is halved and counts twice. With one before and after, too. Otherwise a token takes both copies of the
  first half of its choices, and the function changes.
- A dense MLP for an SMoE layer: every expert is a copy with noise of its own, and the router begins anew. Where the
  weights of a token's choices add up to 1, the function is kept whatever they are.

Where weights do not add up to 1, W2 makes up for it: with combine=softmax_then_topk and one expert per token, copies
count half, so W2 is doubled; a new router's k choices count about k / E, so W2 is multiplied by E / k; with sigmoid,
two copies count twice, and a new router's choices about k / 2. The optimizer and its state are new in every case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2moe.config.options import ConfigError
from s2moe.config.run import InitConfig
from s2moe.hub.reading import read_config, require_whole
from s2moe.hub.weight_files import WeightFiles
from s2moe.models import S2MoEForCausalLM
from s2moe.models.configuration import S2MoEConfig
from s2moe.moe.config import MoEConfig

from .export import expert_parameters
from .weights import Weights, find_weights

KEY = "init.weights"
TIE_BREAK = 1e-3  # change of a copied router row, relative to its numbers; in bf16 some of them still differ
_DENSE = {  # expert matrix: the dense MLP's, by the experts' form
    "gated": {"w1": "gate.weight", "w2": "down.weight", "w3": "up.weight"},
    "mlp": {"w1": "up.weight", "w2": "down.weight", "w3": "up.bias"},
}


@dataclass(frozen=True)
class _Target:
    """A tensor of the new model: its whole shape, and how its value is made, of all of it or of one expert."""

    shape: tuple[int, ...]
    make: Callable[[int | None], Tensor] | None  # None: it stays as it was initialised


class InitialWeights:
    """What a new run begins with.

    Raises:
        ConfigError: naming the first tensor that does not fit, or the tokenizer if it is another one.
    """

    def __init__(self, options: InitConfig, config: S2MoEConfig, tokenizer: str, seed: int) -> None:
        assert options.weights is not None
        directory = _directory(Path(options.weights))
        self._noise, self._seed = options.noise, seed
        try:
            self._source = read_config(S2MoEConfig, directory)
            self._files = WeightFiles(directory)
            require_whole_language_model(self._source, self._files, directory)
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error}") from error
        self._config = config
        trained = Weights(hf=directory).tokenizer
        if trained and trained != tokenizer:
            raise ConfigError(
                f"{KEY}: {directory} was trained with the tokenizer {trained}, the corpus has {tokenizer}: "
                "give a corpus prepared with the same one"
            )
        self._before, self._now = self._source.moe_config(), config.moe_config()
        self.grown = self._now.num_experts == 2 * self._before.num_experts and self._is_sparse(self._source)
        self._used: set[str] = set()
        self._targets = self._plan(directory)
        self.description = f"begun with the weights of {directory}{self._account()}"

    def fill(self, model: nn.Module) -> None:
        """Set the weights and buffers of `model`, which holds some of the experts. On every process alike."""
        spread = expert_parameters(model)
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                make = self._targets[name].make
                if make is None:
                    continue
                if name in spread:
                    for place, expert in enumerate(spread[name].local_experts(self._now.num_experts)):
                        tensor[place].copy_(make(expert))
                else:
                    tensor.copy_(make(None))

    def _plan(self, directory: Path) -> dict[str, _Target]:
        with torch.device("meta"):
            model = S2MoEForCausalLM(self._config)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        targets = {
            name: _Target(tuple(tensor.shape), self._maker(name, tuple(tensor.shape), name in parameters))
            for name, tensor in model.state_dict().items()
        }
        tied = {"lm_head.weight"} if self._config.tie_word_embeddings else set()
        unused = sorted(self._files.shapes.keys() - self._used - tied)
        if unused:
            raise ConfigError(f"{KEY}: the model has no place for {unused[0]} of {directory}{_more(unused)}")
        return targets

    def _maker(self, name: str, shape: tuple[int, ...], trained: bool) -> Callable[[int | None], Tensor] | None:
        if name == "lm_head.weight" and name not in self._files.shapes:
            name = "model.embed_tokens.weight"  # the source's are tied
        layer, _, rest = name.partition(".moe.")
        is_expert = rest.startswith("experts.w")
        if rest and f"{layer}.mlp.down.weight" in self._files.shapes:
            return self._of_dense(layer, rest.removeprefix("experts."), shape) if is_expert else None
        there = self._files.shapes.get(name)
        if there is None:
            raise ConfigError(
                f"{KEY}: it has no {name}, which the model needs: is it of another model.moe.method or router?"
            )
        self._used.add(name)
        if there == shape:
            return lambda row: self._files.read(name, row)
        axes = [axis for axis in range(len(shape)) if shape[axis] != there[axis]] if len(shape) == len(there) else []
        if self.grown and rest and len(axes) == 1 and self._doubled(there[axes[0]], shape[axes[0]]):
            if is_expert:
                scale = _copies_scale(self._now) if rest == "experts.w2" else 1.0
                return lambda row: self._grown_expert(name, row or 0, scale)
            return lambda _: self._grown_rows(name, axes[0], trained)
        raise ConfigError(
            f"{KEY}: {name} has the shape {list(there)} there and {list(shape)} here: give the model the same sizes"
            + (", or twice the experts" if rest else "")
        )

    def _doubled(self, before: int, now: int) -> bool:
        return (before, now) == (self._before.num_experts, self._now.num_experts)

    def _of_dense(self, layer: str, matrix: str, shape: tuple[int, ...]) -> Callable[[int | None], Tensor]:
        if self._now.expert_form not in _DENSE:
            raise ConfigError(
                f"{KEY}: experts cannot begin as a dense layer with model.moe.expert_form={self._now.expert_form}: "
                f"choose one of {', '.join(_DENSE)}"
            )
        name = f"{layer}.mlp.{_DENSE[self._now.expert_form][matrix]}"
        there = self._files.shapes.get(name)
        if there is None:
            raise ConfigError(f"{KEY}: its dense layers are of another form than model.moe.expert_form: no {name}")
        self._used.add(name)
        if there not in (shape[1:], shape[2:]):
            raise ConfigError(
                f"{KEY}: {name} has the shape {list(there)}, an expert's {matrix} {list(shape[1:])}: set "
                f"model.moe.expert_hidden={self._source.intermediate_size} and the same model.hidden_size"
            )
        scale = _fresh_scale(self._now) if matrix == "w2" else 1.0
        return lambda row: (self._files.read(name) + self._drawn(name, row, self._files.read(name))) * scale

    def _grown_expert(self, name: str, expert: int, scale: float) -> Tensor:
        """Copy `expert` of 2E."""
        source = expert % self._before.num_experts
        weight = self._files.read(name, source)
        sign = 1 if expert < self._before.num_experts else -1
        return (weight + sign * self._drawn(name, source, weight)) * scale

    def _grown_rows(self, name: str, axis: int, trained: bool) -> Tensor:
        """What a router has for each expert, twice."""
        rows = self._files.read(name)
        if not trained:
            return torch.cat((rows, rows), axis)
        change = TIE_BREAK * rows.float() * torch.randn(rows.shape, generator=self._generator(name, 0))
        return torch.cat((rows + change, rows - change), axis)

    def _drawn(self, name: str, expert: int | None, weight: Tensor) -> Tensor:
        """Noise for a matrix of an expert, the same on every rank that holds it."""
        noise = torch.randn(weight.shape, generator=self._generator(name, expert or 0))
        return noise * (self._noise * float(weight.float().std()))

    def _generator(self, name: str, expert: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self._seed}/init/{name}/{expert}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    @staticmethod
    def _is_sparse(config: S2MoEConfig) -> bool:
        moe = config.moe_config()
        return any(moe.is_sparse(layer) for layer in range(config.num_hidden_layers))

    def _account(self) -> str:
        """For the user: what became of them."""
        before, now = self._before, self._now
        if not self._is_sparse(self._source) and self._is_sparse(self._config):
            return f", each of the {now.num_experts} experts a copy of its dense layer's MLP"
        if not self.grown:
            return ""
        text = f", each of its {before.num_experts} experts twice"
        k_before, k = before.experts_per_token, now.experts_per_token
        if k != 2 * k_before and (k, k_before) != (1, 1):
            text += (
                f". A token takes both copies of its best experts and, with {k} of them, not the ones it took: the "
                f"loss begins higher, which model.moe.experts_per_token={2 * k_before} avoids"
            )
        return text


def _directory(path: Path) -> Path:
    """The Hugging Face directory of what the user gave."""
    weights = find_weights(path)
    if weights.hf is None:
        raise ConfigError(
            f"{KEY}: {weights.description} is not exported: python launcher/export.py --checkpoint {path} --out DIR, "
            f"and give {KEY}=DIR"
        )
    return weights.hf


def require_whole_language_model(config: S2MoEConfig, files: WeightFiles, directory: Path) -> None:
    """Raise ConfigError unless the files have exactly the weights of a language model of this configuration."""
    with torch.device("meta"):
        model = S2MoEForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    others = [name for name, shape in files.shapes.items() if expected.get(name, shape) != shape]
    require_whole(str(directory), expected.keys() - files.shapes - tied, files.shapes.keys() - expected, others)


def _copies_scale(moe: MoEConfig) -> float:
    """What makes up for the weights of twice the experts."""
    router, choices = moe.router, moe.experts_per_token
    if router.get("renormalise"):
        return 1.0
    if router.get("combine") == "softmax_then_topk" and choices == 1:
        return 2.0
    if router.get("combine") == "sigmoid" and choices > 1:
        return 0.5
    return 1.0


def _fresh_scale(moe: MoEConfig) -> float:
    """What makes up for the sum of a token's weights while a new router has no preference."""
    router, choices = moe.router, moe.experts_per_token
    if router.get("renormalise"):
        return 1.0
    if router.get("combine") == "softmax_then_topk":
        return moe.num_experts / choices
    if router.get("combine") == "sigmoid":
        return 2.0 / choices
    return 1.0


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

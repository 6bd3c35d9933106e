"""What a finished run tells the person who started it."""

from __future__ import annotations

from pathlib import Path

import torch

from s2moe.config.run import RunConfig
from s2moe.data import Corpus, compressor_bits
from s2moe.data.units import unit_of
from s2moe.hub import S2MoETokenizer

from .console import format_seconds
from .evaluation import Score
from .generation import extend
from .run import Result
from .weights import Weights, load_weights

LARGEST_TEXT = 16 * 2**20  # bytes of training text up to which the compressors are run: a minute at most


def report(config: RunConfig, result: Result) -> str:
    """The closing text of a finished run: validation figure, what compressors reach, a sample, the directory."""
    corpus = config.data.open()
    assert result.score is not None
    assert result.hf is not None
    parts = [
        f"{result.state.step:,} steps, {result.state.tokens:,} tokens, "
        f"{format_seconds(result.state.seconds)} of training",
        comparison(corpus, config.data.train, config.data.validation, result.score),
    ]
    if result.timing:
        parts.append(result.timing)
    if config.logging.sample_tokens:
        try:
            text = sample(result.hf, corpus, config.logging.sample_prompt, config.logging.sample_tokens, config.seed)
            parts.append(f"sample:\n{text}")
        except Exception as error:  # the results of a long run must not get lost for it
            parts.append(f"no sample: {type(error).__name__}: {error}")
    parts.append(f"run directory: {result.directory}")
    return "\n\n".join(parts)


def comparison(corpus: Corpus, train: str, validation: str, score: Score) -> str:
    """The validation figure, beside what gzip, bzip2 and xz make of the same bytes where the text is small."""
    symbol = corpus.metadata.symbol
    head = (
        f"{validation}: {score.bits_per_symbol:.4f} {unit_of(symbol)} ({score.symbols:,} {symbol}s, every one scored)"
    )
    if symbol == "word" or corpus.path(train).stat().st_size > LARGEST_TEXT:
        return head
    bits = compressor_bits(corpus.text_bytes(validation), corpus.text_bytes(train))
    rows = [f"  {'compressor, bits per byte':28}{'alone':>8}{'given the training text':>26}"]
    rows += [f"  {name:28}{both['alone']:>8.3f}{both['given']:>26.3f}" for name, both in bits.items()]
    return "\n".join([head, *rows])


def sample(hf: Path, corpus: Corpus, prompt: str, tokens: int, seed: int) -> str:
    """A continuation of `prompt` by the exported model, drawn at temperature 0.8."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_weights(Weights(hf=hf)).to(device)
    tokenizer = S2MoETokenizer(corpus.tokenizer)  # after which a text goes on: a corpus' own may end it
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long().to(device)
    torch.manual_seed(seed)
    ids = extend(model, ids, tokens, do_sample=True, temperature=0.8, top_k=0)
    return corpus.tokenizer.decode(ids[0].cpu().numpy())

"""The project in the Hugging Face world: tokenizers, dense models made sparse, other checkpoints in and out, cards."""

from transformers import AutoTokenizer

from s2moe.hub.interchange import from_transformers, to_transformers
from s2moe.hub.sparse_models import register_families
from s2moe.hub.tokenization import S2MoETokenizer, save_tokenizer
from s2moe.hub.upcycling import upcycle
from s2moe.models import S2MoEConfig

AutoTokenizer.register(S2MoEConfig, S2MoETokenizer)
register_families()

__all__ = ["S2MoETokenizer", "from_transformers", "save_tokenizer", "to_transformers", "upcycle"]

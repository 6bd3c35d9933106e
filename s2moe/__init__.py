"""S2MoE: training of large sparse mixture-of-experts language models whose experts do not collapse.

Importing the package registers its models and tokenizers with transformers' Auto classes.
"""

from s2moe.hub import from_transformers, to_transformers, upcycle
from s2moe.models import S2MoEConfig, S2MoEForCausalLM, S2MoEForSequenceClassification, S2MoEModel

__version__ = "0.1.0"
__all__ = [
    "S2MoEConfig",
    "S2MoEForCausalLM",
    "S2MoEForSequenceClassification",
    "S2MoEModel",
    "from_transformers",
    "to_transformers",
    "upcycle",
]

"""Models: transformers classes, registered with the Auto classes on ``import s2moe``."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from s2moe.models.classification import S2MoEForSequenceClassification
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.modeling import S2MoEForCausalLM, S2MoEModel

AutoConfig.register(S2MoEConfig.model_type, S2MoEConfig)
AutoModel.register(S2MoEConfig, S2MoEModel)
AutoModelForCausalLM.register(S2MoEConfig, S2MoEForCausalLM)
AutoModelForSequenceClassification.register(S2MoEConfig, S2MoEForSequenceClassification)

__all__ = ["S2MoEConfig", "S2MoEForCausalLM", "S2MoEForSequenceClassification", "S2MoEModel"]

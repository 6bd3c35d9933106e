"""Vision models: one file a published model, chosen by ``model.kind``."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from s2moe.models.vision.base import VISION_KINDS, VisionConfig, VisionModel, VisionOutput
from s2moe.models.vision.mixture import MixtureModel
from s2moe.models.vision.mixture_config import MixtureConfig
from s2moe.models.vision.snnl_moe import SNNLMoEConfig, SNNLMoEModel
from s2moe.models.vision.vae import VAEConfig, VAEModel
from s2moe.models.vision.vit import VMoEForImageClassification
from s2moe.models.vision.vit_config import VMoEConfig

for _config, _model in (
    (MixtureConfig, MixtureModel),
    (SNNLMoEConfig, SNNLMoEModel),
    (VMoEConfig, VMoEForImageClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageClassification.register(_config, _model)
AutoConfig.register(VAEConfig.model_type, VAEConfig)
AutoModel.register(VAEConfig, VAEModel)

__all__ = [
    "VISION_KINDS",
    "MixtureConfig",
    "MixtureModel",
    "SNNLMoEConfig",
    "SNNLMoEModel",
    "VAEConfig",
    "VAEModel",
    "VMoEConfig",
    "VMoEForImageClassification",
    "VisionConfig",
    "VisionModel",
    "VisionOutput",
]

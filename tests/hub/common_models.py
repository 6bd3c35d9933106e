"""Our models before transformers' own model tests. Run by test_common_model_tests.py, in a process of its own.

`transformers_tests` is the tests' folder of transformers' source distribution.
"""

# ruff: noqa: E402
from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto import modeling_auto as auto

from s2moe import S2MoEConfig
from s2moe.hub.sparse_models import CONFIGS


def model_classes(config: type[PreTrainedConfig]) -> tuple[type[Any], ...]:
    """Those that the Auto classes know, put down where the tests look up which labels a class is given."""
    found = []
    for cls, names in (
        (AutoModel, auto.MODEL_MAPPING_NAMES),
        (AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (AutoModelForSequenceClassification, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ):
        found.append(cls._model_mapping[config])
        names[config.model_type] = found[-1].__name__
    return tuple(found)


OURS = model_classes(S2MoEConfig)
LLAMA, GPT2 = model_classes(CONFIGS["llama"]), model_classes(CONFIGS["gpt2"])

from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor


class ModelTester:
    """A small model and a batch for it, in the form that the mixin asks for."""

    is_training = True
    batch_size, seq_length, vocab_size = 13, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, config_class: type[Any], method: str) -> None:
        self.config_class = config_class
        self.method = method

    def get_config(self) -> Any:
        own: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 64}
        if self.config_class.model_type == "s2moe_gpt2":
            own = {"n_inner": 64, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)}
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            moe={"method": self.method, "num_experts": 4, "expert_hidden": 32},
            **own,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(ModelTesterMixin):
    all_model_classes = OURS
    method = ""

    def setUp(self) -> None:
        config_class = self.all_model_classes[0].config_class
        self.model_tester = ModelTester(config_class, self.method)
        width = "n_embd" if config_class.model_type == "s2moe_gpt2" else "hidden_size"
        self.config_tester = ConfigTester(self, config_class=config_class, **{width: 32})  # type: ignore[no-untyped-call]

    def test_config(self) -> None:
        self.config_tester.run_common_tests()  # type: ignore[no-untyped-call]


class TestTopK(Common, unittest.TestCase):
    method = "smoe"


class TestS2MoE(Common, unittest.TestCase):
    method = "s2moe"


class TestXMoE(Common, unittest.TestCase):
    method = "xmoe"


class TestTokenGraph(Common, unittest.TestCase):
    method = "similarity_aware"


class TestUpcycledLlama(Common, unittest.TestCase):
    all_model_classes = LLAMA
    method = "s2moe"


class TestUpcycledGPT2(Common, unittest.TestCase):
    all_model_classes = GPT2
    method = "smoe"

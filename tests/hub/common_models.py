"""Our models before transformers' own model tests. Run by test_common_model_tests.py, in a process of its own.

`transformers_tests` is the tests' folder of transformers' source distribution.
"""

# ruff: noqa: E402
from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers.models.auto import modeling_auto as auto

import s2moe  # noqa: F401
from s2moe import S2MoEConfig, S2MoEForCausalLM, S2MoEForSequenceClassification, S2MoEModel

# By these lists the tests know which labels a class is given.
auto.MODEL_MAPPING_NAMES["s2moe"] = "S2MoEModel"
auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["s2moe"] = "S2MoEForCausalLM"
auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["s2moe"] = "S2MoEForSequenceClassification"

from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor


class ModelTester:
    """A small model and a batch for it, in the form that the mixin asks for."""

    is_training = True
    batch_size, seq_length, vocab_size = 13, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, method: str) -> None:
        self.method = method

    def get_config(self) -> S2MoEConfig:
        return S2MoEConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            moe={"method": self.method, "num_experts": 4, "expert_hidden": 32},
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[S2MoEConfig, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(ModelTesterMixin):
    all_model_classes = (S2MoEModel, S2MoEForCausalLM, S2MoEForSequenceClassification)
    method = ""

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.method)
        self.config_tester = ConfigTester(self, config_class=S2MoEConfig, hidden_size=32)  # type: ignore[no-untyped-call]

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

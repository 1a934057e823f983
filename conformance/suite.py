"""Transformers' model tests, pointed at a tiny Megalodon and a tiny Gecko; `run.py` puts their `tests` on the path."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from absent import CausalLMModelTest
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ids_tensor
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from megalodon import (
    GeckoConfig,
    GeckoForCausalLM,
    GeckoModel,
    GeckoState,
    MegalodonConfig,
    MegalodonForCausalLM,
    MegalodonModel,
    MegalodonState,
)

# Several tests find out what a class is for (does it take labels?) in these tables of Transformers' own models.
modeling_auto.MODEL_MAPPING_NAMES["megalodon"] = MegalodonModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["megalodon"] = MegalodonForCausalLM.__name__
modeling_auto.MODEL_MAPPING_NAMES["gecko"] = GeckoModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gecko"] = GeckoForCausalLM.__name__


class MegalodonModelTester:
    """The tiny model and its inputs. Attributes under their Transformers names are read by the tests."""

    batch_size = 13
    seq_length = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    pad_token_id = 0
    bos_token_id = 1
    eos_token_id = 2
    config_class: Any = MegalodonConfig
    base_model_class: Any = MegalodonModel
    causal_lm_class: Any = MegalodonForCausalLM
    state_class: Any = MegalodonState
    question_answering_class = sequence_classification_class = token_classification_class = None

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        return self.base_model_class, self.causal_lm_class

    @property
    def pipeline_model_mapping(self) -> dict[str, type]:
        return {"feature-extraction": self.base_model_class, "text-generation": self.causal_lm_class}

    def get_config(self) -> Any:
        # Chunks of 5 tokens, so that every input of 7 crosses a chunk boundary.
        return self.config_class(
            vocab_size=self.vocab_size,
            num_layers=self.num_hidden_layers,
            model_dim=self.hidden_size,
            z_dim=16,
            value_dim=64,
            num_heads=self.num_attention_heads,
            ffn_hidden_dim=37,
            cema_ndim=4,
            chunk_size=5,
            norm_num_groups=4,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": input_ids.new_ones(input_ids.shape).tril()}


class GeckoModelTester(MegalodonModelTester):
    """The same of a Gecko, whose window of two chunks an input of 7 tokens crosses too."""

    config_class = GeckoConfig
    base_model_class = GeckoModel
    causal_lm_class = GeckoForCausalLM
    state_class = GeckoState


class MegalodonModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class: Any = MegalodonModelTester
    model_tester = None  # type: ignore[assignment]
    has_attentions = False  # no pass keeps a whole attention matrix to return

    if hasattr(CausalLMModelTest, "test_left_padding_compatibility"):

        def test_left_padding_compatibility(self) -> None:
            self.has_attentions = True  # which this test reads as "knows padding"
            super().test_left_padding_compatibility()

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self,
            config_class=self.model_tester.config_class,
            common_properties=["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
        )
        self.all_model_classes = self.model_tester.all_model_classes
        self.pipeline_model_mapping = self.model_tester.pipeline_model_mapping

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_model(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.model_tester.base_model_class(config).to(torch_device).eval()
        shape = (self.model_tester.batch_size, self.model_tester.seq_length, self.model_tester.hidden_size)
        self.assertEqual(model(**inputs).last_hidden_state.shape, shape)
        self.assertEqual(model(inputs["input_ids"]).last_hidden_state.shape, shape)

    # What the generation tests ask of a model whose memory is not one of Transformers' caches.

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        self.assertIsInstance(past_key_values, self.model_tester.state_class)
        self.assertEqual(past_key_values.batch_size, batch_size)
        self.assertLessEqual(past_key_values.get_seq_length(), seq_length)  # it counts no padding
        self.assertEqual(len(past_key_values.layers), config.num_layers)

    def _check_caches_are_equal(self, cache1: Any, cache2: Any) -> None:
        torch.testing.assert_close(cache1.state_dict(), cache2.state_dict())


class GeckoModelTest(MegalodonModelTest):
    model_tester_class = GeckoModelTester

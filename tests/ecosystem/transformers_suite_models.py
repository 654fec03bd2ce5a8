"""Our models in transformers' own suite. Run by `test_transformers_suite.py`, in a process that finds the suite.

As every model with a cache of its own does in that suite, each deviation below stands with its reason.
"""

import unittest

import torch
from transformers_suite.test_configuration_common import ConfigTester
from transformers_suite.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_suite.test_training_mixin import TrainingTesterMixin

from loglinear import models
from tests.ecosystem.tiny import FULL, LINEAR

CLASSES = (
    models.LogLinearModel,
    models.LogLinearForCausalLM,
    models.LogLinearForSequenceClassification,
    models.LogLinearForTokenClassification,
    models.LogLinearForQuestionAnswering,
)


class Tester:
    """Makes tiny models and inputs, with the names that the suite reads."""

    base_model_class = models.LogLinearModel
    causal_lm_class = models.LogLinearForCausalLM
    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 2, 99
    type_sequence_label_size, num_labels, num_choices = 2, 3, 4

    def __init__(self, parent, **options):
        self.parent, self.options = parent, options

    def get_config(self):
        sizes = dict(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=37,
            num_heads=4,
            key_dim=8,
            head_dim=8,
            num_levels=6,
            chunk_size=4,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=1,
            attention_head_dim=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return models.LogLinearConfig(**{**sizes, **self.options})

    def prepare_config_and_inputs_for_common(self):
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.tril(torch.ones_like(tokens))
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}


class Suite(ModelTesterMixin, TrainingTesterMixin):
    all_model_classes = CLASSES
    options: dict = {}
    model_tester = None

    # The distribution leaves GenerationTesterMixin out; tests/models has tests of `generate`.
    test_generation_tester_mixin_inheritance = None
    # It wants weights saved under the names that checkpoints had first; ours are read under these and never written.
    test_reverse_loading_mapping = None

    def setUp(self):
        self.model_tester = Tester(self, **self.options)

    def test_config(self):
        ConfigTester(self, config_class=models.LogLinearConfig, hidden_size=32).run_common_tests()


class Mamba2Test(Suite, unittest.TestCase):
    has_attentions = False


class GatedDeltaNetTest(Suite, unittest.TestCase):
    options = {"variant": "gated_delta_net", "lambda_form": "softplus"}
    has_attentions = False


class HybridTest(Suite, unittest.TestCase):
    options = {"variant": "gated_delta_net", "lambda_form": "bounded", "layer_types": [LINEAR, FULL]}

    def test_attention_outputs(self):
        """The suite's own wants weights of every layer; as in all hybrids of transformers, linear layers have none."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            weights = model_class(config).eval()(**inputs, output_attentions=True).attentions
            rows, time, heads = self.model_tester.batch_size, self.model_tester.seq_length, config.num_attention_heads
            self.assertEqual([tuple(layer.shape) for layer in weights], [(rows, heads, time, time)])


class TransformerTest(Suite, unittest.TestCase):
    options = {"layer_types": [FULL, FULL]}

"""The Hugging Face model family; importing it registers the Auto classes."""

from loglinear.models.auto import register
from loglinear.models.cache import LogLinearCache
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.generation import decode_top_k, set_decode_top_k
from loglinear.models.heads import (
    LogLinearForQuestionAnswering,
    LogLinearForSequenceClassification,
    LogLinearForTokenClassification,
)
from loglinear.models.modeling import LogLinearForCausalLM, LogLinearModel, LogLinearPreTrainedModel
from loglinear.models.size import ParameterCounts, key_value_cache_bytes, parameter_counts, state_bytes
from loglinear.models.tokenizer import CHAT_TEMPLATE, ByteTokenizer

register()

__all__ = [
    "CHAT_TEMPLATE",
    "ByteTokenizer",
    "LogLinearCache",
    "LogLinearConfig",
    "LogLinearForCausalLM",
    "LogLinearForQuestionAnswering",
    "LogLinearForSequenceClassification",
    "LogLinearForTokenClassification",
    "LogLinearModel",
    "LogLinearPreTrainedModel",
    "ParameterCounts",
    "key_value_cache_bytes",
    "parameter_counts",
    "decode_top_k",
    "set_decode_top_k",
    "state_bytes",
]

"""The registration of our classes with transformers: its Auto classes, and its lists of class names."""

from transformers import AutoConfig, AutoTokenizer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import modeling_auto as auto

from loglinear.layers.former_names import FORMER_NAMES
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.heads import (
    LogLinearForQuestionAnswering,
    LogLinearForSequenceClassification,
    LogLinearForTokenClassification,
)
from loglinear.models.modeling import LogLinearForCausalLM, LogLinearModel
from loglinear.models.tokenizer import ByteTokenizer

MODELS = (
    (auto.AutoModel, auto.MODEL_MAPPING_NAMES, LogLinearModel),
    (auto.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, LogLinearForCausalLM),
    (
        auto.AutoModelForSequenceClassification,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        LogLinearForSequenceClassification,
    ),
    (
        auto.AutoModelForTokenClassification,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        LogLinearForTokenClassification,
    ),
    (
        auto.AutoModelForQuestionAnswering,
        auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        LogLinearForQuestionAnswering,
    ),
)


def register() -> None:
    """Register configuration, tokenizer, models and the former names of weights with transformers.

    Registration does not put a class into transformers' lists of names, so this adds it. Trainer's label smoothing
    shifts labels only for listed language models. lm-eval recognises language models by the lists, and model cards
    take the task from them.
    """
    AutoConfig.register(LogLinearConfig.model_type, LogLinearConfig, exist_ok=True)
    AutoTokenizer.register(LogLinearConfig, ByteTokenizer, exist_ok=True)
    for auto_class, names, model_class in MODELS:
        auto_class.register(LogLinearConfig, model_class, exist_ok=True)
        names[LogLinearConfig.model_type] = model_class.__name__
    register_checkpoint_conversion_mapping(
        LogLinearConfig.model_type,
        [WeightRenaming(f"mixer.{former}", f"mixer.{name}") for former, name in FORMER_NAMES.items()],
        overwrite=True,
    )

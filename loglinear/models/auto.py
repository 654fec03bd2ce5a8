"""How transformers finds our classes: its Auto classes, and the lists of class names that parts of it go by."""

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
    """Register configuration, tokenizer and models with the Auto classes, their names in transformers' lists, and the
    former names of weights.

    A registered class is not in these lists by itself. Trainer's label smoothing shifts the labels of listed language
    models alone, lm-eval knows by them what a language model is, and model cards know the task.
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

"""One Hugging Face model family, registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from loglinear.layers.former_names import FORMER_NAMES
from loglinear.models.cache import LogLinearCache
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.modeling import LogLinearForCausalLM, LogLinearModel, LogLinearPreTrainedModel
from loglinear.models.size import ParameterCounts, key_value_cache_bytes, parameter_counts, state_bytes

AutoConfig.register("loglinear", LogLinearConfig, exist_ok=True)
AutoModel.register(LogLinearConfig, LogLinearModel, exist_ok=True)
AutoModelForCausalLM.register(LogLinearConfig, LogLinearForCausalLM, exist_ok=True)
register_checkpoint_conversion_mapping(
    "loglinear",
    [WeightRenaming(f"mixer.{former}", f"mixer.{name}") for former, name in FORMER_NAMES.items()],
    overwrite=True,
)

__all__ = [
    "LogLinearCache",
    "LogLinearConfig",
    "LogLinearForCausalLM",
    "LogLinearModel",
    "LogLinearPreTrainedModel",
    "ParameterCounts",
    "key_value_cache_bytes",
    "parameter_counts",
    "state_bytes",
]

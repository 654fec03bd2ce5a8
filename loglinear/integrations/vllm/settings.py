"""The settings of vLLM for our models: sizes that it derives, and settings that are refused."""

from vllm.config import VllmConfig
from vllm.model_executor.models.config import MambaModelConfig, VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from loglinear.models import LogLinearConfig


class LogLinearArchitecture(ModelArchConfigConvertorBase):
    """The sizes of softmax attention; `head_dim` of our configuration is the width of a mixer's values."""

    hf_text_config: LogLinearConfig

    def get_head_size(self) -> int:
        return self.hf_text_config.attention_head_dim or 0


class LogLinearSettings(VerifyAndUpdateConfig):
    """The checks before a model is loaded."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Raise ValueError, in one line that names the setting, if a setting cannot be served."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        config = model.hf_config
        if not isinstance(config, LogLinearConfig):
            raise ValueError(
                f"the architecture LogLinearForCausalLM needs a LogLinearConfig, got {type(config).__name__}"
            )
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(parallel, name) != 1:
                raise ValueError(f"{name} must be 1 for log-linear models, got {getattr(parallel, name)}")
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative decoding is not supported for log-linear models: a state cannot go back")
        if model.quantization is not None:
            raise ValueError(f"quantization must be None for log-linear models, got {model.quantization!r}")
        if config.decode_top_k is not None:
            raise ValueError(
                f"decode_top_k must be None in vLLM, whose steps also end prompts, got {config.decode_top_k}"
            )
        if model.is_hybrid:
            MambaModelConfig.verify_and_update_config(vllm_config)

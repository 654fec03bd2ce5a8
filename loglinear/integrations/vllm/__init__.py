"""The plugin for vLLM, which calls `register` in each of its processes (entry point `vllm.general_plugins`)."""

ARCHITECTURE = "LogLinearForCausalLM"
MODEL_TYPE = "loglinear"
STATES = "LOGLINEAR"  # our name among vLLM's backends for recurrent layers


def register() -> None:
    """Tell vLLM about our configuration, model class and states. It may be called more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    import loglinear.models  # noqa: F401  # transformers' Auto classes know our configuration and tokenizer
    from loglinear.integrations.vllm.settings import LogLinearArchitecture, LogLinearSettings

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = LogLinearSettings
    MODEL_ARCH_CONFIG_CONVERTORS[MODEL_TYPE] = LogLinearArchitecture
    if STATES not in MambaAttentionBackendEnum.__members__:
        MambaAttentionBackendEnum.register(STATES, f"{__name__}.batch.LogLinearBackend")

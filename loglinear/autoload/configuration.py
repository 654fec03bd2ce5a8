"""The configuration class that `config.json` of an upgraded checkpoint names."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class UpgradeConfig(PreTrainedConfig):
    """A placeholder: its `from_dict` returns the configuration of the upgraded model's family."""

    model_type = "loglinear_upgrade"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from loglinear.upgrades.checkpoint import config_from

        return config_from(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: every save already names the class."""

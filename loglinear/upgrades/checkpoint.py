"""Checkpoints of upgraded models: classes that save how a model was upgraded, and upgrade what they load."""

import copy
import functools
import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loglinear.autoload.configuration import UpgradeConfig
from loglinear.models import LogLinearConfig
from loglinear.models.auto_file import MODULE, write_auto_file
from loglinear.models.configuration import current_fields
from loglinear.models.generation import check_continuation
from loglinear.upgrades.cache import SeenColumns
from loglinear.upgrades.mixer import NEW_PARTS, UpgradedConv1d
from loglinear.upgrades.places import CACHES, upgraded_mixers

ENTRY = "loglinear_upgrade"
"""The entry of a configuration that says how the model was upgraded: the arguments of `upgrade`, and the model type."""
PREFIX = "LogLinear"  # of the names of our classes
BASE = "base_model_type"  # transformers takes a part with a "model_type" for a configuration of its own
TRAINED = "trained"  # the part with the names of other parameters that a frozen model trains
GUARD = "initializer_range"
"""The field whose place in `config.json` takes REFUSAL; the number is in the entry. Every family checks its type."""
REFUSAL = "upgraded by loglinear: import loglinear, and load the folder with an Auto class"
AUTO_FILE = '''"""Loads this checkpoint with the installed package `loglinear`."""
from loglinear.autoload.configuration import UpgradeConfig  # noqa: F401
'''
AUTO_CLASSES = (
    modeling_auto.AutoModel,
    modeling_auto.AutoModelForCausalLM,
    modeling_auto.AutoModelForSequenceClassification,
    modeling_auto.AutoModelForTokenClassification,
    modeling_auto.AutoModelForQuestionAnswering,
    modeling_auto.AutoModelForImageTextToText,
    modeling_auto.AutoModelForMultimodalLM,
)


def made_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return functools.cache of a function of classes, which its type does not allow."""
    return functools.cache(make)


class UpgradedConfig:
    """Added to the configuration class of a family: `config.json` has a model type of ours.

    In memory the model type stays, because transformers and others choose conversions of weights and more by it. In the
    file it is that of `UpgradeConfig`. So the Auto classes of a program without this library refuse the checkpoint, or
    load it with `trust_remote_code`, and never load the linear model by mistake. Neither do programs that look up the
    names in `architectures`, such as TRL: no class of transformers has a name with our prefix. The class of the family
    itself would only warn of the model type; the guard stops it, which is a sentence in the place of a number.
    """

    auto_map: ClassVar[dict[str, str]] = {}  # in memory no Auto class takes code of the folder

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        original = {name: value for name, value in config_dict.items() if name not in ("auto_map", "model_type")}
        return super().from_dict(unguarded(original), **kwargs)  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        saved = super().to_diff_dict()  # type: ignore[misc]
        classes = [f"{PREFIX}{name.removeprefix(PREFIX)}" for name in saved.get("architectures") or ()]
        text = self.get_text_config()  # type: ignore[attr-defined]
        part = next((name for name in self.sub_configs if getattr(self, name, None) is text), None)  # type: ignore[attr-defined]
        return {
            **guarded(saved, part),
            "model_type": UpgradeConfig.model_type,
            "architectures": classes or None,
            "auto_map": {"AutoConfig": f"{MODULE}.{UpgradeConfig.__name__}"},
        }

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and add the file through which tools load the model without importing us."""
        write_auto_file(save_directory, AUTO_FILE)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def guarded(saved: dict[str, Any], part: str | None) -> dict[str, Any]:
    """Return the contents of `config.json` with the guard, at the top or in the part for text."""
    inner = saved if part is None else saved[part]
    outer = {**saved, ENTRY: {**saved[ENTRY], GUARD: inner.get(GUARD)}}
    return {**outer, GUARD: REFUSAL} if part is None else {**outer, part: {**inner, GUARD: REFUSAL}}


def unguarded(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the contents without the guard, if there is one: the inverse of `guarded`."""
    if ENTRY not in config_dict:
        return config_dict
    entry = dict(config_dict[ENTRY])
    number = {name: value for name, value in [(GUARD, entry.pop(GUARD, None))] if value is not None}

    def restored(part: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(part.get(GUARD), str):
            return part
        return {**{name: value for name, value in part.items() if name != GUARD}, **number}

    parts = {name: restored(part) if isinstance(part, dict) else part for name, part in config_dict.items()}
    return restored({**parts, ENTRY: entry})


class UpgradedModel:
    """Added to a model class of transformers: it makes an upgraded model of a configuration that says so.

    `generate` checks a second turn against what the cache has seen. It compiles no steps, also for static caches.
    """

    config: Any
    _can_compile_fullgraph = False

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        from loglinear.upgrades.in_place import upgrade_as_configured

        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        upgrade_as_configured(self)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: the conversions of weights are those of the class that this one adds to."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, which makes all parameters require gradients, and freeze again what was frozen.

        A parameter that the folder lacks, such as the head of a new task, is trained.
        """
        from loglinear.upgrades.in_place import train_as_configured

        model, found = super().from_pretrained(*args, **{**kwargs, "output_loading_info": True})  # type: ignore[misc]
        train_as_configured(model)
        parameters = dict(model.named_parameters())
        for name in (*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])):
            if name in parameters:
                parameters[name].requires_grad_(True)
        return (model, found) if kwargs.get("output_loading_info") else model

    @functools.wraps(PreTrainedModel.save_pretrained, assigned=())  # other tools inspect its arguments
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does. The configuration says which other parameters were trained."""
        from loglinear.upgrades.in_place import note_trained

        note_trained(self)  # type: ignore[arg-type]
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as transformers does, and new parameters so that they are neutral."""
        super()._init_weights(module)  # type: ignore[misc]
        initial_values = getattr(module, "initial_values", None)
        if initial_values is not None and not isinstance(module, UpgradedConv1d):
            for name, value in initial_values().items():
                initialization.copy_(module.get_parameter(name), value)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = next((model_kwargs[name] for name in CACHES if model_kwargs.get(name) is not None), None)
        if cache is not None:
            seen = SeenColumns(cache, [mixer.layer_idx for mixer in upgraded_mixers(self)])
            if seen.get_seq_length() > 0:
                check_continuation(seen, input_ids, generation_config, model_kwargs)
                if model_kwargs.get("past_key_values") is None:  # by this name alone transformers finds what is new
                    input_ids, model_kwargs = new_tokens(seen, input_ids, generation_config, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]


def new_tokens(
    seen: SeenColumns, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the input ids and arguments of a call of `generate` without the tokens that the cache has seen."""
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    given = input_ids.shape[1] if embeds is None else embeds.shape[1]
    width = getattr(generation_config, "_mask_length", given) if mask is None else mask.shape[1]
    if width != given:  # the mask is that of the whole sequence, the tokens are new
        return input_ids, model_kwargs
    past = seen.get_seq_length()
    if embeds is not None:
        return input_ids, {**model_kwargs, "inputs_embeds": embeds[:, past:]}
    return input_ids[:, past:], model_kwargs


@made_once
def upgraded_config_class(config_class: Any) -> type[PreTrainedConfig]:
    """Return the class of the configurations of upgraded models, and let the Auto classes know its models."""
    if issubclass(config_class, UpgradedConfig):
        return config_class
    name = f"{PREFIX}{config_class.__name__}"
    new = type(name, (UpgradedConfig, config_class), {"__module__": __name__, "__qualname__": name})
    for auto_class in AUTO_CLASSES:
        if config_class in auto_class._model_mapping:
            model_class = auto_class._model_mapping[config_class]
            if isinstance(model_class, type) and model_class.config_class is config_class:
                auto_class.register(new, upgraded_model_class(model_class, new), exist_ok=True)
    return new


@made_once
def upgraded_model_class(model_class: Any, config_class: Any) -> type[PreTrainedModel]:
    """Return the class of upgraded models. It has the name of transformers' class, by which tools know its task."""
    name = model_class.__name__
    contents = {"__module__": __name__, "__qualname__": name, "config_class": config_class}
    return type(name, (UpgradedModel, model_class), contents)


def become_saveable(model: Any, entry: dict[str, Any]) -> None:
    """Give a model, its parts that are models and its configuration the classes that save how it was upgraded."""
    config = model.config
    config_class = upgraded_config_class(type(config))
    setattr(config, ENTRY, {BASE: config.model_type, **entry})
    config.__class__ = config_class
    for part in list(model.modules()):
        if isinstance(part, PreTrainedModel) and upgraded_mixers(part):
            if not isinstance(part, UpgradedModel):
                part.__class__ = upgraded_model_class(type(part), type(part.config))
            part._keep_in_fp32_modules_strict = {*(part._keep_in_fp32_modules_strict or ()), *NEW_PARTS}


def own_configuration(model: PreTrainedModel) -> None:
    """Give a model and its parts a copy of its configuration, which other models may share."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                vars(module)[name] = copies[id(value)]


def choices_of(config: PreTrainedConfig) -> LogLinearConfig:
    """Return the choices of the levels of an upgraded model, as fields of a configuration of ours."""
    entry = getattr(config, ENTRY)
    fields = {name: value for name, value in entry.items() if name not in (BASE, "freeze", TRAINED)}
    return LogLinearConfig(**current_fields(fields))


def config_from(config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
    """Return the configuration of an upgraded model from the contents of its `config.json`.

    Raises:
        ValueError: It does not say how the model was upgraded, or transformers does not know the model.
    """
    entry = config_dict.get(ENTRY)
    base = entry.get(BASE) if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or base is None or base not in CONFIG_MAPPING:
        raise ValueError(f"config.json must have an entry {ENTRY!r} with a {BASE} of transformers, got {entry!r}")
    freeze, trained = entry.get("freeze"), entry.get(TRAINED, [])
    if not (isinstance(freeze, bool) and isinstance(trained, list) and all(isinstance(name, str) for name in trained)):
        expected = f"'freeze', true or false, and {TRAINED!r}, a list of names"
        raise ValueError(f"config.json: {ENTRY} must have {expected}, got {freeze!r} and {trained!r:.80}")
    return upgraded_config_class(CONFIG_MAPPING[base]).from_dict(config_dict, **kwargs)


def __getattr__(name: str) -> Any:
    """Return a class that this module has made, for pickled models."""
    import transformers

    found: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name[:1].isupper() else None
    if isinstance(found, type) and issubclass(found, PreTrainedConfig):
        return upgraded_config_class(found)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return upgraded_model_class(found, upgraded_config_class(found.config_class))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

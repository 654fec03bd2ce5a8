"""The names of a configuration's options: a misspelt one is refused, or named where it was saved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches

from transformers import GenerationConfig, PreTrainedConfig

ALIKE = 0.8  # of two names, as difflib measures it: one letter of five may be wrong
OF_TRANSFORMERS = {  # further names that transformers' constructor takes, or that its tools write
    *("torch_dtype", "name_or_path", "attn_implementation", "experts_implementation", "output_attentions"),
    *("num_labels", "model_type", "per_layer_config", "quantization_config", "base_model_tp_plan", "trust_remote_code"),
    *("sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id", "tokenizer_class"),
}


def unknown_options(kind: type[PreTrainedConfig], names: Iterable[str]) -> dict[str, str | None]:
    """Return the names that neither a configuration nor transformers knows, each with the option that it resembles.

    None: it resembles no option. Names that begin with an underscore are those of tools.
    """
    own = {field.name for field in fields(kind)}
    known = own | OF_TRANSFORMERS | set(dir(PreTrainedConfig)) | set(GenerationConfig._get_default_generation_params())
    options = sorted(own - {field.name for field in fields(PreTrainedConfig)})
    found = {}
    for name in names:
        if name not in known and not name.startswith("_"):
            found[name] = next(iter(get_close_matches(name, options, n=1, cutoff=ALIKE)), None)
    return found

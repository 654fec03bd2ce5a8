# B batch, T time (new columns), S columns so far
"""The support of these models for `generate`: their cache, ended rows and second turns."""

# transformers types the mixin's methods by a protocol of a whole model, which no mixin is:
# mypy: disable-error-code="misc, arg-type, override"

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation import StoppingCriteriaList

from loglinear.layers.token_mixer import TokenMixer
from loglinear.models.cache import LogLinearCache
from loglinear.models.history import Seen


class RowsAtWork(StoppingCriteriaList):
    """The stopping criteria of one call, with the rows that were unfinished when the newest tokens were chosen.

    An ended row receives padding. It stays in the batch, but its state must not change.
    """

    writing: Tensor | None = None  # [B] True at unfinished rows; None: before the first token
    unfinished: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self.writing = torch.ones_like(done) if self.unfinished is None else self.unfinished
        self.unfinished = self.writing & ~done
        return done


class LogLinearGenerationMixin(GenerationMixin):
    """`generate` with a `LogLinearCache`."""

    config: Any
    _previous_max_cache_length = -1

    def _prepare_cache_for_generation(  # the other arguments differ by version
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` a `LogLinearCache`.

        Linear layers have a fixed size. With cache_implementation="static" all layers have, and a GPU's steps are
        compiled.
        """
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation must be 'static' or left out, got {implementation!r}: "
                "these models have one cache, LogLinearCache"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None and implementation is not None:
            raise ValueError("past_key_values and cache_implementation exclude each other: pass one of them")
        if given is not None:
            given._is_user_defined = True
        if generation_config.use_cache is not False and given is None:
            columns = None
            if implementation == "static":
                *_, needed = (*args, *kwargs.values())  # max_cache_length comes last
                # A smaller cache would need another graph, so the largest size so far stays, as in transformers.
                columns = max(needed, generation_config.max_cache_len or 0, self._previous_max_cache_length)
                self._previous_max_cache_length = columns
            model_kwargs["past_key_values"] = LogLinearCache(self.config, columns)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Raise ValueError for `initial_position`, which `generate` does not pass on, or an argument that no model has.

        An `initial_position` of None is dropped.
        """
        if model_kwargs.pop("initial_position", None) is not None:
            raise ValueError(
                "generate takes no initial_position: call forward with it on all tokens but the last, "
                "and pass the past_key_values of its output to generate"
            )
        super()._validate_model_kwargs(model_kwargs)

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        pads_ended_rows = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        if input_ids.shape[0] > 1 and pads_ended_rows:
            kwargs["rows_at_work"] = stopping_criteria = RowsAtWork(stopping_criteria)
        return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, LogLinearCache) and int(cache.get_seq_length()) > 0:
            check_continuation(cache, input_ids, generation_config, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(  # transformers inspects these names
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: LogLinearCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        rows_at_work: RowsAtWork | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return transformers' inputs, but with the mask of the new columns alone: the cache knows the others.

        `tokenizer` belongs to the stopping criteria of `generate`; it is dropped because `forward` does not take it.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if past_key_values is None:
            return inputs
        tokens = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
        mask = inputs.pop("attention_mask", None)
        if mask is not None:
            mask = mask[:, -tokens.shape[1] :]
            mask = mask if is_first_iteration else mask.bool()  # the prompt's forward has checked its values
        if rows_at_work is not None and rows_at_work.writing is not None:
            writing = rows_at_work.writing.to(tokens.device)
            mask = None if not past_key_values.is_compileable and bool(writing.all()) else writing[:, None]
        return inputs if mask is None else {**inputs, "attention_mask": mask.contiguous()}

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Return the mask unchanged: with a static cache the forward pass makes the masks of the layers."""
        return attention_mask


def check_continuation(cache: Seen, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless the tokens and the mask [B, S + T] of a call begin with those that the cache has seen.

    `input_ids` are the whole sequence or, with a mask of the whole sequence, the new tokens alone. `generate` drops a
    mask of ones and notes its length.
    """
    cache.require_whole()
    seen, embeds = int(cache.get_seq_length()), model_kwargs.get("inputs_embeds")
    rows, given = input_ids.shape if embeds is None else embeds.shape[:2]
    mask = model_kwargs.get("attention_mask")
    width = getattr(generation_config, "_mask_length", given) if mask is None else mask.shape[1]
    if cache.rows != rows:
        raise ValueError(f"past_key_values holds {cache.rows} sequences, got a batch of {rows}")
    if width == given and given <= seen:
        raise ValueError(
            f"past_key_values has seen {seen} tokens, got {given}: pass the whole sequence with at least one new token"
        )
    if width not in (given, seen + given):
        raise ValueError(f"attention_mask must have {given} or {seen + given} columns, got {width}")
    past = input_ids.new_ones(rows, seen, dtype=torch.bool) if mask is None else mask[:, :seen] == 1
    cache.check_past(past, input_ids[:, :seen] if embeds is None and width == given else None)


def decode_top_k(model: nn.Module) -> int | None:
    """Return the number of `set_decode_top_k`, or of the configuration. None: steps read all buckets."""
    numbers = [part.decode_top_k for part in model.modules() if isinstance(part, TokenMixer)]
    return next((number for number in numbers if number is not None), None)


def set_decode_top_k(model: nn.Module, top_k: int | None) -> None:
    """Let every decode step of a routed model read only `top_k` buckets in each head, besides the token's own.

        w'[t, b] = w[t, b] for b = 0 and for the top_k largest others;  w'[t, b] = 0 for the rest

    The weights that stay are those of the full read. Prompts and other forward passes of several tokens read all
    buckets, and training is refused. A step in plain torch on a CPU copies and reads the chosen states alone, if they
    are at most a third of large states. Compiled steps and steps on a GPU still read all states. The scores read the
    sums of keys of every bucket in any case.

    Args:
        model: A `LogLinearForCausalLM`, or an upgraded model of transformers. It changes in place. A save does not
            write the number; `LogLinearConfig.decode_top_k` is saved.
        top_k: At least 1. None: all buckets.

    Raises:
        ValueError: The model has no routed layer, or top_k is below 1.
    """
    mixers = [part for part in model.modules() if isinstance(part, TokenMixer) and part.bucket_weights is not None]
    if not mixers:
        raise ValueError(f"decode_top_k needs a model with routing, {type(model).__name__} has no routed layer")
    for mixer in mixers:
        mixer.set_decode_top_k(top_k)

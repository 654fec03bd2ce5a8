# B batch, T time, D hidden size, V vocabulary
"""The model family: log-linear models, linear models, hybrids and the Transformer baseline."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from loglinear.layers import Attention, Mixer, SwiGLU
from loglinear.layers.slices import Slice
from loglinear.models.cache import LogLinearCache, changing
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.generation import LogLinearGenerationMixin
from loglinear.models.inputs import (
    TokenLayout,
    TokensFirst,
    check_positions,
    check_slices,
    one_of,
    places_from,
    refuse_unknown,
    token_layout,
)
from loglinear.models.loss import sliced_cross_entropy
from loglinear.models.places import TokenPlaces
from loglinear.variants import HeadBias


class LogLinearBlock(GradientCheckpointingLayer):
    """One block: x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LogLinearConfig, layer_type: str) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer: Attention | Mixer
        if layer_type == "full_attention":
            assert config.num_attention_heads and config.num_key_value_heads and config.attention_head_dim
            self.mixer = Attention(
                config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
            )
        else:
            self.mixer = Mixer(config.hidden_size, config.heads, **config.mixer_options)
        self.mlp: SwiGLU | None = None
        if config.intermediate_size:
            self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden_states: Tensor, layout: TokenLayout, past_key_values: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the block's output and, if the layout asks for them, its attention weights [B, H, T, S].

        Args:
            hidden_states: [B, T, D].
            layout: The inputs that all blocks share.
            past_key_values: This layer's cache; gradient checkpointing recognises it by this name and drops it.
        """
        normed, weights = self.mixer_norm(hidden_states), None
        if isinstance(self.mixer, Attention):
            assert layout.attention is not None
            mixed, weights = self.mixer(normed, layout.attention, past_key_values)
            hidden_states = hidden_states + mixed
        elif past_key_values is None:
            start = self.mixer.starting_at(layout.initial_position, normed)
            hidden_states = hidden_states + self.mixer(normed, layout.packing, start, slices=layout.slices)[0]
        elif layout.is_step:
            hidden_states = hidden_states + self.mixer.step(normed, past_key_values.state, layout.active)
            past_key_values.advance(1)
        else:
            past = past_key_values.state
            # A static cache that was reset has a state of new sequences, at position 0.
            is_new = past is None or layout.initial_position is not None
            before = self.mixer.starting_at(layout.initial_position, normed) if is_new else past.state()
            mixed, state = self.mixer(normed, layout.packing, before, return_state=True)
            past_key_values.store(state, hidden_states.shape[1])
            hidden_states = hidden_states + mixed
        return (hidden_states if self.mlp is None else hidden_states + self.mlp(self.mlp_norm(hidden_states))), weights


class LogLinearPreTrainedModel(PreTrainedModel):
    """The base of all models of the family."""

    config_class = LogLinearConfig
    config: LogLinearConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LogLinearBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True  # a state cannot go back, so transformers refuses assisted generation
    _can_compile_fullgraph = True

    @wraps(PreTrainedModel.save_pretrained, assigned=())  # other tools inspect its arguments
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save as transformers does, but always under the current names of the weights."""
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def _returns_dict(self, asked: bool | None) -> bool:
        return (self.config.return_dict if asked is None else asked) is not False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise linear layers and embeddings as transformers does, all else by a module's `initial_values`."""
        # transformers.initialization leaves loaded weights alone; this method also runs after loading.
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and self.config.embedding_range is not None:
            init.normal_(module.weight, std=self.config.embedding_range)
        initial_values = getattr(module, "initial_values", None)
        if initial_values is not None:
            for name, value in initial_values().items():
                init.copy_(module.get_parameter(name), value)


class LogLinearModel(LogLinearPreTrainedModel):
    """The decoder without a head: tokens to hidden states."""

    def __init__(self, config: LogLinearConfig) -> None:
        super().__init__(config)
        assert config.layer_types is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LogLinearBlock(config, layer_type) for layer_type in config.layer_types])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        biases = [name for name, part in self.named_modules() if isinstance(part, HeadBias) and [*part.parameters()]]
        self._keep_in_fp32_modules_strict = {name.rpartition(".")[2] for name in biases}
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LogLinearCache | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_position: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        slices: Slice | None = None,
        places: TokenPlaces | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPast:
        """Return the hidden states [B, T, D] of tokens [B, T] or of their embeddings [B, T, D].

        Args:
            input_ids: [B, T], the tokens. Pass either these or inputs_embeds.
            attention_mask: [B, T] or, with a cache, [B, past + T], as booleans or numbers: 1 at tokens, 0 at padding,
                which may be anywhere. A row gives exactly the same outputs as without its padding. Models without
                linear layers also take [B, 1, T, past + T]: booleans, True at keys that a query attends to, or numbers
                that are added to the scores.
            position_ids: [B or 1, T], the rotary positions of full-attention layers. None: every row counts its tokens.
            past_key_values: The `LogLinearCache` to continue from; it changes in place and carries no gradients. Under
                torch.no_grad, as in `generate`, one token per row is a decode step.
            inputs_embeds: [B, T, D], embeddings in place of input_ids.
            cu_seqlens: [n+1] boundaries of packed documents in a batch of 1, as FlashAttention names them.
            cu_seq_lens_q: Another name of cu_seqlens, from transformers' collator.
            cu_seq_lens_k: Another name of cu_seqlens, from transformers' collator.
            seq_idx: [1, T], the document of each token, in place of cu_seqlens.
            initial_position: [B], or [n] for packed documents: the position in the tree at which each new sequence
                starts, below 2**62. Token t of a sequence is then at position initial_position + t, which alone decides
                its buckets. Linear models and full attention do not depend on it. None: 0.
            use_cache: True to return a cache, False for none. None: as the configuration says, but none in training or
                for packed documents.
            output_hidden_states: True to also return the input of each block and the final hidden states.
            output_attentions: True to also return the attention weights [B, H, T, S] of each full-attention layer;
                linear layers have none.
            return_dict: False for a tuple in place of a `BaseModelOutputWithPast`.
            slices: The `loglinear.parallel.Slices` of rows or documents that lie on several devices: the tokens are
                those of this rank. They exclude a cache, a mask and boundaries. None: the rows are whole.
            places: The mask and the boundaries from a caller that has already read them, in place of both.

        Raises:
            ValueError: Arguments contradict each other, or position_ids restart without boundaries of documents.
        """
        if places is None:
            places = TokenPlaces.of(
                one_of(input_ids, inputs_embeds),
                past_key_values,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                cu_seq_lens_q=cu_seq_lens_q,
                cu_seq_lens_k=cu_seq_lens_k,
                seq_idx=seq_idx,
                slices=slices,
            )
        refuse_unknown(kwargs, places)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        with_weights = self.config.output_attentions if output_attentions is None else output_attentions
        check_slices(places, use_cache, initial_position, with_weights)
        is_whole = places.cu_seqlens is None and places.slices is None
        cache = self._cache(past_key_values, use_cache, packed=not is_whole)
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        check_positions(position_ids, places)
        places = places_from(initial_position, places)
        tokens_first = None
        if places.real is not None and cache is None and torch.compiler.is_compiling():
            tokens_first = TokensFirst.of(places.real)
            hidden_states, places = tokens_first.apply(hidden_states), places._replace(real=None)
            if position_ids is not None:
                position_ids = tokens_first.apply(position_ids.expand(places.rows, -1))
        layout = token_layout(
            self.config,
            places,
            hidden_states.device,
            position_ids,
            cache,
            with_weights=bool(with_weights),
            initial_position=initial_position,
        )
        all_hidden_states, all_weights = [], []
        with changing(cache):
            if cache is not None:
                cache.history.extend(places.rows, places.time, places.real, input_ids, hidden_states.device)
            for i, layer in enumerate(self.layers):
                if keep_all:
                    all_hidden_states.append(hidden_states)
                hidden_states, weights = layer(
                    hidden_states, layout, past_key_values=None if cache is None else cache.layers[i]
                )
                if weights is not None:
                    all_weights.append(weights)
            hidden_states = self.norm(hidden_states)
        if tokens_first is not None:
            hidden_states, *all_hidden_states = (tokens_first.undo(y) for y in (hidden_states, *all_hidden_states))
            all_weights = [tokens_first.undo_weights(weights) for weights in all_weights]
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache,
            hidden_states=(*all_hidden_states, hidden_states) if keep_all else None,
            attentions=tuple(all_weights) if with_weights else None,
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def _cache(self, given: LogLinearCache | None, use_cache: bool | None, *, packed: bool) -> LogLinearCache | None:
        """Return the cache of a call: its past_key_values, a new one or None."""
        if self.training and self.gradient_checkpointing:
            if given is not None:
                raise ValueError(
                    "past_key_values must be None while gradient checkpointing trains: call model.eval() to generate"
                )
            return None
        if packed and (given is not None or use_cache):
            raise ValueError("past_key_values cannot continue packed documents: pass them as rows of a padded batch")
        if given is not None or use_cache is False:
            return given
        if use_cache is None and (self.training or packed or not self.config.use_cache):
            return None
        return LogLinearCache(self.config)


class LogLinearForCausalLM(LogLinearPreTrainedModel, LogLinearGenerationMixin):
    """The language model: the decoder and a linear head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LogLinearConfig) -> None:
        super().__init__(config)
        self.model = LogLinearModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LogLinearCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        slices: Slice | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | CausalLMOutputWithPast:
        """Return logits and, with labels, the loss (mean nats per target).

        The arguments that are not listed here are those of `LogLinearModel.forward`.

        Args:
            labels: [B, T], the token ids; the model shifts them. -100, padding and the first token of a document or row
                are no targets.
            shift_labels: [B, T], the targets themselves, from a caller that has shifted the labels (a shard of a longer
                row does not know its next token). Then `labels` are not read.
            logits_to_keep: The positions of the returned logits: the last n, all (0), or an index tensor.
            skip_logits: True for the loss alone, which is computed in slices and needs no logits of a whole row. None:
                training with labels returns no logits, unless logits_to_keep or return_dict=False asks for them.
            num_items_in_batch: Divides the summed loss in place of the number of targets (Trainer, gradient
                accumulation).
            slices: As in `LogLinearModel.forward`, with shift_labels in place of labels. The loss is that of all ranks,
                and the mean of their gradients is its gradient.

        Raises:
            ValueError: Arguments contradict each other, or labels do not have the shape of the tokens.
        """
        places = TokenPlaces.of(
            one_of(input_ids, inputs_embeds),
            past_key_values,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            seq_idx=seq_idx,
            slices=slices,
        )
        # shift_labels is not in the signature: Trainer expects every named argument with "label" in it in each batch.
        targets = places.targets(labels, kwargs.pop("shift_labels", None))
        if targets is not None:
            use_cache = bool(use_cache)  # a loss needs no cache by default
        if skip_logits is None:
            asked = logits_to_keep is not None or not self._returns_dict(return_dict)
            skip_logits = targets is not None and self.training and not asked
        elif skip_logits and (targets is None or logits_to_keep is not None):
            raise ValueError("skip_logits=True needs labels and excludes logits_to_keep")
        outputs = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            places=places,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        with changing(outputs.past_key_values):
            if targets is not None:
                loss = sliced_cross_entropy(
                    self.lm_head,
                    hidden_states,
                    targets,
                    slice_size=self.config.loss_chunk_size,
                    num_items=num_items_in_batch,
                    slices=slices,
                )
            if not skip_logits:
                logits = self.lm_head(_kept(hidden_states, logits_to_keep))
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Return the forward pass that `generate` calls with a static cache; it compiles steps, but not prompts."""
        compiled = super().get_compiled_call(compile_config)

        def call(**inputs: Any) -> Any:
            tokens, cache = inputs.get("input_ids"), inputs.get("past_key_values")
            is_step = tokens is not None and tokens.shape[1] == 1 and cache is not None and cache.has_states
            return (compiled if is_step else self)(**inputs)

        return call


def _kept(hidden_states: Tensor, logits_to_keep: int | Tensor | None) -> Tensor:
    """Return the hidden states whose logits are wanted."""
    if isinstance(logits_to_keep, Tensor):
        return hidden_states[:, logits_to_keep]
    return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states

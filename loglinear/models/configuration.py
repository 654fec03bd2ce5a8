"""The configuration class of the model family."""

import math
import os
from collections.abc import Mapping
from inspect import get_annotations
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from loglinear.fenwick import MOST_LEVELS
from loglinear.layers import Routing
from loglinear.layers.level_scales import check_finest_block, check_lambda_form
from loglinear.layers.mixer import check_eigenvalues, check_gate_bound
from loglinear.models.auto_file import AUTO_MAP, write_auto_file
from loglinear.models.option_names import unknown_options
from loglinear.ops import IMPLEMENTATIONS
from loglinear.ops.validation import (
    check_partition,
    chunk_length,
    finite_number,
    flag,
    is_whole,
    whole_number,
)
from loglinear.partition import FENWICK, Partition
from loglinear.variants import HeadSizes, get_variant

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_levels",
    "num_heads",
    "key_dim",
    "head_dim",
    "loss_chunk_size",
)
SIZES_OR_NONE = ("num_groups", "num_attention_heads", "num_key_value_heads", "attention_head_dim")
LENGTHS_OR_NONE = ("intermediate_size", "conv_kernel")  # of which 0 means that there is none
WHOLE = (*SIZES, *SIZES_OR_NONE, *LENGTHS_OR_NONE, "chunk_size", "radix", "finest_block", "largest_block")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LAYER_TYPES = ("linear_attention", "full_attention")
logger = logging.get_logger(__name__)


def current_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved fields of a `LogLinearConfig` without the values that only earlier versions allowed.

    Earlier versions took a whole number as a float or a bool: it becomes an int. They took a negative routing_tau: it
    becomes 0, with a warning. It is a start alone, so a model that has weights for tau keeps its results.
    """
    fields = dict(saved)
    for name in WHOLE:
        value = fields.get(name)
        if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
            fields[name] = int(value)
    tau = fields.get("routing_tau")
    if isinstance(tau, int | float) and -math.inf < tau < 0:
        logger.warning_once(
            f"routing_tau = {tau} of an earlier version is 0 now, for new weights alone: weights that are loaded "
            "keep their tau"
        )
        fields["routing_tau"] = 0.0
    return fields


class LogLinearConfig(PreTrainedConfig):
    r"""Sizes and choices of a log-linear model, a linear model, a hybrid or a Transformer baseline.

    Every attribute is a keyword argument of the constructor, which also takes those of transformers. A further one
    becomes an attribute that nothing reads, with a warning, or is refused if it resembles an option.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: D, the width of the residual stream.
        num_hidden_layers: Number of blocks.
        intermediate_size: Width of the SwiGLU layer after each mixer. None: 8/3 of hidden_size, rounded up to a
            multiple of 64. 0: no such layer.
        variant: The base model, a name in `loglinear.variants.VARIANTS`.
        num_levels: L, the levels of the Fenwick partition, at most 64 because int64 positions have no more. Tokens more
            than 2**(L - 2) away share the last level. 1: the linear model of the same variant, without lambda. With
            another radix, a largest block or routing: the columns of `partition`, `Partition.num_columns(length)` for
            all that a sequence uses.
        lambda_form: "unit" (starts at exactly 1, as the linear model of the same variant), "softplus" (as published)
            or "bounded"; see `LevelScales`.
        finest_block: The tokens of each aligned block of this size share one lambda. 1: as published.
        radix: r, the blocks that join into one; see `loglinear.partition`. 2: as published.
        largest_block: Tokens of the largest block; older blocks of this size stay apart. None: blocks grow.
        routing: "gram" for the routed read, whose weights depend on what the buckets hold; see `BucketWeights`. Then
            lambda_form has no meaning. "selective_gram": the same with learned weights of the keys in the scores; see
            `KeyWeights`. None: lambda depends on the token alone, as published.
        routing_tau: The factor of the score in the weights of the routed read at the start, at least 0. 0: the model
            starts as the linear model.
        decode_top_k: The buckets that a decode step of the routed read weights in each head, besides the token's own
            finest block; see `loglinear.layers.routing.keep_largest`. Prompts and other forward passes read all, and
            training refuses it. None: all.
        num_heads: H, the value heads.
        num_groups: G, the query/key groups. None: 1 for variants that share one group, such as Mamba-2, otherwise H.
        key_dim: K, the width of a query or key.
        head_dim: V, the width of a value.
        conv_kernel: Tokens that the short convolution reads. 0: no convolution and no SiLU. None: the variant's own, 0
            for `gla` and 4 for the others.
        chunk_size: C, tokens per chunk of the algorithm, a power of two up to 4096. It changes the speed and the size
            of a state, but no result.
        impl: The implementation of the operators: "auto", "triton", "torch" or "reference".
        layer_types: "linear_attention" or "full_attention" for each layer. None: all linear.
        num_attention_heads: Query heads of the full-attention layers. None: hidden_size / 64.
        num_key_value_heads: Key/value heads of the full-attention layers. None: num_attention_heads.
        attention_head_dim: Head width of the full-attention layers. None: hidden_size / num_attention_heads.
        rope_theta: Base of the rotary frequencies of the full-attention layers.
        rms_norm_eps: Epsilon of the RMS norms.
        mixer_norm_eps: Epsilon of the output norms of the mixers. None: rms_norm_eps.
        output_gate: False for output norms of the mixers without a gate, as DeltaNet was published.
        negative_eigenvalues: True for write strengths up to 2 in place of 1; see `Mixer`. It needs the delta rule.
        gate_lower_bound: The least log decay of a token in `kimi_delta_attention`, such as -5. None: no bound.
        initializer_range: Standard deviation of the first weights of linear layers and embeddings.
        embedding_range: Standard deviation of the first embeddings. None: initializer_range.
        loss_chunk_size: Tokens whose logits exist at the same time while the loss is computed.
        auto_map: The entry of a checkpoint that tells other tools how to load it. None: through `loglinear_auto.py`,
            which every save writes.

    Raises:
        ValueError: A value of another type, or one that does not fit. The message names the argument, its value and
            the expected one. Configurations that are loaded may have the values of earlier versions. A misspelt option
            is one too; in a saved configuration it is a warning.
    """

    model_type = "loglinear"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 264
    hidden_size: int = 256
    num_hidden_layers: int = 4
    intermediate_size: int | None = None
    variant: str = "mamba2"
    num_levels: int = 15
    lambda_form: str = "unit"
    finest_block: int = 1
    radix: int = 2
    largest_block: int | None = None
    routing: str | None = None
    routing_tau: float = 1.0
    decode_top_k: int | None = None
    num_heads: int = 8
    num_groups: int | None = None
    key_dim: int = 64
    head_dim: int = 64
    conv_kernel: int | None = None
    chunk_size: int = 64
    impl: str = "auto"
    layer_types: list[str] | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    attention_head_dim: int | None = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    mixer_norm_eps: float | None = None
    output_gate: bool = True
    negative_eigenvalues: bool = False
    gate_lower_bound: float | None = None
    initializer_range: float = 0.02
    embedding_range: float | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    loss_chunk_size: int = 1024
    auto_map: dict | None = None

    def __post_init__(self, **kwargs) -> None:
        for name, option in unknown_options(type(self), kwargs).items():
            if option is not None:
                raise ValueError(f"{name} is no option of {type(self).__name__}: did you mean {option}?")
            logger.warning_once(f"{name} is no option of {type(self).__name__}: it is an attribute that nothing reads")
        if self.auto_map is None:
            self.auto_map = dict(AUTO_MAP)
        self._check_numbers()
        variant = get_variant(self.variant)
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // (3 * 64)) * 64
        if self.conv_kernel is None:
            self.conv_kernel = variant.conv_kernel
        if self.num_groups is None:
            self.num_groups = 1 if variant.paper_heads.num_groups == 1 else self.num_heads
        self.heads.check()
        check_lambda_form(self.lambda_form)
        check_eigenvalues(self.negative_eigenvalues, self.variant)
        check_gate_bound(self.gate_lower_bound, self.variant)
        self._check_partition()
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // 64)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_head_dim is None:
            self.attention_head_dim = self.hidden_size // self.num_attention_heads
        self._check_sizes("num_attention_heads", "num_key_value_heads", "attention_head_dim")
        self._check_layer_types()
        super().__post_init__(**kwargs)

    def _check_numbers(self) -> None:
        self._check_sizes(*SIZES, *(name for name in SIZES_OR_NONE if getattr(self, name) is not None))
        self.chunk_size = chunk_length("chunk_size", self.chunk_size)
        for name in LENGTHS_OR_NONE:
            if getattr(self, name) is not None:
                setattr(self, name, whole_number(name, getattr(self, name), least=0))
        given = [name for name in ("mixer_norm_eps", "embedding_range") if getattr(self, name) is not None]
        for name in ("rms_norm_eps", "rope_theta", *given):
            if finite_number(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if finite_number("initializer_range", self.initializer_range) < 0:
            raise ValueError(f"initializer_range must be finite and at least 0, got {self.initializer_range}")
        for name in ("output_gate", "negative_eigenvalues"):
            flag(name, getattr(self, name))
        for name in TOKEN_IDS:
            value = getattr(self, name)
            several = name == "eos_token_id"
            tokens = value if several and isinstance(value, list | tuple) else [value]
            if value is not None and not all(is_whole(token) for token in tokens):
                raise ValueError(f"{name} must be an integer{' or a list of them' * several}, got {value!r}")
        if self.impl not in ("auto", *IMPLEMENTATIONS):
            raise ValueError(f"impl must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {self.impl!r}")

    def _check_partition(self) -> None:
        own = Partition(self.radix, self.finest_block, self.largest_block)
        self.radix, self.finest_block, self.largest_block = own.radix, own.finest_block, own.largest_block
        partition = self.partition
        most = MOST_LEVELS if partition == FENWICK else partition.num_columns(2**63)
        if self.num_levels > most:
            raise ValueError(f"num_levels must be at most {most}, got {self.num_levels}")
        check_partition("the partition", partition)
        if self.num_levels > 1:
            check_finest_block(self.shared_block, self.num_levels)
        if self.routing is None:
            if self.decode_top_k is not None:
                raise ValueError(f"decode_top_k needs routing, got {self.decode_top_k!r} with routing=None")
            return
        Routing(self.routing, self.routing_tau, self.decode_top_k).checked()
        if self.num_levels < 2:
            raise ValueError(f"routing needs num_levels of at least 2, got {self.num_levels}")

    def _check_sizes(self, *names: str) -> None:
        for name in names:
            setattr(self, name, whole_number(name, getattr(self, name)))

    def _check_layer_types(self) -> None:
        if not isinstance(self.layer_types, list | tuple):
            raise ValueError(f"layer_types must be a list of {' and '.join(LAYER_TYPES)}, got {self.layer_types!r}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have num_hidden_layers = {self.num_hidden_layers} entries, "
                f"got {len(self.layer_types)}"
            )
        for layer_type in self.layer_types:
            if layer_type not in LAYER_TYPES:
                raise ValueError(f"layer_types must hold {' or '.join(LAYER_TYPES)}, got {layer_type!r}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of saved fields, with other values for the options among `kwargs`.

        Saved fields may have values that a new configuration refuses. Saved fields without meaning stay, for other
        tools; there is a warning for one that resembles an option.
        """
        further = unknown_options(cls, config_dict)
        for name, option in further.items():
            if option is not None:
                logger.warning_once(f"{name} is no option of {cls.__name__}, so it has no effect: {option} is one")
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in get_annotations(LogLinearConfig)}
        options = {name: value for name, value in config_dict.items() if name not in further}
        found = super().from_dict({**current_fields(options), **given}, **kwargs)
        for name in further:
            setattr(found[0] if isinstance(found, tuple) else found, name, config_dict[name])
        return found

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as transformers does, and add the file through which tools load the classes without importing them."""
        write_auto_file(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def validate_rope(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: transformers and vLLM would check `head_dim`, and no such head is rotated."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: every save already names the class, and a copy of its code in a checkpoint would become stale."""

    @property
    def partition(self) -> Partition:
        """The partition of the past in the operators."""
        if self.radix == 2 and self.largest_block is None and self.routing is None:
            return FENWICK  # a finest block is then one lambda for several levels
        return Partition(self.radix, self.finest_block, self.largest_block)

    @property
    def shared_block(self) -> int:
        """The finest block of lambda, where it is not the partition's."""
        return self.finest_block if self.partition == FENWICK else 1

    @property
    def routing_choices(self) -> Routing | None:
        """The choices of the routed read; None without routing."""
        return None if self.routing is None else Routing(self.routing, self.routing_tau, self.decode_top_k)

    @property
    def taps(self) -> int:
        """W, the tokens that the short convolution reads: 1 without one, the token itself."""
        assert self.conv_kernel is not None
        return max(self.conv_kernel, 1)

    @property
    def heads(self) -> HeadSizes:
        """The heads of a mixer: H, G, K and V."""
        assert self.num_groups is not None
        return HeadSizes(self.num_heads, self.num_groups, self.key_dim, self.head_dim)

    @property
    def mixer_options(self) -> dict[str, Any]:
        """The keyword arguments of a `loglinear.layers.Mixer`."""
        return dict(
            variant=self.variant,
            num_levels=self.num_levels,
            lambda_form=self.lambda_form,
            finest_block=self.shared_block,
            partition=self.partition,
            routing=self.routing_choices,
            conv_kernel=self.conv_kernel,
            chunk_size=self.chunk_size,
            norm_eps=self.rms_norm_eps if self.mixer_norm_eps is None else self.mixer_norm_eps,
            output_gate=self.output_gate,
            negative_eigenvalues=self.negative_eigenvalues,
            gate_lower_bound=self.gate_lower_bound,
            impl=self.impl,
        )

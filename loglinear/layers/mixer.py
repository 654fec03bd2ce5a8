# B batch, T time, D hidden size, G groups, H heads, K key, V value, L levels, S sequences, W kernel
"""The token mixer of all variants."""

from torch import Tensor, nn

from loglinear.layers.former_names import rename_former
from loglinear.layers.gated_rms_norm import GatedRMSNorm
from loglinear.layers.level_scales import LevelScales
from loglinear.layers.mixer_state import MixerDecodeState, MixerState
from loglinear.layers.packing import Packing
from loglinear.layers.routing import BucketWeights, Routing
from loglinear.layers.short_convolution import NoConvolution, ShortConvolution
from loglinear.layers.slices import Slice
from loglinear.layers.token_mixer import OPERATORS, TokenMixer
from loglinear.ops.validation import finite_number
from loglinear.partition import FENWICK, Partition
from loglinear.variants import HeadSizes, Variant, get_variant


class Mixer(TokenMixer):
    """Log-linear attention as a layer: [B, T, D] -> [B, T, D].

        z, (q, k, v) = W x ;  q, k, v = silu(conv(q, k, v)) ;  lambda = LevelScales(x), or BucketWeights(x, scores)
        y = operator(variant(x, q, k, v), lambda) ;  output = W_o norm(y, z)

    Each row of the batch is one sequence, unless `packing` describes the sequences. A sequence continues from the state
    that `return_state=True` returns. `step`, or a call with a `MixerDecodeState`, processes one token per row in place.

    Args:
        hidden_size: D.
        heads: H, G, K and V.
        variant: The base model, a name in `loglinear.variants.VARIANTS`.
        num_levels: L. 1 is the linear model of the same variant: lambda is 1 and has no parameters.
        lambda_form: "unit", "softplus" or "bounded"; see `LevelScales`.
        finest_block: The tokens of each aligned block of this size share one lambda of `LevelScales`.
        partition: The partition of the past in the operator. L counts its columns.
        routing: The choices of a routed read, whose weights take the place of `LevelScales`. None: no such read.
        conv_kernel: W, the tokens that the short convolution reads. 0: no convolution and no SiLU. None: the variant's.
        chunk_size: C, tokens per chunk of the operator, a power of two.
        norm_eps: The epsilon of the output norm.
        output_gate: False for an output norm without the gate z.
        negative_eigenvalues: True for write strengths up to 2 in place of 1 (delta rule only), so that a transition has
            eigenvalues in [-1, 1] in place of [0, 1] (arXiv 2411.12537).
        gate_lower_bound: The least log decay of a token, below 0 (`kimi_delta_attention` alone). None: no bound.
        impl: The implementation of the operator: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError: An unknown variant or form, sizes that do not fit, negative_eigenvalues without the delta rule, or
            a gate_lower_bound that is not below 0 or of another variant; the message names the argument.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: HeadSizes,
        *,
        variant: str,
        num_levels: int,
        lambda_form: str = "unit",
        finest_block: int = 1,
        partition: Partition = FENWICK,
        routing: Routing | None = None,
        conv_kernel: int | None = None,
        chunk_size: int = 64,
        norm_eps: float = 1e-5,
        output_gate: bool = True,
        negative_eigenvalues: bool = False,
        gate_lower_bound: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        check_gate_bound(gate_lower_bound, variant)
        bound = {} if gate_lower_bound is None else {"gate_lower_bound": gate_lower_bound}
        self.variant = get_variant(variant)(hidden_size, heads, **bound)
        check_eigenvalues(negative_eigenvalues, variant)
        self.beta_scale = 2 if negative_eigenvalues else 1
        self.operator, self.operator_step = OPERATORS[self.variant.transition]
        self.transition, self.scale = self.variant.transition, self.variant.scale
        self.l2_normalize, self.diagonal_gate = self.variant.l2_normalize, self.variant.diagonal_gate
        self.heads, self.num_levels, self.partition = heads, num_levels, partition
        self.chunk_size, self.impl = chunk_size, impl
        self.key_width, self.value_width = heads.num_groups * heads.key_dim, heads.num_heads * heads.head_dim
        conv_width = 2 * self.key_width + self.value_width
        rank = heads.head_dim if self.variant.low_rank_output_gate else self.value_width
        self.gate_width = rank if output_gate else 0
        self.in_proj = nn.Linear(hidden_size, self.gate_width + conv_width, bias=False)
        self.gate_up: nn.Linear | None = None
        if output_gate and self.variant.low_rank_output_gate:
            self.gate_up = nn.Linear(rank, self.value_width, bias=False)
        self.conv = convolution(conv_width, conv_kernel, self.variant)
        self.level_scales: LevelScales | None = None
        self.bucket_weights: BucketWeights | None = None
        if routing is not None:
            self.bucket_weights = BucketWeights(hidden_size, heads, num_levels, routing)
            self.set_decode_top_k(routing.top_k)
        elif num_levels > 1:
            self.level_scales = LevelScales(hidden_size, heads.num_heads, num_levels, lambda_form, finest_block)
        self.norm = GatedRMSNorm(
            heads.num_heads,
            heads.head_dim,
            heads.num_groups,
            gate_first=self.variant.gate_before_norm,
            eps=norm_eps,
            sigmoid=self.variant.sigmoid_gate,
        )
        self.out_proj = nn.Linear(self.value_width, hidden_size, bias=False)
        self.register_load_state_dict_pre_hook(rename_former)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        state: MixerState | MixerDecodeState | None = None,
        return_state: bool = False,
        active: Tensor | None = None,
        slices: Slice | None = None,
    ) -> tuple[Tensor, MixerState | MixerDecodeState | None]:
        """Return the output [B, T, D], and the new state or None; see `TokenMixer.mix`."""
        return self.mix(x, packing, state, return_state, active, slices)

    def step(self, x: Tensor, state: MixerDecodeState, active: Tensor | None = None) -> Tensor:
        """Return the output [B, 1, D] of one token per row [B, 1, D] and advance `state` in place, without gradients.

        Rows that are not `active` [B] keep their state.
        """
        # A call of the module, so hooks on its forward pass (offloading, sharding) run.
        return self(x, state=state, active=active)[0]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z, then q, k, v before the convolution, and x, from which the variant makes its gates."""
        z, qkv = self.in_proj(x).split([self.gate_width, 2 * self.key_width + self.value_width], dim=-1)
        return z if self.gate_up is None else self.gate_up(z), qkv, x

    def _operands(self, x: Tensor, qkv: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Return the operator's tensors in its order, without lambda, and v from the convolution."""
        q, k, v = qkv.split([self.key_width, self.key_width, self.value_width], dim=-1)
        q, k = (t.unflatten(-1, (self.heads.num_groups, self.heads.key_dim)) for t in (q, k))
        v = v.unflatten(-1, (self.heads.num_heads, self.heads.head_dim))
        operands = self.variant(x, q, k, v)
        # Named one by one: torch 2.11 compiles `*tensors, beta = operands` to a tuple where Python makes a list.
        gates = [operands.log_decay]
        if operands.beta is not None:
            gates.append(operands.beta if self.beta_scale == 1 else operands.beta * self.beta_scale)
        return [operands.q, operands.k, operands.v, *gates], v

    def _output(self, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """Return the mixer's output from the operator's: skip connection, norm and projection."""
        if self.variant.skip_bias is not None:
            y = self.variant.skip_bias(y, v)
        return self.out_proj(self.norm(y, z if self.gate_width else None))


def convolution(channels: int, kernel: int | None, variant: Variant) -> ShortConvolution | NoConvolution:
    """Return the convolution of a mixer; its kernel is the variant's if it is None, and 0 for none."""
    kernel = variant.conv_kernel if kernel is None else kernel
    return ShortConvolution(channels, kernel, bias=variant.conv_bias) if kernel else NoConvolution(channels)


def check_gate_bound(bound: float | None, variant: str) -> None:
    """Raise ValueError for a lower bound of the log decay that is not below 0, or of a variant without a safe gate."""
    if bound is None:
        return
    if not get_variant(variant).safe_gate:
        raise ValueError(f"gate_lower_bound needs the variant kimi_delta_attention, got {variant!r}")
    if finite_number("gate_lower_bound", bound) >= 0:
        raise ValueError(f"gate_lower_bound must be below 0, got {bound}")


def check_eigenvalues(negative: bool, variant: str) -> None:
    """Raise ValueError for negative eigenvalues of a variant without the delta rule."""
    if negative and get_variant(variant).transition != "delta_rule":
        raise ValueError(f"negative_eigenvalues needs a variant with the delta rule, got {variant!r}")

"""The decays inside chunks: of a scalar gate (D = 1, one for all channels of the keys) or a diagonal one (D = K).

    from_start            = exp(G)              from a chunk's start to each token
    to_end                = exp(Gam - G)        from each token to the chunk's end
    products(a, b)[i, j]  = sum_c a_ic b_jc exp(G_ic - G_jc) for i >= j, 0 above the diagonal

G is the cumulative log decay, Gam its last value. Every exponent is the sum of the very log decays that it stands for,
never a difference of two long sums, which loses digits once a decay is strong. So none is above 0, and none overflows.
The gradient of a log decay is the sum of the flows that pass its token: the products of a factor and its gradient.
"""

# H heads of a slab, n chunks, C chunk, K key, D decays of a token
from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from loglinear.fenwick import log2
from loglinear.kernels.torch.chunks import block_view, decay_matrix, prefix_sums, reverse_cumsum, suffix_sums
from loglinear.kernels.torch.workspace import matmul, product, zeros


class Gate(ABC):
    """The decays of chunks and their adjoints."""

    def __init__(self, log_decay: Tensor) -> None:
        self.log_decay = log_decay  # [H, n, C, D]
        self.from_start = log_decay.cumsum(-2).exp_()  # [H, n, C, D]
        self.to_end = suffix_sums(log_decay, -2).exp_()  # [H, n, C, D]

    @property
    def whole(self) -> Tensor:
        """exp(Gam) [H, n, D], the decay of a whole chunk."""
        return self.from_start[..., -1, :]

    @abstractmethod
    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """[H, n, C, C] of the rows a, b [H, n, C, K]."""

    @abstractmethod
    def products_backward(self, d: Tensor, products: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
        """dlog_decay from the gradient d [H, n, C, C] of products(a, b), over which it writes; adds into da and db."""

    def flow(self, x: Tensor, dx: Tensor) -> Tensor:
        """The flow [H, n, C, D] through rows [H, n, C, K] that contain a decay."""
        return of_gate(product(dx, x), self.log_decay.shape[-1])

    def gradient(self, flow_in: Tensor, flow_out: Tensor, dtotal: Tensor) -> Tensor:
        """dlog_decay [H, n, C, D] from the flows through rows with the factor from_start, or to_end, and from dGam."""
        return reverse_cumsum(flow_in, -2) + prefix_sums(flow_out, -2).add_(dtotal[..., None, :])


def of_gate(flow: Tensor, decays: int) -> Tensor:
    """The flow of each decay [..., D] from that of each channel [..., K]."""
    return flow.sum(-1, keepdim=True) if decays == 1 else flow


def gate_of(log_decay: Tensor) -> Gate:
    """The gate of log decays [H, n, C] (scalar) or [H, n, C, K] (diagonal)."""
    log_decay = log_decay[..., None] if log_decay.dim() == 3 else log_decay
    return ScalarGate(log_decay) if log_decay.shape[-1] == 1 else DiagonalGate(log_decay)


class ScalarGate(Gate):
    """One decay for all channels: a matrix of decays multiplies the product."""

    def __init__(self, log_decay: Tensor) -> None:
        super().__init__(log_decay)
        self.decay_CC = decay_matrix(log_decay[..., 0])

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        return matmul(a, b.mT).mul_(self.decay_CC)

    def products_backward(self, d: Tensor, products: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
        flow_CC = product(d, products)
        dcumulative = flow_CC.sum(-1) - flow_CC.sum(-2)
        d.mul_(self.decay_CC)
        if a is b:
            da.add_(matmul(d + d.mT, a))
        else:
            da.add_(matmul(d, b))
            db.add_(matmul(d.mT, a))
        return reverse_cumsum(dcumulative)[..., None]


class Halves(NamedTuple):
    """The blocks of 2w tokens of a chunk, each cut in its middle."""

    w: int
    right: Tensor  # [H, n, C / 2w, w, K]: the decay from the middle to a token of the right half
    left: Tensor  # the same shape: the decay from a token of the left half to the middle

    def rows(self, a: Tensor) -> Tensor:
        """The rows of the right halves, as the middle sees them."""
        return product(halves(a, self.w)[1], self.right)

    def columns(self, b: Tensor) -> Tensor:
        """The rows of the left halves, decayed to the middle."""
        return product(halves(b, self.w)[0], self.left)


def halves(x: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """The left and the right halves of blocks of 2w tokens, views [H, n, C / 2w, w, K] of x [H, n, C, K]."""
    left, right = x.unflatten(-2, (-1, 2, w)).unbind(-3)
    return left, right


class DiagonalGate(Gate):
    """A decay for each channel: inside the product. A block of 2w tokens is a product of its right half and its left
    half, with the decays to and from the middle; blocks of all sizes fill the triangle."""

    def __init__(self, log_decay: Tensor) -> None:
        super().__init__(log_decay)
        self.blocks = []
        for level in range(log2(log_decay.shape[-2])):
            left, right = halves(log_decay, 1 << level)
            self.blocks.append(Halves(1 << level, right.cumsum(-2).exp_(), suffix_sums(left, -2).exp_()))

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        out = zeros(a, *a.shape[:-1], a.shape[-2])
        out.diagonal(dim1=-2, dim2=-1).copy_(product(a, b).sum(-1))
        for block in self.blocks:
            below = matmul(block.rows(a), block.columns(b).mT)
            block_view(out, block.w)[..., 0].copy_(below.movedim(-3, -1))
        return out

    def products_backward(self, d: Tensor, products: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
        own, dlog_decay = d.diagonal(dim1=-2, dim2=-1)[..., None], zeros(a, *a.shape)
        da.addcmul_(b, own)
        db.addcmul_(a, own)
        for block in self.blocks:
            rows, columns = block.rows(a), block.columns(b)
            below = block_view(d, block.w)[..., 0].movedim(-1, -3).contiguous()
            drows, dcolumns = matmul(below, columns), matmul(below.mT, rows)
            left, right = halves(dlog_decay, block.w)
            right += reverse_cumsum(rows.mul_(drows), -2)
            left += prefix_sums(columns.mul_(dcolumns), -2)
            halves(da, block.w)[1].add_(drows.mul_(block.right))
            halves(db, block.w)[0].add_(dcolumns.mul_(block.left))
        return dlog_decay

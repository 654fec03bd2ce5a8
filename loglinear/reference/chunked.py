# T time, C chunk, N chunks, K key, V value, L levels, D decays of a token: 1, or K of a diagonal gate
"""The Fenwick-array algorithm in four steps, for one head; read it before any fast implementation.

    1. S_z = sum_j exp(G_z,C - G_z,j) k_j v_j^T          every chunk's own state at its end
    2. S_block = exp(G_right) S_left + S_right           merged in place: slot e is the block that ends at chunk e
    3. O = ((Q K^T * dec) * LAM) V                       inside the chunk
    4. O += lambda * (Q exp(G + path)) S_slot            for each block of the walk over the past, nearest first

G is the cumulative log decay inside a chunk: one number for all channels of the keys (a scalar gate), or one for each
(a diagonal gate). Fast implementations run step 4 for all chunks at once. With radix r a
block joins r blocks of the next smaller size, and the walk reads up to r - 1 blocks of each size.
"""

import torch
from torch import Tensor

from loglinear.partition import FENWICK, Partition


def chunked_scalar_gate(
    q_TK: Tensor,
    k_TK: Tensor,
    v_TV: Tensor,
    log_decay_TD: Tensor,
    lambda_TL: Tensor,
    C: int,
    partition: Partition = FENWICK,
) -> Tensor:
    """Return o [T, V] of one head; T is a multiple of the chunk size C, the size of a block.

    The log decay is [T, 1] for a scalar gate and [T, K] for a diagonal one.
    """
    N, L = len(q_TK) // C, lambda_TL.shape[1]
    q, k, v, g, lam = (x.unflatten(0, (N, C)) for x in (q_TK, k_TK, v_TV, log_decay_TD, lambda_TL))
    G, total = g.cumsum(1), g.sum(1)
    # [own]
    # 1. every chunk's own state [N, K, V]
    state = (k * (total[:, None] - G).exp()).mT @ v
    # [end]
    # [sweep]
    # 2. up-sweep: r neighbouring blocks of w chunks become one, which takes the slot of the newest
    log_decay = total.clone()
    for w, r, _ in partition.heights(C, N):
        newest = list(range(r * w - 1, N, r * w))
        for older in range(1, r):
            left = [e - older * w for e in newest]
            state[newest] += log_decay[newest].exp()[..., None] * state[left]
            log_decay[newest] += log_decay[left]
    # [end]
    # [inside]
    # 3. inside the chunk
    causal_CC = torch.ones(C, C, dtype=torch.bool).tril()
    decay_CCD = (G[:, :, None] - G[:, None, :]).masked_fill(~causal_CC[..., None], -torch.inf).exp()
    scores_CC = torch.einsum("nik,njk,nijk->nij", q, k, decay_CCD)
    column_CC = torch.tensor([[min(partition.index(i, min(i, j)), L - 1) for j in range(C)] for i in range(C)])
    out = (scores_CC * lam.gather(2, column_CC.expand(N, C, C))) @ v
    # [end]
    # [walk]
    # 4. the walk of chunk z over its past, nearest block first
    for z in range(N):
        path = torch.zeros_like(total[0])
        for end, _, column in partition.walk(z, C):
            weight = lam[z, :, min(column, L - 1), None]
            out[z] += weight * ((q[z] * (G[z] + path).exp()) @ state[end - 1])
            path = path + log_decay[end - 1]
    # [end]
    return out.flatten(0, 1)

# B batch, T time, D hidden size, G groups, H heads, K key, V value, L levels
"""Foreign models written out token by token in float64. They read tensors under the names of their own libraries."""

import torch
from torch.nn import functional as F


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T


def convolved(x, weight, bias=None):
    """silu of the causal depthwise convolution of x [T, C] with weight [C, 1, W]."""
    taps = weight.shape[-1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    y = torch.stack([(padded[t : t + taps] * weight[:, 0].T).sum(0) for t in range(len(x))])
    return F.silu(y if bias is None else y + bias)


def level(t, s, levels):
    return min((t ^ s).bit_length(), levels - 1)


def recurrence(q, k, v, log_decay, beta=None, lam=None):
    """Outputs [T, V] of one head. The state that each source token wrote is kept apart, to weigh it by its level."""
    T = len(q)
    states = q.new_zeros(T, q.shape[1], v.shape[1])
    outputs = []
    for t in range(T):
        states = states * log_decay[t].exp()
        write = v[t]
        if beta is not None:
            states = states - beta[t] * torch.einsum("k,j,sjv->skv", k[t], k[t], states)
            write = beta[t] * write
        states[t] = torch.outer(k[t], write)
        weights = [1.0 if lam is None else lam[t, level(t, s, lam.shape[1])] for s in range(t + 1)]
        outputs.append(sum(weight * (q[t] @ states[s]) for s, weight in enumerate(weights)))
    return torch.stack(outputs)


def heads_of(x, heads):
    """x [T, heads * width] as [heads, T, width]."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def mamba2(x, w, at, *, heads, groups, head_dim, state, eps=1e-5, levels=0):
    """A Mamba-2 layer, x [T, D]: in_proj [z, x, B, C, dt, dl], conv1d [x, B, C], norm(y silu(z)) for each group."""
    inner, keys = heads * head_dim, groups * state
    z, xbc, dt, dl = linear(x, w, f"{at}in_proj").split([inner, inner + 2 * keys, heads, heads * levels], -1)
    xbc = convolved(xbc, w[f"{at}conv1d.weight"], w.get(f"{at}conv1d.bias"))
    v, b, c = xbc.split([inner, keys, keys], -1)
    v, b, c = heads_of(v, heads), heads_of(b, groups), heads_of(c, groups)
    dt = F.softplus(dt + w[f"{at}dt_bias"])
    log_decay = -w[f"{at}A_log"].exp() * dt
    lam = F.softplus(w[f"{at}L"] * dl.unflatten(-1, (heads, levels))) if levels else None
    y = []
    for h in range(heads):
        g = h // (heads // groups)
        head_lam = None if lam is None else lam[:, h]
        o = recurrence(c[g], b[g], v[h] * dt[:, h, None], log_decay[:, h], lam=head_lam)
        y.append(o + w[f"{at}D"][h] * v[h])
    gated = torch.cat(y, -1) * F.silu(z)
    normed = rms_norm(gated.unflatten(-1, (groups, -1)), 1.0, eps).flatten(-2) * w[f"{at}norm.weight"]
    return linear(normed, w, f"{at}out_proj")


def swiglu(x, w, at):
    return linear(F.silu(linear(x, w, f"{at}gate_proj")) * linear(x, w, f"{at}up_proj"), w, f"{at}down_proj")

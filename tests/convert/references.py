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
    """Outputs [T, V] of one head, with log_decay [T] or [T, K, 1].

    The state that each source token wrote is kept apart, to weigh it by its level.
    """
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


def delta_rule(x, w, at, heads, *, eps, decay=True, beta_scale=1.0, scaled=True, levels=0):
    """A delta-rule layer, x [T, D], heads (H, G, K, V). Projections, convolutions and the gate are optional parts."""
    H, G, K, V = heads
    q, k, v = (linear(x, w, f"{at}{part}_proj") for part in "qkv")
    if f"{at}q_conv1d.weight" in w:
        q, k, v = (convolved(y, w[f"{at}{part}_conv1d.weight"]) for part, y in zip("qkv", (q, k, v), strict=True))
    else:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    q, k, v = heads_of(q, G), heads_of(k, G), heads_of(v, H)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = beta_scale * linear(x, w, f"{at}b_proj").sigmoid()
    log_decay = torch.zeros_like(beta)
    if decay:
        log_decay = -w[f"{at}A_log"].exp() * F.softplus(linear(x, w, f"{at}a_proj") + w[f"{at}dt_bias"])
    lam = F.softplus(w[f"{at}L"] * linear(x, w, f"{at}l_proj").unflatten(-1, (H, levels))) if levels else None
    y = []
    for h in range(H):
        g = h // (H // G)
        query = q[g] * K**-0.5 if scaled else q[g]
        head_lam = None if lam is None else lam[:, h]
        y.append(recurrence(query, k[g], v[h], log_decay[:, h], beta[:, h], head_lam))
    normed = rms_norm(torch.stack(y, 1), w[f"{at}o_norm.weight"], eps).flatten(-2)
    if f"{at}g_proj.weight" in w:
        normed = normed * F.silu(linear(x, w, f"{at}g_proj"))
    return linear(normed, w, f"{at}o_proj")


def gla(x, w, at, heads, *, key_value_heads, eps):
    """A GLA layer, x [T, D], heads (H, H, K, V), whose keys, values and decays several heads share."""
    H, _, K, _ = heads
    q, k, v = (linear(x, w, f"{at}{part}_proj") for part in "qkv")
    if f"{at}q_conv1d.weight" in w:
        q, k, v = (convolved(y, w[f"{at}{part}_conv1d.weight"]) for part, y in zip("qkv", (q, k, v), strict=True))
    gate = linear(linear(x, w, f"{at}gk_proj.0"), w, f"{at}gk_proj.1") + w[f"{at}gk_proj.1.bias"]
    q, k, v, gate = heads_of(q, H), *(heads_of(part, key_value_heads) for part in (k, v, gate))
    log_decay = F.logsigmoid(gate)[..., None] / 16
    shared = [h // (H // key_value_heads) for h in range(H)]
    y = [recurrence(q[h] * K**-0.5, k[g], v[g], log_decay[g]) for h, g in enumerate(shared)]
    norm = next(name for name in ("g_norm_swish_gate", "g_norm") if f"{at}{name}.weight" in w)
    normed = rms_norm(torch.stack(y, 1), w[f"{at}{norm}.weight"], eps).flatten(-2)
    if f"{at}g_proj.weight" in w:
        normed = normed * F.silu(linear(x, w, f"{at}g_proj"))
    return linear(normed, w, f"{at}o_proj")


def attention(x, w, at, *, heads, key_value_heads, theta):
    """Causal softmax attention with rotary positions, whose angles are float32; pairs are halves of a head."""
    q, k, v = (
        heads_of(linear(x, w, f"{at}q_proj"), heads),
        *(heads_of(linear(x, w, f"{at}{part}_proj"), key_value_heads) for part in "kv"),
    )
    width = q.shape[-1]
    frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(len(x), dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().double().repeat(1, 2), angle.sin().double().repeat(1, 2)

    def rotated(y):
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin

    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    y = []
    for h in range(heads):
        g = h // (heads // key_value_heads)
        scores = rotated(q[h]) @ rotated(k[g]).T * width**-0.5
        y.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[g])
    return linear(torch.cat(y, -1), w, f"{at}o_proj")


def decoder(w, tokens, layers, mixer, eps):
    """Logits [T, vocabulary] of a model of flash-linear-attention with blocks attn_norm, attn, mlp_norm, mlp."""
    x = w["model.embeddings.weight"][tokens]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        x = x + mixer(rms_norm(x, w[f"{at}attn_norm.weight"], eps), layer, f"{at}attn.")
        x = x + swiglu(rms_norm(x, w[f"{at}mlp_norm.weight"], eps), w, f"{at}mlp.")
    return linear(rms_norm(x, w["model.norm.weight"], eps), w, "lm_head")


def backbone(w, tokens, layers, eps, norm="norm", **sizes):
    """Logits [T, vocabulary] of a Mamba-2 model with or without feed-forward layers."""
    x = w["backbone.embeddings.weight"][tokens]
    for layer in range(layers):
        at = f"backbone.layers.{layer}."
        x = x + mamba2(rms_norm(x, w[f"{at}{norm}.weight"], eps), w, f"{at}mixer.", eps=eps, **sizes)
        if f"{at}mlp_norm.weight" in w:
            x = x + swiglu(rms_norm(x, w[f"{at}mlp_norm.weight"], eps), w, f"{at}mlp.")
    return linear(rms_norm(x, w["backbone.norm_f.weight"], eps), w, "lm_head")

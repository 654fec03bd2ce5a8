"""The variant linear attention."""

from loglinear.variants.base import HeadSizes, Variant


class LinearAttention(Variant):
    """Linear attention without decay: a scalar gate with a = 1.

        S_t = S_{t-1} + k_t v_t^T

    The SiLU after the mixer's short convolution is the feature map of q and k. The output norm keeps the growing sum in
    range; it replaces the denominator.

    Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", arXiv 2006.16236, section 3.4; the norm is
    from Qin et al., "The Devil in Linear Transformer", arXiv 2210.10340.
    """

    paper_heads = HeadSizes(num_heads=12, num_groups=12, key_dim=128, head_dim=128)

from loglinear.variants.base import HeadSizes, Variant


class LinearAttention(Variant):
    """Linear attention without decay, scalar gate with a = 1:

        S_t = S_{t-1} + k_t v_t^T

    The SiLU after the mixer's short convolution is the feature map of q and k; the output norm keeps the growing sum
    in range. Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", arXiv 2006.16236, section 3.4, with the
    norm of Qin et al., "The Devil in Linear Transformer", arXiv 2210.10340, in place of the denominator.
    """

    paper_heads = HeadSizes(num_heads=12, num_groups=12, key_dim=128, head_dim=128)

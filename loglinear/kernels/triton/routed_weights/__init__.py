"""w = n softmax(logits + sharpness tau score) over the buckets that hold a token: the weights of the routed read.

forward.py:  one launch for the weights.
backward.py: one launch for all gradients, and a sum over tokens for that of tau.
operator.py: both directions as torch sees them.
tiles.py:    the share of a program.

A pair is a token and a query/key group. The heads of a group follow one another, so logits [B,T,H,L] are [pairs,R,L] of
R heads, and scores [B,T,G,L] are [pairs,L]. A program has some pairs and all heads of their groups. It reads scores and
tokens once for these heads, and adds up the gradient of the scores without atomics.
"""

from loglinear.kernels.triton.routed_weights.operator import routed_weights

__all__ = ["routed_weights"]

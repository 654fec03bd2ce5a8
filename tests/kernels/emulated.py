"""The errors that rounding makes in the kernels, as emulation.py has measured them in the interpreter."""

import torch

# The largest of ||x - float64|| / ||float64|| over the head dims of emulation.py and four seeds, T = 1,111, 12 levels,
# inputs as on the GPU.
EMULATED = {
    "scalar_gate": {
        torch.bfloat16: {
            "output": 2.96e-3,
            "gradient of q": 3.34e-3,
            "gradient of k": 3.39e-3,
            "gradient of v": 3.3e-3,
            "gradient of log_decay": 5.75e-3,
            "gradient of level_scales": 2.95e-3,
        },
        torch.float16: {
            "output": 1.04e-3,
            "gradient of q": 1.69e-3,
            "gradient of k": 1.31e-3,
            "gradient of v": 1.14e-3,
            "gradient of log_decay": 1.69e-3,
            "gradient of level_scales": 1.02e-3,
        },
    },
    "diagonal_gate": {  # one seed: the interpreter takes longer over its H K rows of states
        torch.bfloat16: {
            "output": 3.34e-3,
            "gradient of q": 3.03e-3,
            "gradient of k": 3.45e-3,
            "gradient of v": 3.65e-3,
            "gradient of log_decay": 3.32e-3,
            "gradient of level_scales": 3.32e-3,
        },
        torch.float16: {
            "output": 1.21e-3,
            "gradient of q": 1.01e-3,
            "gradient of k": 1.29e-3,
            "gradient of v": 1.47e-3,
            "gradient of log_decay": 1.41e-3,
            "gradient of level_scales": 1.05e-3,
        },
    },
    "delta_rule": {
        torch.bfloat16: {
            "output": 6.4e-3,
            "gradient of q": 6.84e-3,
            "gradient of k": 9.04e-3,
            "gradient of v": 6.84e-3,
            "gradient of log_decay": 1.04e-2,
            "gradient of beta": 8.82e-3,
            "gradient of level_scales": 6.88e-3,
        },
        torch.float16: {
            "output": 3.67e-3,
            "gradient of q": 3.44e-3,
            "gradient of k": 5.48e-3,
            "gradient of v": 4.0e-3,
            "gradient of log_decay": 6.25e-3,
            "gradient of beta": 5.19e-3,
            "gradient of level_scales": 3.33e-3,
        },
    },
    "diagonal_delta_rule": {  # one seed
        torch.bfloat16: {
            "output": 7.02e-3,
            "gradient of q": 6.85e-3,
            "gradient of k": 9.27e-3,
            "gradient of v": 7.05e-3,
            "gradient of log_decay": 9.15e-3,
            "gradient of beta": 8.84e-3,
            "gradient of level_scales": 6.83e-3,
        },
        torch.float16: {
            "output": 1.32e-3,
            "gradient of q": 1.42e-3,
            "gradient of k": 2.91e-3,
            "gradient of v": 1.91e-3,
            "gradient of log_decay": 2.42e-3,
            "gradient of beta": 2.44e-3,
            "gradient of level_scales": 1.08e-3,
        },
    },
}
# The same of the delta rule in bfloat16 where keys come again (`repeat_keys`, T = 700), the decay's as a share of
# `flows` where they are larger.
KEYS = {
    "one": {
        "output": 4.89e-3,
        "gradient of q": 1.68e-2,
        "gradient of k": 4.8e-3,
        "gradient of v": 6.64e-3,
        "gradient of log_decay": 3.27e-2,
        "gradient of beta": 1.25e-2,
        "gradient of level_scales": 4.61e-3,
    },
    "eight": {
        "output": 5.74e-3,
        "gradient of q": 8.02e-3,
        "gradient of k": 5.19e-3,
        "gradient of v": 6.63e-3,
        "gradient of log_decay": 2.56e-2,
        "gradient of beta": 8.47e-3,
        "gradient of level_scales": 5.44e-3,
    },
    "orthogonal": {
        "output": 2.98e-3,
        "gradient of q": 3.14e-3,
        "gradient of k": 4.56e-3,
        "gradient of v": 2.7e-3,
        "gradient of log_decay": 4.76e-3,
        "gradient of beta": 3.19e-3,
        "gradient of level_scales": 2.69e-3,
    },
}
# The same with a diagonal gate.
DIAGONAL_KEYS = {
    "one": {
        "output": 6.09e-3,
        "gradient of q": 1.57e-2,
        "gradient of k": 5.18e-3,
        "gradient of v": 7.82e-3,
        "gradient of log_decay": 1.36e-2,
        "gradient of beta": 1.32e-2,
        "gradient of level_scales": 5.59e-3,
    },
    "eight": {
        "output": 6.41e-3,
        "gradient of q": 7.55e-3,
        "gradient of k": 5.57e-3,
        "gradient of v": 7.77e-3,
        "gradient of log_decay": 7.72e-3,
        "gradient of beta": 8.97e-3,
        "gradient of level_scales": 6.36e-3,
    },
    "orthogonal": {
        "output": 2.78e-3,
        "gradient of q": 2.76e-3,
        "gradient of k": 4.06e-3,
        "gradient of v": 2.95e-3,
        "gradient of log_decay": 2.95e-3,
        "gradient of beta": 3.52e-3,
        "gradient of level_scales": 2.63e-3,
    },
}
# The same where states prescribe the chunks: of the output, of the final state's blocks, and of every gradient
# (T = 700, 9 levels, the heads of STATE_HEADS). The beta of a few raw tokens, as few numbers, varies from seed to seed.
# Chunks of 16 tokens are multiplied as float16's are. Their own errors are smaller (output 2.2e-3, decay 2.75e-3), but
# that of the decay varies with the loss (4.0e-3 with T = 300).
STATES = {
    16: EMULATED["delta_rule"][torch.float16] | {"gradient of state's log_decay": 5.56e-4},
    32: {
        "output": 6.02e-3,
        "blocks": 6.37e-3,
        "gradient of q": 5.91e-3,
        "gradient of k": 7.87e-3,
        "gradient of v": 6.15e-3,
        "gradient of log_decay": 1.25e-2,
        "gradient of beta": 7.7e-3,
        "gradient of level_scales": 6.2e-3,
        "gradient of state's blocks": 6.75e-3,
        "gradient of state's k": 7.43e-3,
        "gradient of state's v": 7.38e-3,
        "gradient of state's log_decay": 1.18e-3,
        "gradient of state's beta": 1.44e-2,
    },
    64: {
        "output": 6.19e-3,
        "blocks": 7.23e-3,
        "gradient of q": 6.21e-3,
        "gradient of k": 8.25e-3,
        "gradient of v": 6.18e-3,
        "gradient of log_decay": 1.43e-2,
        "gradient of beta": 7.8e-3,
        "gradient of level_scales": 6.35e-3,
        "gradient of state's blocks": 6.97e-3,
        "gradient of state's k": 7.4e-3,
        "gradient of state's v": 7.25e-3,
        "gradient of state's log_decay": 5.59e-4,
        "gradient of state's beta": 8.28e-3,
    },
    128: {
        "output": 6.54e-3,
        "blocks": 8.14e-3,
        "gradient of q": 6.68e-3,
        "gradient of k": 9.18e-3,
        "gradient of v": 6.64e-3,
        "gradient of log_decay": 1.01e-2,
        "gradient of beta": 8.81e-3,
        "gradient of level_scales": 6.76e-3,
        "gradient of state's blocks": 8.51e-3,
        "gradient of state's k": 8.14e-3,
        "gradient of state's v": 9.63e-3,
        "gradient of state's log_decay": 1.38e-3,
        "gradient of state's beta": 1.3e-2,
    },
}

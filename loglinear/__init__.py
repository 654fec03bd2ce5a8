"""Log-linear attention for PyTorch: operators, layers, models and training.

The operators are importable from here; they load torch at first use. `upgrade` loads transformers at first use, so
`from loglinear import *` does not name it.
"""

from typing import TYPE_CHECKING, Any

from loglinear import autoload

if TYPE_CHECKING:
    from loglinear.ops import BucketScores as BucketScores
    from loglinear.ops import DecodeState as DecodeState
    from loglinear.ops import FenwickState as FenwickState
    from loglinear.ops import LogLinearOutput as LogLinearOutput
    from loglinear.ops import Partition as Partition
    from loglinear.ops import bucket_scores as bucket_scores
    from loglinear.ops import bucket_scores_step as bucket_scores_step
    from loglinear.ops import bucket_tokens as bucket_tokens
    from loglinear.ops import log_linear_attention as log_linear_attention
    from loglinear.ops import log_linear_attention_step as log_linear_attention_step
    from loglinear.ops import log_linear_delta_rule as log_linear_delta_rule
    from loglinear.ops import log_linear_delta_rule_step as log_linear_delta_rule_step
    from loglinear.ops import routed_weights as routed_weights
    from loglinear.upgrades import UpgradeReport as UpgradeReport
    from loglinear.upgrades import load_upgrade as load_upgrade
    from loglinear.upgrades import new_parameters as new_parameters
    from loglinear.upgrades import save_upgrade as save_upgrade
    from loglinear.upgrades import upgrade as upgrade

__version__ = "0.1.0"

__all__ = [
    "BucketScores",
    "DecodeState",
    "FenwickState",
    "LogLinearOutput",
    "Partition",
    "__version__",
    "bucket_scores",
    "bucket_scores_step",
    "bucket_tokens",
    "log_linear_attention",
    "log_linear_attention_step",
    "log_linear_delta_rule",
    "log_linear_delta_rule_step",
    "routed_weights",
]

UPGRADES = ("UpgradeReport", "load_upgrade", "new_parameters", "save_upgrade", "upgrade")


def __getattr__(name: str) -> Any:
    if name in UPGRADES:
        from loglinear import upgrades

        return getattr(upgrades, name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loglinear import ops

    return getattr(ops, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *UPGRADES})


autoload.start()

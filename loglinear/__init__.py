"""Log-linear attention: operators, layers, models, training."""

__version__ = "0.1.0"

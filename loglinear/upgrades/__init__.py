"""Pretrained linear models of transformers become log-linear in place; `loglinear.upgrade` is the way in."""

from loglinear.upgrades.in_place import UpgradeReport, new_parameters, upgrade

__all__ = ["UpgradeReport", "new_parameters", "upgrade"]

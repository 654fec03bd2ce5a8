"""Pretrained linear models of transformers become log-linear in place; `loglinear.upgrade` is the way in."""

from loglinear.upgrades.adapter import load_upgrade, save_upgrade
from loglinear.upgrades.in_place import UpgradeReport, new_parameters, upgrade

__all__ = ["UpgradeReport", "load_upgrade", "new_parameters", "save_upgrade", "upgrade"]

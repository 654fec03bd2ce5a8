"""transformers' Trainer with our choice of decayed parameters and checkpoints that appear whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from loglinear.training.checkpoints import checkpoints, defect


class LogLinearTrainer(Trainer):
    """The Trainer of transformers, with two of its steps replaced."""

    _staging: Path | None = None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; vectors (norms, biases) and what is marked `_no_weight_decay` (A_log, lambda's L) do not."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
        ]

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside the checkpoints, then rename: a kill at any moment leaves the previous ones whole."""
        out = Path(self.args.output_dir or ".")
        final = out / f"checkpoint-{self.state.global_step}"
        if defect(final, resumable=True) is None:  # a run that was stopped at the very step it resumed from
            return
        self._staging = out / ".saving"
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)  # what a kill left behind
                self._staging.mkdir()
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(final, ignore_errors=True)  # a broken one
                (self._staging / final.name).rename(final)
                self._staging.rmdir()
        finally:
            self._staging = None
        if self.args.should_save and self.args.save_total_limit is not None:
            for old in checkpoints(out)[: -self.args.save_total_limit]:
                shutil.rmtree(old)

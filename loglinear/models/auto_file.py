"""The file in every checkpoint through which other tools load our classes: lm-eval, trl, a bare `AutoModel`.

transformers executes it only with trust_remote_code=True. It imports the installed library and contains no other code.
"""

from __future__ import annotations

import os
from pathlib import Path

MODULE = "loglinear_auto"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.LogLinearConfig",
    "AutoModel": f"{MODULE}.LogLinearModel",
    "AutoModelForCausalLM": f"{MODULE}.LogLinearForCausalLM",
    "AutoModelForSequenceClassification": f"{MODULE}.LogLinearForSequenceClassification",
    "AutoModelForTokenClassification": f"{MODULE}.LogLinearForTokenClassification",
    "AutoModelForQuestionAnswering": f"{MODULE}.LogLinearForQuestionAnswering",
}
TOKENIZER_AUTO_MAP = (f"{MODULE}.ByteTokenizer", f"{MODULE}.ByteTokenizer")  # slow and fast: one class serves as both
TEXT = '''"""Loads this checkpoint with the installed package `loglinear`."""
from loglinear.models import *  # noqa: F403
'''


def write_auto_file(folder: str | os.PathLike, text: str = TEXT) -> None:
    """Write `loglinear_auto.py` into the folder of a checkpoint; create the folder if necessary."""
    if Path(folder).is_file():
        return  # transformers raises the error
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{MODULE}.py").write_text(text)

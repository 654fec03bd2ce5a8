"""The errors that mean the loss of another process, and those that do not."""

from pathlib import Path

import pytest
import torch

from loglinear.training.lost import LostProcess, loss_of_process, together

GLOO = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:7888: Connection reset by peer. "
    "This is typically caused by a remote worker hanging."
)
NCCL = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1.\nOriginal reason: timeout")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GLOO, "Read error [127.0.0.1]:7888: Connection reset by peer"),
        (NCCL, "NCCL communicator was aborted on rank 1."),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("a note about /gloo/"), None),
    ],
)
def test_the_loss_of_a_process_is_one_line_and_other_errors_stay(error, reason, monkeypatch):
    assert loss_of_process(error) == reason
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LostProcess if reason else RuntimeError) as raised, together(Path("runs/a")):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("while saving") from cause
    if reason:
        expected = f"process 2 of 4 has lost another one ({reason}): start all of them again with --resume --out runs/a"
        assert str(raised.value).startswith(expected) and "\n" not in str(raised.value)


def test_one_process_has_no_other_to_lose(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError) as raised, together(Path("runs/a")):
        raise GLOO
    assert raised.value is GLOO

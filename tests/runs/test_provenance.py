import pytest
import torch

from loglinear.runs.provenance import versions


@pytest.mark.parametrize(("pipe", "note"), [("", ""), ("/tmp/mps", " shared with other processes (MPS)")])
def test_a_shared_gpu_says_so_beside_the_times_measured_on_it(monkeypatch, pipe, note):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", pipe)
    assert versions()["device"] == f"A100{note}, {torch.get_num_threads()} CPU threads"

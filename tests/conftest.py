"""Every test starts from the same seed and number of threads: OMP_NUM_THREADS, by default one, as the suite runs in
parallel processes. Processes that a test starts inherit it."""

import os
import signal

import pytest

# A background job of a shell, and nohup, ignore signals, and processes inherit that. Tests of signals need them heard.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels run without a GPU


def pytest_collection_modifyitems(config, items):
    """Compiled kernels on GPU machines, interpreted ones elsewhere: the other kind is left out of the run."""
    other = "interpreter" if _has_gpu() else "gpu"
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker(other)])
    items[:] = [item for item in items if not item.get_closest_marker(other)]


def pytest_terminal_summary(terminalreporter):
    """The counts that tests in tests/soak recorded with `record_property("soak", text)`."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    counts = [text for report in reports for name, text in report.user_properties if name == "soak"]
    if counts:
        terminalreporter.section("soak")
        for text in sorted(counts):
            terminalreporter.line(text)


@pytest.fixture(autouse=True)
def _reproducible():
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _free_gpu(request):
    """Give the memory of a GPU test back after it: parallel processes share the GPU, and each would keep its peak."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of text for the tiny recipe."""
    from tests.training.tiny import write_text

    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data):
    """The folder of a run of the tiny recipe from its beginning to its end. A test that changes it works on a copy."""
    from tests.training.tiny import train_tiny

    return train_tiny(data, tmp_path_factory.mktemp("runs") / "whole")

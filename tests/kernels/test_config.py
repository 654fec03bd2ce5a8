"""Which plan a call gets: the user's table, the shipped one, or defaults; never a measurement."""

import json

import pytest
import torch

pytest.importorskip("triton")

from loglinear.kernels.triton import config  # noqa: E402
from loglinear.kernels.triton.config import STAGES, Launch, Plan, choose, default_plan, table_key  # noqa: E402

GPU = torch.device("cpu")  # whose "name" in the tables is "cpu"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a user's table and makes the next call read it."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("LOGLINEAR_TUNED", str(path))
    config._tables.cache_clear()

    def write(text):
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        config._tables.cache_clear()

    yield write
    monkeypatch.undo()
    config._tables.cache_clear()


@pytest.mark.parametrize("direction", STAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(16, 16), (128, 64), (192, 256)])
def test_every_shape_has_a_default_for_every_stage(direction, dtype, dims, table):
    plan = choose(direction, *dims, dtype, 1000, GPU)
    assert set(plan.stages) == set(STAGES[direction]) and plan == default_plan(direction, *dims, dtype)
    assert choose(direction, *dims, dtype, 1000, GPU, chunk_size=32).chunk_size == 32


def test_the_users_table_wins_and_a_state_keeps_its_chunk(table):
    plan = Plan(64, dict.fromkeys(STAGES["forward"], Launch(32, 2, 5)))
    table({"cpu": {table_key("forward", 8, 8, torch.float32, 3000): plan.to_json()}})
    assert choose("forward", 8, 8, torch.float32, 8000, GPU) == plan  # the bucket of 2,049 to 8,192 tokens
    assert choose("forward", 8, 8, torch.float32, 9000, GPU) != plan
    assert choose("forward", 8, 8, torch.float32, 8000, GPU, chunk_size=16).chunk_size == 16


@pytest.mark.parametrize("text", ["{not json", "[]", '{"cpu": {"forward": {"chunk_size": 64}}}'])
def test_a_broken_table_is_left_aside(table, caplog, text):
    table(text)
    assert choose("forward", 8, 8, torch.float32, 100, GPU) == default_plan("forward", 8, 8, torch.float32)
    assert "is not a table of tuned kernels" in caplog.text


def test_the_shipped_table_names_every_stage():
    for plans in json.loads(config.SHIPPED.read_text()).values():
        for key, plan in plans.items():
            assert set(plan["stages"]) == set(STAGES[key.split()[0]])

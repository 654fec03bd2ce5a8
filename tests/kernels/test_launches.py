"""A call's plan is from the user's table, the shipped one, or the defaults; never from a measurement."""

import json

import pytest
import torch

tl = pytest.importorskip("triton.language")

from loglinear.kernels.triton import launches  # noqa: E402
from loglinear.kernels.triton.launches import STAGES, Kind, Launch, Plan, choose, default_plan, table_key  # noqa: E402

GPU = torch.device("cpu")  # whose "name" in the tables is "cpu"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a user's table and makes the next call read it."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("LOGLINEAR_TUNED", str(path))
    launches.forget_tables()

    def write(text):
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        launches.forget_tables()

    yield write
    monkeypatch.undo()
    launches.forget_tables()


KIND = Kind("scalar_gate", "forward", 8, 8, torch.float32)
KINDS = [(operator, direction) for operator, directions in STAGES.items() for direction in directions]


@pytest.mark.parametrize(("operator", "direction"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(16, 16), (128, 64), (192, 256)])
def test_every_shape_has_a_default_for_every_stage(operator, direction, dtype, dims, table):
    kind = Kind(operator, direction, *dims, dtype)
    plan = choose(kind, 1000, GPU)
    assert set(plan.stages) == set(kind.stages) and plan == default_plan(kind)
    assert choose(kind, 1000, GPU, chunk_size=32).chunk_size == 32


def test_the_users_table_wins_and_a_state_keeps_its_chunk(table):
    plan = Plan(64, dict.fromkeys(KIND.stages, Launch(32, 64, 2, 5, 100)))
    table({"cpu": {table_key(KIND, 3000): plan.to_json()}})
    assert choose(KIND, 8000, GPU) == plan  # the bucket of 2,049 to 8,192 tokens
    assert choose(KIND, 9000, GPU) != plan
    assert choose(KIND, 8000, GPU, chunk_size=16).chunk_size == 16


def test_a_stage_that_the_table_lacks_has_its_default(table):
    table({"cpu": {table_key(KIND, 3000): Plan(64, {"output": Launch(num_stages=5)}).to_json()}})
    found = choose(KIND, 3000, GPU)
    assert found["output"].num_stages == 5 and found["up_sweep"] == default_plan(KIND, 64)["up_sweep"]


OLD = '{"cpu": {"a": {"chunk_size": 64, "stages": {"output": [64, 4, 1]}}}}'


@pytest.mark.parametrize("text", ["{not json", "[]", '{"cpu": {"forward": {"chunk_size": 64}}}', OLD])
def test_a_broken_table_is_left_aside(table, caplog, text):
    table(text)
    assert choose(KIND, 100, GPU) == default_plan(KIND)
    assert "is not a table of tuned kernels" in caplog.text


def test_the_shipped_table_names_every_stage():
    for plans in json.loads(launches.SHIPPED.read_text()).values():
        for key, plan in plans.items():
            operator, direction = key.split()[:2]
            assert set(plan["stages"]) == set(STAGES[operator][direction])


@pytest.mark.parametrize("operator", STAGES)
def test_candidates_of_a_measurement_are_launches_of_every_stage(operator):
    from loglinear.kernels.triton.tune import candidates

    for direction in STAGES[operator]:
        kind = Kind(operator, direction, 128, 64, torch.bfloat16)
        plans = list(candidates(kind))
        assert len(plans) > 5 and all(set(plan.stages) == set(kind.stages) for plan in plans)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("operator", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_in_float32_have_four_warps(dtype, operator, direction):
    """Triton 3.6 miscompiles some of these products with eight, for compute capability 9.0."""
    from loglinear.kernels.triton.tune import candidates

    for width in (64, 256):
        kind = Kind(operator, direction, width, width, dtype)
        plans = [default_plan(kind), default_plan(kind, 16), default_plan(kind, 64), *candidates(kind)]
        assert {launch.num_warps for plan in plans for launch in plan.stages.values()} == {4}


@pytest.mark.parametrize("delta", [False, True])
def test_what_is_kept_for_a_plan_is_not_that_of_another(delta):
    """Constants are kept for the widths, the products and the plan that they are made of."""
    from loglinear.kernels.triton.args import Math
    from loglinear.kernels.triton.delta_rule.tiling import tiling_of
    from loglinear.kernels.triton.scalar_gate.states import constants

    def made(K=64, V=64, C=64, tile=64, precision="tf32"):
        launch, math = Launch(tile, num_warps=8), Math(tl.float32, precision)
        if delta:
            return tiling_of(K, V, Plan(C, {"output": launch}), math).constants("output")
        return constants(K, V, C, math, launch)

    base = made()
    assert made() == base
    changed = [made(K=128), made(V=32), made(tile=32), made(precision="tf32x3"), made(C=128)]
    assert [x != base for x in changed] == [True] * 4 + [not delta]  # the delta rule passes C itself
    assert (changed[0]["K"], changed[1]["V"], changed[2]["BV"]) == (128, 32, 32)
    assert changed[3]["MATH"].precision == "tf32x3" and base["num_warps"] == 8


def test_plans_are_equal_where_their_launches_are():
    plan = Plan(64, {"output": Launch(32), "up_sweep": Launch()})
    same = Plan(64, {"up_sweep": Launch(), "output": Launch(32)})
    assert plan == same and hash(plan) == hash(same)
    assert len({plan, Plan(32, plan.stages), Plan(64, plan.stages | {"output": Launch(32, num_warps=8)})}) == 3

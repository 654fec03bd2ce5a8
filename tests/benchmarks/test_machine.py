"""The file of a benchmark's result."""

import json
import math

import pytest

from benchmarks.machine import keep


def test_a_result_is_strict_json_and_touches_no_other_file(tmp_path):
    other = tmp_path / "times.tmp"
    other.write_text("mine")
    keep(tmp_path / "times.json", {"command": "python -m benchmarks.ops"}, [{"ms": 1.5}, {"ms": math.nan}])
    found = json.loads((tmp_path / "times.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found == {"about": {"command": "python -m benchmarks.ops"}, "rows": [{"ms": 1.5}, {"ms": None}]}
    assert other.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2

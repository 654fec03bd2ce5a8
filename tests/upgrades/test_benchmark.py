"""The benchmark of upgrades, on its tiny models."""

import json

import pytest
import torch

import loglinear
from benchmarks import upgrade
from benchmarks.machine import command_line
from benchmarks.upgrade_models import FAMILIES, KINDS, build, cache_bytes, new_cache, of_kind, repeat_rows
from loglinear import log_linear_attention
from loglinear.ops.announcement import announced


def run(monkeypatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["benchmarks.upgrade", *options])
    with pytest.raises(SystemExit) as exit_:
        command_line(upgrade.main, "upgrade")
    return exit_.value.code


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "upgrade.json"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "--lengths", "64", "--lengths", "192", "--steps", "3", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert found["about"]["versions"].keys() >= {"torch", "transformers"}
    return {(row["family"], row["model"], row["work"], row["B"], row["T"]): row for row in found["rows"]}


def test_every_model_is_measured_at_every_length(rows):
    works = [("prefill", 1), ("decode", 1), ("decode", 16)]
    expected = [(family, kind, *work, T) for T in (64, 192) for family in FAMILIES for kind in KINDS for work in works]
    assert [place for place in rows if place[2] != "float32"] == expected  # a length after the other
    for place, row in rows.items():
        assert "failed" not in row and row["seconds"] > 0
        assert place[2] == "float32" or row["tokens_per_second"] == pytest.approx(
            (row["T"] if row["work"] == "prefill" else row["B"]) / row["seconds"]
        )


def test_upgrades_have_the_logits_of_their_original(rows):
    """Up to bfloat16's rounding; measured 0.003 to 0.005."""
    for (_, kind, work, *_), row in rows.items():
        assert ("logits_difference" in row) == (work == "prefill" and kind != "original")
        assert row.get("logits_difference", 0) < 0.02
        assert (row["new_parameters"] > 0) == (kind != "original")


def test_the_rounding_of_the_original_stands_beside_that_of_its_upgrades(rows):
    """Distances to the original in float32, at the shortest length; measured in bfloat16: 0.005 to 0.007 for each."""
    assert {place for place, row in rows.items() if "logits_error" in row} == {
        (family, kind, work, 1, 64) for family in FAMILIES for kind in KINDS for work in ("prefill", "float32")
    }
    for family in FAMILIES:
        rounding = rows[family, "original", "prefill", 1, 64]["logits_error"]
        assert 1e-3 < rounding < 0.02
        assert rows[family, "original", "float32", 1, 64]["logits_error"] == 0
        for kind in KINDS:
            assert rows[family, kind, "prefill", 1, 64]["logits_error"] < 1.5 * rounding
            assert rows[family, kind, "float32", 1, 64]["logits_error"] < 1e-6


def test_rows_name_the_code_that_ran(rows):
    for (family, kind, work, *_), row in rows.items():
        work = "decode" if work == "decode" else "prefill"
        if kind == "original":  # no package with kernels is installed here
            module = f"transformers.models.{FAMILIES[family].module}"
            assert row["ran"] == [f"{name}: {module}" for name in FAMILIES[family].functions[work]]
        else:
            operator = {"Mamba-2": "log_linear_attention", "Qwen3.5": "log_linear_delta_rule"}[family]
            assert f"{operator}{'_step' * (work == 'decode')} runs with impl='torch'" in row["ran"]
            scores = f"bucket_scores{'_step' * (work == 'decode')} runs with impl='torch'"
            assert (scores in row["ran"]) == ("routed" in kind)


def test_the_cache_is_counted_by_its_parts(rows):
    """A linear layer of the tiny Qwen3.5 keeps, as float32, 2 heads of 16 x 16 and, in bfloat16, 4 tokens of 96."""
    for (family, kind, work, B, T), row in rows.items():
        if work == "prefill":
            assert row["key_value_bytes"] == {"Mamba-2": 0, "Qwen3.5": 2 * 16 * T * 2}[family]
        if work == "float32":
            continue
        if kind == "original" and family == "Qwen3.5":
            assert row["state_bytes"] == B * 3 * (2 * 16 * 16 * 4 + 4 * 96 * 2)
        if kind != "original":
            assert row["state_bytes"] > rows[family, "original", work, B, T]["state_bytes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_repeated_rows_continue_like_the_one_row(family, kind):
    model, name = of_kind(build(FAMILIES[family], "cpu", None), kind, 128), FAMILIES[family].cache_name
    ids, cache = torch.randint(3, 200, (1, 70), generator=torch.Generator().manual_seed(1)), new_cache(model)
    model(ids, use_cache=True, **{name: cache})
    one = cache_bytes(cache)
    repeat_rows(cache, 3)
    assert cache_bytes(cache) == {part: 3 * size for part, size in one.items()}
    logits = model(ids[:, :1].expand(3, 1), use_cache=True, **{name: cache}).logits
    whole = model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:]
    assert (logits - whole).norm() < 0.02 * whole.norm() * 3**0.5


ONE = ["--family", "Mamba-2", "--model", "original", "--steps", "1", "--lengths", "128", "--lengths", "64"]


def outcomes(monkeypatch, tmp_path, *options: str) -> dict[tuple[str, int, int], str | None]:
    """Return the reason of each row that failed, or None, by work, rows and length."""
    out = tmp_path / "upgrade.json"
    assert run(monkeypatch, *ONE, "--out", str(out), *options) == 0
    rows = json.loads(out.read_text())["rows"]
    return {(row["work"], row["B"], row["T"]): row.get("failed") for row in rows}


SHORT = [("float32", 1, 64), ("prefill", 1, 64), ("decode", 1, 64), ("decode", 16, 64)]
LONG = [("prefill", 1, 128), ("decode", 1, 128), ("decode", 16, 128)]


def test_a_row_that_fails_says_why_and_the_others_continue(monkeypatch, tmp_path, capsys):
    prefill = upgrade.Reader.prefill

    def short_of_memory(self, T):
        if T == 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, T)

    monkeypatch.setattr(upgrade.Reader, "prefill", short_of_memory)
    failures = dict(zip(LONG, ["out of memory", "no prefill", "no prefill"], strict=True))
    assert outcomes(monkeypatch, tmp_path) == {**dict.fromkeys(SHORT), **failures}
    assert "out of memory" in capsys.readouterr().out


def test_rows_that_time_does_not_allow_say_so(monkeypatch, tmp_path):
    """Those of a model that was not built, and a prefill that would take too long by the shorter one's time."""
    found = outcomes(monkeypatch, tmp_path, "--minutes", "1e-9")
    assert found == dict.fromkeys([*SHORT[1:], *LONG], "out of time")
    seconds = upgrade.Reader.seconds
    monkeypatch.setattr(upgrade.Reader, "seconds", lambda self, run: (31.0, seconds(self, run)[1]))  # of every call
    assert outcomes(monkeypatch, tmp_path, "--minutes", "1") == {
        **dict.fromkeys(SHORT),
        **dict(zip(LONG, ["out of time", "no prefill", "no prefill"], strict=True)),
    }


def test_a_prefill_that_cannot_fit_into_memory_is_not_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(upgrade.Reader, "peak", lambda self: {"peak_bytes": 10_000_000_000})
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 17_000_000_000))
    assert outcomes(monkeypatch, tmp_path) == dict.fromkeys([*SHORT, *LONG])  # 20 GB is within the margin
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 12_000_000_000))
    failures = dict(zip(LONG, ["needs about 18.6 GiB", "no prefill", "no prefill"], strict=True))
    assert outcomes(monkeypatch, tmp_path) == {**dict.fromkeys(SHORT), **failures}


def test_a_slow_prefill_runs_once(monkeypatch, tmp_path):
    prefill, lengths = upgrade.Reader.prefill, []
    monkeypatch.setattr(upgrade.Reader, "prefill", lambda self, T: (lengths.append(T), prefill(self, T))[1])
    outcomes(monkeypatch, tmp_path)
    assert lengths == [64, 64, 64, 128, 128]  # the first in float32
    lengths.clear()
    monkeypatch.setattr(upgrade, "SLOW", 0.0)
    outcomes(monkeypatch, tmp_path)
    assert lengths == [64, 64, 128]


def test_upgrades_share_the_weights_of_their_original():
    original = build(FAMILIES["Qwen3.5"], "cpu", None)
    weights = {id(p) for p in original.parameters()}
    model = of_kind(original, "radix 2", 128)
    new = {id(p) for p in loglinear.new_parameters(model).values()}
    assert {id(p) for p in model.parameters()} == weights | new and not weights & new
    assert not any("LogLinear" in type(module).__name__ for module in original.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_layers_run(monkeypatch, tmp_path, family):
    options = ["--family", family, "--model", "radix 2", "--lengths", "64", "--steps", "1"]
    assert run(monkeypatch, *options, "--layers", "4", "--out", str(tmp_path / "few.json")) == 0
    assert not any("failed" in row for row in json.loads((tmp_path / "few.json").read_text())["rows"])
    assert run(monkeypatch, *options, "--layers", "3") == 2


def test_a_length_within_one_block_has_an_upgrade_too(monkeypatch, tmp_path):
    out = tmp_path / "short.json"
    options = ["--family", "Mamba-2", "--model", "radix 16, routed", "--lengths", "64", "--steps", "1"]
    assert run(monkeypatch, *options, "--out", str(out)) == 0
    assert [row.get("failed") for row in json.loads(out.read_text())["rows"]][:3] == [None] * 3


def test_unknown_names_are_refused_in_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "--family", "GPT") == 2
    assert "--family must be one of 'Mamba-2', 'Qwen3.5', got 'GPT'" in capsys.readouterr().err
    assert run(monkeypatch, "--model", "radix 3") == 2 and run(monkeypatch, "--minutes", "0") == 2


def test_announced_lines_are_those_of_the_block():
    q, v = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4)
    for _ in range(2):  # whatever was announced before
        with announced() as lines:
            log_linear_attention(q, q, v, None, torch.ones(1, 2, 1, 2))
        assert lines == ["log_linear_attention runs with impl='torch'"]
    with announced() as lines:
        pass
    assert lines == []

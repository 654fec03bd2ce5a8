"""Slices of sequences on 2, 3, 4 and 8 processes give the numbers of one process."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from loglinear import parallel
from loglinear.parallel import Slices
from loglinear.parallel.pieces import Tree, pieces, runs
from loglinear.partition import FENWICK, Partition
from tests.ops.operators import excess, relative_error
from tests.parallel.cases import BY_NAME, CASES, DTYPES, RANKS, SCORED, cases_on
from tests.parallel.models import MODELS
from tests.parallel.training import WAYS, one_process

ROOT = Path(__file__).parents[2]
EXACT = 1e-12
# One collective each way; the other all_gather is that of the outputs, for the test.
EXPECTED = {"all_gather": 2, "reduce_scatter": 1}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.parallel.worker", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return {ranks: torch.load(folder / f"{ranks}.pt") for ranks in RANKS}


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("case", CASES)
def test_slices_give_the_outputs_and_gradients_of_one_process(found, case, name):
    expected = CASES[case].whole(BY_NAME[name])
    for ranks in RANKS:
        if CASES[case] in cases_on(ranks):
            for part, x in expected.items():
                assert relative_error(found[ranks][case, name][part], x) < EXACT, (ranks, part)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("case", DTYPES, ids=lambda case: case.name)
def test_slices_add_less_error_than_the_operator_has(found, case, name):
    """The largest ratio measured is 1.08."""
    twin = case.whole(BY_NAME[name])
    exact = case.in_float64(BY_NAME[name])
    for ranks in (2, 3, 4):
        for part, x in exact.items():
            actual = found[ranks][case.name, name][part]
            assert actual.dtype == case.dtype
            assert excess(actual, twin[part], x) < 1.3, (ranks, part)


def test_a_call_has_one_collective_forward_and_one_backward(found):
    for ranks, results in found.items():
        for case in [case for case in results if isinstance(case, tuple)]:
            result = results[case]
            assert {name: n for name, n in result["collectives"].items() if n} == EXPECTED, (ranks, case)


def test_gradients_of_many_readers_are_summed_in_float32(found):
    """In bfloat16 1 + 2^-9 is 1."""
    for ranks in RANKS:
        exact = torch.tensor(1 + (ranks - 1) * 2**-9).bfloat16()
        assert (found[ranks]["float32 sums"] == exact).all(), ranks


@pytest.mark.parametrize("case", SCORED)
def test_slices_give_the_scores_of_buckets_of_one_process(found, case):
    expected = CASES[case].whole_scores()
    for ranks in (2, 3, 4):
        actual = found[ranks][case]
        assert torch.equal(actual["tokens"], expected["tokens"])
        for part in ("scores", "q", "k"):
            assert relative_error(actual[part], expected[part]) < EXACT, (ranks, part)


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_loss_the_logits_and_the_gradients_of_one_process(found, name):
    expected = MODELS[name].whole()
    for ranks in MODELS[name].ranks:
        actual = found[ranks][name]
        assert actual.keys() == expected.keys()
        for part, x in expected.items():
            assert relative_error(actual[part], x) < 1e-11, (ranks, part)


@pytest.mark.parametrize("way", WAYS)
def test_training_on_slices_takes_the_steps_of_one_process(found, way):
    expected = one_process(groups=WAYS[way] // 2)
    actual = found[WAYS[way]][way]
    assert actual.keys() == expected.keys()
    for part, x in expected.items():
        assert relative_error(actual[part], x) < 1e-10, part


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("documents", [None, (0, 100), (0, 7, 33, 60, 100), (0, 99, 100), (0, *range(1, 100, 9), 100)])
def test_parts_cover_each_slice_and_cut_documents_at_chunks(ranks, documents):
    C, whole = 4, documents or (0, 100)
    boundaries = Slices.plan(100, ranks, chunk_size=C, cu_seqlens=documents).boundaries
    assert boundaries[0] == 0 and boundaries[-1] == 100 and list(boundaries) == sorted(boundaries)
    longest = -(-100 // (ranks * C)) * C
    for rank, (first, end) in enumerate(pairwise(boundaries)):
        assert end - first < longest + C
        slices = Slices.plan(100, ranks, chunk_size=C, cu_seqlens=documents, rank=rank)
        parts = slices.parts
        assert [part.begin for part in parts] + [max(end - first, 1)] == [0] + [part.end for part in parts]
        for part in parts:
            begin = max(d for d in whole if d <= first + part.begin) if end > first else first
            assert part.position == first + part.begin - begin and part.position % C == 0
            assert part.goes_on == (first + part.end not in whole and end > first)
            assert part.documents is None or list(part.documents) == sorted({*part.documents})
            assert not part.goes_on or (part.last_position % C == 0 and part is parts[-1])
        assert slices.position == parts[0].position


@pytest.mark.parametrize("partition", [FENWICK, Partition(4), Partition(16, finest_block=4), Partition(2, 1, 16)])
@pytest.mark.parametrize("num_columns", [1, 4, 9])
def test_pieces_and_runs_are_those_of_the_definition(partition, num_columns):
    """Every token of a piece is read in the column of its newest one, at every later position."""
    tree = Tree(partition, partition.chunk_near(4, 4096), num_columns)
    C = tree.chunk_size
    for start, end, last in ((0, 3 * C, 9 * C), (5 * C, 11 * C, 20 * C), (8 * C, 16 * C, 33 * C - 1)):
        found = pieces(start, end, tree)
        tokens = tuple(piece.token for piece in found)
        assert len(set(tokens)) == len({piece.number for piece in found}) == len(found)
        columns = [c for run in runs(end, last, tokens, tree) for c in [run.columns] * run.length]
        assert len(columns) == last - end
        for t, row in zip(range(end, last), columns, strict=True):
            for s in range(start, end):
                piece = min((token, n) for n, token in enumerate(tokens) if token >= s)[1]
                assert row[piece] == tree.column(t, s), (t, s)


def test_a_slice_that_is_a_block_is_one_piece():
    assert len(pieces(64, 128, Tree(FENWICK, 4, 12))) == len(pieces(0, 256, Tree(Partition(4), 4, 12))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": 0}, "time must be an integer of at least 1, got 0"),
        ({"chunk_size": 12}, "chunk_size must be a power of two, got 12"),
        ({"cu_seqlens": [0, 5]}, r"cu_seqlens must rise from 0 to the number of tokens \(20\), got \[0, 5\]"),
        ({"mesh": "cp"}, r'mesh must be a DeviceMesh of one dimension, as mesh\["cp"\], got str'),
    ],
)
def test_wrong_slices_are_refused(options, message):
    arguments = {"time": 20, "mesh": None, "chunk_size": 4, **options}
    with pytest.raises(ValueError, match=message):
        if arguments["mesh"] is None:
            Slices.plan(arguments["time"], 2, chunk_size=arguments["chunk_size"], cu_seqlens=options.get("cu_seqlens"))
        else:
            Slices.of(**arguments)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (Slices.plan(40, 2, chunk_size=4), r"q must have the 20 tokens of this rank's slice, got \[2, 8, 2, 5\]"),
        (
            Slices.plan(16, 2, chunk_size=4, cu_seqlens=[0, 9, 16]),
            "packed documents need a batch of 1, got a batch of 2",
        ),
        (Slices.plan(16, 2, chunk_size=2), "a multiple of the operator's chunk of 4 tokens, got chunk_size=2"),
        (
            Slices.plan(16, 2, chunk_size=4),
            r"slices must come from Slices.of\(..., mesh\), got a plan without processes",
        ),
    ],
)
def test_slices_that_do_not_fit_the_call_are_refused(slices, message):
    inputs = BY_NAME["scalar_gate"].inputs(T=8)
    with pytest.raises(ValueError, match=message):
        parallel.log_linear_attention(*inputs.values(), slices=slices, chunk_size=4)

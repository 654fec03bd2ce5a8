"""The figures of memorisation, of results that were made up here."""

from experiments.capacity import read_memories
from experiments.figures.capacity import LINES, capacity, conclusion
from experiments.recipes.capacity import KINDS
from tests.experiments.test_capacity import write


def names(files):
    return [file.name for file in files if "dark" not in file.name]


def test_every_kind_has_a_look_of_its_own():
    looks = [(LINES[kind].colour, LINES[kind].marker) for kind in KINDS]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(KINDS)


def test_nothing_is_drawn_without_results(tmp_path):
    assert capacity(tmp_path, tmp_path) == [] and not [*tmp_path.iterdir()]


def test_the_title_has_the_bits_a_parameter_of_each_kind_with_the_seeds(tmp_path):
    for seed, slope in enumerate((3.0, 3.5, 3.1)):
        write(tmp_path, "transformer", slope, seed=seed)
    write(tmp_path, "transformer", 3.6, dtype="float32")
    write(tmp_path, "log_linear_gated_delta_net", 2.5)
    files = capacity(tmp_path, tmp_path)
    assert names(files) == [
        "capacity.svg",
        "capacity-transformer-float32.svg",
        "capacity-transformer-bfloat16.svg",
        "capacity-log_linear_gated_delta_net-bfloat16.svg",
    ]
    assert len(files) == 8 and all(file.is_file() for file in files)
    title = conclusion(read_memories(tmp_path)).splitlines()
    assert title == [
        "Transformer, float32: 3.60 bits a parameter (1 seed)",
        "Transformer, bfloat16: 3.20 bits a parameter (3.00 to 3.50, 3 seeds)",
        "log-linear Gated DeltaNet, bfloat16: 2.50 bits a parameter (1 seed)",
    ]
    drawn = {file.name: file.read_text() for file in files}
    assert all(line in drawn["capacity.svg"] for line in title)
    assert title[2] not in drawn["capacity-transformer-bfloat16.svg"]
    assert all(f"{size},000 parameters" in drawn["capacity-transformer-bfloat16.svg"] for size in (100, 270, 500))


def test_unfinished_experiments_are_drawn(tmp_path):
    write(tmp_path, "linear", 2.0, sizes=["270k"], loads=[0.5, 1.0])
    assert names(capacity(tmp_path, tmp_path)) == ["capacity-linear-bfloat16.svg"]
    assert conclusion(read_memories(tmp_path)) == "Memorised bits, too few sizes for bits a parameter"
    write(tmp_path, "linear", 2.0, sizes=["270k"])
    assert names(capacity(tmp_path, tmp_path)) == ["capacity.svg", "capacity-linear-bfloat16.svg"]

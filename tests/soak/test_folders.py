"""A run's folder, damaged in one place: a line that names the file, an older checkpoint, or no difference at all."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from loglinear.runs.checkpoints import last_checkpoint, resolve
from loglinear.runs.folder import LOCK_FILE, run_recipe
from loglinear.runs.loading import load_checkpoint
from loglinear.runs.metrics import read_metrics
from loglinear.training.train import train
from tests.training.tiny import assert_same_run, tiny_recipe

SOAK = int(os.environ.get("SOAK", "1"))
CASES, RESUMED, KILLS = 600 * SOAK, 6 * SOAK, 8 * SOAK
LAST = "checkpoint-8"


# --- damages: what the file holds afterwards, or None where it is gone -----------------------------------------------


def flip(rng, content):
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def cut(rng, content):
    return content[: rng.randrange(1, len(content))]


def zero(rng, content):
    begin = rng.randrange(len(content))
    return content[:begin] + bytes(len(content) - begin)


def empty(rng, content):
    return b""


def remove(rng, content):
    return None


def change_a_field(rng, content):
    """Another value, another type, or nothing, somewhere in a JSON object; content that is no JSON is cut."""
    try:
        value = json.loads(content)
    except ValueError:
        return cut(rng, content)
    if not isinstance(value, dict):  # the lock's
        return b"text"
    place, key = value, rng.choice(list(value))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
        place, key = place[key], rng.choice(list(place[key]))
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice([None, True, -1, 10**30, 0.5, "text", [], {}, [place[key]], str(place[key])])
    return json.dumps(value, indent=2).encode()


DAMAGES = [flip, flip, cut, zero, empty, remove, change_a_field, change_a_field]


def same(name, before, after):
    """Return True if a file says the same: as JSON, up to its own checksum, or because nothing is read from it."""
    if name == LOCK_FILE or after == before:
        return True
    if after is None or not name.endswith(".json"):
        return False
    try:
        values = [json.loads(content) for content in (before, after)]
    except ValueError:
        return False
    if not all(isinstance(value, dict) for value in values):
        return False
    contents = [{key: part for key, part in value.items() if key != "sha256"} for value in values]
    return contents[0] == contents[1]


def read(run):
    """All that resuming reads of the run before it trains, and all that loading reads."""
    run_recipe(run)
    checkpoint = last_checkpoint(run)
    read_metrics(run)
    return checkpoint


def outcome(run, name, caplog):
    """`refused` or `passed over`, both with the file's name, or `taken`, when reading notices nothing."""
    caplog.clear()
    try:
        checkpoint = read(run)
    except (ValueError, OSError) as error:
        assert name in str(error) and "\n" not in str(error), error
        return "refused"
    if checkpoint is None or checkpoint.name != LAST:
        assert name in caplog.text, caplog.text
        return "passed over"
    return "taken"


def files_of(run):
    return [*(path for path in run.iterdir() if path.is_file()), *(run / LAST).iterdir()]


def damaged(rng, run):
    file, damage = rng.choice(sorted(files_of(run))), rng.choice(DAMAGES)
    before = file.read_bytes()
    after = damage(rng, before) if before else None
    if after is None:
        file.unlink()
    else:
        file.write_bytes(after)
    return file, before, after


def test_every_damage_is_named_passed_over_or_harmless(tmp_path, whole, caplog, record_property):
    run = shutil.copytree(whole, tmp_path / "run")
    rng, counts = random.Random(0), Counter()
    for _ in range(CASES):
        file, before, after = damaged(rng, run)
        found = outcome(run, file.name, caplog)
        harmless = same(file.name, before, after) or (file.name == "manifest.json" and after is None)
        assert found != "taken" or harmless, (file, before, after)
        if found == "taken" and file.name == "manifest.json" and after is None:
            assert "has no manifest.json, so its contents were not checked" in caplog.text
        if file.parent != run and found == "passed over":  # loading reads less: it takes nothing that is damaged
            of_training = file.suffix in (".pt", ".pth", ".bin") or file.name == "trainer_state.json"
            assert (resolve(run).name == LAST) == of_training
        counts[found] += 1
        file.write_bytes(before)
    assert outcome(run, "", caplog) == "taken" and min(counts.values()) > 0
    record_property(
        "soak",
        f"{CASES} damaged run folders: {counts['refused']} refused in one line, {counts['passed over']} went back to "
        f"an older checkpoint, {counts['taken']} without any effect",
    )


def test_what_is_resumed_or_loaded_after_a_damage_is_bit_equal(tmp_path, data, whole, caplog, record_property):
    torch.set_num_threads(1)
    rng, resumed, loaded = random.Random(1), 0, 0
    expected = {path.name: load_checkpoint(path)[0].state_dict() for path in whole.glob("checkpoint-*")}
    while resumed < RESUMED:
        run = shutil.copytree(whole, tmp_path / "run")
        file, _, _ = damaged(rng, run)
        found = outcome(run, file.name, caplog)
        if file.parent != run and found != "refused":
            weights = load_checkpoint(run)[0].state_dict()
            assert all(torch.equal(weights[name], value) for name, value in expected[resolve(run).name].items())
            loaded += 1
        if found == "passed over":
            train(tiny_recipe(data), run, resume=True, progress=False)
            assert_same_run(run, whole)
            resumed += 1
        shutil.rmtree(run)
    record_property("soak", f"{resumed} damaged runs resumed and {loaded} loaded: all bit-equal to undamaged ones")


def test_kills_at_any_moment_of_saving_lose_nothing_that_was_saved(tmp_path, data, whole, record_property):
    command = [sys.executable, "-m", "tests.soak.killed", str(data), str(tmp_path / "run"), "0", str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", whole)
    record_property("soak", f"{int(result.stdout)} kills while saving: every checkpoint whole, the result bit-equal")

import fcntl

import pytest

from loglinear.runs.folder import claim


def refused(out):
    with pytest.raises(ValueError, match="nothing here"), claim(out):
        raise ValueError("nothing here")


@pytest.mark.parametrize("parents", [0, 2])
def test_a_failed_start_leaves_no_folder_that_it_made(tmp_path, parents):
    made = tmp_path.joinpath("runs", *"ab"[:parents])
    refused(made / "x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    refused(made / "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


def test_a_failed_start_leaves_what_was_there_and_what_it_wrote(tmp_path):
    with claim(tmp_path / "a"):
        pass
    refused(tmp_path / "a")  # the lock of another run
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "b"):
        (tmp_path / "b" / "run.json").touch()
        raise KeyboardInterrupt
    refused(tmp_path / "b")
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert names == ["a", "a/.lock", "b", "b/.lock", "b/run.json"]


def test_a_lock_that_its_holder_has_just_removed_is_no_lock(tmp_path, monkeypatch):
    """The second process has opened the file when the first removes it; a third one would make and lock a new one."""
    out, flock = tmp_path / "run", fcntl.flock

    def late(*arguments):
        (out / ".lock").unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="is in use by another process"), claim(out):
        pass

"""Files and folders of which no reader meets half, whoever is killed when."""

import os
import subprocess
import sys

import pytest

from ebft.errors import UsageError
from ebft.files import clean_up, exclusive, left_overs, remove_folder, write_atomically, write_folder_atomically


@pytest.fixture
def calls(monkeypatch):
    """The order of what makes a write durable: ("sync", name), ("rename", from, to)."""
    log = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def name(path):
        return os.path.basename(os.fspath(path))

    def logged_fsync(descriptor):
        log.append(("sync", name(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def logging(function):
        def call(source, target, **more):
            log.append(("rename", name(source), name(target)))
            return function(source, target, **more)

        return call

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logging(replace))
    monkeypatch.setattr(os, "rename", logging(rename))
    return log


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")
def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_call_returns(tmp_path, calls):
    temporary = f".note.txt.{os.getpid()}.tmp"
    write_atomically(tmp_path / "note.txt", b"words")
    assert calls == [("sync", temporary), ("rename", temporary, "note.txt"), ("sync", tmp_path.name)]

    calls.clear()

    def fill(folder):
        (folder / "below").mkdir()
        (folder / "below" / "a").write_text("a")
        (folder / "b").write_text("b")

    write_folder_atomically(tmp_path / "new" / "made", fill)
    made = calls.index(("rename", ".made.tmp", "made"))
    assert {name for _, name in calls[:made]} >= {"a", "b", "below", ".made.tmp", tmp_path.name}
    assert calls[made + 1 :] == [("sync", "new")]


def test_left_overs_are_removed_and_a_folder_about_to_be_replaced_comes_back(tmp_path):
    for name in (".policy.tmp", ".policy.old", ".step-000002.old", "step-000002", "step-000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    (tmp_path / ".config.json.4711.tmp").write_text("half")
    for name in (".hidden", "mine.tmp", ".git"):
        (tmp_path / name).write_text("of the user")
    assert len(left_overs(tmp_path)) == 4
    clean_up(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"policy", "step-000001", "step-000002", ".hidden", "mine.tmp", ".git"}
    assert (tmp_path / "policy" / "content").read_text() == ".policy.old"  # nothing had taken its place
    assert (tmp_path / "step-000002" / "content").read_text() == "step-000002"  # the new one had
    clean_up(tmp_path / "absent")


def test_a_folder_that_is_being_removed_has_lost_its_name_first(tmp_path, monkeypatch):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "content").write_text("old")

    def killed(path, **more):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [".step-000001.tmp"]
    clean_up(tmp_path)
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from ebft.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_process_and_is_free_when_that_is_killed(tmp_path):
    pytest.importorskip("fcntl", reason="folders are locked where there is flock")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"{tmp_path} is in use by another process"), exclusive(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with exclusive(tmp_path):
        assert list(tmp_path.iterdir()) == []

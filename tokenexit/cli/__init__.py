"""The command line."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from tokenexit import __version__
from tokenexit.cli import train, use
from tokenexit.cli.options import err

app = typer.Typer(
    help="Taggers whose tokens exit early: train, calibrate, evaluate, tag.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # of the commands, too
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for _command in (
    *(train.adapt, train.train, train.self_sample, train.calibrate),
    *(use.evaluate, use.predict, train.demo, use.info),
):
    app.command()(_command)

# What a command may lack, and the extra that brings it.
_EXTRAS = {"datasets": "train", "accelerate": "train", "matplotlib": "plot"}


def _version(wanted: bool):
    if wanted:
        print(f"tokenexit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
):
    pass


def main():
    """Run the command line; a user's mistake is one line on stderr and a non-zero exit code."""
    _prepare_streams()
    try:
        with _signals_as_exceptions():
            code = app(standalone_mode=False)
            sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:  # as `| head` leaves
        code = 1
    except Exception as error:
        if hasattr(error, "show"):  # typer's own: a wrong option or argument
            error.show()
            sys.exit(error.exit_code)
        if os.environ.get("TOKENEXIT_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if (extra := _EXTRAS.get(getattr(error, "name", None))) and isinstance(error, ImportError):
            text += f"; expected it installed: pip install 'tokenexit[{extra}]'"
        known = isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError))
        kind = "" if known else f"{type(error).__name__}: "
        print(f"error: {kind}{text}", file=sys.stderr)
        code = 1
    if code == 130:
        err.print("interrupted")
    _drop_unwritten()
    sys.exit(code)


def _prepare_streams():
    """Text is UTF-8 whatever the locale; what is closed stays so for the files opened later."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:  # else the next file gets its number, and what is printed
                os.open(os.devnull, os.O_RDWR)
            if name != "stdin":
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _drop_unwritten():
    """What a full disk or a reader gone did not take is not tried again at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP clean up as ^C does, where they would kill: no files are left aside."""

    def stop(number, frame):
        for other in before:  # a second one would stop the cleaning up
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Results of `predict --resume`: what a run that was cut off wrote, and where the next goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenexit.files import check_same_record, only_one, remove_files, write_aside


@contextmanager
def partial_results(output: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """A file to append results to, which becomes `output` at the end and stays after an exception.

    It lies in the folder `OUTPUT.partial`, where `output` leads if it is a link, beside a record of
    what the results depend on. What else is in the folder stays.

    Args:
        record: JSON-ready.

    Raises:
        ValueError: `output` is no file; the results that are there depend on something else, or
            another process is at them.
    """
    output = output.resolve()  # where a link leads may be another file system
    if output.exists() and not output.is_file():
        raise ValueError(f"--resume: {output} is no file; expected one, or a new name")
    folder = output.with_name(f"{output.name}.partial")
    rows, about = folder / "rows", folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        if about.exists():
            check_same_record(folder, json.loads(about.read_text(encoding="utf-8")), record)
        else:
            rows.unlink(missing_ok=True)  # of nobody knows what
            with write_aside(about) as aside:
                aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        rows.touch()
        try:
            yield rows
        except BaseException:
            if not rows.stat().st_size:
                remove_files(folder, rows, about)
            raise
        with write_aside(output) as aside:
            os.replace(rows, aside)
        remove_files(folder, rows, about)


def skip_done(
    path: Path,
    rows: Iterator,
    is_last: Callable[[bytes], bool],
    is_of: Callable[[Sequence[bytes], Any], bool],
) -> int:
    """Read over the rows whose results are in a file; cut off a result that is not whole.

    Args:
        path: of the results, lines.
        rows: of the input, in its order.
        is_last: whether a line ends a result.
        is_of: whether the lines of a result are of that row.

    Returns:
        How many results there are.

    Raises:
        ValueError: a result that is not of its row.
    """
    done, place, result = 0, 0, []
    with open(path, "r+b") as file:
        for line in file:
            result.append(line)
            if not line.endswith(b"\n"):
                break
            if not is_last(line):
                continue
            row = next(rows, None)
            if row is None or not is_of(result, row):
                raise ValueError(
                    f"result {done + 1} in {path.parent} is not of that sentence of the input; "
                    "expected the input of before, or the folder removed to start anew"
                )
            done, place, result = done + 1, place + sum(map(len, result)), []
        file.truncate(place)
    return done

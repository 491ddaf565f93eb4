"""What a plan needs, in a folder small enough to travel to a machine without a network.

    FOLDER/encoders/NAME        in fp16, with the pieces of the vocabulary that the texts have
    FOLDER/sets/NAME            train, dev and test sentences, compressed
    FOLDER/wheels               pure Python that such a machine may lack

`python -m experiments run PLAN --texts FOLDER` takes encoders and sets from there.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from experiments import sources
from experiments.runs import Run
from tokenexit.files import write_folder_aside
from tokenexit.text.encoding import Window, encode

WHEELS = ("datasets", "dill", "multiprocess", "seqeval")
PYTHON = "3.12"  # of the machine that they are for


def pack(runs: Sequence[Run], folder: Path, texts: Path | None, wheels: bool = True) -> int:
    """Write all that the runs need; its size in bytes.

    Args:
        texts: see `sources.splits`.
        wheels: fetch those, too.

    Raises:
        ValueError: see `cut`.
    """
    with write_folder_aside(folder) as aside:
        found = {name: sources.splits(name, texts) for name in {run.data for run in runs}}
        for name, splits in found.items():
            target = aside / "sets" / name
            target.mkdir(parents=True)
            for field in dataclasses.fields(splits):
                table = getattr(splits, field.name).with_format("arrow")[:]
                pq.write_table(table, target / f"{field.name}.parquet", compression="zstd")
        for name in sorted({run.encoder for run in runs}):
            sentences = [
                words
                for used in sorted({run.data for run in runs if run.encoder == name})
                for part in dataclasses.astuple(found[used])
                for words in part["words"]
            ]
            cut(sources.encoder(name, texts), sentences, aside / "encoders" / name)
        if wheels:
            fetch_wheels(aside / "wheels")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cut(encoder: Path, sentences: Sequence[Sequence[str]], target: Path):
    """Save an encoder in fp16 with that part of its vocabulary only that the sentences need.

    Raises:
        ValueError: a vocabulary that is neither Unigram nor WordPiece; sentences that the rest of
            it cuts otherwise.
    """
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    whole = _windows(tokenizer, sentences)
    kept = {i for window in whole for i in window.input_ids} | set(tokenizer.all_special_ids)
    kept = sorted(kept)
    place = {old: new for new, old in enumerate(kept)}
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(_cut_core(core, place)))
    for window, other in zip(whole, _windows(tokenizer, sentences), strict=True):
        if [place[i] for i in window.input_ids] != other.input_ids:
            raise ValueError(
                f"sentence {window.sentence}, {sentences[window.sentence]!r:.80}, is cut otherwise "
                f"by {len(kept)} pieces; expected the same"
            )
    model = AutoModel.from_pretrained(encoder, dtype=torch.float16)
    weight = model.get_input_embeddings().weight.detach()[kept].clone()
    model.set_input_embeddings(nn.Embedding.from_pretrained(weight, freeze=False))
    model.config.vocab_size = len(kept)
    for name, value in model.config.to_dict().items():
        if name.endswith("_token_id") and value is not None:
            setattr(model.config, name, place.get(value))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def fetch_wheels(folder: Path):
    """Those of `WHEELS`, of the versions installed here."""
    for name in WHEELS:
        wanted = f"{name}=={metadata.version(name)}"
        pip = [sys.executable, "-m", "pip", "--quiet"]
        options = ["--only-binary=:all:", "--python-version", PYTHON, "--dest", str(folder)]
        done = subprocess.run([*pip, "download", "--no-deps", wanted, *options])
        if done.returncode:  # it has no wheel: one is made
            options = ["--no-deps", "--wheel-dir", str(folder)]
            subprocess.run([*pip, "wheel", wanted, *options], check=True)


def _windows(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sequence[str]]
) -> list[Window]:
    return encode(tokenizer, sentences, 512)


def _cut_core(core: dict, place: Collection[int]) -> dict:
    """The tokenizer's file with the pieces in `place` only, under their new ids."""
    model = core["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in place]
        model["unk_id"] = place[model["unk_id"]]
    elif model["type"] == "WordPiece":
        vocabulary = {old: piece for piece, old in model["vocab"].items()}
        model["vocab"] = {vocabulary[old]: new for old, new in place.items()}
    else:
        raise ValueError(f"got a {model['type']} vocabulary; expected Unigram or WordPiece")
    core["added_tokens"] = [
        {**token, "id": place[token["id"]]}
        for token in core["added_tokens"]
        if token["id"] in place
    ]
    after = core.get("post_processor") or {}
    for special in after.get("special_tokens", {}).values():
        special["ids"] = [place[i] for i in special["ids"]]
    for name in ("sep", "cls"):  # of BERT's and RoBERTa's
        if name in after:
            after[name][1] = place[after[name][1]]
    return core

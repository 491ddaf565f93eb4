"""How fast are exits on a CPU, beside every other way to run the same tagger there?

    PYTHONPATH=benchmarks python -m cpu          (make bench; --help for options)

Same weights, same sentences, same threads, all systems in alternation. A peer has a process of its
own, which stands still while others are timed. Peers get their inputs
tokenized, padded and sorted by length for nothing, in the batch size that suits them best; ours
gets a padded batch and packs it within the time measured. A peer whose logits are not Hugging
Face's gets no numbers, and the exit status is 1.

- BERT-base with random weights and imposed exits ("strong": 3.4 times fewer active token-layers,
  "extreme": 5.1 times), so that the times do not hang on what a model learned.
- The tagger of `make demo` with the exits it decides itself, and F1 beside every speed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import latency
import peers
import report
import texts
import torch
import transformers
from apart import Apart
from texts import Batch, Sentence

import tokenexit
from tokenexit import ExitPolicy, Tagger, TokenExitForTokenClassification, demo, demo_assets
from tokenexit.calibrate import calibrate, policy_grid
from tokenexit.files import cache_folder, write_aside
from tokenexit.flops import active_tokens, speedup
from tokenexit.text.data import read_sentences
from tokenexit.text.scoring import score

PROFILES = {"strong": 1 / 3.4, "extreme": 1 / 5.1}
BATCH_SIZES = (1, 2, 4, 8, 16)
CLOSE = 1e-3
ROUNDS, HEADLINE_ROUNDS = 5, 3
TEST_SENTENCES, DEV_SENTENCES, TUNED_SENTENCES = 1000, 1500, 32
SAMPLES = 128  # sentences from which ranges of bytes are taken
MAX_LOSS = 0.002  # of F1 on development data, for the real exits: on others it may be more
HEADLINES = ("Hugging Face sdpa", "ONNX Runtime", "ONNX Runtime int8", "OpenVINO int8")
PADDED_TOO = HEADLINES
FP32, NOT_PACKED = "tokenexit fp32", "tokenexit, weights not packed"
LONG_TEXTS = (report.CHINESE, "uniform 128", "uniform 512")
# Ways to leave: a batch to the arguments of the model's call.
Exits = Mapping[str, Callable[[Batch], dict]]


@dataclass(frozen=True)
class Case:
    """What is timed at once.

    Attributes:
        text: where the sentences are from.
        batch: how many of them are there at a time, to be run as each system likes.
        sentences: a multiple of batch.
    """

    text: str
    batch: int
    sentences: Sequence[Sentence]

    @property
    def headlines(self) -> bool:
        """Whether it gets the peers of `HEADLINES` only, to save time."""
        return self.batch in (8, 128) or self.text in LONG_TEXTS

    @property
    def ragged(self) -> bool:
        return len({len(s) for s in self.sentences}) > 1

    def facts(self) -> dict:
        lengths = [len(s) for s in self.sentences]
        return {
            "text": self.text,
            "batch": self.batch,
            "sentences": len(lengths),
            "tokens": sum(lengths),
            "longest": max(lengths),
        }


@dataclass
class Subject:
    """A tagger in all its forms.

    Attributes:
        theirs: Hugging Face's, the truth at full depth.
        ours: by dtype.
        exits: ours are timed with each; the first is full depth.
        cases: what to time it on.
        folder, failed: of `peers.export`.
        test: sentences and their words' labels to take F1 from, or None.
    """

    name: str
    theirs: transformers.BertForTokenClassification
    ours: dict[str, TokenExitForTokenClassification]
    exits: Exits
    cases: list[Case]
    folder: Path
    failed: dict[str, str]
    test: tuple[list[Sentence], list[list[str]]] | None = None


@dataclass(frozen=True)
class System:
    """Something to time: a tagger on the chunks of a case.

    Attributes:
        run: gives the outputs of all chunks.
        time_ms: milliseconds that they take, now.
        chunks: indices of the sentences of each.
        facts: for its row.
    """

    run: Callable[[], list]
    time_ms: Callable[[], float]
    chunks: list[list[int]]
    facts: dict


def split(lengths: Sequence[int], batch: int, size: int) -> list[list[int]]:
    """Sentences that come `batch` at a time, sorted by length within, in chunks of `size`."""
    chunks = []
    for start in range(0, len(lengths), batch):
        group = range(start, min(start + batch, len(lengths)))
        ordered = sorted(group, key=lambda i: lengths[i])
        chunks += [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return chunks


def best_size(sizes: Sequence[int], time_of: Callable[[int], float]) -> int:
    """The size with the least time, of two runs of each; of one of those far off."""
    if len(sizes) == 1:
        return sizes[0]
    time_of(sizes[0])  # what a peer does once at its first call
    first = {size: time_of(size) for size in sizes}
    near = [size for size in sizes if first[size] < 1.4 * min(first.values())]
    return min(near, key=lambda size: min(first[size], time_of(size)))


def peer_system(name: str, peer: Apart, sentences, batch: int, size: int) -> System:
    """A peer on sentences in chunks of a size."""
    chunks = split([len(s) for s in sentences], batch, size)
    inputs = [peer.prepare(texts.batch([sentences[i] for i in chunk])) for chunk in chunks]
    setting = "padded" if size >= batch else f"sorted, batches of {size}"
    facts = {"system": name, "dtype": peers.PEERS[name][0], "setting": setting, "size": size}
    return System(lambda: peer.run(inputs), lambda: peer.time_ms(inputs), chunks, facts)


def our_system(dtype: str, model, exits: str, arguments, sentences, batch: int) -> System:
    """Ours on sentences, with exits."""
    chunks = split([len(s) for s in sentences], batch, batch)
    calls = []
    for chunk in chunks:
        b = texts.batch([sentences[i] for i in chunk])
        inputs = {"attention_mask": b.attention_mask, "word_ids": b.word_ids, **arguments(b)}
        calls.append({"input_ids": b.input_ids, **inputs})
    name = "tokenexit" if dtype == "fp32" else f"tokenexit {dtype}"
    facts = {"system": name, "dtype": dtype, "setting": "packed", "exits": exits}

    def run():
        return [model(**call) for call in calls]

    return System(run, lambda: harness.time_ms(run), chunks, facts)


def per_sentence(chunks, outputs, sentences) -> list[torch.Tensor]:
    """Values of the real tokens of each sentence, from padded ones of each chunk."""
    result = [None] * len(sentences)
    for chunk, values in zip(chunks, outputs, strict=True):
        for index, row in zip(chunk, torch.as_tensor(values), strict=True):
            result[index] = row[: len(sentences[index])]
    return result


def compare(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict:
    """Largest difference of logits, and the share of tokens with the same best label."""
    got, expected = torch.cat(list(got)), torch.cat(list(expected))
    difference = float((got - expected).abs().max())
    same = float((got.argmax(-1) == expected.argmax(-1)).double().mean())
    return {"max_difference": round(difference, 7), "agreement": round(same, 4)}


class Bench:
    """Times subjects, writes rows as they come, and keeps what went wrong."""

    def __init__(self, budget_s: float, skip: Sequence[str], run: str, results: Path):
        self.budget_s, self.skip, self.run, self.results = budget_s, skip, run, results
        self.failures = []
        self.origin = harness.origin()

    def say(self, text: str):
        print(text, flush=True)

    def subject(self, subject: Subject):
        """All cases of a subject."""
        self.check_exits(subject)
        with contextlib.ExitStack() as stack:
            loaded = {
                name: stack.enter_context(Apart(name, subject.folder, subject.failed))
                for name in peers.PEERS
                if name not in self.skip
            }
            for name, peer in list(loaded.items()):
                try:
                    peer.wait()
                except peers.Unavailable as error:
                    self.say(f"{name} is left out: {error}")
                    del loaded[name]
            self.cases(subject, loaded)
        self.latency(subject)

    def cases(self, subject: Subject, loaded: dict[str, Apart]):
        """All cases of a subject, with the peers that are there."""
        sizes, f1 = {}, {}
        for case in subject.cases:
            rows = self.case(subject, case, loaded, sizes)
            if subject.test:
                for row in rows:
                    key = row["system"], row.get("exits")
                    if key not in f1:
                        f1[key] = self.f1(subject, loaded, *key, row.get("size", 32))
                    row["f1"] = f1[key]
            harness.write("cpu", rows, self.results)

    def latency(self, subject: Subject):
        """What one sentence of CoNLL waits for, at full depth and with exits of tokens."""
        cases = [case for case in subject.cases if case.text == report.CONLL]
        sentences = max((case.sentences for case in cases), key=len)
        exits = {name: e for name, e in subject.exits.items() if "sentence" not in name}
        facts = {"run": self.run, "model": subject.name, "text": report.CONLL}
        rows = [
            {**facts, **row}
            for row in latency.rows(
                subject.ours, exits, sentences, subject.folder, subject.failed, self.skip
            )
        ]
        harness.write("latency", rows, self.results)

    def case(self, subject: Subject, case: Case, loaded, sizes: dict) -> list[dict]:
        """Rows of one case; `sizes` remembers each peer's best batch size for a text."""
        sentences, batch = case.sentences, case.batch
        truth = self.truth(subject, sentences)
        systems, checks = [], []
        for name, peer in list(loaded.items()):
            if case.headlines and name not in HEADLINES:
                continue
            known = (name, case.text, min(batch, TUNED_SENTENCES))
            try:
                if known not in sizes:
                    sizes[known] = self.tune(name, peer, case)
                chosen = [sizes[known]]
                if name in PADDED_TOO and case.ragged and not case.headlines and chosen[0] < batch:
                    chosen.append(batch)
                for size in chosen:
                    system = peer_system(name, peer, sentences, batch, size)
                    logits = per_sentence(system.chunks, system.run(), sentences)
                    self.keep(system, compare(logits, truth), systems, checks, subject.name)
            except Exception as error:  # such as a compiler that is not there
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self.say(f"{name} is left out from here on: {reason}")
                del loaded[name]
        exact = {}
        for dtype, model in subject.ours.items():
            for exits, arguments in subject.exits.items():
                system = our_system(dtype, model, exits, arguments, sentences, batch)
                outputs = system.run()
                logits = per_sentence(system.chunks, [o.logits for o in outputs], sentences)
                # Exits in fp32 have no truth but the reference, see `check_exits`.
                check = {}
                if exits == "full depth" or dtype != "fp32":
                    check = compare(logits, truth if exits == "full depth" else exact[exits])
                exact.setdefault(exits, logits)
                saved = _saved(outputs, model.config)
                system = replace(system, facts={**system.facts, **saved})
                self.keep(system, check, systems, checks, subject.name)

        names = [f"{i}" for i in range(len(systems))]
        clocks = dict(zip(names, (s.time_ms for s in systems), strict=True))
        rounds = HEADLINE_ROUNDS if case.headlines else ROUNDS
        times = harness.alternate(clocks, rounds, self.budget_s, warm=True)  # by the checks
        full = {
            s.facts["dtype"]: times[i]
            for i, s in zip(names, systems, strict=True)
            if s.facts.get("exits") == "full depth"
        }
        rows = []
        for i, system, check in zip(names, systems, checks, strict=True):
            facts = system.facts
            row = {"run": self.run, "model": subject.name, **case.facts(), **facts}
            row |= harness.summary(times[i])
            row["tokens_per_s"] = round(row["tokens"] / row["median_ms"] * 1e3, 1)
            if "fp32" in full:
                row["ratio_to"] = "tokenexit, full depth"
                row["ratio"] = harness.ratio(full["fp32"], times[i])
            if "active_fraction" in facts and facts["dtype"] in full:
                own = harness.ratio(full[facts["dtype"]], times[i])
                row["eta"] = round(own * facts["active_fraction"], 3)
            row["times_ms"] = [round(t, 3) for t in times[i]]
            rows.append({**row, **check, **self.origin})
        best = ", ".join(
            f"{r['system']} {r.get('exits') or r['setting']} {r['tokens_per_s']:.0f}" for r in rows
        )
        self.say(f"{subject.name}, {case.text} x {batch}, tokens a second: {best}")
        return rows

    def keep(self, system: System, check: dict, systems: list, checks: list, model: str):
        """Take a system that computes what it should; note one that does not."""
        if system.facts["dtype"] == "fp32" and not check.get("max_difference", 0) < CLOSE:
            what = ", ".join(str(system.facts[k]) for k in ("system", "setting"))
            self.failures.append(
                f"{what} on {model}: logits differ by {check['max_difference']}; expected less "
                f"than {CLOSE}"
            )
            self.say(f"RED, no numbers: {self.failures[-1]}")
            return
        systems.append(system)
        checks.append(check)

    def tune(self, name: str, peer: Apart, case: Case) -> int:
        """A peer's best batch size, by time on a part of the case."""
        batch = min(case.batch, TUNED_SENTENCES)
        sentences = case.sentences[: max(batch, TUNED_SENTENCES // 2)]
        sizes = [s for s in BATCH_SIZES if s < batch] + [batch]
        if not case.ragged:
            sizes = sizes[-2:] + sizes[:1] if batch > 1 else sizes
        systems = {s: peer_system(name, peer, sentences, batch, s) for s in set(sizes)}
        return min(best_size(list(systems), lambda s: systems[s].time_ms()), case.batch)

    def truth(self, subject: Subject, sentences) -> list[torch.Tensor]:
        chunks = split([len(s) for s in sentences], len(sentences), 8)
        outputs = []
        for chunk in chunks:
            b = texts.batch([sentences[i] for i in chunk])
            outputs.append(subject.theirs(b.input_ids, b.attention_mask).logits)
        return per_sentence(chunks, outputs, sentences)

    def check_exits(self, subject: Subject):
        """Exits of ours against the plain-PyTorch reference; raises AssertionError."""
        model = subject.ours["fp32"]
        b = texts.batch(subject.cases[0].sentences[:4])
        layers = model.config.num_hidden_layers
        exits = texts.imposed_exits(b, layers, (1 + 1 / layers) / 2).clamp(min=1)
        inputs = {"attention_mask": b.attention_mask, "word_ids": b.word_ids}
        ours = model(b.input_ids, **inputs, exit_layers=exits)
        model.backend = "reference"
        expected = model(b.input_ids, **inputs, exit_layers=exits)
        model.backend = "auto"
        assert torch.equal(ours.exit_layers, expected.exit_layers)
        torch.testing.assert_close(ours.logits, expected.logits, atol=CLOSE, rtol=0)

    def f1(self, subject: Subject, loaded, name: str, exits: str | None, size: int) -> float:
        """F1 of a system on test data, from its own outputs."""
        sentences, gold = subject.test
        if exits is None:
            system = peer_system(name, loaded[name], sentences, len(sentences), size)
            outputs = system.run()
        else:
            dtype = "fp32" if name == "tokenexit" else name.removeprefix("tokenexit ")
            chunks = split([len(s) for s in sentences], len(sentences), 32)
            arguments = subject.exits[exits]
            by_length = [sentences[i] for chunk in chunks for i in chunk]
            system = our_system(dtype, subject.ours[dtype], exits, arguments, by_length, 32)
            outputs = [o.logits for o in system.run()]
            order = [i for chunk in chunks for i in chunk]
            system = replace(system, chunks=[[order[i] for i in c] for c in system.chunks])
        names = subject.theirs.config.id2label
        logits = per_sentence(system.chunks, outputs, sentences)
        return round(score(gold, word_labels(sentences, logits, names))["score"], 4)


def word_labels(
    sentences: Sequence[Sentence], logits: Sequence[torch.Tensor], names: Mapping[int, str]
) -> list[list[str]]:
    """The label of each word, by the logits of its first token."""
    labels = []
    for sentence, rows in zip(sentences, logits, strict=True):
        best, before = rows.argmax(-1).tolist(), [-1, *sentence.word_ids]
        firsts = [i for i, w in enumerate(sentence.word_ids) if w not in (-1, before[i])]
        labels.append([names[best[i]] for i in firsts])
    return labels


def _saved(outputs, config) -> dict:
    """What exits save, from the layers that tokens left at."""
    layers = config.num_hidden_layers
    active = torch.cat([active_tokens(o.exit_layers, layers) for o in outputs])
    tokens = torch.cat([(o.exit_layers > 0).sum(1) for o in outputs])
    fraction = float(active.sum() / (tokens.sum() * layers))
    return {
        "active_fraction": round(fraction, 4),
        "exit_rate": round(1 - float(active[:, -1].sum() / tokens.sum()), 4),
        "flops_speedup": round(speedup(active, tokens, config), 3),
    }


def imposed(num_layers: int) -> Exits:
    """Full depth and the profiles, at token level and, for the first, at sentence level."""
    exits: dict[str, Callable[[Batch], dict]] = {
        "full depth": lambda b: {"policy": ExitPolicy.never()}
    }

    def layers(fraction, level=lambda exits: exits):
        def arguments(b: Batch) -> dict:
            exits = level(texts.imposed_exits(b, num_layers, max(fraction, 1.1 / num_layers)))
            return {"exit_layers": exits.masked_fill(exits == 0, num_layers)}

        return arguments

    exits["sentence exit, strong"] = layers(PROFILES["strong"], texts.by_sentence)
    return exits | {f"token exit, {name}": layers(f) for name, f in PROFILES.items()}


def decided(**policies: ExitPolicy) -> Exits:
    """Full depth and exits by policies."""
    policies = {"full depth": ExitPolicy.never(), **policies}
    return {name.replace("_", " "): (lambda b, p=p: {"policy": p}) for name, p in policies.items()}


def forms(model: TokenExitForTokenClassification) -> dict[str, TokenExitForTokenClassification]:
    """Copies of a tagger: with weights packed ahead, in bf16 if the processor has it, in 8 bits."""
    with torch.inference_mode(False):  # in which weights could not be packed
        found = {"fp32": tokenexit.prepack(copy.deepcopy(model))}
    if "bf16" in harness.features():
        found["bf16"] = copy.deepcopy(model).to(torch.bfloat16)
    return found | {"int8": tokenexit.quantize(copy.deepcopy(model))}


def random_bert(
    quick: bool,
) -> tuple[
    transformers.BertForTokenClassification,
    transformers.PreTrainedTokenizerBase,
    list[Case],
    list[Sentence],
]:
    """BERT-base with random weights, a tokenizer of its vocabulary, cases, other sentences."""
    torch.manual_seed(0)
    shape = {"num_labels": 9}
    if quick:
        shape |= {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
        shape |= {"intermediate_size": 64, "vocab_size": 200}
    config = transformers.BertConfig(**shape)
    model = transformers.BertForTokenClassification(config).eval()
    vocab = config.vocab_size
    if quick:
        tokenizer = tiny_tokenizer(vocab)
        conll = chinese = texts.tokenized(tokenizer, _made_up(16)["words"])
        uniform = [Case("uniform 16", 1, texts.uniform(1, 16, vocab))]
        sizes = ((1, 2), (4, 8))
    else:
        assets = demo_assets.fetch()
        tokenizer = transformers.AutoTokenizer.from_pretrained(assets.encoder)
        conll = texts.tokenized(tokenizer, read_sentences(assets.conll / "test.txt")["words"])
        chinese = texts.newspaper(cache_folder(), vocab)
        uniform = [
            Case(f"uniform {length}", batch, texts.uniform(batch, length, vocab))
            for length, batch in ((32, 1), (128, 1), (128, 8), (512, 1))
        ]
        sizes = ((1, 16), (8, 16), (32, 32))
    cases = [Case(report.CONLL, b, texts.sample(conll, n)) for b, n in sizes]
    if not quick:
        cases.append(Case(report.CONLL, 128, texts.sample(conll, 128)))
    cases.append(Case(report.CHINESE, sizes[-1][0], texts.sample(chinese, sizes[-1][1])))
    samples = texts.sample(conll, SAMPLES, seed=1)
    return model, tokenizer, cases + uniform, samples


def bert_base(folder: Path, quick: bool) -> Subject:
    """BERT-base, random weights, imposed exits."""
    model, tokenizer, cases, samples = random_bert(quick)
    exits = imposed(model.config.num_hidden_layers)
    failed = peers.export(model, tokenizer, samples, folder)
    ours = forms(tokenexit.convert(model))
    return Subject("BERT-base", model, ours, exits, cases, folder, failed)


def tagger(folder: Path, quick: bool) -> Subject:
    """The tagger of `make demo`, with the exits that it decides itself."""
    tokenizer, model, exits, cases, samples, scored = demo_tagger(quick)
    theirs = tokenexit.to_hugging_face(model)
    failed = peers.export(theirs, tokenizer, texts.tokenized(tokenizer, samples), folder)
    return Subject(report.TAGGER, theirs, forms(model), exits, cases, folder, failed, scored)


def demo_tagger(quick: bool):
    """The tokenizer and the model of `make demo`, exits, cases, other sentences' words, and
    sentences with their labels to score it by."""
    if quick:
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer(200)
        labels = {"O": 0, "B-PER": 1, "I-PER": 2}
        config = transformers.BertConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=200,
            label2id=labels,
            id2label={i: name for name, i in labels.items()},
        )
        theirs = transformers.BertForTokenClassification(config).eval()
        model = tokenexit.convert(theirs, tokenizer)
        exits = decided(token_exit=ExitPolicy(threshold=0.99, window=0))
        test, sizes = _made_up(16), ((1, 8), (4, 8), (8, 8))
        samples = test["words"]
    else:
        assets = demo_assets.fetch()
        trained, policies = trained_tagger(cache_folder() / "bench-tagger", assets)
        tokenizer, model = trained.tokenizer, trained.model
        exits = decided(**policies)
        test = read_sentences(assets.conll / "test.txt").shuffle(0).take(TEST_SENTENCES).to_dict()
        sizes = ((1, 32), (8, 32), (32, 64), (128, 128))
        samples = read_sentences(assets.conll / "train.txt").shuffle(0).take(SAMPLES)["words"]
    sentences = texts.tokenized(tokenizer, test["words"])
    cases = [Case(report.CONLL, b, sentences[:n]) for b, n in sizes]
    return tokenizer, model, exits, cases, samples, (sentences, test["labels"])


def trained_tagger(folder: Path, assets) -> tuple[Tagger, dict[str, ExitPolicy]]:
    """The demo's tagger, trained on first use; its fastest policies within `MAX_LOSS` of F1."""
    if not (folder / "results.json").exists():
        print("training the tagger of `make demo`, once", flush=True)
        demo.run(folder, neighbor_heads=True)  # which plain transformers can run at full depth
    trained = Tagger.from_pretrained(folder)
    file = folder / "bench-policies.json"
    if not file.exists():
        dev = read_sentences(assets.conll / "valid.txt").take(DEV_SENTENCES)
        chosen = {}
        for level in ("sentence", "token"):
            grid = [p for p in policy_grid() if p.level == level]
            point = calibrate(trained, dev, max_loss=MAX_LOSS, policies=grid).chosen
            chosen[f"{level}_exit"] = point.policy.to_dict()
        with write_aside(file) as path:
            path.write_text(json.dumps(chosen, indent=1))
    saved = json.loads(file.read_text())
    return trained, {name: ExitPolicy.from_dict(policy) for name, policy in saved.items()}


def tiny_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Words w5, w6, ..., a token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = [*special, *(f"w{i}" for i in range(len(special), vocab_size))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=marks)
    kinds = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **dict(zip(kinds, special, strict=True))
    )


def _made_up(count: int) -> dict[str, list[list[str]]]:
    words = [[f"w{5 + (i * j) % 190}" for j in range(2 + i % 9)] for i in range(count)]
    return {"words": words, "labels": [["B-PER", "I-PER", *["O"] * (len(w) - 2)] for w in words]}


def memory(subject: Subject, run: str, skip: Sequence[str]) -> list[dict]:
    """Peak memory of each system on a batch of the most sentences of a case, by themselves."""
    case = max((c for c in subject.cases if c.batch <= 32), key=lambda c: c.batch)
    for dtype, model in subject.ours.items():
        model.save_pretrained(subject.folder / f"tokenexit {dtype}")
    exits = [
        (name, arguments(texts.batch(case.sentences[: case.batch])))
        for name, arguments in subject.exits.items()
    ]
    torch.save(
        (texts.batch(case.sentences[: case.batch]), dict(exits)), subject.folder / "batch.pt"
    )
    rows = []
    wanted = [(name, None) for name in HEADLINES if name not in skip]
    wanted += [(f"tokenexit {dtype}", name) for dtype in subject.ours for name, _ in exits]
    wanted.append((NOT_PACKED, next(iter(subject.exits))))
    for name, chosen in wanted:
        command = [sys.executable, "-m", "cpu", "--memory-of", name, str(chosen)]
        command += ["--folder", str(subject.folder), "--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"no memory of {name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        facts = {"run": run, "model": subject.name, **case.facts()}
        facts |= {"system": name.removesuffix(" fp32"), "setting": "one padded batch given"}
        facts |= {"exits": chosen} if chosen else {}
        rows.append({**facts, "peak_mib": int(done.stdout.split()[-1]), **harness.origin()})
    return rows


@torch.inference_mode()
def memory_of(name: str, exits: str, folder: Path) -> int:
    """MiB that this process holds at most while a system runs, its weights among them."""
    b, arguments = torch.load(folder / "batch.pt", weights_only=False)
    if name in peers.PEERS:
        peer = peers.load(name, folder, {})
        inputs = peer.prepare(b)
        _forget_peak()
        peer.run(inputs)
    else:
        with torch.inference_mode(False):  # in which weights could not be packed
            where = folder / (FP32 if name == NOT_PACKED else name)
            model = TokenExitForTokenClassification.from_pretrained(where).eval()
            if name == FP32:
                tokenexit.prepack(model)  # as it is timed
        _forget_peak()
        model(b.input_ids, b.attention_mask, word_ids=b.word_ids, **arguments[exits])
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def _forget_peak():
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write rows, plot and tables; 1 if a system computed something else."""
    root = Path(__file__).parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, made-up text")
    parser.add_argument("--memory", action="store_true", help="peak memory too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=2, help="seconds a case may take")
    parser.add_argument("--skip", nargs="*", default=[], choices=peers.PEERS)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="a folder")
    parser.add_argument("--documents", type=Path, default=root / "docs", help="a folder")
    parser.add_argument("--report", action="store_true", help="only the tables, from old rows")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_of(*args.memory_of, args.folder))
        return 0

    failures = []
    if not args.report:
        budget = 0 if args.quick else args.budget
        bench = Bench(budget, args.skip, harness.origin()["date"], args.results)
        for make in (bert_base, tagger):
            with tempfile.TemporaryDirectory() as folder:
                subject = make(Path(folder), args.quick)
                bench.subject(subject)
                if args.memory and make is bert_base:
                    rows = memory(subject, bench.run, args.skip)
                    harness.write("cpu", rows, args.results)
        failures = bench.failures
    runs = report.latest(harness.read("cpu", args.results))
    others = [report.latest(harness.read(name, args.results)) for name in ("roofline", "latency")]
    for kind, rows in runs.items():
        name = f"cpu-{report.slug(rows[0])}"
        report.plot(rows, args.documents / f"{name}.png")
        harness.page(
            args.documents / f"{name}.md",
            f"Speed on a CPU: {kind}",
            report.tables(rows, *(other.get(kind, ()) for other in others)),
            args.documents / f"{name}.png",
        )
    harness.between(args.documents / "cpu.md", "cpu table", report.overview(runs))
    for failure in failures:
        print(f"RED: {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

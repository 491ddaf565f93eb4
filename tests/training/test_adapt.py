"""adapt: the tagger stays what it was, its heads learn from it, its folder is not touched."""

import json
import re
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_models import ALL_FAMILIES, random_classifier
from test_cli import call
from test_dial import WORDS, sentences
from test_trainer import NAMES, data
from transformers import pipeline

import tokenexit
from tokenexit import ExitPolicy, Tagger
from tokenexit.training import adapt as tuning
from tokenexit.training.adapt import adapt
from tokenexit.training.heads import distill_heads

ROOT = Path(__file__).parents[2]
BOUND = {"max_disagreement": 0.3, "timing_runs": 0}


def theirs(tokenizer, family="bert", **changes):
    return random_classifier(family, vocab_size=len(tokenizer), **changes)


@torch.no_grad()
def states_of(model, tokenizer, texts, near=False):
    """Of words' first pieces: the states of all layers, and the last logits, by transformers.

    Args:
        near: with the states of the tokens before and after behind them, or zeros.
    """
    states, logits = [], []
    for words in texts:
        encoded = tokenizer([words], is_split_into_words=True, return_tensors="pt")
        ids = encoded.word_ids(0)
        firsts = [ids.index(i) for i in range(len(words))]
        out = model(**encoded, output_hidden_states=True)
        its = torch.stack(out.hidden_states[1:])[:, 0]
        if near:
            padded = F.pad(its, (0, 0, 1, 1))
            its = torch.cat([its, padded[:, :-2], padded[:, 2:]], -1)
        states.append(its[:, firsts])
        logits.append(out.logits[0, firsts])
    return torch.cat(states, 1), torch.cat(logits)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_model_is_what_it_was(family, tiny_tokenizer, tmp_path):
    """Weights and full depth to the bit; only heads below the last are new. It loads and tags."""
    tokenizer = tiny_tokenizer()
    hf = theirs(tokenizer, family)
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    converted = tokenexit.convert(hf, tokenizer)
    timed = family == "distilbert"  # which takes no token types, and the tokenizer gives some
    result = adapt(hf, sentences(80), tokenizer, **{**BOUND, "timing_runs": int(timed)})
    assert (result.original_wall is not None) == timed
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())
    model, old = result.tagger.model, converted.state_dict()
    changed = {name for name, v in model.state_dict().items() if not torch.equal(v, old[name])}
    heads = {f"encoder.heads.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert changed == heads and model.untrained_heads() == []
    some = sentences(9, seed=3)
    batch = tokenizer(some, is_split_into_words=True, return_tensors="pt", padding=True)
    with torch.no_grad():
        full = [x(**batch, policy=ExitPolicy.never()).logits for x in (model, converted)]
        wanted = hf(**batch).logits
    assert torch.equal(*full)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(full[0][real], wanted[real], atol=1e-4, rtol=1e-4)
    back = tokenexit.to_hugging_face(model).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in back.items())

    result.tagger.save_pretrained(tmp_path)
    again = Tagger.from_pretrained(tmp_path)
    assert again.model.dial == result.calibration.dial
    for speed in ("full", "promised", "fastest"):
        assert again.tag(some, speed=speed) == result.tagger.tag(some, speed=speed)
    texts = [" ".join(words) + "." for words in some]
    assert [x.words for x in again.tag(texts, speed="fastest")] == [[*x, "."] for x in some]
    names = hf.config.id2label
    tagged = result.tagger.tag(some, speed="full")
    for words, its in zip(some, tagged, strict=True):
        _, logits = states_of(hf, tokenizer, [words])
        assert its.labels == [names[i] for i in logits.argmax(-1).tolist()]


@pytest.mark.parametrize("near", [False, True, "all"], ids=["", "hearing", "all hearing"])
def test_heads_are_as_good_as_linear_ones_get(near, tiny_tokenizer):
    """Beside softmax regressions by another optimizer on states that transformers gives."""
    tokenizer = tiny_tokenizer()
    hf, texts = theirs(tokenizer), sentences(150)
    tagger = Tagger(tokenexit.convert(hf, tokenizer, neighbor_heads=near).eval(), tokenizer)
    distill_heads(tagger, tagger.windows(texts))
    states, logits = states_of(hf, tokenizer, texts, near)
    wanted = logits.softmax(-1)

    def loss(layer, weight, bias):
        logs = F.log_softmax(states[layer] @ weight.T + bias, -1)
        return -(wanted * logs).sum(-1).mean()

    for layer in range(3):
        weight = torch.zeros(5, states.shape[-1], requires_grad=True)
        bias = torch.zeros(5, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure(layer=layer, weight=weight, bias=bias, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(layer, weight, bias)
            value.backward()
            return value

        optimizer.step(closure)
        head = tagger.model.exit_heads[layer]
        its = torch.cat(head.weight.split(5), 1), head.bias[:5]
        with torch.no_grad():
            best, ours = loss(layer, weight, bias), loss(layer, *its)
            nothing = -(wanted * wanted.mean(0).log()).sum(-1).mean()
        assert best - 1e-3 < ours < best + 0.1 * (nothing - best), layer
        for _, output, (firsts,) in tagger.run(
            tagger.windows(texts[:1]), ExitPolicy.never(), output_layer_logits=True
        ):
            expected = (states[layer] @ its[0].T + its[1])[: len(firsts)]
            torch.testing.assert_close(output.layer_logits[layer, 0, firsts], expected)


def test_states_that_do_not_fit_are_left_out(tiny_tokenizer, monkeypatch):
    tokenizer = tiny_tokenizer()
    tagger = Tagger(tokenexit.convert(theirs(tokenizer), tokenizer), tokenizer)
    windows, seen = tagger.windows([["john"] * 9] * 4000), []
    run = tagger.run

    def recorded(windows, *args, **kwargs):
        seen.append(len(windows))
        return run(windows, *args, **kwargs)

    monkeypatch.setattr(tagger, "run", recorded)
    distill_heads(tagger, windows, memory_mib=1, epochs=1)
    assert seen == [2**20 // (2 * 3 * 32) // 9]
    with pytest.raises(ValueError, match="the texts have no words"):
        distill_heads(tagger, tagger.windows([[]]))
    with pytest.raises(ValueError, match="epochs is 0"):
        distill_heads(tagger, windows, epochs=0)
    one = Tagger(tokenexit.convert(theirs(tokenizer, layers=1), tokenizer), tokenizer)
    with pytest.raises(ValueError, match="got a model of one layer"):
        distill_heads(one, windows)


@pytest.mark.parametrize("set_default", [torch.set_default_dtype, torch.set_default_device])
def test_defaults_of_the_user_change_nothing(tiny_tokenizer, set_default):
    tokenizer = tiny_tokenizer()
    hf, texts = theirs(tokenizer), sentences(80)
    expected = adapt(hf, texts, tokenizer, **BOUND)
    set_default(torch.float64 if set_default is torch.set_default_dtype else "meta")
    try:
        got = adapt(hf, texts, tokenizer, **BOUND)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for value, other in zip(*(x.tagger.model.parameters() for x in (got, expected)), strict=True):
        assert torch.equal(value, other)
    assert got.calibration.dial == expected.calibration.dial


def test_adapts_in_a_mode_without_gradients(tiny_tokenizer):
    tokenizer, found = tiny_tokenizer(), []
    hf = theirs(tokenizer)
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            found.append(adapt(hf, sentences(80), tokenizer, **BOUND).tagger.model)
    for model in found[1:]:
        for value, expected in zip(model.parameters(), found[0].parameters(), strict=True):
            assert torch.equal(value, expected) and not value.is_inference()


@pytest.fixture(scope="module")
def trained(tiny_tokenizer, tmp_path_factory):
    """The folder of a Hugging Face tagger that has learnt labels which the words alone tell."""
    tokenizer, folder = tiny_tokenizer(), tmp_path_factory.mktemp("hf")
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    hf = theirs(tokenizer, initializer_range=0.1, **names).train()
    optimizer, rows = torch.optim.AdamW(hf.parameters(), 3e-3), data(256)
    for start in range(0, 4 * 256, 8):
        batch = rows[start % 256 : start % 256 + 8]
        encoded = tokenizer(
            batch["words"], is_split_into_words=True, return_tensors="pt", padding=True
        )
        labels = torch.full_like(encoded["input_ids"], -100)
        for row, its_labels in enumerate(batch["labels"]):
            ids = encoded.word_ids(row)
            for word, label in enumerate(its_labels):
                labels[row, ids.index(word)] = NAMES.index(label)
        hf(**encoded, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hf.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    return folder / "hf"


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*")}


def test_a_folder_and_texts_to_a_faster_tagger(trained, tmp_path):
    before, seen = contents(trained), []
    result = adapt(
        trained,
        [" ".join(words) for words in sentences(400)],
        max_disagreement=0.05,
        timing_runs=1,
        annotated=data(40, seed=5),
        progress=lambda *step: seen.append(step),
    )
    assert contents(trained) == before
    dial, model = result.calibration.dial, result.tagger.model
    assert dial.promised >= 1 and model.policy == dial.at("promised").policy
    assert dial.at("promised").speedup > 1.2 and dial.at("promised").disagreement < 0.05
    assert result.metric == "entity_f1" and len(result.scores) == len(dial.speeds)
    assert len(model.config.temperatures) == 4 and min(model.config.temperatures) > 0
    assert min(result.scores[: dial.promised + 1]) > 0.9
    assert {"read the texts", "train the heads", "test the path", "score"} <= {s[0] for s in seen}
    result.tagger.save_pretrained(tmp_path / "out")
    again = Tagger.from_pretrained(tmp_path / "out", speed="promised")
    assert again.model.dial == dial
    assert again.tag(sentences(5)) == result.tagger.tag(sentences(5))
    assert result.to_dict()["scores"] == result.scores


def test_tuning_is_held_against_the_model_of_before(trained):
    texts = sentences(300)
    result = adapt(trained, texts, tune=True, epochs=1, max_disagreement=0.2, timing_runs=0)
    before = tokenexit.TokenExitForTokenClassification.from_pretrained(trained)
    old = Tagger(before, result.tagger.tokenizer)
    assert not torch.equal(
        before.embeddings.word.weight, result.tagger.model.embeddings.word.weight
    )
    order = torch.randperm(300, generator=torch.Generator().manual_seed(42)).tolist()
    tested = [texts[i] for i in order][:150]
    for speed in result.calibration.dial.speeds:
        pairs = zip(
            result.tagger.tag(tested, speed.policy),
            old.tag(tested, ExitPolicy.never()),
            strict=True,
        )
        loss = [
            np.mean([a != b for a, b in zip(x.labels, y.labels, strict=True)]) for x, y in pairs
        ]
        assert speed.disagreement == pytest.approx(np.mean(loss))


def test_eight_bits_are_held_against_the_model_of_before(trained, tmp_path):
    with torch.inference_mode():  # as a caller may be in; what is to be trained is made outside
        result = adapt(trained, sentences(200), int8=True, per_type=["PER"], **BOUND)
    dial, model = result.calibration.dial, result.tagger.model
    assert dial.dtype == "int8" and model.config.int8
    assert (dial.reference, dial.per_type) == ("the original", ("PER",))
    assert dial.speeds[0].bound > 0  # even of full depth, which is not to the bit what it was
    result.tagger.save_pretrained(tmp_path)
    again = Tagger.from_pretrained(tmp_path, speed="promised")
    assert again.tag(sentences(5)) == result.tagger.tag(sentences(5), speed="promised")


def test_what_can_not_be_done_is_told_before_the_work(trained, tiny_tokenizer, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr("tokenexit.training.adapt.distill_heads", work)
    with pytest.raises(ValueError, match="too few sentences with a word of PER"):
        adapt(trained, [["the", "red"]] * 200, per_type=["PER"], **BOUND)
    with pytest.raises(ValueError, match="timing_runs is -1"):
        adapt(trained, sentences(80), **{**BOUND, "timing_runs": -1})
    with pytest.raises(TypeError, match="sentence 0 is {'words': .*; expected a list of words"):
        adapt(trained, data(80), **BOUND)
    with pytest.raises(ValueError, match="epochs is 0; expected more than 0"):
        adapt(trained, sentences(80), tune=True, epochs=0, **BOUND)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="expected a multiple of 4 for int8"):
        hf = theirs(tokenizer, intermediate_size=66)
        adapt(hf, sentences(80), tokenizer, int8=True, **BOUND)
    monkeypatch.setattr("tokenexit.training.adapt.load_tokenizer", work)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="datasets"):
        adapt(trained, sentences(80), tune=True, **BOUND)


@pytest.mark.parametrize(
    "more", [{"int8": True}, {"tune": True, "epochs": 0.1}], ids=["int8", "tune"]
)
def test_what_was_saved_in_16_bits_goes_on_in_fp32(tiny_tokenizer, tmp_path, more):
    tokenizer = tiny_tokenizer()
    theirs(tokenizer).half().save_pretrained(tmp_path)
    found = adapt(tmp_path, sentences(80), tokenizer, **BOUND, **more)
    assert found.tagger.model.dtype == torch.float32
    assert found.calibration.dial.dtype == ("int8" if "int8" in more else "float32")
    kept = adapt(tmp_path, sentences(80), tokenizer, **BOUND)
    assert kept.tagger.model.dtype == torch.float16


def test_tuning_goes_on_after_a_kill(trained, tmp_path):
    def run(folder, resume=False, kill=None):
        def progress(what, done, total):
            if what == "tune" and done == kill:
                raise KeyboardInterrupt

        result = adapt(
            trained, sentences(200), tune=True, epochs=2, **BOUND,
            checkpoints=tmp_path / folder, resume=resume, progress=progress,
        )  # fmt: skip
        return result.tagger.model.state_dict()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", kill=10)
    with pytest.raises(ValueError, match="killed has a run already; expected resume"):
        run("killed")
    resumed = run("killed", resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    with pytest.raises(ValueError, match="got resume, but no complete checkpoint is in .*nowhere"):
        run("nowhere", resume=True)


def test_it_is_done_on_the_device_that_is_asked_for(tiny_tokenizer, monkeypatch):
    moved, tokenizer = [], tiny_tokenizer()
    cls = tokenexit.TokenExitForTokenClassification
    to = cls.to
    monkeypatch.setattr(cls, "to", lambda self, *args: (moved.append(args), to(self, *args))[1])
    adapt(theirs(tokenizer), sentences(80), tokenizer, device="cpu", **BOUND)
    assert ("cpu",) in moved
    moved.clear()
    adapt(theirs(tokenizer), sentences(80), tokenizer, **BOUND)
    assert ("cpu",) not in moved


def test_the_encoder_is_trained_where_it_is_and_stays_there(tiny_tokenizer, monkeypatch):
    """The Trainer takes a GPU unless it is told not to, and leaves the model on it."""
    asked, tokenizer, made = [], tiny_tokenizer(), tuning.training_arguments

    def arguments(*args, **settings):
        asked.append(settings["use_cpu"])
        return made(*args, **settings)

    def train(self, *args, **kwargs):
        self.model.to("meta")  # as if that were the GPU

    monkeypatch.setattr(tuning, "training_arguments", arguments)
    monkeypatch.setattr(tuning.ExitTrainer, "train", train)
    with pytest.raises(
        NotImplementedError, match="Cannot copy out of meta tensor"
    ):  # on the way back
        adapt(theirs(tokenizer), sentences(80), tokenizer, tune=True, epochs=1, **BOUND)
    assert asked == [True]


def test_what_can_not_be_adapted(tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    hf = theirs(tokenizer)
    with pytest.raises(ValueError, match=r"got 80 texts with words; expected at least (\d+)"):
        adapt(hf, [*sentences(80), []], tokenizer)  # of which a fifth is to be learnt from
    with pytest.raises(TypeError, match="without its tokenizer"):
        adapt(hf, sentences(80))
    with pytest.raises(ValueError, match="confidence is 1"):
        adapt(hf, sentences(80), tokenizer, confidence=1)
    with pytest.raises(ValueError, match="neighbor_heads is 'all'; expected True or False"):
        adapt(hf, sentences(80), tokenizer, neighbor_heads="all")
    for name, value, other in (
        ("epochs", 3, "tune"),
        ("checkpoints", tmp_path / "c", "tune"),
        ("metric", "f1", "annotated"),
    ):
        with pytest.raises(ValueError, match=f"got {name} without {other}"):
            adapt(hf, sentences(80), tokenizer, **{name: value})
    for name, value in (("max_disagreement", "x"), ("confidence", None), ("max_disagreement", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; expected a number between"):
            adapt(hf, sentences(80), tokenizer, **{name: value})
    with pytest.raises(ValueError, match="memory_mib is 0; expected 1 or more"):
        adapt(hf, sentences(80), tokenizer, memory_mib=0)
    hf.bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no trained classifier; expected a token classifier"):
        adapt(str(tmp_path), sentences(80), **BOUND)


def test_texts_are_split_as_the_tokenizer_does(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    hf = theirs(tokenizer)
    words = [[*words, "."] for words in sentences(80)]
    texts = [" ".join(its[:-1]) + "." for its in words]
    both = [adapt(hf, given, tokenizer, **BOUND) for given in (words, texts)]
    first, second = (result.tagger.model.state_dict() for result in both)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert both[0].calibration.dial == both[1].calibration.dial
    assert set(WORDS) & set(both[0].tagger.split(texts)[0])


def blocks(page):
    """The commands and the Python of a page, in their order."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL)


class FastAPI:
    """A stand-in that keeps what is served by its path."""

    def __init__(self):
        self.served = {}

    def post(self, path):
        return lambda function: self.served.setdefault(path, function)


def test_the_docs_run(trained, tmp_path, monkeypatch, capsys):
    """Tutorial, adapting, speeds, serving: as written, with a small tagger and made-up text."""
    (tmp_path / "my-tagger").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        sys.modules, "fastapi", SimpleNamespace(FastAPI=FastAPI, HTTPException=SystemError)
    )
    texts = [" ".join(words) + "." for words in sentences(700)]
    for name in ("texts.txt", "news.txt"):
        Path(name).write_text("\n".join(texts))
    before, ran = contents(trained), []
    for page in ("tutorial.md", "speeds.md", "serve.md", "adapt.md"):
        names = {"tokenexit": tokenexit, "texts": texts if page == "adapt.md" else texts[:3]}
        if page == "serve.md":
            names["tagger"] = Tagger.from_pretrained("fast-tagger")
        for kind, block in blocks(page):
            ran.append((page, kind))
            if kind == "python":
                exec(block, names)
                continue
            for line in block.splitlines():
                if page != "adapt.md":  # whose command is that of the tutorial
                    code, out, err = call(capsys, *shlex.split(line)[1:])
                    assert code == 0, err
        if page == "tutorial.md":
            rows = [json.loads(x) for x in Path("entities.jsonl").read_text().splitlines()]
            assert [row["text"] for row in rows] == texts and "spans" in rows[0]
            hf = pipeline("token-classification", str(trained), ignore_labels=[])
            words = {(x["start"], x["end"]): x["entity"] for x in hf(texts[0])}
            (full,) = names["full"][:1]
            assert all(
                words[at] == x
                for at, x in zip(full.offsets, full.labels, strict=True)
                if at in words
            )
            assert 0 <= sum(names["changed"]) < 0.02 * len(names["changed"])
        if page == "serve.md":
            served = names["app"].served
            served["/speed"]("full")
            with pytest.raises(SystemError, match="422, 'speed is 99; expected at most"):
                served["/speed"]("99")
            assert names["tagger"].speed == "full"
            assert served["/tag"](texts[0]) == names["tagger"].tag(texts[:1])[0].spans
            assert len(names["tagged"].words) == 6
    assert len(ran) == 11 and contents(trained) == before
    assert len(names["result"].calibration.dial.speeds) > 1

"""How often a promise fails on real text that nothing was chosen by, over many random splits.

`PYTHONPATH=benchmarks python -m promised` fine-tunes MiniLM on CoNLL-2003 with plain transformers,
adapts it by other sentences without their labels, and runs each step of the path that this finds,
with real exits, on sentences that neither has seen. Each split of these tests the path on some of
them, as calibration does, and holds what is promised against what the rest loses. No times are
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
import torch
import transformers
from datasets import Dataset

import tokenexit
from tokenexit import Speed, Tagger, demo_assets
from tokenexit.evaluate import check_annotated, tag_windows
from tokenexit.files import cache_folder
from tokenexit.promise import fixed_sequence, holds
from tokenexit.text.data import label_names, read_sentences
from tokenexit.text.scoring import score

SEED = 0
# Sentences: for the tagger, for adapt, to split, of the official test set.
TRAINED, TEXTS, KEPT, LATER = 2000, 2000, 6000, 2000
SPLITS, CONFIDENCE = 1000, 0.9
BOUNDS, TESTED = (0.005, 0.01, 0.02), (500, 1000, 3000)
PAGE = Path(__file__).parents[1] / "docs" / "promise.md"


@dataclass(frozen=True)
class Step:
    """A step of a path, and what it gave.

    Attributes:
        speed: of the dial, measured on the sentences that are split.
        losses: of each of them, the share of words whose label is not that of full depth.
        later: the same of text of a later time.
        score: entity F1 on the sentences that are split.
    """

    speed: Speed
    losses: np.ndarray
    later: np.ndarray
    score: float


def fine_tune(folder: Path, encoder: Path, data: Dataset, seed: int = SEED, epochs: int = 3):
    """A tagger as users have them: an encoder, a classifier on top, the Trainer of transformers."""
    names = label_names(data)
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        encoder, id2label=dict(enumerate(names)), label2id={x: i for i, x in enumerate(names)}
    )

    def row(sentence: Mapping) -> dict:
        encoded = tokenizer(sentence["words"], is_split_into_words=True, truncation=True)
        ids = [None, *encoded.word_ids()]
        labels = [
            -100 if new is None or new == old else names.index(sentence["labels"][new])
            for old, new in zip(ids, ids[1:], strict=False)
        ]
        return {**encoded, "labels": labels}

    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder / "checkpoints"),
            num_train_epochs=epochs,
            learning_rate=2e-4,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to=[],
            seed=seed,
        ),
        transformers.DataCollatorForTokenClassification(tokenizer),
        data.map(row, remove_columns=data.column_names),
    )
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_path(
    tagger: Tagger, path: Sequence[Speed], kept: Dataset, later: Sequence[Sequence[str]]
) -> list[Step]:
    """Each step of a path on sentences to split, and on later text, by real exits."""
    metric = check_annotated(tagger, kept)
    texts = [tagger.windows(words) for words in (kept["words"], later)]
    steps, whole = [], None
    for speed in path:
        outcomes = [tag_windows(tagger, windows, speed.policy) for windows in texts]
        whole = whole or [outcome.labels for outcome in outcomes]  # full depth is the first step
        losses = [
            np.array(
                [np.mean(np.array(a) != np.array(b)) for a, b in zip(x.labels, y, strict=True)]
            )
            for x, y in zip(outcomes, whole, strict=True)
        ]
        exits = [layer for sentence in outcomes[0].exits for layer in sentence]
        measured = Speed(
            speed.policy, outcomes[0].speedup, float(losses[0].mean()), 1.0, float(np.mean(exits))
        )
        scores = score(list(kept["labels"]), outcomes[0].labels, metric)
        steps.append(Step(measured, *losses, scores["score"]))
        print(f"{speed.policy}: {measured.speedup:.2f}x, {measured.disagreement:.3%}", flush=True)
    return steps


def split(
    steps: Sequence[Step], bound: float, tested: int, splits: int = SPLITS, seed: int = SEED
) -> dict:
    """What promises of a bound come to, tested on so many sentences, over random splits.

    Returns:
        Shares of the splits: `failed`, a promised step loses at least the bound on the sentences
        left over; `failed_later`, on text of a later time; `nothing`, no exits are promised;
        `failed_untested`, the last step whose mean is below the bound loses more than that on those
        left over. Means over splits, of the fastest step promised: `speedup` in multiply-adds,
        `mean_exit_layer`, `disagreement` on those left over, `score`.
    """
    losses = np.stack([step.losses for step in steps])
    later = np.array([step.later.mean() for step in steps])
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = rng.permutation(losses.shape[1])
        known, fresh = losses[:, order[:tested]], losses[:, order[tested:]].mean(1)
        passed = max(1, fixed_sequence(known, bound, CONFIDENCE))  # full depth by definition
        below = np.flatnonzero(known.mean(1) < bound)[-1]
        last = steps[passed - 1]
        found.append(
            {
                "failed": (fresh[:passed] >= bound).any(),
                "failed_later": (later[:passed] >= bound).any(),
                "nothing": passed == 1,
                "failed_untested": fresh[below] >= bound,
                "speedup": last.speed.speedup,
                "mean_exit_layer": last.speed.mean_exit_layer,
                "disagreement": fresh[passed - 1],
                "score": last.score,
            }
        )
    return {name: round(float(np.mean([x[name] for x in found])), 5) for name in found[0]}


def at_the_edge(
    steps: Sequence[Step], tested: int, draws: int = SPLITS, seed: int = SEED
) -> dict[str, float]:
    """How often a bound that a step just does not keep is said to be kept: the worst that can be.

    The bound is what the step loses on all sentences, of which so many are drawn with replacement:
    then that is the expected loss.

    Returns:
        Over the steps that lose 0.2 to 5 %: the largest share of `passed` draws, their mean, and
        the number of `steps`.
    """
    rng, shares = np.random.default_rng(seed), []
    for step in steps:
        bound = step.losses.mean()
        if 0.002 <= bound <= 0.05:
            drawn = (rng.choice(step.losses, tested) for _ in range(draws))
            shares.append(np.mean([holds(losses, bound, CONFIDENCE) for losses in drawn]))
    return {
        "most_passed": round(float(max(shares)), 5),
        "mean_passed": round(float(np.mean(shares)), 5),
        "steps": len(shares),
    }


def table(rows: Sequence[Mapping]) -> str:
    """Rows as Markdown."""
    heads = [
        "promised",
        "sentences tested",
        "**promise failed**",
        "labels changed",
        "multiply-adds",
    ]
    heads += ["mean exit layer", "F1", "no exits", "failed, text of later", "failed, untested"]
    lines = []
    for row in rows:
        cells = [
            f"{row['bound']:.1%}",
            f"{row['tested']:,}",
            f"**{row['failed']:.1%}**",
            f"{row['disagreement']:.2%}",
            f"{row['speedup']:.2f}x",
            f"{row['mean_exit_layer']:.2f}",
            f"{row['score']:.4f}",
            f"{row['nothing']:.0%}",
            f"{row['failed_later']:.0%}",
            f"{row['failed_untested']:.0%}",
        ]
        lines.append(cells)
    return harness.table(heads, lines)


def edges(rows: Sequence[Mapping]) -> str:
    """Rows of `at_the_edge` as a sentence."""
    found = [f"{row['most_passed']:.1%} of draws of {row['tested']:,}" for row in rows]
    return (
        f"At worst, where the bound is just what a step loses (of {rows[0]['steps']} steps the one "
        f"that is promised most often): promised wrongly in {', '.join(found)} sentences."
    )


@dataclass(frozen=True)
class Prepared:
    """A tagger as a user has it, and sentences.

    Attributes:
        theirs: its folder.
        texts: for adapt, of which labels are not read.
        kept: that nothing was trained on.
        conll: the folder of the whole text.
    """

    theirs: Path
    texts: Dataset
    kept: Dataset
    conll: Path


def prepare() -> Prepared:
    """Fetch text and encoder and fine-tune the tagger, what of it is not in the cache."""
    assets = demo_assets.fetch()
    train = read_sentences(assets.conll / "train.txt").shuffle(SEED)
    parts = []
    for size in (TRAINED, TEXTS, KEPT):
        start = sum(map(len, parts))
        parts.append(train.select(range(start, start + size)))
    for_tagger, for_adapt, kept = parts
    theirs = demo_assets.cached_folder(
        cache_folder() / "promised-tagger",
        lambda aside: fine_tune(aside, assets.encoder, for_tagger),
    )
    return Prepared(theirs, for_adapt, kept, assets.conll)


def main():
    """Measure, print the table, append rows to results/promised.jsonl, renew the page."""
    transformers.logging.set_verbosity_error()
    given, folder = prepare(), cache_folder()
    kept, later = given.kept, read_sentences(given.conll / "test.txt").shuffle(SEED).take(LATER)

    def adapt(aside: Path):
        adapted = tokenexit.adapt(given.theirs, given.texts["words"], timing_runs=0)
        adapted.tagger.save_pretrained(aside)

    tagger = Tagger.from_pretrained(demo_assets.cached_folder(folder / "promised-adapted", adapt))
    steps = run_path(tagger, tagger.model.dial.speeds, kept, later["words"])
    facts = {"text": "CoNLL-2003", "model": "MiniLM-L6", "splits": SPLITS, "confidence": CONFIDENCE}
    facts |= {"sentences": KEPT, "full_depth": round(steps[0].score, 5), **harness.origin()}
    rows = [
        {"bound": bound, "tested": tested, **split(steps, bound, tested), **facts}
        for bound in BOUNDS
        for tested in TESTED
    ]
    edge = [{"tested": tested, **at_the_edge(steps, tested), **facts} for tested in TESTED]
    text = f"{table(rows)}\n\n{edges(edge)}"
    print(text)
    harness.write("promised", rows + edge)
    harness.between(PAGE, "promised", text)


if __name__ == "__main__":
    torch.manual_seed(SEED)
    main()

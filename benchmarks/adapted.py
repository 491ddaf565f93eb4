"""What one command makes of a user's tagger, beside ONNX Runtime in 8 bits, which is one call.

`PYTHONPATH=benchmarks python -m adapted` adapts the tagger that `promised` fine-tunes with plain
transformers, by sentences without labels, in fp32 and in 8 bits. Beside it runs the tagger as it
was, in transformers and in ONNX Runtime: the same sentences, one and 32 at a time, all in
alternation. Peers get theirs sorted and padded, in batches of the size that suits each best.

`--heads N` instead adapts it N times, by other splits of the sentences into those learnt from and
those kept aside, with heads that hear their neighbours and with plain ones; it times nothing.

F1 is that of test sentences. *promised* is the fastest speed within the promise; *equal F1* the
fastest whose F1 on development sentences is not below ONNX Runtime's in 8 bits there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cpu
import harness
import peers
import promised
import texts
import torch
import transformers
from apart import Apart
from cpu import Case, System
from datasets import Dataset

import tokenexit
from tokenexit import Speed, Tagger, demo_assets
from tokenexit.evaluate import evaluate
from tokenexit.files import cache_folder, write_aside
from tokenexit.text.data import read_sentences
from tokenexit.text.scoring import score

PEERS = ("Hugging Face sdpa", "ONNX Runtime", "ONNX Runtime int8")
RIVAL = "ONNX Runtime int8"
DEV, TEST, SAMPLES = 1500, 2000, 16
CASES = ((1, 100), (32, 320))  # sentences at a time, sentences
ROUNDS, BUDGET_S, SPEEDS = 7, 15, (2, 3)
HEADS_AT = (2, 3)
TITLE = "Sentences a second and F1: a tagger as it was, in ONNX Runtime, and adapted"
ROOT = Path(__file__).parents[1]
# The first gets what adapting took, too; the picture stands beside it.
PAGES = (ROOT / "docs" / "adapt.md", ROOT / "docs" / "index.md", ROOT / "README.md")


def equal(
    speeds: Sequence[Speed], score_of: Callable[[Speed], float], least: float
) -> Speed | None:
    """The fastest in multiply-adds whose score is not below the least; None: there is none."""
    for one in sorted(speeds, key=lambda one: one.speedup, reverse=True):
        if score_of(one) >= least:
            return one
    return None


def policies(tagger: Tagger, dev: Dataset, least: float) -> dict[str, Speed]:
    """The speeds of a tagger to time, by what they are."""
    dial = tagger.model.dial
    best = equal(dial.speeds, lambda one: evaluate(tagger, dev, one.policy).score, least)
    chosen = {"full depth": dial.at("full"), "equal F1": best}
    if dial.promised is not None:
        chosen["promised"] = dial.at("promised")
    return {name: one for name, one in chosen.items() if one is not None}


def f1_of(peer: Apart, name: str, data: Dataset, sentences, names: Mapping[int, str]) -> float:
    """F1 of a peer, from its own outputs."""
    system = cpu.peer_system(name, peer, sentences, len(sentences), 32)
    logits = cpu.per_sentence(system.chunks, system.run(), sentences)
    return score(list(data["labels"]), cpu.word_labels(sentences, logits, names))["score"]


@torch.inference_mode()
def measure(
    theirs: torch.nn.Module,
    taggers: Mapping[str, Tagger],
    dev: Dataset,
    test: Dataset,
    samples: Sequence[Sequence[str]],
    cases: Sequence[tuple[int, int]] = CASES,
    budget_s: float = BUDGET_S,
) -> list[dict]:
    """A row for each system and number of sentences at a time.

    Args:
        theirs: the tagger as it was.
        taggers: what it was adapted to, by dtype, "fp32" and "int8".
        dev, test: annotated, to choose a speed by and to score it on; `test` is timed, too.
        samples: a few other sentences.

    Raises:
        AssertionError: full depth in fp32 is not the tagger as it was.
        Unavailable: ONNX Runtime is not there.
    """
    tokenizer, names = taggers["fp32"].tokenizer, theirs.config.id2label
    dev_texts, test_texts = (texts.tokenized(tokenizer, data["words"]) for data in (dev, test))
    bench, rows = cpu.Bench(budget_s, (), harness.origin()["date"], harness.RESULTS), []
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        failed = peers.export(theirs, tokenizer, texts.tokenized(tokenizer, samples), folder, PEERS)
        loaded = {name: stack.enter_context(Apart(name, folder, failed)) for name in PEERS}
        for peer in loaded.values():
            peer.wait()
        least = f1_of(loaded[RIVAL], RIVAL, dev, dev_texts, names)
        f1 = {
            (name, ""): f1_of(peer, name, test, test_texts, names) for name, peer in loaded.items()
        }
        chosen = {dtype: policies(tagger, dev, least) for dtype, tagger in taggers.items()}
        for dtype, speeds in chosen.items():
            for kind, speed in speeds.items():
                f1[dtype, kind] = evaluate(taggers[dtype], test, speed.policy).score
        for batch, count in cases:
            case = Case("CoNLL-2003", batch, test_texts[:count])
            systems = {}
            for name, peer in loaded.items():
                size = bench.tune(name, peer, case)
                systems[name, ""] = cpu.peer_system(name, peer, case.sentences, batch, size)
            for dtype, speeds in chosen.items():
                for kind, speed in speeds.items():
                    systems[dtype, kind] = cpu.our_system(
                        dtype,
                        taggers[dtype].model,
                        kind,
                        lambda b, policy=speed.policy: {"policy": policy},
                        case.sentences,
                        batch,
                    )
            _check(bench.truth(cpu.Subject("", theirs, {}, {}, [], folder, {}), case.sentences),
                   systems, case.sentences)  # fmt: skip
            times = harness.alternate(
                {key: system.time_ms for key, system in systems.items()}, ROUNDS, budget_s
            )
            for key, system in systems.items():
                facts = {name: v for name, v in system.facts.items() if name != "setting"}
                if key in f1 and key[1]:
                    speed = chosen[key[0]][key[1]]
                    facts |= {"policy": str(speed.policy), "flops_speedup": round(speed.speedup, 3)}
                summary = harness.summary(times[key])
                rows.append(
                    {
                        **case.facts(),
                        **facts,
                        "f1": round(f1[key], 4),
                        **summary,
                        "ms_a_sentence": round(summary["median_ms"] / count, 4),
                        "over_rival": harness.ratio(times[RIVAL, ""], times[key]),
                    }
                )
    return [{**row, "f1_of_rival_on_dev": round(least, 4), **harness.origin()} for row in rows]


def _check(truth, systems: Mapping[tuple, System], sentences):
    """Raise AssertionError unless fp32 at full depth computes what the tagger did."""
    for (name, kind), system in systems.items():
        if system.facts["dtype"] == "fp32" and kind in ("", "full depth"):
            outputs = [getattr(output, "logits", output) for output in system.run()]
            found = cpu.compare(cpu.per_sentence(system.chunks, outputs, sentences), truth)
            assert found["max_difference"] < cpu.CLOSE, (name, found)


def table(rows: Sequence[Mapping]) -> str:
    """Rows as Markdown."""
    heads = ["", "F1", "multiply-adds", "one sentence, ms", "over ONNX Runtime int8"]
    heads += ["32 at a time, ms a sentence", "over ONNX Runtime int8"]
    lines = []
    alone, many = ([row for row in rows if row["batch"] == batch] for batch in (1, 32))
    for one, other in zip(alone, many, strict=True):
        name = f"**{one['system']}, {one['exits']}**" if "exits" in one else one["system"]
        cells = [name, f"{one['f1']:.4f}", f"{one.get('flops_speedup', 1):.2f}x"]
        for row in (one, other):
            cells += [f"{row['ms_a_sentence']:.2f}", f"{row['over_rival']:.2f}x"]
        lines.append(cells)
    return harness.table(heads, lines)


def sentence(facts: Mapping) -> str:
    """What adapting took and gave, in words."""
    found = [
        f"at {speed:g}x fewer multiply-adds {1 - changed:.2%} of the labels stay"
        for speed, changed in facts["disagreement_at"]
    ]
    fp32, int8 = (facts["adapt_s"][dtype] for dtype in ("fp32", "int8"))
    return (
        f"`adapt` took {fp32:.0f} s, with `--int8` {int8:.0f} s (two threads, speeds not timed). "
        f"In fp32, {', '.join(found)}, on the texts kept aside."
    )


def plot(rows: Sequence[Mapping], path: Path):
    """Draw sentences a second, 32 at a time, with F1 beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    many = [row for row in rows if row["batch"] == 32][::-1]  # the first at the top
    names = [", ".join(filter(None, (row["system"], row.get("exits")))) for row in many]
    colors = {"tokenexit": "#1f6f8b", "tokenexit int8": "#d1495b"}
    figure, axes = plt.subplots(figsize=(8, 3.6), dpi=130, layout="constrained")
    bars = axes.barh(
        names,
        [1e3 / row["ms_a_sentence"] for row in many],
        color=[colors.get(row["system"], "#9a9a9a") for row in many],
    )
    axes.bar_label(bars, [f"F1 {100 * row['f1']:.1f}" for row in many], padding=4, fontsize=9)
    axes.margins(x=0.12)
    axes.set_xlabel("sentences a second, 32 at a time, two threads")
    axes.spines[["top", "right"]].set_visible(False)
    with write_aside(path) as aside:
        figure.savefig(aside, format="png")
    plt.close(figure)


def adapt(given: promised.Prepared, dtype: str) -> tuple[Tagger, float]:
    """The tagger adapted, kept in the cache folder, and the seconds that this took."""

    def build(aside: Path):
        start = time.perf_counter()
        adapted = tokenexit.adapt(
            given.theirs, given.texts["words"], int8=dtype == "int8", timing_runs=0
        )
        seconds = round(time.perf_counter() - start, 1)
        print(f"adapted, {dtype}: {seconds:.0f} s", flush=True)
        adapted.tagger.save_pretrained(aside)
        (aside / "seconds.json").write_text(json.dumps(seconds))

    folder = demo_assets.cached_folder(cache_folder() / f"adapted-{dtype}", build)
    return Tagger.from_pretrained(folder), json.loads((folder / "seconds.json").read_text())


def run(given: promised.Prepared, dev: Dataset, test: Dataset) -> tuple[list[dict], dict]:
    """Adapt and measure: rows, and what adapting took and gave."""
    adapted = {dtype: adapt(given, dtype) for dtype in ("fp32", "int8")}
    taggers = {dtype: tagger for dtype, (tagger, _) in adapted.items()}
    dial = taggers["fp32"].model.dial
    fast = [x for x in SPEEDS if x <= dial.at("fastest").speedup]
    facts = {
        "adapt_s": {dtype: seconds for dtype, (_, seconds) in adapted.items()},
        "texts": len(given.texts),
        "disagreement_at": [(x, round(dial.at(x).disagreement, 5)) for x in fast],
        **harness.origin(),
    }
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(given.theirs).eval()
    return measure(theirs, taggers, dev, test, given.texts["words"][:SAMPLES]), facts


def compare_heads(given: promised.Prepared, test: Dataset, splits: int) -> list[dict]:
    """A row for each split of the texts and kind of heads: what is promised, and what changes."""
    rows = []
    for seed in range(splits):
        for neighbor_heads in (False, True):
            found = tokenexit.adapt(
                given.theirs,
                given.texts["words"],
                timing_runs=0,
                seed=seed,
                neighbor_heads=neighbor_heads,
            )
            dial, row = found.tagger.model.dial, {"split": seed, "neighbor_heads": neighbor_heads}
            for name in ("promised", *HEADS_AT):
                speed = dial.at(name)
                row[str(name)] = {
                    "policy": str(speed.policy),
                    "flops_speedup": round(speed.speedup, 3),
                    "disagreement": round(speed.disagreement, 5),
                    "f1": round(evaluate(found.tagger, test, speed.policy).score, 4),
                }
            print(row, flush=True)
            rows.append({**row, **harness.origin()})
    return rows


def table_of_heads(rows: Sequence[Mapping]) -> str:
    """Means over splits, a line for each kind of heads; a column for each split's promise."""
    splits = len({row["split"] for row in rows})
    heads = ["heads", *(f"promised, split {i}" for i in range(1, splits + 1)), "F1 of these"]
    for name in HEADS_AT:
        heads += [f"labels changed at {name}x", f"F1 at {name}x"]
    lines = []
    for hears, name in ((False, "plain"), (True, "hearing")):
        mine = [row for row in rows if row["neighbor_heads"] == hears]
        cells = [f"{row['promised']['flops_speedup']:.2f}x" for row in mine]
        for at in ("promised", *HEADS_AT):
            changed, f1 = (
                statistics.mean(row[str(at)][field] for row in mine)
                for field in ("disagreement", "f1")
            )
            cells += [f"{changed:.2%}"] * (at != "promised") + [f"{f1:.4f}"]
        lines.append([name, *cells])
    return harness.table(heads, lines)


def main(arguments: Sequence[str] | None = None):
    """Measure, print the table, append rows to results/adapted.jsonl, renew page and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="a folder")
    parser.add_argument("--heads", type=int, metavar="N", help="compare kinds of heads instead")
    parser.add_argument("--pages", type=Path, nargs="*", default=PAGES)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    given = promised.prepare()
    test = read_sentences(given.conll / "test.txt").shuffle(promised.SEED).take(TEST)
    if args.heads:
        rows = compare_heads(given, test, args.heads)
        harness.write("adapted_heads", rows, args.results)
        print(found := table_of_heads(rows))
        return harness.between(args.pages[0], "heads", found)
    dev = read_sentences(given.conll / "valid.txt").take(DEV)
    rows, facts = run(given, dev, test)
    print(f"{table(rows)}\n\n{sentence(facts)}")
    harness.write("adapted", [*rows, facts], args.results)
    publish(rows, facts, args.pages)


def publish(rows: Sequence[Mapping], facts: Mapping, pages: Sequence[Path]):
    """Draw the picture beside the first page, and renew the table in all of them."""
    picture = pages[0].with_name("adapted.png")
    plot(rows, picture)
    for page in pages:
        shown = os.path.relpath(picture, page.parent)
        where = f"Two threads of {facts['device']} ({facts['features']}), {facts['date'][:10]}."
        told = f"{where} {sentence(facts)}" if page == pages[0] else where
        parts = [table(rows), told, f"![{TITLE}]({shown})"]
        harness.between(page, "adapted", "\n\n".join(parts))


if __name__ == "__main__":
    sys.exit(main())

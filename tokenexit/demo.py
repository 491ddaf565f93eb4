"""The main job on a real encoder and real text, from pretrained weights to tagged sentences."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, set_seed

from tokenexit import demo_assets
from tokenexit.calibrate import Point, calibrate, plot
from tokenexit.evaluate import Evaluation, evaluate, time_evaluations
from tokenexit.files import write_aside
from tokenexit.models.checkpoint import check_output_folder
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.models.tagger import Tagged, Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.text.data import label_names, read_sentences
from tokenexit.training.self_sampling import SelfSampling
from tokenexit.training.trainer import ExitTrainer, RichProgress, training_arguments

DEV_SENTENCES, TEST_SENTENCES, TIMED_SENTENCES = 500, 1000, 200
EXAMPLES = (
    "The European Commission said on Thursday it disagreed with German advice .",
    "Ada Lovelace met Charles Babbage in London in 1833 .",
    "Rain is expected tomorrow .",
)


@torch.inference_mode(False)  # training has to work from within that mode, too
def run(
    output: Path,
    sentences: int = 2000,
    seed: int = 42,
    console: Console | None = None,
    neighbor_heads: bool | str = "all",
):
    """Train, self-sample, calibrate, tag; print a table and write a picture.

    Args:
        output: folder for the tagger, `speed.png` and `results.json`.
        sentences: of training data.
        seed: of everything random.
        console: to print to.
        neighbor_heads: see `tokenexit.convert`.
    """
    import matplotlib  # noqa: F401  told now, if it lacks

    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    start = time.perf_counter()

    def step(text: str):
        seconds = f"{time.perf_counter() - start:4.0f} s"
        console.print(Text.assemble((seconds, "bold cyan"), " ", text), soft_wrap=True)

    assets = demo_assets.fetch()
    start = time.perf_counter()
    train, dev, test = (
        read_sentences(assets.conll / f"{name}.txt") for name in ("train", "valid", "test")
    )
    train = train.shuffle(seed).take(sentences)
    dev = dev.take(DEV_SENTENCES)  # whole documents, as tagging in the wild meets them
    test = test.shuffle(seed).take(TEST_SENTENCES)
    names = label_names(train)
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(assets.encoder)
    model = TokenExitForTokenClassification.from_pretrained(
        assets.encoder,
        tokenizer=tokenizer,
        neighbor_heads=neighbor_heads,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    tagger = Tagger(model, tokenizer)

    stages = (("1: joint training", None, 3), ("2: self-sampling", SelfSampling(), 1))
    for name, sampling, epochs in stages:
        step(f"stage {name}, {len(train)} sentences, {epochs} epochs")
        arguments = training_arguments(
            output / "checkpoints",
            model.config.hidden_size,
            len(train),
            epochs=epochs,
            seed=seed,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = ExitTrainer(
            model,
            arguments,
            tokenizer,
            train,
            sampling=sampling,
            head_learning_rate=1e-3,
            progress=RichProgress(console, "training"),
        )
        trainer.train()

    step(f"calibrate on {len(dev)} sentences of development data: at most one point of F1 to lose")
    calibration = calibrate(tagger, dev, max_loss=0.01)
    model.policy = calibration.chosen.policy
    tagger.save_pretrained(output)

    step(f"score {len(test)} sentences of test data; time {TIMED_SENTENCES}, in alternation")
    results = [evaluate(tagger, test, policy) for policy in _shown(calibration)]
    results = time_evaluations(tagger, test.take(TIMED_SENTENCES), results, runs=5)
    on_dev = [evaluate(tagger, dev, result.policy).score for result in results]
    console.print(_table(results, on_dev, calibration.chosen.policy))
    with write_aside(output / "speed.png") as path:
        points = [Point(r.policy, r.score, r.flops_speedup) for r in results]
        title = f"Token-level early exit: MiniLM-L6, CoNLL-2003 ({sentences} sentences)"
        plot(calibration, path, title, points)
    with write_aside(output / "results.json") as path:
        rows = [result.to_dict() for result in results]
        path.write_text(
            json.dumps({"test": rows, "calibration": calibration.to_dict()}, indent=2) + "\n"
        )

    console.print("\nTagged, with the layer each word left at:\n")
    for tagged in tagger.tag(sentence.split() for sentence in EXAMPLES):
        console.print(_shown_sentence(tagged))
    console.print()
    step(f"done: tagger, speed.png and results.json are in {output}/")


def _shown(calibration) -> list[ExitPolicy]:
    """Full depth, the chosen policy, and two more speeds of each level."""
    policies = [ExitPolicy.never()]
    for level in ("sentence", "token"):
        mine = [p for p in calibration.simulated if p.policy.level == level]
        for target in (1.5, 2.0, 2.5):
            fast = [p for p in mine if p.speedup >= target]
            if fast:
                policies.append(max(fast, key=lambda p: p.score).policy)
    return list(dict.fromkeys([*policies, calibration.chosen.policy]))


def _table(results: list[Evaluation], on_dev: list[float], chosen: ExitPolicy) -> Table:
    table = Table(title="Accuracy against speed")
    table.add_column("policy")
    for name in ("dev F1", "test F1", "layers", "FLOPs", "time", "words/s"):
        table.add_column(name, justify="right", min_width=len(name))
    for result, dev_score in zip(results, on_dev, strict=True):
        table.add_row(
            str(result.policy),
            f"{dev_score:.3f}",
            f"{result.score:.3f}",
            f"{result.mean_exit_layer:.2f}",
            f"{result.flops_speedup:.2f}x",
            f"{result.wall_speedup:.2f}x",
            f"{result.words_per_second:.0f}",
            style="bold" if result.policy == chosen else None,
        )
    table.caption = (
        "bold: chosen by calibration. layers: mean exit layer of a word. FLOPs, time: speed-up "
        "over full depth, in multiply-adds (keys and values counted) and in wall clock here"
    )
    return table


def _shown_sentence(tagged: Tagged) -> Text:
    text = Text("  ")
    for word, label, layer in zip(tagged.words, tagged.labels, tagged.exit_layers, strict=True):
        text.append(word, style="bold magenta" if label != "O" else "")
        text.append(f"/{label}" if label != "O" else "", style="magenta")
        text.append(f"·{layer} ", style="dim")
    return text

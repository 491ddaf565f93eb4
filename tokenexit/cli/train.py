"""The commands that make a tagger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tokenexit.cli.options import (
    BatchSize,
    Column,
    Copy,
    Criterion,
    Data,
    Dev,
    Epochs,
    Format,
    HeadLearningRate,
    LearningRate,
    Metric,
    Model,
    Neighbors,
    Output,
    Resume,
    Schedule,
    Seed,
    Settings,
    be_quiet,
    check_heads,
    check_model_name,
    err,
    load_tagger,
    out,
    parse_settings,
    progress_bars,
    read_data,
)
from tokenexit.policy import ExitPolicy


def train(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Encoder or tagger: a folder or a hub name.")
    ],
    data: Data,
    output: Output,
    dev: Dev = None,
    column: Column = None,
    format: Format = None,
    epochs: Epochs = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: LearningRate = None,
    head_learning_rate: HeadLearningRate = 1e-3,
    metric: Metric = "auto",
    seed: Seed = 42,
    resume: Resume = False,
    new_classifier: Annotated[
        bool, typer.Option("--new-classifier", help="Take the encoder only of a fine-tuned tagger.")
    ] = False,
    set: Settings = None,
):
    """Stage 1: train an encoder with a head after each layer.

    Example: `tokenexit train -m bert-base-cased -d train.conll --dev dev.conll -o tagger`
    """
    from transformers import AutoTokenizer

    be_quiet()
    from tokenexit.models.checkpoint import load_config
    from tokenexit.text.data import label_names
    from tokenexit.training.start import load_to_train

    run = _planned(
        output,
        dev,
        epochs,
        batch_size,
        learning_rate,
        head_learning_rate,
        metric,
        seed,
        resume,
        set,
    )
    check_model_name(model)
    load_config(model)  # told before the data is read, if there is none
    train_data = read_data(data, column, format)
    dev_data = dev and read_data(dev, column, format)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tagger_model = load_to_train(model, tokenizer, label_names(train_data), new_classifier)
    run(tagger_model, tokenizer, train_data, dev_data, ExitPolicy.never())


def self_sample(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder that `train` wrote.")],
    data: Data,
    output: Output,
    dev: Dev = None,
    column: Column = None,
    format: Format = None,
    epochs: Epochs = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: LearningRate = None,
    head_learning_rate: HeadLearningRate = 1e-3,
    exits: Annotated[
        str, typer.Option(help="online (by the current model) or cached (by stage 1's).")
    ] = "online",
    flooding: Annotated[
        bool, typer.Option("--flooding", help="Keep each loss at its level after stage 1.")
    ] = False,
    copy: Annotated[str, typer.Option(help="post_norm or pre_norm.")] = "post_norm",
    criterion: Annotated[str, typer.Option(help="entropy or max_prob.")] = "entropy",
    max_threshold: Annotated[float, typer.Option(help="Highest threshold drawn.")] = 0.5,
    metric: Metric = "auto",
    seed: Seed = 42,
    resume: Resume = False,
    set: Settings = None,
):
    """Stage 2: train under exits that the model itself draws.

    Example: `tokenexit self-sample -m tagger -d train.conll --dev dev.conll -o tagger-exits`
    """
    from tokenexit.training.self_sampling import SelfSampling

    sampling = SelfSampling(
        ExitPolicy(copy=copy, criterion=criterion),
        thresholds=(min(SelfSampling.thresholds[0], max_threshold), max_threshold),
        exits=exits,
        flooding=flooding,
    )
    run = _planned(
        output,
        dev,
        epochs,
        batch_size,
        learning_rate,
        head_learning_rate,
        metric,
        seed,
        resume,
        set,
    )
    train_data = read_data(data, column, format)
    dev_data = dev and read_data(dev, column, format)
    tagger = load_tagger(model, batch_size)
    check_heads(tagger.model, model)
    # Calibration goes on with this kind of copies and criterion.
    policy = sampling.policy.replace(threshold=0.0)
    run(tagger.model, tagger.tokenizer, train_data, dev_data, policy, sampling)


def _planned(
    output, dev, epochs, batch_size, learning_rate, head_learning_rate, metric, seed, resume,
    settings,
):  # fmt: skip
    """What trains a model as the options say; these are checked now, before any work."""
    from tokenexit.files import disk_errors
    from tokenexit.models.checkpoint import check_output_folder
    from tokenexit.text.scoring import check_metric
    from tokenexit.training.trainer import (
        ExitTrainer,
        RichProgress,
        check_rate,
        check_same_run,
        last_checkpoint,
        training_arguments,
        write_record,
    )

    checkpoints = output / "checkpoints"
    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "disable_tqdm": True,
        "eval_strategy": "no" if dev is None else "epoch",
        **parse_settings(settings),
    }
    training_arguments(checkpoints, 768, 1, **options)
    check_rate("head_learning_rate", head_learning_rate)
    check_metric(metric)
    check_output_folder(output)
    checkpoint = last_checkpoint(checkpoints)
    if resume and checkpoint is None:
        raise ValueError(f"--resume: no complete checkpoint in {checkpoints}")
    if not resume and checkpoint is not None:
        raise ValueError(
            f"{checkpoints} has a run already: give --resume to go on with it, or remove it"
        )

    def run(model, tokenizer, train_data, dev_data, policy, sampling=None):
        if any(model.policy.thresholds(model.config.num_hidden_layers)[:-1]):
            err.print(
                f"the policy of before ({model.policy}) does not fit what is trained now: full "
                "depth until the next `calibrate`"
            )
        model.policy = policy
        arguments = training_arguments(
            checkpoints, model.config.hidden_size, len(train_data), **options
        )
        trainer = ExitTrainer(
            model,
            arguments,
            tokenizer,
            train_data,
            dev_data,
            sampling,
            head_learning_rate,
            metric=metric,
            progress=RichProgress(err),
        )
        record = trainer.record()
        if resume:
            check_same_run(checkpoints, record)
        elif trainer.is_world_process_zero():
            write_record(checkpoints, record)
        with disk_errors(output):
            trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
            if trainer.is_world_process_zero():
                trainer.tagger.save_pretrained(output)
                out.print(f"wrote {output}", soft_wrap=True)

    return run


def calibrate(
    model: Model,
    data: Data,
    target_speedup: Annotated[
        float | None, typer.Option(help="At least this much faster, in multiply-adds.")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="At most this much below full depth; 0.005 (default) is half a point."),
    ] = None,
    copy: Copy = None,
    criterion: Criterion = None,
    schedule: Schedule = None,
    neighbors: Neighbors = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for calibration.json and calibration.png.")
    ] = None,
    verify: Annotated[
        int | None,
        typer.Option(
            help="At most so many policies run with real exits. Default: all needed.", min=1
        ),
    ] = None,
    column: Column = None,
    format: Format = None,
    metric: Metric = "auto",
    batch_size: BatchSize = 32,
):
    """Pick the policy from development data and store it in the tagger.

    Examples: `tokenexit calibrate tagger -d dev.conll --max-loss 0.005`,
    `tokenexit calibrate tagger -d dev.conll --target-speedup 3 --report report`
    """
    from tokenexit.calibrate import calibrate as run
    from tokenexit.calibrate import plot, policy_grid
    from tokenexit.files import write_folder_aside
    from tokenexit.models.checkpoint import check_tagger_folder
    from tokenexit.text.scoring import check_metric

    check_metric(metric)
    check_tagger_folder(model)
    for folder in filter(None, (model, report)):
        with write_folder_aside(folder):  # told now, if it can't be
            pass
    tagger = load_tagger(model, batch_size)
    kinds = {"criterion": criterion, "copy": copy, "schedule": schedule, "neighbors": neighbors}
    base = tagger.model.policy.replace(
        threshold=0.0, **{name: value for name, value in kinds.items() if value is not None}
    )
    with progress_bars() as progress:
        result = run(
            tagger,
            read_data(data, column, format),
            target_speedup=target_speedup,
            max_loss=max_loss,
            policies=policy_grid(base),
            verify=verify,
            metric=metric,
            progress=progress,
        )
    tagger.model.policy = result.chosen.policy
    _save_config(tagger.model, model)
    table = Table("policy", result.metric, "speed-up", "", title="verified with real exits")
    table.add_row("full depth", f"{result.full_depth.score:.4f}", "1.00", "")
    for point in result.verified:
        mark = "chosen" if point.policy == result.chosen.policy else ""
        table.add_row(str(point.policy), f"{point.score:.4f}", f"{point.speedup:.2f}", mark)
    out.print(table)
    if report:
        with write_folder_aside(report) as aside:
            text = json.dumps(result.to_dict(), indent=2) + "\n"
            (aside / "calibration.json").write_text(text)
            plot(result, aside / "calibration.png")
        out.print(f"wrote {report}/calibration.json and {report}/calibration.png", soft_wrap=True)
    out.print(f"policy of {model}: {result.chosen.policy}", soft_wrap=True)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the tagger, picture and tables.")
    ] = Path("tokenexit-demo"),
    sentences: Annotated[int, typer.Option(help="Training sentences.", min=1)] = 2000,
    seed: Seed = 42,
):
    """The main job on a real encoder and real text: train, self-sample, calibrate, tag.

    Example: `tokenexit demo`
    """
    from tokenexit.demo import run

    be_quiet()
    run(output, sentences, seed, out)


def _save_config(model, folder: str):
    from tokenexit.files import write_folder_aside

    with write_folder_aside(folder) as aside:
        model.config.save_pretrained(aside)

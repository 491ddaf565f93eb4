"""The commands that make a tagger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tokenexit.cli.options import (
    MOST,
    BatchSize,
    Column,
    Copy,
    Criterion,
    Data,
    Dev,
    Device,
    Epochs,
    Format,
    Growth,
    HeadLearningRate,
    LearningRate,
    Metric,
    Model,
    NeighborHeads,
    Neighbors,
    Output,
    PerLayer,
    PerType,
    Resume,
    Schedule,
    Seed,
    Settings,
    be_quiet,
    check_heads,
    check_model_name,
    device_errors,
    dial_table,
    err,
    hearing,
    load_tagger,
    need_stdout,
    out,
    parse_settings,
    parse_types,
    progress_bars,
    read_data,
    read_texts,
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
    batch_size: Annotated[int, typer.Option(min=1, max=MOST)] = 16,
    learning_rate: LearningRate = None,
    head_learning_rate: HeadLearningRate = 1e-3,
    metric: Metric = "auto",
    seed: Seed = 42,
    resume: Resume = False,
    new_classifier: Annotated[
        bool, typer.Option("--new-classifier", help="Take the encoder only of a fine-tuned tagger.")
    ] = False,
    neighbor_heads: NeighborHeads = None,
    set: Settings = None,
):
    """Stage 1: train an encoder with a head after each layer.

    Example: `tokenexit train -m bert-base-cased -d train.conll --dev dev.conll -o tagger`
    """
    be_quiet()
    from transformers import set_seed

    from tokenexit.models.loading import check_encoder
    from tokenexit.text.data import label_names
    from tokenexit.text.encoding import load_tokenizer
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
    heads = hearing(neighbor_heads)
    check_model_name(model)
    check_encoder(model)  # told before the data is read
    train_data = read_data(data, column, format)
    dev_data = dev and read_data(dev, column, format)
    tokenizer = load_tokenizer(model)
    set_seed(seed)  # of new classifiers; the Trainer seeds later
    tagger_model = load_to_train(model, tokenizer, label_names(train_data), new_classifier, heads)
    run(tagger_model, tokenizer, train_data, dev_data, ExitPolicy.never())


def self_sample(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder that `train` wrote.")],
    data: Data,
    output: Output,
    dev: Dev = None,
    column: Column = None,
    format: Format = None,
    epochs: Epochs = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST)] = 16,
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


def _checkpoint(checkpoints: Path, resume: bool) -> Path | None:
    """The one to go on from, if that is wanted; ValueError if there is none, or one unasked for."""
    from tokenexit.training.trainer import last_checkpoint

    checkpoint = last_checkpoint(checkpoints)
    if resume and checkpoint is None:
        raise ValueError(f"--resume: no complete checkpoint is in {checkpoints}; expected one")
    if not resume and checkpoint is not None:
        raise ValueError(
            f"{checkpoints} has a run already: give --resume to go on with it, or remove it"
        )
    return checkpoint


def _is_same(folder: Path, model: str) -> bool:
    return folder.exists() and Path(model).exists() and folder.samefile(model)


def _planned(
    output, dev, epochs, batch_size, learning_rate, head_learning_rate, metric, seed, resume,
    settings,
):  # fmt: skip
    """What trains a model as the options say; these are checked now, before any work."""
    from tokenexit.files import disk_errors
    from tokenexit.int8 import dtype_of
    from tokenexit.models.checkpoint import check_output_folder
    from tokenexit.text.scoring import check_metric
    from tokenexit.training.trainer import (
        ExitTrainer,
        RichProgress,
        check_rate,
        check_same_run,
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
    checkpoint = _checkpoint(checkpoints, resume)

    def run(model, tokenizer, train_data, dev_data, policy, sampling=None):
        if any(model.policy.thresholds(model.config.num_hidden_layers)[:-1]):
            err.print(
                f"the policy of before ({model.policy}) does not fit what is trained now: full "
                "depth until the next `calibrate`"
            )
        if model.dtype.itemsize < 4:
            err.print(
                f"the weights, in {dtype_of(model)}, are trained and saved in fp32: 16 bits lose "
                "small steps"
            )
            model.float()
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
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="Promise that a smaller share of labels, 0.01 say, is not that of full depth; "
            "text without labels does."
        ),
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the promise. Default: 0.9.")] = None,
    per_layer: PerLayer = False,
    per_type: PerType = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="Tagger, a folder or a hub name, whose score or labels count in place of this "
            "one's at full depth: what it was before `self-sample`, say."
        ),
    ] = None,
    timing_runs: Annotated[
        int, typer.Option(help="Timed runs of each speed that a promise covers or not.", min=0)
    ] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    copy: Copy = None,
    criterion: Criterion = None,
    schedule: Schedule = None,
    growth: Growth = None,
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

    With `--max-disagreement`, `--data` may be text, a sentence a line; the speeds found are stored,
    too, for `--speed` of other commands.

    Examples: `tokenexit calibrate tagger -d dev.conll --max-loss 0.005`,
    `tokenexit calibrate tagger -d dev.conll --target-speedup 3 --report report`,
    `tokenexit calibrate tagger -d texts.txt --max-disagreement 0.01 --confidence 0.9`
    """
    from tokenexit.calibrate import CRITERIA, GROWTHS, plot, policy_grid, promise_grid
    from tokenexit.calibrate import calibrate as run
    from tokenexit.evaluate import check_wanted
    from tokenexit.files import write_folder_aside
    from tokenexit.models.checkpoint import check_tagger_folder
    from tokenexit.promise import check_share
    from tokenexit.temperature import fit_temperatures
    from tokenexit.text.scoring import check_metric

    if json_output:
        need_stdout()
    if report:
        import matplotlib  # noqa: F401  told now, if it lacks
    check_metric(metric)
    promised = max_disagreement is not None
    if promised:
        if column is not None:
            raise ValueError("got --column with --max-disagreement, which reads no labels")
        check_share("--max-disagreement", max_disagreement)
    check_wanted("--confidence", confidence is not None, "--max-disagreement", promised)
    confidence = 0.9 if confidence is None else confidence
    check_share("--confidence", confidence)
    check_tagger_folder(model)
    for folder in filter(None, (model, report)):
        with write_folder_aside(folder):  # told now, if it can't be
            pass
    tagger = load_tagger(model, batch_size)
    kinds = {"copy": copy, "schedule": schedule, "neighbors": neighbors}
    base = tagger.model.policy.replace(
        threshold=0.0,
        growth=1.0,
        **{name: value for name, value in kinds.items() if value is not None},
    )
    if growth is not None and base.schedule != "constant":
        raise ValueError(f"got --growth with the schedule {base.schedule!r}; expected 'constant'")
    tried = {
        "growths": GROWTHS if growth is None else (growth,),
        "criteria": CRITERIA if criterion is None else (criterion,),
    }
    theirs = original and load_tagger(original, batch_size)
    if promised:
        texts = {"words": tagger.split(read_texts(data, format))}
        grid = promise_grid(base, **tried)
    else:
        texts, grid = read_data(data, column, format), policy_grid(base, **tried)
    with progress_bars() as progress:
        result = run(
            tagger,
            texts,
            target_speedup=target_speedup,
            max_loss=max_loss,
            policies=grid,
            verify=verify,
            metric=metric,
            progress=progress,
            max_disagreement=max_disagreement,
            confidence=confidence,
            timing_runs=timing_runs,
            original=theirs,
            per_layer=per_layer,
            per_type=parse_types(per_type),
        )
    tagger.model.policy = result.chosen.policy
    if promised:
        tagger.model.dial = result.dial
    else:
        policies = dict.fromkeys((ExitPolicy.never(), result.chosen.policy))
        tagger.model.config.temperatures = fit_temperatures(tagger, texts, policies)
    _save_config(tagger.model, model)
    if json_output:
        print(json.dumps(result.to_dict()))
    elif promised:
        out.print(dial_table(result.dial))
    else:
        out.print(_verified(result))
    if report:
        with write_folder_aside(report) as aside:
            text = json.dumps(result.to_dict(), indent=2) + "\n"
            (aside / "calibration.json").write_text(text)
            plot(result, aside / "calibration.png")
        err.print(f"wrote {report}/calibration.json and {report}/calibration.png", soft_wrap=True)
    if not json_output:
        out.print(f"policy of {model}: {result.chosen.policy}", soft_wrap=True)


def _verified(result) -> Table:
    """What was run with real exits: those that no other beats in both, and the one chosen."""
    from tokenexit.calibrate import pareto_front

    ahead = pareto_front(result.verified)
    points = [x for x in result.verified if x in ahead or x.policy == result.chosen.policy]
    title = f"verified with real exits: {len(points)} of {len(result.verified)}, those ahead"
    table = Table("policy", result.metric, "speed-up", "", title=title)
    if result.original is not None:
        table.add_row("the original", f"{result.original:.4f}", "", "")
    table.add_row("full depth", f"{result.full_depth.score:.4f}", "1.00", "")
    for point in points:
        mark = "chosen" if point.policy == result.chosen.policy else ""
        table.add_row(str(point.policy), f"{point.score:.4f}", f"{point.speedup:.2f}", mark)
    return table


def adapt(
    model: Annotated[
        str, typer.Argument(help="Fine-tuned token classifier: a folder or a hub name.")
    ],
    texts: Annotated[
        str,
        typer.Option(
            "--texts", "-t", help="Text, a sentence a line; or what `--data` of others takes."
        ),
    ],
    output: Output,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Annotated sentences, to score speeds on.")
    ] = None,
    max_disagreement: Annotated[
        float, typer.Option(help="Promise that a smaller share of labels changes.")
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="Of the promise.")] = 0.9,
    per_layer: PerLayer = False,
    per_type: PerType = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Train the encoder, too: faster exits, other labels.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Give the result 8-bit weights, and promise it of these.")
    ] = False,
    neighbor_heads: Annotated[
        str | None,
        typer.Option(
            help="Which classifiers hear those of the tokens beside a token: none, or those below "
            "the last, which stays. Default: these, up to 85 labels, which GPUs take.",
        ),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Of --tune.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of --tune.")
    ] = False,
    timing_runs: Annotated[
        int, typer.Option(help="Timed runs of each speed; 0 for none.", min=0)
    ] = 3,
    device: Device = None,
    batch_size: BatchSize = 32,
    seed: Seed = 42,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    column: Column = None,
    format: Format = None,
    metric: Metric = "auto",
):
    """Let the tokens of a fine-tuned tagger exit early, by text without labels.

    Its encoder and classifier stay, so full depth is the tagger as it was; new classifiers below
    learn from the last. How far their labels stay those of the tagger is promised by a part of the
    texts kept aside; all speeds are stored, and `--speed` of other commands chooses among them.

    Examples: `tokenexit adapt dslim/bert-base-NER -t texts.txt -o tagger`,
    `tokenexit predict tagger news.txt --speed 2.5`
    """
    from tokenexit.evaluate import check_wanted
    from tokenexit.files import disk_errors
    from tokenexit.models.checkpoint import check_output_folder
    from tokenexit.models.loading import check_encoder
    from tokenexit.promise import check_share
    from tokenexit.text.encoding import load_tokenizer
    from tokenexit.text.scoring import check_metric
    from tokenexit.training.adapt import adapt as run
    from tokenexit.training.trainer import remove_run

    be_quiet()
    if json_output:
        need_stdout()
    check_share("--max-disagreement", max_disagreement)
    check_share("--confidence", confidence)
    check_metric(metric)
    check_wanted("--epochs", epochs is not None, "--tune", tune)
    check_wanted("--resume", resume, "--tune", tune)
    check_wanted("--column", column is not None, "--data", bool(data))
    check_wanted("--metric", metric != "auto", "--data", bool(data))
    heads = hearing(neighbor_heads, last=False)
    check_output_folder(output)
    if _is_same(output, model):
        raise ValueError(f"--output is the folder of the model, {model}; expected another")
    whole = output.absolute()  # "." has no name
    checkpoints = whole.with_name(f"{whole.name}-checkpoints")
    if tune:
        if _is_same(checkpoints, model):
            raise ValueError(
                f"the model is in {model}, where the checkpoints for {output} belong; expected "
                "another --output"
            )
        _checkpoint(checkpoints, resume)
    check_model_name(model)
    check_encoder(model)  # told before the texts are read
    tokenizer = load_tokenizer(model)
    sentences = read_texts(texts, format)
    annotated = data and read_data(data, column, None)
    with progress_bars() as progress, device_errors(device):
        result = run(
            model,
            sentences,
            tokenizer,
            tune=tune,
            int8=int8,
            neighbor_heads=heads,
            max_disagreement=max_disagreement,
            confidence=confidence,
            per_layer=per_layer,
            per_type=parse_types(per_type),
            annotated=annotated,
            metric=metric,
            epochs=epochs,
            batch_size=batch_size,
            timing_runs=timing_runs,
            device=device,
            seed=seed,
            progress=progress,
            checkpoints=checkpoints if tune else None,
            resume=resume,
        )
    with disk_errors(output):
        result.tagger.save_pretrained(output)
    if tune:
        remove_run(checkpoints)
    if result.calibration.needed is not None:
        err.print(
            f"no exits are promised: the texts are too few; about {2 * result.calibration.needed} "
            "would do, if they are as these"
        )
    if json_output:
        print(json.dumps(result.to_dict()))
        return
    columns, dial = {}, result.calibration.dial
    if result.original_wall is not None:
        walls = [one.wall_speedup * result.original_wall for one in dial.speeds]
        columns["beside\ntrans-\nformers"] = [f"{wall:.2f}x" for wall in walls]
    if result.scores is not None:
        columns[result.metric.replace("_", "\n")] = [f"{score:.4f}" for score in result.scores]
    out.print(dial_table(dial, columns))
    out.print(f"wrote {output}: {result.tagger.model.policy}", soft_wrap=True)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the tagger, picture and tables.")
    ] = Path("tokenexit-demo"),
    sentences: Annotated[int, typer.Option(help="Training sentences.", min=1, max=MOST)] = 2000,
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
    from tokenexit.models.card import write_card

    with write_folder_aside(folder) as aside:
        model.config.save_pretrained(aside)
    write_card(model, folder)

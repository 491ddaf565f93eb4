"""`python -m experiments run PLAN`: train and read what a plan lists, once."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import gpu_exits
import gpu_probes
import harness
import torch
import typer
import yaml

from experiments import clock, packing, reading, report, signals, sources
from experiments.runs import (
    BY_CLOCK,
    KINDS,
    OutOfTime,
    Run,
    new,
    seconds_trained,
    told_of,
    train,
    trained_heads,
)
from tokenexit.calibrate import Sweep
from tokenexit.evaluate import evaluate
from tokenexit.files import cache_folder
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy

ROWS, DECODED, SIGNALS = "experiments", "decoding", "signals"
FULL = "full depth"
TEXTS = "Folder of sets that no package has, or what `pack` wrote."
# With which the program for a GPU is tried: of the large tagger, of data, of training.
TINY_SHAPE = dict(hidden_size=64, num_hidden_layers=12, num_attention_heads=4, intermediate_size=64)
FOR_SCORES = 22  # seconds, to choose a policy and read test data
DEVICE = "cpu: only to try the program (--tiny)."
TINY_DATA, TINY_SETTINGS = 24, {"max_steps": 2, "save_strategy": "no"}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def runs_of(plan: Path) -> list[Run]:
    """The runs of a plan, in its order, one for each seed.

    A plan is YAML: `defaults` of all runs, and `runs`, a list of the fields of `Run`, or `seeds`, a
    list, in place of `seed`: then `start` and `teacher` name the run of the same seed.

    Raises:
        ValueError: an unknown field; a run that goes on from one not listed before it.
    """
    content = yaml.safe_load(plan.read_text())
    known = {field.name for field in dataclasses.fields(Run)} | {"seeds"}
    runs: dict[str, Run] = {}
    for entry in content["runs"]:
        entry = {**content.get("defaults", {}), **entry}
        if unknown := entry.keys() - known:
            raise ValueError(f"{plan}: run {entry.get('name')} has {sorted(unknown)}")
        entry["read"] = tuple(entry.get("read", ()))
        for seed in entry.pop("seeds", [entry.get("seed", 1)]):
            mine = {**entry, "name": f"{entry['name']}-{seed}", "seed": seed}
            for other in ("start", "teacher"):
                if mine.get(other):
                    mine[other] = f"{mine[other]}-{seed}"
                    if mine[other] not in runs:
                        raise ValueError(f"{plan}: {mine['name']} wants {mine[other]} before it")
            run = Run(**mine)
            if run.name in runs:
                raise ValueError(f"{plan}: {run.name} is listed twice")
            runs[run.name] = run
    return list(runs.values())


def read(run: Run, tagger, splits, dev_sentences: int, seconds: float):
    """Append the rows of a trained run: full depth and its layers, each kind of policy and target.

    Kinds with rows are left alone.
    """
    known = [row for row in harness.read(ROWS) if row["run"] == run.name]
    kinds = {row["kind"] for row in known}
    dev = splits.dev.take(min(dev_sentences, len(splits.dev)))
    tagger.model.to(getattr(torch, run.dtype))
    common = {
        "run": run.name,
        **{k: v for k, v in dataclasses.asdict(run).items() if k not in ("name", "read")},
        "train_s": round(seconds),
        "computed_on": reading.device_of(tagger),
        **harness.origin(),
    }

    def row_of(kind: str, target: float | None, on_dev, wall: float | None = None, **more) -> dict:
        on_test = evaluate(tagger, splits.test, on_dev.policy)
        return {
            "kind": kind,
            "target": target,
            "policy": on_dev.policy.to_dict(),
            "dev": on_dev.score,
            "test": on_test.score,
            "test_types": on_test.scores.get("types"),
            "dev_speedup": round(on_dev.flops_speedup, 3),
            "flops_speedup": round(on_test.flops_speedup, 3),
            "layer_speedup": round(reading.layer_speedup(on_test), 3),
            "wall_speedup": wall,
            "broken": on_test.broken_labels,
            **more,
            **common,
        }

    if FULL not in kinds:
        full = evaluate(tagger, dev, ExitPolicy.never())
        layers = {
            name: [s["score"] for s in reading.read_layers(tagger, data)]
            for name, data in (("dev_layers", dev), ("test_layers", splits.test))
        }
        harness.write(ROWS, [row_of(FULL, None, full, **layers)])
    sweep = None
    for kind in run.read:
        if kind in kinds:
            continue
        if kind == BY_CLOCK:
            found = reading.choose_by_clock(tagger, dev, best_on_dev(known))
        else:
            sweep = sweep or Sweep(tagger, dev, "auto")
            found = reading.choose(tagger, dev, sweep, KINDS[kind])
        if kind.endswith("per layer"):
            found = reading.choose_per_layer(tagger, dev, sweep, found)
        walls = reading.wall_speedups(tagger, dev, [x.policy for x in found.values()])
        rows = [row_of(kind, *x, wall) for x, wall in zip(found.items(), walls, strict=True)]
        harness.write(ROWS, rows)
        known += rows
        for row in rows:
            print(
                f"  {kind}, {row['target']:g}x: dev {row['dev']:.4f}, test {row['test']:.4f}, "
                f"wall clock {row['wall_speedup']:.2f}x",
                flush=True,
            )


def best_on_dev(rows: list[dict]) -> dict[float, ExitPolicy]:
    """Of a run's rows the policy of words with the best score on development data, by target."""
    rows = sorted(rows, key=lambda row: row["dev"])  # of equals the last one stays
    words = [row for row in rows if row["target"] and row["kind"].startswith("token")]
    return {row["target"]: ExitPolicy.from_dict(row["policy"]) for row in words}


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="A YAML file, see `runs_of`.")],
    budget: Annotated[float, typer.Option(help="Minutes, of training and reading.")] = 1e9,
    texts: Annotated[Path | None, typer.Option(help=TEXTS)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[
        str, typer.Option(help="Runs whose name has this, and those that they go on from.")
    ] = "",
    dev_sentences: Annotated[int, typer.Option(help="That choose policies.", min=1)] = 1000,
):
    """Train and read what a plan lists; what is done is left, what was cut off goes on."""
    end = time.monotonic() + 60 * budget
    runs = runs_of(plan)
    finished = {one.name: cache_folder() / "experiments" / one.name / "tagger" for one in runs}
    known = {(row["run"], row["kind"]) for row in harness.read(ROWS)}
    untrained, unread, needed = set(), set(), set()
    for one in reversed(runs):  # what a run goes on from is before it
        kinds = (*one.read, FULL) if one.head == "linear" else ()  # `signals` reads others
        if only in one.name and not {(one.name, kind) for kind in kinds} <= known:
            unread.add(one.name)
        if (only in one.name or one.name in needed) and not finished[one.name].is_dir():
            untrained.add(one.name)
            needed |= {one.start, one.teacher}
    for one in runs:
        if one.name not in untrained | unread:
            continue
        if time.monotonic() > end:
            break
        splits = sources.splits(one.data, texts)
        print(f"{one.name}: training on {len(splits.train)} sentences at most", flush=True)
        folder = finished[one.name].parent
        try:
            tagger = train(one, splits, folder, finished, end, device, texts)
        except OutOfTime:
            print(f"{one.name}: out of time; the next call goes on", flush=True)
            break
        if one.name in unread:
            read(one, tagger, splits, dev_sentences, seconds_trained(folder))
    else:
        print("all runs of the plan are done")
        sys.exit(0)
    sys.exit(3)


@app.command()
def retime(
    plan: Annotated[Path, typer.Argument(help="A YAML file, see `runs_of`.")],
    texts: Annotated[Path | None, typer.Option(help=TEXTS)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[str, typer.Option(help="Runs whose name has this.")] = "",
    kind: Annotated[list[str] | None, typer.Option(help="Of policies. Default: all.")] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="In fp32, beside the plan's dtype.")] = False,
):
    """Measure the wall clock of what a plan has read once more, as on a machine that was busy."""
    rows = harness.read(ROWS)
    for one in runs_of(plan):
        folder = cache_folder() / "experiments" / one.name / "tagger"
        mine = [row for row in rows if row["run"] == one.name and row["kind"] != FULL]
        mine = [row for row in mine if not kind or row["kind"] in kind]
        if only not in one.name or not mine or not folder.is_dir():
            continue
        dtype = "float32" if fp32 else one.dtype
        tagger = Tagger.from_pretrained(folder, dtype=getattr(torch, dtype))
        tagger.model.to(device)
        policies = [ExitPolicy.from_dict(row["policy"]) for row in mine]
        dev = sources.splits(one.data, texts).dev
        for row, wall in zip(mine, reading.wall_speedups(tagger, dev, policies), strict=True):
            print(f"{one.name}, {row['kind']}, {row['target']:g}x: {wall:.2f}x", flush=True)
            row["wall_speedup_fp32" if fp32 else "wall_speedup"] = wall
        harness.write_anew(ROWS, rows)


@app.command(name="signals")
def read_signals(
    plan: Annotated[Path, typer.Argument(help="A YAML file, see `runs_of`.")],
    texts: Annotated[Path | None, typer.Option(help=TEXTS)] = None,
    only: Annotated[str, typer.Option(help="Runs whose name has this.")] = "",
    dev_sentences: Annotated[int, typer.Option(help="That choose policies.", min=1)] = 1000,
):
    """Simulate exits of a plan's trained runs by other signals, and of other heads; once each."""
    known = {row["run"] for row in harness.read(SIGNALS)}
    for one in runs_of(plan):
        folder = cache_folder() / "experiments" / one.name
        if only not in one.name or one.name in known or not (folder / "tagger").is_dir():
            continue
        tagger = Tagger.from_pretrained(folder / "tagger")
        heads = trained_heads(one, folder, tagger.model.config)
        splits = sources.splits(one.data, texts)
        dev = splits.dev.take(min(dev_sentences, len(splits.dev)))
        common = {"run": one.name, "data": one.data, "head": one.head, **harness.origin()}
        found = signals.read_signals(*(signals.Words(tagger, x, heads) for x in (dev, splits.test)))
        harness.write(SIGNALS, [{**row, **common} for row in found])
        print(f"{one.name}: read", flush=True)


@app.command()
def decode(
    plan: Annotated[Path, typer.Argument(help="A YAML file, see `runs_of`.")],
    texts: Annotated[Path | None, typer.Option(help=TEXTS)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    kind: Annotated[list[str] | None, typer.Option(help="Of policy. Default: all.")] = None,
    dev_sentences: Annotated[int, typer.Option(help="Those that chose policies.", min=1)] = 1000,
):
    """Decode what a plan has read both ways, word by word and under constraints, once."""
    known = {(row["run"], row["kind"], row["target"]) for row in harness.read(DECODED)}
    for one in runs_of(plan):
        folder = cache_folder() / "experiments" / one.name / "tagger"
        mine = [row for row in harness.read(ROWS) if row["run"] == one.name]
        mine = [row for row in mine if (row["run"], row["kind"], row["target"]) not in known]
        mine = [row for row in mine if not kind or row["kind"] in kind]
        if not mine or not folder.is_dir():
            continue
        tagger = Tagger.from_pretrained(folder, dtype=getattr(torch, one.dtype))
        tagger.model.to(device)
        splits = sources.splits(one.data, texts)
        parts = {"dev": splits.dev.take(min(dev_sentences, len(splits.dev))), "test": splits.test}
        for row in mine:
            found = {name: row[name] for name in ("run", "data", "kind", "target", "policy")}
            for name, data in parts.items():
                policy = ExitPolicy.from_dict(row["policy"])
                found[name] = reading.both_decodings(tagger, data, policy)
                print(f"{one.name}, {row['kind']}, {row['target']}, {name}: {found[name]}")
            found |= {"computed_on": reading.device_of(tagger), **harness.origin()}
            harness.write(DECODED, [found])


@app.command()
def pack(
    plan: Annotated[Path, typer.Argument(help="A YAML file, see `runs_of`.")],
    folder: Annotated[Path, typer.Argument(help="Where to; see `experiments.packing`.")],
    texts: Annotated[Path | None, typer.Option(help=TEXTS)] = None,
    wheels: Annotated[bool, typer.Option(help="Pure Python that a machine may lack.")] = True,
):
    """Put what a plan needs into a folder that travels."""
    size = packing.pack(runs_of(plan), folder, texts, wheels)
    print(f"{folder}: {size / 2**20:.1f} MiB")


@app.command("save-exits")
def save_exits(
    plan: Annotated[Path, typer.Argument(help="A YAML file, see `runs_of`.")],
    name: Annotated[str, typer.Argument(help="A run of it, with its seed.")],
    file: Annotated[Path, typer.Argument(help="A .npz file, see `gpu_exits`.")],
    kind: Annotated[str, typer.Option(help="Of policy.")] = "token",
    target: Annotated[float, typer.Option(help="Times fewer multiply-adds, as asked for.")] = 3.0,
    texts: Annotated[Path | None, typer.Option(help=TEXTS)] = None,
):
    """Keep the layers that the tokens of a test set leave at, by a policy that was read."""
    known = {(row["run"], row["kind"], row["target"]): row for row in harness.read(ROWS)}
    folder = cache_folder() / "experiments" / name / "tagger"
    run = next((one for one in runs_of(plan) if one.name == name), None)
    row = known.get((name, kind, target))
    if run is None or row is None or not folder.is_dir():
        sys.exit(f"{plan}: got {name}, {kind!r}, {target:g}x; expected a run that was read so")
    tagger = Tagger.from_pretrained(folder, dtype=getattr(torch, run.dtype))
    tagger = Tagger(tagger.model, tagger.tokenizer, 64)
    windows = tagger.windows(sources.splits(run.data, texts).test["words"])
    exits = clock.exits_of(tagger, windows, ExitPolicy.from_dict(row["policy"]))
    gpu_exits.save_exits(exits, windows, file)
    flat = [layer for one in exits for layer in one]
    share = sum(flat) / len(flat) / tagger.model.config.num_hidden_layers
    print(f"{file}: {len(windows)} sentences, {len(flat)} tokens, {share:.3f} of token-layers")


@app.command("gpu-train")
def gpu_train(
    plan: Annotated[Path, typer.Argument(help="A YAML file; its last run is kept.")],
    work: Annotated[Path, typer.Option(help="Folder of the tagger.")],
    out: Annotated[Path, typer.Option(help="Folder of what is told, and rows.")],
    texts: Annotated[Path | None, typer.Option(help=TEXTS)] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Little text, a few steps.")] = False,
    most_loss: Annotated[float, typer.Option(help="Of F1 on development data.")] = 0.005,
    seconds: Annotated[float, typer.Option(help="In all.")] = 1e9,
):
    """Train what a plan lists within the time, and choose a policy for its last tagger.

    Other processes compile meanwhile the kernels that `gpu-measure` needs.
    """
    runs, splits, more = asked(plan, out, "teach", texts, device, tiny, seconds)
    same = [str(plan), "--device", device, *["--tiny"] * tiny, "--work", str(work), "--warm"]
    same += [] if texts is None else ["--texts", str(texts)]
    finished: dict[str, Path] = {}
    shutil.rmtree(work, ignore_errors=True)
    with tempfile.TemporaryDirectory() as aside, ExitStack() as stack:
        others = []
        for number, part in enumerate(clock.PARTS[:1] if tiny else clock.PARTS):
            log = stack.enter_context(Path(aside, f"{number}.log").open("w+"))
            command = [sys.executable, "-m", "experiments", "gpu-measure", *same, "--part", part]
            command += ["--out", str(Path(aside, str(number)))]
            other = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(other.wait)
            stack.callback(other.kill)
            others.append((part, other, log))
        for number, one in enumerate(runs):  # what the last one that did not fail made is kept
            if one.seconds is not None:
                left = (gpu_probes.left() - FOR_SCORES) / (len(runs) - number)
                one = dataclasses.replace(one, seconds=max(1.0, min(one.seconds, left)))
            folder = Path(aside, one.name)
            options = one, splits, folder, finished, float("inf"), device, texts
            trained = gpu_probes.attempt(one.name, partial(train, *options))
            if trained is None:
                break
            tagger, finished[one.name] = trained, folder / "tagger"
            gpu_probes.say(f"{one.name}: {told_of(folder)}", keep=True)
        if finished:
            tagger.save_pretrained(work)
            chosen = gpu_probes.attempt(
                "choosing", partial(clock.choose, tagger, splits.dev, most_loss)
            )
            if chosen is not None:
                tagger.save_pretrained(work)
                facts = {"run": [*finished][-1]}
                read_test = partial(clock.read, tagger, splits.test, *chosen, out, **facts)
                gpu_probes.attempt("reading", read_test)
        for part, other, log in others:
            with suppress(subprocess.TimeoutExpired):
                other.wait(max(0.0, min(gpu_probes.left(), 600)))
            if other.poll() != 0:
                gpu_probes.say(f"kernels of {part}: status {other.poll()}", keep=True)
                log.seek(0)
                print(log.read()[-2000:], flush=True)
    sys.exit(gpu_probes.ended())


@app.command("gpu-measure")
def gpu_measure(
    plan: Annotated[Path, typer.Argument(help="As that of `gpu-train`.")],
    work: Annotated[Path, typer.Option(help="Folder of the tagger that it made.")],
    out: Annotated[Path, typer.Option(help="Folder of what is told, rows and exits.")],
    texts: Annotated[Path | None, typer.Option(help=TEXTS)] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Little text.")] = False,
    part: Annotated[list[str], typer.Option(help=f"Of {clock.PARTS}.")] = clock.PARTS,
    warm: Annotated[bool, typer.Option(help="Run all once, untrained, and time nothing.")] = False,
    seconds: Annotated[float, typer.Option(help="Begin nothing later.")] = 1e9,
):
    """Measure what the exits of a trained tagger are worth on the clock; the GPU is to be alone."""
    stage = "warm" if warm else "evidence"
    runs, splits, more = asked(plan, out, stage, texts, device, tiny, seconds)
    test = splits.test
    if warm:
        tagger, more["most"] = new(runs[-1], splits, device, texts), 3
        tagger.model.policy = ExitPolicy(threshold=0.97, window=0)
        test = test.take(min(640, len(test)))
    else:
        tagger = Tagger.from_pretrained(work, device=device)
    clock.measure(tagger, test, splits.train, out, parts=part, warm=warm, **more)
    sys.exit(gpu_probes.ended())


def asked(plan, out, stage, texts, device, tiny, seconds):
    """Runs, texts and sizes for a GPU, or for trying it."""
    out.mkdir(parents=True, exist_ok=True)
    gpu_probes.CHOSEN = argparse.Namespace(
        warm=False, out=out, stage=stage, device=device, tiny=tiny, seconds=seconds
    )
    torch.set_float32_matmul_precision("highest")
    runs, more = runs_of(plan), {}
    splits = sources.splits(runs[-1].data, texts)
    if tiny:
        runs = [
            dataclasses.replace(one, batch_size=4, settings={**one.settings, **TINY_SETTINGS})
            for one in runs
        ]
        parts = (getattr(splits, field.name) for field in dataclasses.fields(splits))
        splits = sources.Splits(*(part.take(min(TINY_DATA, len(part))) for part in parts))
        more = {"sizes": (4, 8), "shape": TINY_SHAPE, "step": (2, 8), "most": 2}
    return runs, splits, more


@app.command("report")
def write_report():
    """Write the tables and curves of docs/results.md from the rows."""
    report.write()


if __name__ == "__main__":
    app()

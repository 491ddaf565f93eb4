"""Tables and curves of `docs/results.md` from the rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import gpu
import harness
from gpu_exits import EXITS, FULL, LAYERS, LAYERS_EXITS, VARLEN

from tokenexit.policy import ExitPolicy

_WORDS = ("token", "token, max_prob", "token, growing", "token, growing, max_prob")
# By name: how the runs' names end, and the kinds of policy.
ALL_HEAR = "words, all heads hear"
GROUPS = {
    ALL_HEAR: ("all-hear", _WORDS),
    "words, heads that hear": ("hearing", _WORDS),
    "words": ("joint", _WORDS),
    "words, one threshold": ("joint", ("token",)),
    "sentences": ("joint", ("sentence", "sentence, growing")),
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "results.md"


def write(document: Path = DOCUMENT):
    """Fill the document's marked parts, and draw a picture for each data set beside it."""
    rows = harness.read("experiments")
    harness.between(document, "summary", summary(rows))
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        harness.between(document, f"{data}: scores", at_speeds(mine))
        harness.between(document, f"{data}: speeds", speeds(mine))
        harness.between(document, f"{data}: layers", layers(mine))
        draw(mine, data, document.with_name(f"{data}.png"))
    both = harness.read("decoding")
    for data in dict.fromkeys(row["data"] for row in both):
        mine = [row for row in both if row["data"] == data]
        harness.between(document, f"{data}: decoding", decodings(mine))
    simulated = harness.read("signals")
    for data in dict.fromkeys(row["data"] for row in simulated):
        mine = [row for row in simulated if row["data"] == data]
        harness.between(document, f"{data}: signals", by_signal(mine))
    if on_gpu := harness.read("gpu_scores"):
        times = [row for row in harness.read("gpu_check") if row["stage"] == "evidence"]
        parts = scores(on_gpu), clocks(times), steps(times)
        harness.between(document, "gpu", "\n\n".join(filter(None, parts)))


def summary(rows: Sequence[dict]) -> str:
    """A table of all sets: what `grouped` finds in each, a column a speed."""
    each = {
        (data, group): by_speed
        for data in dict.fromkeys(row["data"] for row in rows)
        for group, by_speed in grouped([row for row in rows if row["data"] == data]).items()
    }
    speeds = sorted({speed for by_speed in each.values() for speed in by_speed})
    lines = []
    for names, by_speed in each.items():
        scores = {speed: [row["test"] for row in group] for speed, group in by_speed.items()}
        cells = [spread(scores[speed]) if speed in scores else "" for speed in speeds]
        lines.append([*names, *cells])
    return harness.table(["set", "", *_times(speeds)], lines, names=2)


def grouped(rows: Sequence[dict]) -> dict[str, dict[float, list[dict]]]:
    """Of a set's rows by group and speed: joint training at full depth and by `GROUPS`, of which
    that is taken, seed by seed, which development data choose; and encoders of fewer layers. The
    last layer is another one where all heads hear."""
    fewer, found = _fewer_layers(rows), {}

    def add(group: str, speed: float, row: dict):
        found.setdefault(group, {}).setdefault(speed, []).append(row)

    for row in rows:
        for name, group in (("joint", "full depth"), ("all-hear", ALL_HEAR)):
            if row["target"] is None and _system(row).endswith(f"-{name}"):
                add(group, 1.0, row)
    for group, (name, kinds) in GROUPS.items():
        best: dict[tuple, dict] = {}
        for row in rows:
            key, mine = (row["run"], row["target"]), _system(row).endswith(f"-{name}")
            if mine and row["kind"] in kinds and (key not in best or row["dev"] > best[key]["dev"]):
                best[key] = row
        for (_, target), row in best.items():
            add(group, target, row)
    for row in rows:
        if row["target"] is None and fewer[_system(row)] > 1:
            taught = "distilled" if row["teacher"] else "by labels"
            add(f"fewer layers, {taught}", fewer[_system(row)], row)
    return found


def at_speeds(rows: Sequence[dict]) -> str:
    """A table of scores on test data: a line for each system and kind of policy, a column a speed.

    An encoder of fewer layers at its full depth stands below the speed that it has against the
    deepest.
    """
    fewer = _fewer_layers(rows)
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in rows:
        speed = fewer[_system(row)] if row["target"] is None else row["target"]
        of_kind = found.setdefault((_system(row), row["kind"]), {})
        of_kind.setdefault(speed, []).append(row["test"])
    columns = sorted({speed for of_kind in found.values() for speed in of_kind})
    lines = []
    for (system, kind), of_kind in sorted(
        found.items(), key=lambda item: item[0][1] != "full depth"
    ):
        cells = [spread(of_kind[speed]) if speed in of_kind else "" for speed in columns]
        lines.append([system, kind, *cells])
    return harness.table(["run", "policy", *_times(columns)], lines, names=2)


def speeds(rows: Sequence[dict]) -> str:
    """A table of all systems: at each speed the scores, and the speed in each sense.

    Operations and token layers of an encoder with fewer layers count against the deepest.
    """
    fewer = _fewer_layers(rows)
    heads = ["run", "policy", "asked", "dev", "test", "operations", "token layers", "wall clock"]
    lines = []
    groups: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["kind"] != "full depth"):
        groups.setdefault((_system(row), row["kind"], row["target"]), []).append(row)
    for (system, kind, target), group in groups.items():
        speeds = (
            fewer[system] * mean_of(group, name) for name in ("flops_speedup", "layer_speedup")
        )
        walls = (mean(group, name) for name in ("wall_speedup", "wall_speedup_fp32"))
        both = (spread([row[part] for row in group]) for part in ("dev", "test"))
        cells = *both, *(f"{speed:.2f}" for speed in speeds), *walls
        lines.append([system, kind, _time(target), *cells, round(mean_of(group, "broken"))])
    return harness.table([*heads, "in fp32", "broken"], lines, names=2)


def layers(rows: Sequence[dict]) -> str:
    """A table of each layer's score on test data at full depth."""
    full = [row for row in rows if row["kind"] == "full depth"]
    most = max(len(row["test_layers"]) for row in full)
    lines = []
    groups: dict[str, list[dict]] = {}
    for row in full:
        groups.setdefault(_system(row), []).append(row)
    for system, group in groups.items():
        each = zip(*(row["test_layers"] for row in group), strict=True)
        cells = [f"{100 * statistics.mean(scores):.1f}" for scores in each]
        lines.append([system, *cells, *[""] * (most - len(cells))])
    return harness.table(["run", *map(str, range(1, most + 1))], lines)


def decodings(rows: Sequence[dict]) -> str:
    """A table of scores word by word and under constraints, and of test data what was broken."""
    heads = ["run", "policy", "asked"]
    heads += [x for part in ("dev", "test", "broken") for x in (part, "constrained")]
    lines = []
    for row in rows:
        pair = [
            f"{100 * row[part][way]['score']:.2f}"
            for part in ("dev", "test")
            for way in ("argmax", "constrained")
        ]
        test = row["test"]
        pair += [str(test[way]["broken"]) for way in ("argmax", "constrained")]
        names = row["run"], row["kind"], _time(row["target"])
        lines.append([*names, *pair, f"{test['decode_ms']:.0f}"])
    return harness.table([*heads, "decoding, ms"], lines, names=2)


def by_signal(rows: Sequence[dict]) -> str:
    """A table of scores on test data by head and signal, exits simulated; a column a speed."""
    targets = sorted({row["target"] for row in rows})
    lines = []
    groups: dict[tuple, dict[float, list[float]]] = {}
    for row in rows:
        group = groups.setdefault((_system(row), row["head"], row["signal"]), {})
        group.setdefault(row["target"], []).append(row["test"])
    for names, group in groups.items():
        cells = [spread(group[target]) if target in group else "" for target in targets]
        lines.append([*names, *cells])
    return harness.table(["run", "heads", "signal", *_times(targets)], lines, names=3)


def scores(rows: Sequence[dict]) -> str:
    """A table of the policies of the newest run on a GPU, the one chosen marked."""
    last = [row for row in rows if row["date"][:10] == rows[-1]["date"][:10]]
    lines = []
    for row in last:
        numbers = 100 * row["dev"], 100 * row["test"], row["flops_speedup"], row["layer_speedup"]
        cells = [f"{number:.2f}" for number in numbers]
        lines.append([ExitPolicy.from_dict(row["policy"]), *cells, "chosen" * row["chosen"]])
    return harness.table(["policy", "dev", "test", "operations", "token layers", ""], lines)


def clocks(rows: Sequence[dict]) -> str:
    """A table of milliseconds for the same batches, the newest of each kind.

    Behind those of exits stands how many times as fast as padded Hugging Face, as packed tokens
    with attention of variable length, and as full depth, in this order.
    """
    systems = (gpu.HF, VARLEN, FULL, EXITS, LAYERS, LAYERS_EXITS)
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "tagger" in row:
            key = row["tagger"], row["sentences"], row["order"]
            cases.setdefault(key, {})[row["system"]] = row
    lines = []
    for (tagger, size, order), found in cases.items():
        ms = {name: row["median_ms"] for name, row in found.items()}
        cells = []
        for name in systems:
            cell = f"{ms[name]:.2f}" if name in ms else ""
            others = gpu.HF, VARLEN, {EXITS: FULL, LAYERS_EXITS: LAYERS}.get(name)
            if cell and set(others) <= ms.keys():
                cell += f" ({', '.join(f'{ms[other] / ms[name]:.2f}' for other in others)})"
            cells.append(cell)
        share = next(iter(found.values()))["active_fraction"]
        lines.append([tagger, size, order, f"{share:.3f}", *cells])
    return harness.table(["tagger", "batch", "order", "token-layers", *systems], lines, names=3)


def steps(rows: Sequence[dict]) -> str:
    """A table of the newest times of a step of training, those for which the GPU is busy beside.

    "" where no rows are of one.
    """
    last = {
        (row["sentences"], row["longest"], row["system"]): row
        for row in rows
        if "tagger" not in row and "longest" in row
    }
    lines = []
    for (sentences, longest, name), row in last.items():
        share = row["active_fraction"] if name == "self-sampling" else 1
        busy = f"{row['busy_ms']:.1f}" if "busy_ms" in row else ""
        of_batch = f"{sentences} x {longest}", f"{share:.3f}"
        lines.append([name, *of_batch, f"{row['median_ms']:.1f}", busy])
    heads = ["training step", "sentences", "token-layers", "ms", "the GPU busy for"]
    return harness.table(heads, lines) if last else ""


def _time(speed: float | None) -> str:
    return "" if speed is None else f"{speed:g}x"


def _times(speeds: Sequence[float]) -> list[str]:
    return [*map(_time, speeds)]


def spread(scores: Sequence[float]) -> str:
    """Mean, and the deviation where there are several seeds, in points."""
    middle = f"{100 * statistics.mean(scores):.2f}"
    return middle if len(scores) < 2 else f"{middle} ± {100 * statistics.stdev(scores):.2f}"


def mean_of(rows: Sequence[dict], name: str) -> float:
    """The mean of a field over rows."""
    return statistics.mean(row[name] for row in rows)


def mean(rows: Sequence[dict], name: str) -> str:
    """A speed-up as it is shown; empty where it was not measured."""
    return "" if any(row.get(name) is None for row in rows) else f"{mean_of(rows, name):.2f}"


def draw(rows: Sequence[dict], title: str, path: Path):
    """Score on test data against speed in multiply-adds: a line for each group of `grouped`.

    Dotted are the labels of each layer of joint training as if no deeper layer were there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    groups = grouped(rows)
    full = groups.pop("full depth", groups.get(ALL_HEAR))[1.0]
    score = 100 * mean_of(full, "test")
    for group, by_speed in groups.items():
        points = [(1.0, score)] if group in GROUPS and 1.0 not in by_speed else []
        for speed, same in sorted(by_speed.items()):
            measured = mean_of(same, "flops_speedup") if group in GROUPS else speed
            points.append((measured, 100 * mean_of(same, "test")))
        style = "o-" if group in GROUPS else "s--"
        axes.plot(*zip(*points, strict=True), style, ms=5, lw=1.5, label=group)
    each = [statistics.mean(s) for s in zip(*(r["test_layers"] for r in full), strict=True)]
    speeds = [len(each) / layer for layer in range(1, len(each) + 1)]
    axes.plot(speeds, [100 * y for y in each], "k:", lw=1, label="each layer")
    axes.axhline(score, color="gray", lw=0.8, label="full depth")
    lowest = min(mean_of(same, "test") for x in groups.values() for same in x.values())
    axes.set(xlim=(0.9, 7), ylim=(100 * lowest - 1, None))
    axes.set_xlabel("speed-up in multiply-adds over full depth")
    axes.set_ylabel("score on test data")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def _fewer_layers(rows: Sequence[dict]) -> dict[str, float]:
    """By system, how many times fewer layers its encoder has than the deepest one."""
    full = (row for row in rows if row["kind"] == "full depth")
    layers = {_system(row): len(row["test_layers"]) for row in full}
    return {system: max(layers.values()) / own for system, own in layers.items()}


def _system(row: dict) -> str:
    return row["run"].rpartition("-")[0]

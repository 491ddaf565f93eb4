"""What exits of a trained tagger are worth on the clock of a GPU, on text in batches as it comes.

Rivals have the same weights and the same batches: Hugging Face's model on padded ones, and its
layers on packed tokens with attention of variable length in a CUDA graph. A tagger as large as
BERT-base, whose weights are random, has the exits that the trained one made imposed. Numbers are
told and written as those of `gpu_probes` are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import gpu
import gpu_probes
import harness
import numpy as np
import texts
import torch
from datasets import Dataset

import tokenexit
from experiments import reading
from tokenexit import ExitPolicy
from tokenexit.calibrate import pareto_front
from tokenexit.evaluate import Evaluation, evaluate
from tokenexit.loops import gpu as gpu_loop
from tokenexit.models.tagger import Tagger
from tokenexit.text.encoding import Window
from tokenexit.training.self_sampling import SelfSampling

BASES = (ExitPolicy(window=0), ExitPolicy(window=1), ExitPolicy(window=0, min_active=2))
THRESHOLDS = (0.02, 0.04, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
# Seconds: of a path, for what comes behind it; and for which no case is begun.
RESERVE, LEAST = 8, 6
PARTS = ("trained", "BERT-base", "training step")
VARLEN, FULL, EXITS = "packed varlen, graph", "tokenexit", "tokenexit, exits"
LAYERS, LAYERS_EXITS = "layers, graph", "layers, exits, graph"


def path(tagger: Tagger, dev: Dataset, most_loss: float) -> Iterator[Evaluation]:
    """Full depth, then policies by real exits: of each of `BASES` the boldest within the loss.

    It is looked for by halves, as bolder ones lose more, but for chance; all that were tried are
    given. Ends where less than `RESERVE` seconds are left.

    Args:
        most_loss: of score.
    """
    full = evaluate(tagger, dev, ExitPolicy.never())
    yield full
    for base in BASES:
        good, bad = -1, len(THRESHOLDS)
        while bad - good > 1:
            if gpu_probes.left() < RESERVE:
                gpu_probes.say("  no time for more policies", keep=True)
                return
            at = (good + bad) // 2
            found = evaluate(tagger, dev, base.replace(threshold=THRESHOLDS[at]))
            yield found
            good, bad = (at, bad) if found.score >= full.score - most_loss else (good, at)


def fastest(found: Sequence[Evaluation], most_loss: float) -> Evaluation:
    """Of those that lose at most so much against the first, the fastest in multiply-adds."""
    good = [one for one in found if one.score >= found[0].score - most_loss]
    return max(good, key=lambda one: (one.flops_speedup, one.score))


@torch.inference_mode()
def exits_of(tagger: Tagger, windows: Sequence[Window], policy: ExitPolicy) -> list[list[int]]:
    """The layer that each token of each window leaves at."""
    found = [None] * len(windows)
    for indices, output, _ in tagger.run(windows, policy):
        for index, row in zip(indices, output.exit_layers.tolist(), strict=True):
            found[index] = row[: len(windows[index].input_ids)]
    return found


def save_exits(exits: Sequence[Sequence[int]], windows: Sequence[Window], path: Path):
    """Token by token, one window after another: layers to leave at, ids, words; and lengths."""
    rows = {
        "exits": exits,
        "input_ids": [w.input_ids for w in windows],
        "word_ids": [w.word_ids for w in windows],
    }
    kinds = {"exits": np.uint8, "input_ids": np.int32, "word_ids": np.int16}
    flat = {name: np.concatenate(row).astype(kinds[name]) for name, row in rows.items()}
    np.savez_compressed(path, lengths=np.array([*map(len, exits)], np.int16), **flat)


def batches(
    windows: Sequence[Window], exits: Sequence[Sequence[int]], size: int, order: str, most: int
) -> list[tuple[texts.Batch, torch.Tensor]]:
    """Padded batches with the layers that their tokens leave at, at most so many, evenly picked.

    Args:
        order: "sorted" by length, or "file".
    """
    indices = list(range(len(windows)))
    if order == "sorted":
        indices.sort(key=lambda i: len(windows[i].input_ids))
    starts = range(0, len(indices), size)
    starts = starts[:: -(-len(starts) // most)]
    made = []
    for start in starts:
        chosen = indices[start : start + size]
        rows = [texts.Sentence(windows[i].input_ids, windows[i].word_ids) for i in chosen]
        made.append((texts.batch(rows), texts.pad([exits[i] for i in chosen], 0)))
    return made


@torch.inference_mode()
def clock(
    title: str,
    truth: gpu.Model,
    model: gpu.Model,
    given: Sequence[tuple[texts.Batch, torch.Tensor]],
    policy: ExitPolicy | None,
    warm: bool = False,
    **facts,
) -> dict[str, float]:
    """Milliseconds of each system for all batches, after a look at the first batch's labels.

    Args:
        truth: the model in fp32.
        given: of `batches`.
        policy: by which tokens leave; None: where they are given to.
        warm: run each once, so that all kernels are compiled, and time nothing.
        facts: of the rows.
    """
    runs, tokens, cells, spent = {}, 0, 0, 0
    layers = len(model.ours.encoder.layers)
    for number, (batch, exits) in enumerate(given):
        tokens, cells = tokens + int(batch.real.sum()), cells + batch.real.numel()
        spent += int(exits.sum())
        batch, exits = gpu_probes.on_device(batch), exits.to(model.ours.device)
        made = systems(model, batch, exits, policy)
        if not number:
            alike(truth, model, batch, exits, {name: run() for name, run in made.items()})
        for name, run in made.items():
            runs.setdefault(name, []).append(run)
    found = {name: (lambda each=each: [run() for run in each]) for name, each in runs.items()}
    if warm:
        for run in found.values():
            run()
        return {}
    share = spent / tokens / layers
    facts |= dict(batches=len(given), cells=cells, active_fraction=round(share, 4))
    told = f"-- {title}: {len(given)} batches, {tokens} tokens in {cells} cells"
    told += f", {share:.3f} of token-layers"
    ms = gpu_probes.table(told, found, gpu.HF, tokens, **facts)
    for name, own in ((EXITS, FULL), (LAYERS_EXITS, LAYERS)):
        if {gpu.HF, VARLEN, name, own} <= ms.keys():
            over = (f"{other} {ms[other] / ms[name]:.2f}" for other in (gpu.HF, VARLEN, own))
            gpu_probes.say(f"  {name} over {', '.join(over)}", keep=True)
    return ms


def systems(model: gpu.Model, batch: texts.Batch, exits: torch.Tensor, policy) -> dict:
    """By name, what gives the logits `[B, N, C]` of a batch."""
    padded = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    imposed = exits if policy is None else None
    never = ExitPolicy.never()
    model.ours.policy = never
    found = {
        gpu.HF: lambda: model.theirs(**padded).logits,
        VARLEN: gpu_probes.packed_graph(model, batch, gpu_probes.varlen),
        FULL: lambda: gpu_probes.ours(model, batch, policy=never),
        EXITS: lambda: gpu_probes.ours(model, batch, imposed, policy=policy or never),
    }
    if batch.input_ids.is_cuda:
        found[LAYERS] = gpu.layers_alone(model.ours, batch, None)
        model.ours.policy = policy or never
        found[LAYERS_EXITS] = gpu.layers_alone(model.ours, batch, imposed)
        model.ours.policy = never
    return found


def alike(truth, model, batch, exits, logits: dict[str, torch.Tensor]):
    """Tell which systems give other labels than rounding explains.

    Labels should be Hugging Face's in fp32, or with exits those of the loop in PyTorch where tokens
    leave as given; twice as many may differ as do in these themselves for the dtype.
    """
    wanted, same = (
        {name: run().argmax(-1) for name, run in gpu.judges(one, batch, exits).items()}
        for one in (truth, model)
    )
    for name, got in logits.items():
        judge = gpu.PAPER if name in (EXITS, LAYERS_EXITS) else gpu.HF
        apart, allowed = (
            float((labels != wanted[judge])[batch.real].double().mean())
            for labels in (got.argmax(-1), same[judge])
        )
        if apart > 2 * allowed + 0.02:
            gpu_probes.BAD.append(name)
            told = f"WRONG {name}: {apart:.2%} of labels differ from fp32, {judge}'s {allowed:.2%}"
            gpu_probes.say(told, keep=True)


def sampled_share(tagger: Tagger, data: Dataset) -> float:
    """Of token-layers, under policies as self-sampling draws them, in inference."""
    windows = tagger.windows(data["words"])
    policies = SelfSampling().draw(len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    exits = exits_of(tagger, windows, [policies[i] for i in order])
    flat = np.concatenate(exits)
    return float(flat.mean()) / tagger.model.config.num_hidden_layers


def choose(tagger: Tagger, dev: Dataset, most_loss: float) -> tuple[list[Evaluation], ExitPolicy]:
    """Scores on development data along a path, and the policy chosen; the model's is that then."""
    found = list(path(in_half(tagger), dev, most_loss))
    tagger.model.policy = fastest(found, most_loss).policy
    return found, tagger.model.policy


def read(
    tagger: Tagger,
    test: Dataset,
    found: Sequence[Evaluation],
    chosen: ExitPolicy,
    out: Path,
    **facts,
):
    """Tell and write scores on test data: full depth, the policy chosen, those that none beats.

    Args:
        found, chosen: of `choose`.
        facts: of the rows.
    """
    tagger = in_half(tagger)
    wanted = {one.policy: one for one in [found[0], *pareto_front(found, "flops_speedup")]}
    wanted = {chosen: wanted[chosen], **wanted} if chosen in wanted else wanted
    for policy in [ExitPolicy.never(), *(p for p in wanted if p != found[0].policy)]:
        if gpu_probes.left() < 2:
            return
        one, on_test = wanted[policy], evaluate(tagger, test, policy)
        row = {
            "kind": "full depth" if one is found[0] else "token",
            "chosen": policy == chosen,
            "policy": policy.to_dict(),
            "dev": one.score,
            "test": on_test.score,
            "test_types": on_test.scores.get("types"),
            "flops_speedup": round(on_test.flops_speedup, 3),
            "layer_speedup": round(reading.layer_speedup(on_test), 3),
            "exits_per_layer": on_test.exits_per_layer,
            "dtype": str(tagger.model.dtype)[6:],
            "computed_on": reading.device_of(tagger),
            **facts,
            **harness.origin(),
        }
        harness.write("gpu_scores", [row], out)
        name = "full depth"
        if one is not found[0]:
            name = f"k={policy.window} t={policy.threshold} m={policy.min_active}"
        gpu_probes.say(
            f"  {name:15} dev {100 * one.score:.2f} test {100 * on_test.score:.2f} "
            f"operations x{on_test.flops_speedup:.2f} token-layers x{row['layer_speedup']:.2f}"
            f"{' <- chosen on dev' if policy == chosen else ''}",
            keep=True,
        )


def measure(
    tagger: Tagger,
    test: Dataset,
    train: Dataset,
    out: Path,
    *,
    parts: Sequence[str] = PARTS,
    sizes: Sequence[int] = (64, 256),
    most: int = 12,
    shape: dict | None = None,
    step: tuple[int, int] = (32, 128),
    warm: bool = False,
):
    """Clocks of the trained tagger and of BERT-base, and the step of training.

    Args:
        tagger: trained, in fp32, with its policy.
        parts: of `PARTS`.
        sizes: sentences of a batch.
        most: batches that are timed of each kind.
        shape: of the large tagger, see `gpu.base`.
        step: sentences and tokens of a step of training.
        warm: run everything once, so that all kernels are compiled.
    """
    policy = tagger.model.policy
    exact, half = _pair(tagger.model.eval()), in_half(tagger)
    device, dtype = half.model.device, half.model.dtype
    windows = half.windows(test["words"])
    exits = exits_of(half, windows, policy)
    if not warm:
        save_exits(exits, windows, out / "exits.npz")
    gpu_loop.FALLBACKS.clear()

    @cache
    def large():
        return gpu.base(**(shape or {})).to(device, torch.float32)

    def clocks(name, truth, its_policy, size):
        one = truth.to(device, dtype)
        for order in ("file", "sorted"):
            if gpu_probes.left() < LEAST:
                gpu_probes.say(f"no time for {name}, {size} sentences, {order}", keep=True)
                return
            given = batches(windows, exits, size, order, most)
            title = f"{name}, {size} sentences, {order}"
            facts = dict(tagger=name, sentences=size, order=order, dtype=str(dtype)[6:])
            run = partial(clock, title, truth, one, given, its_policy, warm, **facts)
            gpu_probes.attempt(title, run)

    if "trained" in parts:
        clocks("trained", exact, policy, sizes[0])
    if "BERT-base" in parts:
        clocks("BERT-base", large(), None, sizes[0])
    if "training step" in parts and gpu_probes.left() > LEAST:
        share = sampled_share(half, train.take(min(512, len(train))))
        share = max(share, 1 / len(exact.ours.exit_heads))
        run = partial(gpu_probes.training_step, large().ours, *step, share, warm)
        gpu_probes.attempt("training step", run)
    if "BERT-base" in parts:
        for size in sizes[1:]:
            clocks("BERT-base", large(), None, size)
    if gpu_loop.FALLBACKS:
        gpu_probes.say(f"a slower path served: {dict(gpu_loop.FALLBACKS)}", keep=True)


def in_half(tagger: Tagger) -> Tagger:
    """A copy in fp16, on a CPU in bf16, which takes 64 sentences at a time."""
    model = copy.deepcopy(tagger.model).eval()
    dtype = torch.bfloat16 if model.device.type == "cpu" else torch.float16
    return Tagger(model.to(dtype), tagger.tokenizer, 64)


def _pair(ours) -> gpu.Model:
    theirs = tokenexit.to_hugging_face(ours)
    theirs.set_attn_implementation("sdpa")
    return gpu.Model(theirs, ours)

"""What exits of a trained tagger are worth on the clock of a GPU, on text in batches as it comes.

Rivals have the same weights and the same batches: Hugging Face's model on padded ones, and its
layers on packed tokens with attention of variable length in a CUDA graph. A tagger as large as
BERT-base, whose weights are random, has the exits that the trained one made imposed. Numbers are
told and written as those of `gpu_probes` are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
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
from tokenexit.evaluate import Evaluation, evaluate
from tokenexit.loops import gpu as gpu_loop
from tokenexit.models.tagger import Tagger
from tokenexit.text.encoding import Window
from tokenexit.training.self_sampling import SelfSampling

BASES = (ExitPolicy(window=0), ExitPolicy(window=1), ExitPolicy(window=0, min_active=2))
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
VARLEN, FULL, EXITS = "packed varlen, graph", "tokenexit", "tokenexit, exits"
LAYERS, LAYERS_EXITS = "layers, graph", "layers, exits, graph"


def path(tagger: Tagger, dev: Dataset, most_loss: float) -> Iterator[Evaluation]:
    """Full depth, then policies, each of `BASES` from the cautious to the bold, by real exits.

    Args:
        most_loss: of score; a base ends with a policy that loses three times as much.
    """
    full = evaluate(tagger, dev, ExitPolicy.never())
    yield full
    for base in BASES:
        for threshold in THRESHOLDS:
            found = evaluate(tagger, dev, base.replace(threshold=threshold))
            yield found
            if found.score < full.score - 3 * most_loss:
                break


def fastest(found: Sequence[Evaluation], most_loss: float) -> Evaluation:
    """Of those that lose at most so much against the first, the fastest in multiply-adds."""
    good = [one for one in found if one.score >= found[0].score - most_loss]
    return max(good, key=lambda one: (one.flops_speedup, one.score))


def front(found: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that no other beats in both score and speed, by speed."""
    kept = []
    for one in sorted(found, key=lambda x: (x.flops_speedup, x.score), reverse=True):
        if not kept or one.score > kept[-1].score:
            kept.append(one)
    return kept[::-1]


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


def training_step(model, sentences: int, length: int, share: float, warm: bool = False):
    """Time a step of BERT-base at full depth and under exits as self-sampling draws them.

    Args:
        model: ours, in fp32.
        share: of token-layers that are computed.
    """
    device = model.device.type
    model = copy.deepcopy(model).train()
    batch = texts.batch(texts.uniform(sentences, length, model.config.vocab_size))
    exits = texts.imposed_exits(batch, len(model.encoder.layers), share)
    batch, exits = gpu_probes.on_device(batch), exits.to(model.device)
    labels = (batch.word_ids % model.num_labels).masked_fill(batch.word_ids < 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device != "cpu")
    call = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "word_ids": batch.word_ids,
        "labels": labels,
        "policy": ExitPolicy.never(),
    }

    def step(layers):
        with torch.autocast(device, torch.bfloat16):
            loss = model(**call, exit_layers=layers).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    found = {"full depth": lambda: step(None), "self-sampling": lambda: step(exits)}
    if warm:
        return [run() for run in found.values()]
    title = f"-- training step, {sentences} x {length}, bf16, {share:.3f} of token-layers"
    facts = dict(sentences=sentences, longest=length, active_fraction=round(share, 4))
    return gpu_probes.table(title, found, "full depth", sentences * length, **facts)


def sampled_share(tagger: Tagger, data: Dataset) -> float:
    """Of token-layers, under policies as self-sampling draws them, in inference."""
    windows = tagger.windows(data["words"])
    policies = SelfSampling().draw(len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    exits = exits_of(tagger, windows, [policies[i] for i in order])
    flat = np.concatenate(exits)
    return float(flat.mean()) / tagger.model.config.num_hidden_layers


def accuracy(
    tagger: Tagger, dev: Dataset, test: Dataset, most_loss: float, out: Path, **facts
) -> ExitPolicy:
    """Scores along a path of policies; the one chosen on development data.

    Test data are read at full depth and for the policies that none beats on development data.
    """
    found = list(path(tagger, dev, most_loss))
    chosen = fastest(found, most_loss)
    best = front(found)
    for one in best if found[0] in best else [found[0], *best]:
        on_test = evaluate(tagger, test, one.policy)
        row = {
            "kind": "full depth" if one is found[0] else "token",
            "chosen": one is chosen,
            "policy": one.policy.to_dict(),
            "dev": one.score,
            "test": on_test.score,
            "test_types": on_test.scores.get("types"),
            "flops_speedup": round(on_test.flops_speedup, 3),
            "layer_speedup": round(reading.layer_speedup(on_test), 3),
            "exits_per_layer": on_test.exits_per_layer,
            "computed_on": reading.device_of(tagger),
            **facts,
            **harness.origin(),
        }
        harness.write("gpu_scores", [row], out)
        name = "full depth"
        if one is not found[0]:
            name = f"k={one.policy.window} t={one.policy.threshold} m={one.policy.min_active}"
        gpu_probes.say(
            f"  {name:15} dev {100 * one.score:.2f} test {100 * on_test.score:.2f} "
            f"operations x{on_test.flops_speedup:.2f} token-layers x{row['layer_speedup']:.2f}"
            f"{' <- chosen on dev' if one is chosen else ''}",
            keep=True,
        )
    return chosen.policy


def measure(
    tagger: Tagger,
    dev: Dataset,
    test: Dataset,
    train: Dataset,
    out: Path,
    *,
    most_loss: float = 0.005,
    sizes: Sequence[int] = (64, 256),
    most: int = 18,
    shape: dict | None = None,
    step: tuple[int, int] = (32, 128),
    warm: bool = False,
    **facts,
):
    """All of it: scores, clocks of the trained tagger and of BERT-base, the step of training.

    Args:
        tagger: trained, in fp32.
        sizes: sentences of a batch.
        most: batches that are timed of each kind.
        shape: of the large tagger, see `gpu.base`.
        step: sentences and tokens of a step of training.
        warm: run everything once on little text, so that all kernels are compiled.
        facts: of the rows of scores.
    """
    device = tagger.model.device
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    exact = _pair(tagger.model.eval())
    trained = exact.to(device, dtype)
    tagger = Tagger(trained.ours, tagger.tokenizer, sizes[0])
    policy = ExitPolicy(threshold=0.3)
    if not warm:
        policy = accuracy(tagger, dev, test, most_loss, out, dtype=str(dtype)[6:], **facts)
    windows = tagger.windows(test["words"])
    exits = exits_of(tagger, windows, policy)
    if not warm:
        save_exits(exits, windows, out / "exits.npz")
    share = sampled_share(tagger, train.take(min(512, len(train))))
    base = gpu.base(**(shape or {})).to(device, torch.float32)
    gpu_loop.FALLBACKS.clear()
    plan = [("trained", exact, trained, policy, sizes[0])]
    half = base.to(device, dtype)
    plan += [("BERT-base", base, half, None, size) for size in sizes]
    for name, truth, one, its_policy, size in plan:
        for order in ("sorted", "file"):
            given = batches(windows, exits, size, order, most)
            title = f"{name}, {size} sentences, {order}"
            facts = dict(tagger=name, sentences=size, order=order, dtype=str(dtype)[6:])
            run = partial(clock, title, truth, one, given, its_policy, warm, **facts)
            gpu_probes.attempt(title, run)
    if gpu_loop.FALLBACKS:
        gpu_probes.say(f"a slower path served: {dict(gpu_loop.FALLBACKS)}", keep=True)
    share = max(share, 1 / len(exact.ours.exit_heads))
    gpu_probes.attempt("training step", partial(training_step, base.ours, *step, share, warm))


def _pair(ours) -> gpu.Model:
    theirs = tokenexit.to_hugging_face(ours)
    theirs.set_attn_implementation("sdpa")
    return gpu.Model(theirs, ours)

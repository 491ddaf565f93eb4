"""What exits of a tagger trained on a GPU are worth on its clock, as `gpu_exits` tells it.

A tagger as large as BERT-base, whose weights are random, has the exits that the trained one made
imposed. Numbers are told and written as those of `gpu_probes` are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import gpu
import gpu_exits
import gpu_probes
import harness
import numpy as np
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

BASES = (
    ExitPolicy(window=0, criterion="max_prob", growth=1.5),
    ExitPolicy(window=0),
    ExitPolicy(window=1),
    ExitPolicy(window=0, min_active=2),
)
THRESHOLDS = (0.02, 0.04, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
RESERVE = 8  # seconds of a path, for what comes behind it
PARTS = ("trained", "BERT-base", "training step")


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
        gpu_probes.say(
            f"  {policy!s:40} dev {100 * one.score:.2f} test {100 * on_test.score:.2f} "
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
        gpu_exits.save_exits(exits, windows, out / "exits.npz")
    gpu_loop.FALLBACKS.clear()

    @cache
    def large():
        return gpu.base(**(shape or {})).to(device, torch.float32)

    def clocks(name, truth, its_policy, size):
        one = truth.to(device, dtype)
        gpu_exits.clocks(name, truth, one, windows, exits, its_policy, size, most, warm)

    if "trained" in parts:
        clocks("trained", exact, policy, sizes[0])
    if "BERT-base" in parts:
        clocks("BERT-base", large(), None, sizes[0])
    if "training step" in parts and gpu_probes.left() > gpu_exits.LEAST:
        share = sampled_share(half, train.take(min(512, len(train))))
        share = max(share, 1 / len(exact.ours.exit_heads))
        run = partial(gpu_probes.training_step, large(), *step, share, warm)
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

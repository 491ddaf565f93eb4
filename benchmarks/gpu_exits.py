"""What exits are worth on the clock of a GPU, on text in batches as it comes.

    PYTHONPATH=benchmarks python -m gpu_exits FILE.npz ...          (--help for options)

A file has the tokens of a test set and the layers that a trained tagger has them leave at
(`python -m experiments save-exits`). They are imposed on a tagger as large as BERT-base, whose
weights are random. Rivals have the same weights and the same batches: Hugging Face's model on
padded ones, and its layers on packed tokens with attention of variable length in a CUDA graph.
Numbers are told and written as those of `gpu_probes` are; nothing but what those need is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gpu
import gpu_probes
import numpy as np
import texts
import torch

from tokenexit import ExitPolicy
from tokenexit.loops import gpu as gpu_loop
from tokenexit.text.encoding import Window

LEAST = 6  # seconds, for which no case is begun
VARLEN, FULL, EXITS = "packed varlen, graph", "tokenexit", "tokenexit, exits"
LAYERS, LAYERS_EXITS = "layers, graph", "layers, exits, graph"
_KINDS = {"exits": np.uint8, "input_ids": np.int32, "word_ids": np.int16}


def save_exits(exits: Sequence[Sequence[int]], windows: Sequence[Window], path: Path):
    """Token by token, one window after another: layers to leave at, ids, words; and lengths."""
    rows = {
        "exits": exits,
        "input_ids": [w.input_ids for w in windows],
        "word_ids": [w.word_ids for w in windows],
    }
    flat = {name: np.concatenate(row).astype(_KINDS[name]) for name, row in rows.items()}
    np.savez_compressed(path, lengths=np.array([*map(len, exits)], np.int16), **flat)


def read_exits(path: Path) -> tuple[list[texts.Sentence], list[list[int]]]:
    """What `save_exits` wrote: tokens of each window, and layers that they leave at.

    Raises:
        ValueError: a file that it did not write.
    """
    kept = np.load(path)
    if missing := {"lengths", *_KINDS} - {*kept.files}:
        raise ValueError(f"{path} has {kept.files}; expected {sorted(missing)} too")
    ends = kept["lengths"].astype(int).cumsum()[:-1]
    exits, ids, words = (
        [part.tolist() for part in np.split(kept[name].astype(int), ends)] for name in _KINDS
    )
    return [texts.Sentence(*pair) for pair in zip(ids, words, strict=True)], exits


def batches(
    windows: Sequence[texts.Sentence | Window],
    exits: Sequence[Sequence[int]],
    size: int,
    order: str,
    most: int,
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


def clocks(name, truth, model, windows, exits, policy, size, most, warm=False, **facts):
    """`clock` for batches of so many sentences, in the order of the file and sorted by length."""
    dtype = str(model.ours.dtype)[6:]
    for order in ("file", "sorted"):
        title = f"{name}, {size} sentences, {order}"
        if gpu_probes.left() < LEAST:
            gpu_probes.say(f"no time for {title}", keep=True)
            return
        given = batches(windows, exits, size, order, most)
        known = dict(tagger=name, sentences=size, order=order, dtype=dtype, **facts)
        run = partial(clock, title, truth, model, given, policy, warm, **known)
        gpu_probes.attempt(title, run)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.npz")
    parser.add_argument("--size", type=int, default=64, help="sentences of a batch")
    parser.add_argument("--most", type=int, default=12, help="batches, evenly picked")
    options = gpu_probes.choose(parser, arguments, "exits")
    if options is None:
        return 2
    kept = {path: read_exits(path) for path in options.files}
    shape = {}
    if options.tiny:
        layers = max(max(map(max, exits)) for _, exits in kept.values())
        shape = gpu_probes.TINY | {"num_hidden_layers": layers, "vocab_size": 200}
    base = gpu.base(**shape)
    dtype = torch.bfloat16 if options.device == "cpu" else torch.float16
    truth, model = (base.to(options.device, x) for x in (torch.float32, dtype))
    gpu_probes.say("models are on the device")
    vocab = model.ours.config.vocab_size  # of random weights, for which any token will do
    gpu_loop.FALLBACKS.clear()
    for path, (windows, exits) in kept.items():
        windows = [texts.Sentence([i % vocab for i in w.input_ids], w.word_ids) for w in windows]
        like = "BERT-base" if len(kept) == 1 else f"BERT-base, {path.stem}"
        clocks(like, truth, model, windows, exits, None, options.size, options.most,
               options.warm, exits_of=path.stem)  # fmt: skip
    if gpu_loop.FALLBACKS:
        gpu_probes.say(f"a slower path served: {dict(gpu_loop.FALLBACKS)}", keep=True)
    return gpu_probes.ended()


if __name__ == "__main__":
    sys.exit(main())

"""Exit heads of a frozen encoder, distilled from its last layer: regression on its states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.text.encoding import Window

_STEPS, _MOST_EPOCHS = 1500, 40


@torch.inference_mode(False)
@torch.enable_grad()
def distill_heads(
    tagger: Tagger,
    windows: Sequence[Window],
    *,
    epochs: int | None = None,
    batch_size: int = 512,
    learning_rate: float = 3e-3,
    memory_mib: int = 2048,
    seed: int = 42,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
):
    """Train the heads below the last layer to say what that says; nothing else is changed.

    Each window goes through the model once, at full depth. The states of its words, of all layers
    below the last, are kept in half precision, for heads that hear their neighbours with those of
    the tokens beside; on these each head learns the probabilities of the last, by Adam.

    Args:
        tagger: whose model's heads are trained; its last one is the teacher.
        windows: of text, which needs no labels.
        epochs: passes over the words. None: as many as 1,500 steps take, at most 40.
        batch_size: words a step.
        learning_rate: of the first step, for states scaled to a deviation of 1.
        memory_mib: that the states may take: of more text a random part is used.
        seed: of that part and of the order of the words.
        progress: called with (what, done, total).

    Raises:
        ValueError: a single layer; no words; epochs below 1.
    """
    model = tagger.model
    config, heads = model.config, [*model.exit_heads]
    below, labels, near = len(heads) - 1, config.num_labels, 3 if config.neighbor_heads else 1
    d = near * config.hidden_size
    if not below:
        raise ValueError("got a model of one layer; expected two or more, to leave below the last")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}; expected 1 or more")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator, device="cpu").tolist()
    room, chosen = memory_mib * 2**20 // (2 * below * d), []
    for index in order:
        room -= windows[index].n_words
        if room < 0 and chosen:
            break
        chosen.append(windows[index])
    count = sum(window.n_words for window in chosen)
    if not count:
        raise ValueError("the texts have no words; expected some")

    device, place = heads[0].weight.device, 0
    states = torch.empty(below, count, d, dtype=torch.float16, device=device)
    wanted = torch.empty(count, labels, dtype=torch.float32, device=device)
    for number, (layers, logits) in enumerate(_states(tagger, chosen, near > 1), 1):
        here = slice(place, place + len(logits))
        states[:, here], wanted[here] = layers, logits.float().softmax(-1)
        place = here.stop
        progress("read the texts", min(number * tagger.batch_size, len(chosen)), len(chosen))

    means, scales = [], []
    for layer in states:  # scaled in place: a step then only reads them
        values = layer.float()
        means.append(values.mean(0))
        scales.append(values.std(0, correction=0).clamp(min=1e-3))
        layer.copy_((values - means[-1]) / scales[-1])
    mean, scale = torch.stack(means)[:, None], torch.stack(scales)[:, None]
    # Whatever the user's default dtype is.
    weight = torch.zeros(below, d, labels, dtype=torch.float32, device=device, requires_grad=True)
    bias = wanted.mean(0).clamp(min=1e-6).log().expand(below, 1, labels).clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    steps = math.ceil(count / batch_size)
    if epochs is None:
        epochs = min(_MOST_EPOCHS, math.ceil(_STEPS / steps))
    total = epochs * steps
    for epoch in range(epochs):
        words = torch.randperm(count, generator=generator, device="cpu").to(device)
        for step, batch in enumerate(words.split(batch_size), epoch * steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / total)
            logs = F.log_softmax(torch.baddbmm(bias, states[:, batch].float(), weight), -1)
            loss = -(wanted[batch] * logs).sum(-1).mean(1).sum()  # each head has its own
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        progress("train the heads", epoch + 1, epochs)
    with torch.no_grad():
        weight = weight / scale.mT
        bias = bias - mean @ weight
        for head, its_weight, its_bias in zip(heads, weight, bias, strict=False):
            head.weight.copy_(torch.cat([part.T for part in its_weight.chunk(near)]))
            head.bias.copy_(F.pad(its_bias[0], (0, (near - 1) * labels)))


def _states(
    tagger: Tagger, windows: Sequence[Window], hears: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each batch the states `[L - 1, n, d]` of words' first tokens, and the last's logits.

    Args:
        hears: `[L - 1, n, 3d]`, behind them those of the tokens before and after; 0 for none.
    """
    with _inputs(tagger.model.exit_heads) as seen:
        for _, output, firsts in tagger.run(windows, ExitPolicy.never(), output_layer_logits=True):
            lengths = (output.exit_layers > 0).sum(1).cpu()
            starts = lengths.cumsum(0) - lengths
            at = torch.cat([a + b for a, b in zip(firsts, starts, strict=True)]).to(seen[0].device)
            logits = [output.logits[row, places] for row, places in enumerate(firsts)]
            parts = [torch.stack([layer[at] for layer in seen[:-1]])]
            if hears:
                for step, ends in ((-1, starts), (1, starts + lengths - 1)):
                    alone = torch.isin(at, ends.to(at.device))
                    near = torch.where(alone, at, at + step)
                    states = torch.stack([layer[near] for layer in seen[:-1]])
                    parts.append(states.masked_fill(alone[:, None], 0))
            yield torch.cat(parts, -1), torch.cat(logits)
            seen.clear()


@contextmanager
def _inputs(modules: Sequence[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What each of these modules is called with: all that is computed goes through their calls."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()

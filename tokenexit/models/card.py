"""The model card of a saved tagger: what it was made from, its speeds, and what is promised."""

from __future__ import annotations

import os
from pathlib import Path

from tokenexit.dial import Dial, percent, rounded_down
from tokenexit.files import write_aside
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.text.scoring import shown

NAME = "README.md"
_OURS = "<!-- Written by tokenexit whenever the tagger is saved. Without this line it stays. -->"
_CARD = """---
{head}
---

{ours}

# A tagger whose tokens leave early

{about}

A word leaves as soon as a classifier between the layers is sure of it and of its neighbors; the
others still see it. How soon is chosen at any time, without loading anew.

## Speeds

{speeds}

## Use

```python
import tokenexit

tagger = tokenexit.Tagger.from_pretrained("NAME OR FOLDER OF THIS TAGGER")
tagger.tag(["Ada Lovelace lived in London."])[0].spans
```
"""
_PROMISE = """Promised: {promise}. It is about
text like that, and holds for all speeds marked so together; a bound in the table is that of one
speed by itself. Speeds are in multiply-adds over full depth: `tagger.model.set_speed(2.5)` takes
the most cautious that needs so many times fewer, `"promised"` the fastest within the promise."""


def write_card(
    model: TokenExitForTokenClassification,
    folder: str | os.PathLike,
    target: str | os.PathLike | None = None,
):
    """Write the card to a folder, unless it has one by somebody else.

    Args:
        target: a folder that this one's files are to replace, which may have such a card, too.
    """
    for there in (Path(folder) / NAME, Path(target or folder) / NAME):
        if there.exists() and _OURS not in there.read_text(encoding="utf-8", errors="replace"):
            return
    with write_aside(Path(folder) / NAME) as aside:
        aside.write_text(card(model), encoding="utf-8")


def card(model: TokenExitForTokenClassification) -> str:
    """The card, in the hub's Markdown."""
    config, dial, source = model.config, model.dial, model.config.made_from
    head = ["library_name: tokenexit", "pipeline_tag: token-classification"]
    if source and not source.startswith("./"):
        head.append(f"base_model: {source}")
    about = f"{config.num_hidden_layers} layers of {config.hidden_size}, "
    about += f"labels {shown([*config.id2label.values()], 50)}."
    about = f"{config.source_model_type}, {'8-bit weights, ' if config.int8 else ''}{about}"
    if source:
        about = f"Made from `{source.removeprefix('./')}`: {about}"
    return _CARD.format(
        head="\n".join([*head, "tags:", "- early-exit"]),
        ours=_OURS,
        about=about,
        speeds=_speeds(dial) if dial else f"Not calibrated with a promise. Policy: {model.policy}.",
    )


def _speeds(dial: Dial) -> str:
    heads = ["policy", "multiply-adds", "other labels", *(f"of {name}" for name in dial.per_type)]
    heads.append(f"with {percent(dial.confidence, 0)} below")
    heads += [dial.metric.replace("_", " ").replace("f1", "F1")] if dial.metric else []
    rows = [[*heads, ""], ["---", *["--:"] * (len(heads) - 1), "---"]]
    for number, one in enumerate(dial.speeds):
        row = [str(one.policy), f"{rounded_down(one.speedup)}x", f"{one.disagreement:.2%}"]
        row += [f"{one.by_type[name]:.2%}" for name in dial.per_type]
        row += [f"{one.bound:.2%}", *([f"{one.score:.4f}"] if dial.metric else [])]
        within = dial.promised is not None and number <= dial.promised
        rows.append([*row, "promised" if within else ""])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if dial.promised is None:
        return f"{table}\n\nNothing is promised of this tagger."
    return f"{table}\n\n{_PROMISE.format(promise=dial.promise)}"

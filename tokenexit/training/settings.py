"""Settings of the Trainer as text."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import types
import typing

from transformers import TrainingArguments

# Fields of TrainingArguments that `training_arguments` has arguments for.
OURS = {
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "seed": "seed",
}


def parse_setting(name: str, text: str):
    """The value of a field of `transformers.TrainingArguments`, read as the field's type says.

    `None`; `true`, `yes`, `on`, `false`, `no`, `off` in any case; finite numbers; JSON for lists
    and dicts; else, where the field takes text, the text itself.

    Raises:
        ValueError: no such field, or one that `training_arguments` has an argument for; a text
            that is none of the field's types.
    """
    fields = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    if name in OURS:
        raise ValueError(f"{name} has an option of its own: --{OURS[name].replace('_', '-')}")
    if name not in fields or name == "remove_unused_columns":  # there are no columns to remove
        close = difflib.get_close_matches(name, fields)
        hint = f"; close are {', '.join(close)}" if close else ""
        raise ValueError(f"{name} is no setting of transformers.TrainingArguments{hint}")
    hint = typing.get_type_hints(TrainingArguments)[name]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    plain = [typing.get_origin(kind) or kind for kind in kinds]
    for kind, read in _READERS.items():
        if kind in plain:
            try:
                return read(text)
            except (KeyError, ValueError):
                continue
    if str in plain or any(isinstance(kind, enum.EnumMeta) for kind in plain):
        return text
    expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in plain)
    raise ValueError(f"{name} is {text!r}; expected {expected.replace('NoneType', 'None')}")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _json(kind: type):
    def read(text: str):
        if not isinstance(value := json.loads(text), kind):
            raise ValueError(text)
        return value

    return read


_TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_READERS = {
    type(None): lambda text: {"none": None, "null": None}[text.lower()],
    bool: lambda text: _TRUTH[text.lower()],
    int: int,
    float: _finite,
    dict: _json(dict),
    list: _json(list),
}

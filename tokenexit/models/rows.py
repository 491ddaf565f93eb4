"""The padded inputs of a call: shapes and types are checked at once, values without a wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from tokenexit.models.configuration import TokenExitConfig, settings_of
from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import word_ids_from_kinds

# Arguments of Hugging Face's models that ask for what only a computation of all tokens has.
_OTHERS = frozenset(
    (
        "cache_position",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "head_mask",
        "output_attentions",
        "past_key_values",
        "use_cache",
    )
)
Limits = Mapping[str, tuple[int, int]]  # of rows by name: the least and the largest value
_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
_MOST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Rows:
    """Padded inputs of B sentences in rows of N tokens, of the right types and shapes.

    Attributes:
        input_ids: `[B, N]` int64.
        attention_mask: `[B, N]` bool or int64, not 0 at real tokens.
        word_ids, token_type_ids, position_ids, exit_layers: `[B, N]` int64, or None.
        inputs_embeds: `[B, N, d]` or None; then input_ids stand in for them.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    word_ids: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    exit_layers: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        config: TokenExitConfig,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **more: torch.Tensor | None,
    ) -> Rows:
        """Those of a call of the model; `labels` are only checked.

        Raises:
            TypeError: what is no tensor, or of another type.
            ValueError: shapes that differ; both or none of ids and embeddings; an empty batch.
        """
        if inputs_embeds is not None:
            if input_ids is not None:
                raise ValueError("got both input_ids and inputs_embeds; expected one of them")
            input_ids = _stand_ins(inputs_embeds, config)
            if more.get("word_ids") is None:
                each = torch.arange(input_ids.shape[1], device=input_ids.device)
                more["word_ids"] = each.expand_as(input_ids)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **more}
        if all(isinstance(x, torch.Tensor) for x in (input_ids, more.get("position_ids"))):
            if more["position_ids"].shape == (1, *input_ids.shape[1:]):  # the same for all
                given["position_ids"] = more["position_ids"].expand_as(input_ids)
        _check({**given, "labels": labels})
        given = {name: _as_int64(value) for name, value in given.items()}
        mask = given["attention_mask"]
        if mask is None:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        elif mask.dtype not in (torch.bool, torch.int64):
            given["attention_mask"] = mask != 0
        return cls(**given, inputs_embeds=inputs_embeds)

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """All of them by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def real(self) -> torch.Tensor:
        """`[B, N]` bool, true at real tokens."""
        mask = self.attention_mask
        return mask if mask.dtype == torch.bool else mask != 0

    def clamped(self, limits: Limits, most: int) -> tuple[Rows, torch.Tensor]:
        """Rows whose values may be looked up, whatever these have; and `[]` bool, `sound`.

        That is whether those of real tokens are as they were, there is one, and no sentence has
        more than `most`. The host does not wait.
        """
        real, inside, bad = self.real, {}, None
        for name, (low, high) in limits.items():
            if (value := getattr(self, name)) is not None:
                inside[name] = value.clamp(low, high)
                other = inside[name] != value
                bad = other if bad is None else bad | other
        sound = real.any() > (bad & real).any()  # and not
        if real.shape[1] > most:
            sound = sound & (real.sum(1) <= most).all()
        return replace(self, **inside, attention_mask=real), sound

    def words(self, kinds: torch.Tensor) -> torch.Tensor:
        """`[B, N]` int64: the word of each token, as given or by the `kinds` of the vocabulary.

        They are to be asked of rows that are `clamped`.
        """
        if self.word_ids is not None:
            return self.word_ids
        return word_ids_from_kinds(kinds[self.input_ids], self.real)

    def explain(
        self, limits: Limits, config: TokenExitConfig, kinds: torch.Tensor
    ) -> ValueError | None:
        """The error for rows that are not sound; None if they are."""
        real, (inside, _) = self.real, self.clamped(limits, config.max_tokens)
        if not real.any():
            return ValueError("attention_mask is 0 everywhere; expected at least one token")
        longest, row = (int(x) for x in real.sum(1).max(0))
        if longest > config.max_tokens:
            return ValueError(
                f"sentence {row} has {longest} tokens; expected at most {config.max_tokens} "
                "(tokenexit.Tagger cuts longer sentences into overlapping windows)"
            )
        found = [(name, getattr(self, name), *limit) for name, limit in limits.items()]
        found = [(name, v[real], *limit) for name, v, *limit in found if v is not None]
        if self.exit_layers is not None:
            packed = pack(real, inside.words(kinds))
            values = packed.pack(self.exit_layers)[packed.first_token]
            found.append(("exit_layers", values, 1, config.num_hidden_layers))
        return next(filter(None, (out_of_range(*each) for each in found)), None)


def limits_of(config: TokenExitConfig) -> Limits:
    """Those of integers that are looked up."""
    known = settings_of(config)
    limits = {
        "input_ids": (0, known["vocab_size"] - 1),
        "position_ids": (0, known["max_position_embeddings"] - 1),
        "word_ids": (-1, _MOST),
    }
    if known["type_vocab_size"]:
        limits["token_type_ids"] = (0, known["type_vocab_size"] - 1)
    return limits


def out_of_range(name: str, values: torch.Tensor, low: int, high: int) -> ValueError | None:
    """The error for values beyond these; None if there are none."""
    if not values.numel():
        return None
    smallest, largest = (int(x) for x in values.aminmax())
    if low <= smallest and largest <= high:
        return None
    got = smallest if smallest < low else largest
    return ValueError(f"{name} has {got}; expected values from {low} to {high}")


def check_others(others: Mapping[str, object]):
    """Reject all but arguments of Hugging Face's that ask for nothing."""
    for name, value in others.items():
        if name not in _OTHERS:
            raise TypeError(f"forward got an unexpected keyword argument {name!r}")
        if value is not None and value is not False:
            got = value if isinstance(value, bool) else f"a {type(value).__name__}"
            raise ValueError(
                f"{name} is {got}; expected None or False: a tagger whose tokens exit early has "
                "no such thing"
            )


def _stand_ins(inputs_embeds, config):
    """Ids that no one looks up, `[B, N]`, of what comes as embeddings."""
    if not isinstance(inputs_embeds, torch.Tensor) or not inputs_embeds.is_floating_point():
        raise TypeError(f"inputs_embeds is {inputs_embeds!r:.40}; expected a float tensor")
    d = config.embedding_size or config.hidden_size
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != d:
        raise ValueError(
            f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; expected [B, N, {d}]"
        )
    # Not the padding id, which has no position in some families.
    stand_in = int(config.position_padding_id == 0)
    return torch.full(inputs_embeds.shape[:2], stand_in, device=inputs_embeds.device)


def _as_int64(value):
    """Integers as such, whatever their width; masks of other types as they are."""
    narrow = value is not None and value.dtype in _INTEGERS and value.dtype != torch.int64
    return value.long() if narrow else value


def _check(given):
    """Reject what is no `[B, N]` of the right type; without a look at values."""
    for name, value in given.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor")
        if value is not None and value.dtype not in _INTEGERS and name != "attention_mask":
            raise TypeError(f"{name} is of {value.dtype}; expected integers")
    input_ids = given["input_ids"]
    if input_ids is None:
        raise ValueError("got neither input_ids nor inputs_embeds; expected one of them")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected [B, N] with at least one "
            "sentence and one token"
        )
    for name, value in given.items():
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )

"""How each Hugging Face family names its parts.

A family is a table: our parameter name to theirs, and the settings in which it differs. Several
of their names for one of ours are concatenated along the first dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Family:
    """Names of one architecture's token classifier.

    Attributes:
        prefix: of the encoder in its state dict.
        outer: parameters outside the layers.
        layer: parameters of layer i, with `{i}` for its number from 0.
        layer_prefix: what their layer names start with.
        config: our configuration's fields from theirs, where names or meanings differ.
    """

    prefix: str
    outer: Mapping[str, str]
    layer: Mapping[str, str | tuple[str, ...]]
    layer_prefix: str = "encoder.layer.{i}."
    config: Mapping[str, object] = field(default_factory=dict)

    def names(self, num_layers: int) -> dict[str, tuple[str, ...]]:
        """Our parameter, without `.weight` or `.bias`, to their names in the state dict."""
        names = {ours: (self.prefix + theirs,) for ours, theirs in self.outer.items()}
        for i in range(num_layers):
            for ours, theirs in self.layer.items():
                parts = (theirs,) if isinstance(theirs, str) else theirs
                start = self.prefix + self.layer_prefix.format(i=i)
                names[f"encoder.layers.{i}.{ours}"] = tuple(start + part for part in parts)
        names[f"encoder.heads.{num_layers - 1}"] = ("classifier",)
        return names


_FEED_FORWARD = {
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": Family(
            prefix="bert.",
            outer={**_EMBEDDINGS, "embeddings.token_type": "embeddings.token_type_embeddings"},
            layer={
                "query": "attention.self.query",
                "key_value": ("attention.self.key", "attention.self.value"),
                "attention_output": "attention.output.dense",
                "attention_norm": "attention.output.LayerNorm",
                **_FEED_FORWARD,
            },
        ),
        "mpnet": Family(
            prefix="mpnet.",
            outer={**_EMBEDDINGS, "relative_bias": "encoder.relative_attention_bias"},
            layer={
                "query": "attention.attn.q",
                "key_value": ("attention.attn.k", "attention.attn.v"),
                "attention_output": "attention.attn.o",
                "attention_norm": "attention.LayerNorm",
                **_FEED_FORWARD,
            },
            config={
                "type_vocab_size": 0,
                "position_padding_id": 1,
                "relative_attention_buckets": lambda config: config.relative_attention_num_buckets,
            },
        ),
    }
)

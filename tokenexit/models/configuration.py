"""Configuration of a converted model."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedConfig


class TokenExitConfig(PreTrainedConfig):
    """Shape and policy of a `TokenExitForTokenClassification`, whatever family it came from.

    Args:
        source_model_type: the Hugging Face family it was converted from.
        embedding_size: width of the embeddings, which are projected to `hidden_size` where they
            differ. None: `hidden_size`.
        position_padding_id: families that number positions from a padding id: positions start
            after it, and that token itself does not count. None: from 0.
        relative_attention_buckets: rows of the relative-position bias table; 0 for none.
        exit_policy: fields of the `ExitPolicy`.
        untrained_heads: layers, from 1, whose classifiers were never trained; see
            `TokenExitForTokenClassification.untrained_heads`.

    The others are those of a BERT configuration.
    """

    model_type = "tokenexit"
    # What a Trainer's evaluation leaves out of its predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exit_layers", "layer_logits"]

    source_model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    embedding_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float = 0.1
    max_position_embeddings: int = 512
    position_padding_id: int | None = None
    type_vocab_size: int = 2
    relative_attention_buckets: int = 0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    exit_policy: dict | None = None
    untrained_heads: list[int] | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sentence that the position embeddings cover."""
        used = 0 if self.position_padding_id is None else self.position_padding_id + 1
        return self.max_position_embeddings - used

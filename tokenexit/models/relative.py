"""What layers of disentangled attention know of how far apart two tokens are."""

from __future__ import annotations

import torch
from torch import nn

from tokenexit.layers import Relative
from tokenexit.models.configuration import TokenExitConfig


class RelativeStates(nn.Module):
    """A state for each bucket of relative positions, shared by all layers.

    Source: He et al. 2021 (arXiv 2006.03654), section 3.1; He et al. 2023 (arXiv 2111.09543) for
    buckets that grow with the distance.
    """

    def __init__(self, config: TokenExitConfig):
        super().__init__()
        self.num_buckets = config.position_buckets
        self.most = config.max_relative_positions
        if self.most < 1:
            self.most = config.max_position_embeddings
        self.span = self.num_buckets if self.num_buckets > 0 else self.most
        self.embedding = nn.Embedding(2 * self.span, config.hidden_size)
        kinds = [kind.strip() for kind in config.norm_rel_ebd.lower().split("|")]
        self.norm = None
        if "layer_norm" in kinds:
            self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, longest: int) -> Relative:
        """For sentences of up to that many tokens: states of the buckets that they have."""
        bucket = self.bucket_of(torch.arange(longest - 1, -longest, -1, device="cpu"))
        least, largest = int(bucket.min()), int(bucket.max())
        states = self.embedding.weight[least : largest + 1]
        if self.norm is not None:
            states = self.norm(states)
        return Relative(states, (bucket - least).to(states.device))

    def bucket_of(self, distance: torch.Tensor) -> torch.Tensor:
        """The row of the embedding for a query so many tokens after its key, int64."""
        if self.num_buckets > 0:
            half = self.num_buckets // 2
            # In fp32, as DeBERTa was trained: where buckets end hangs on how it rounds.
            far = (distance.abs().clamp(min=half).float() / half).log()
            most = torch.tensor((self.most - 1) / half, dtype=torch.float32, device="cpu").log()
            grown = (far / most * (half - 1)).ceil().long() + half
            distance = torch.where(distance.abs() <= half, distance, grown * distance.sign())
        return (distance + self.span).clamp(0, 2 * self.span - 1)

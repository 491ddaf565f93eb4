"""What layers know of where tokens are: how far apart, or by turns of rotary positions."""

from __future__ import annotations

import torch
from torch import nn

from tokenexit.layers import Relative, Rotary
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
        least, last = 0, 2 * self.span - 1
        if not torch.compiler.is_exporting():  # a program takes all
            least, last = int(bucket.min()), int(bucket.max())
        states = self.embedding.weight[least : last + 1]
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


def rotary_of(config: TokenExitConfig, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
    """The turns of tokens at `positions [T]`, for all thetas of the layers.

    Source: Su et al. 2021 (arXiv 2104.09864), section 3.2.2.
    """
    width = config.hidden_size // config.num_attention_heads
    wide = torch.promote_types(dtype, torch.float32)  # Hugging Face takes fp32 for all
    steps = torch.arange(0, width, 2, device="cpu").to(wide) / width
    turns = {}
    for theta in config.rotary_thetas:
        if theta not in turns:
            angles = positions[:, None].to(wide) * (1.0 / theta**steps).to(positions.device)
            turns[theta] = angles.cos().to(dtype), angles.sin().to(dtype)
    return Rotary(turns)

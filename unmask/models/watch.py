"""What chosen tokens attend to: a look into the last layers of a forward, for policies that read attention."""

from __future__ import annotations

import torch
from torch import Tensor


class Watch:
    """Attention of some queries, averaged over all heads of the last ``layers``.

    The layers compute their outputs as ever; here the softmax is computed once more, for the chosen queries alone.
    """

    def __init__(self, positions: Tensor, layers: int) -> None:
        """``positions`` (B, S) int64: canvas positions of the tokens whose predictions are watched."""
        self.positions, self.layers = positions, layers
        self.queries = positions
        """(B, S) int64: the rows that predict these tokens; a model that shifts its logits sets them."""
        self.attention = torch.empty(0)
        """(B, S, T) float32 after the forward: how much the prediction of each position reads each canvas token."""
        self._seen = 0

    def add(self, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
        """One layer's rotated ``q`` (B, H, T, D) and ``k`` (B, K, T, D), and what is added to its scores."""
        batch, heads, _, width = q.shape
        rows, at = torch.arange(batch, device=q.device)[:, None], self.queries.to(q.device)
        chosen = q.transpose(1, 2)[rows, at].transpose(1, 2).float()  # (B, H, S, D)
        grouped = chosen.unflatten(1, (k.shape[1], heads // k.shape[1]))  # (B, K, H / K, S, D)
        scores = (grouped @ k.float().transpose(-1, -2)[:, :, None]).flatten(1, 2) * width**-0.5
        if bias is not None:
            per_query = bias if bias.shape[2] == 1 else bias.transpose(1, 2)[rows, at].transpose(1, 2)
            scores = scores + per_query.float()
        mean = scores.softmax(dim=-1).mean(dim=1).to(self.positions.device)
        self._seen += 1
        self.attention = mean if self._seen == 1 else self.attention + (mean - self.attention) / self._seen

"""The pooling of sparse encoders in a form that can be exported for any length."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class WholeSpladePooling(nn.Module):
    """What ``SpladePooling`` of sentence-transformers computes, of the whole sequence at once.

    That one loops over chunks in Python, which fixes the length in a graph.

    Args:
        pooling: of sentence-transformers.
    """

    def __init__(self, pooling: Any) -> None:
        super().__init__()
        self.strategy = pooling.pooling_strategy
        self.logarithms = {"relu": 1, "log1p_relu": 2}[pooling.activation_function]

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds ``sentence_embedding``, ``(batch, vocabulary)``."""
        logits = features["token_embeddings"]
        scores = (logits * features["attention_mask"].unsqueeze(-1).to(logits.dtype)).relu()
        for _ in range(self.logarithms):
            scores = scores.log1p()
        pooled = torch.amax(scores, dim=1) if self.strategy == "max" else scores.sum(dim=1)
        return {**features, "sentence_embedding": pooled}

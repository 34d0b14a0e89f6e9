"""How much the embeddings of a pruned model agree with those of the dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .preparing import Prepared

#: Rows that embeddings are compared on.
MOST_ROWS = 2000
BATCH = 64


@torch.inference_mode()
def agreement(dense: nn.Module, pruned: nn.Module, prepared: Prepared) -> float:
    """Mean cosine between both models' embeddings of the test examples, x 100: means over real tokens."""
    collate, rows = prepared.task.collator(prepared.tokenizer), prepared.tokens["test"]
    device = next(pruned.parameters()).device
    dense.to(device)
    found = []
    for first in range(0, min(len(rows), MOST_ROWS), BATCH):
        last = min(first + BATCH, len(rows), MOST_ROWS)
        batch = collate([rows[place] for place in range(first, last)])
        batch = {name: x.to(device) for name, x in batch.items() if name != "labels"}
        mask = batch["attention_mask"]
        first_mean, second_mean = (_mean(model.eval()(**batch), mask) for model in (dense, pruned))
        found.append(functional.cosine_similarity(first_mean, second_mean))
    return 100 * float(torch.cat(found).mean())


def _mean(out: Any, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(out.last_hidden_state.dtype)
    mean: Tensor = (out.last_hidden_state * weights).sum(1) / weights.sum(1).clamp(min=1)
    return mean

"""How much the embeddings of a pruned model agree with the dense one's; models of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..files import find_file
from .preparing import Prepared

#: Rows that embeddings are compared on.
MOST_ROWS = 2000
BATCH = 64
MODULES = "modules.json"


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


def save_sentence_model(source: str, model: PreTrainedModel, out: Path) -> bool:
    """Save a model as the SentenceTransformer that it came out of.

    Args:
        source: folder or hub name that it was loaded from.
        model: pruned.
        out: folder.

    Returns:
        Whether it came out of one; if not, nothing is written.
    """
    if find_file(source, MODULES) is None or type(model).__name__ != type(model.base_model).__name__:
        return False
    from sentence_transformers import SentenceTransformer

    sentences = SentenceTransformer(source, device="cpu")
    sentences[0].model = model.cpu()
    sentences.save_pretrained(str(out))
    return True

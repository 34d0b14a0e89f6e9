"""Model pruning while you fine-tune: heads, rows and weight blocks, for the stock Trainer."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizer,
)

from . import kernels
from .attaching import KINDS, attach
from .callback import PruningCallback
from .config import PruningConfig
from .loop import advance, collect, start
from .modeling.bert import PrunedBertConfig
from .prunable import (
    PrunableBertConfig,
    PrunableBertForMaskedLM,
    PrunableBertForMultipleChoice,
    PrunableBertForQuestionAnswering,
    PrunableBertForSequenceClassification,
    PrunableBertForTokenClassification,
    PrunableBertModel,
)
from .reporting import Report, report
from .resuming import last_complete_checkpoint
from .shrinking import shrink

__version__ = "0.1.0"

__all__ = [
    "PrunableBertConfig",
    "PrunableBertForMaskedLM",
    "PrunableBertForMultipleChoice",
    "PrunableBertForQuestionAnswering",
    "PrunableBertForSequenceClassification",
    "PrunableBertForTokenClassification",
    "PrunableBertModel",
    "PruningCallback",
    "PruningConfig",
    "Report",
    "advance",
    "attach",
    "collect",
    "kernels",
    "last_complete_checkpoint",
    "report",
    "shrink",
    "start",
]

# So that the Auto classes and `pipeline` load our checkpoints once this package is imported.
AutoConfig.register("prunable_bert", PrunableBertConfig)
AutoConfig.register("pruned_bert", PrunedBertConfig)
AutoTokenizer.register(PrunableBertConfig, BertTokenizer)
AutoTokenizer.register(PrunedBertConfig, BertTokenizer)
for _auto, _kinds in zip(
    (
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
    ),
    KINDS,
    strict=True,
):
    _auto.register(PrunableBertConfig, _kinds.prunable)
    _auto.register(PrunedBertConfig, _kinds.pruned)

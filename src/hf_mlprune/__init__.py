"""Model pruning while you fine-tune: heads, rows and weight blocks, for the stock Trainer."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from . import kernels
from .attaching import attach
from .config import PruningConfig
from .distillation.custom import distilled
from .exporting.export import export
from .exporting.report import ExportReport
from .families import FAMILIES
from .loop import advance, collect, finished_target, start
from .prunable import CONFIGS, PUBLIC, prunable_class
from .reports.counting import report
from .reports.report import Report
from .shrinking import shrink
from .trainer.callback import PruningCallback
from .trainer.resuming import last_complete_checkpoint

__version__ = "0.1.0"

__all__ = [
    "ExportReport",
    "PruningCallback",
    "PruningConfig",
    "Report",
    "advance",
    "attach",
    "collect",
    "distilled",
    "export",
    "finished_target",
    "kernels",
    "last_complete_checkpoint",
    "report",
    "shrink",
    "start",
    # A config class and a class for each head of every family: PrunableBertConfig, PrunableBertModel, ...
    *PUBLIC,
]


def __getattr__(name: str) -> Any:
    try:
        return PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


# So that the Auto classes and `pipeline` load our checkpoints once this package is imported.
for _family in FAMILIES:
    for _config in (CONFIGS[_family.name], _family.config):
        transformers.AutoConfig.register(_config.model_type, _config)
        # What their folders are read with besides: as for the stock model of the family.
        _tokenizer = TOKENIZER_MAPPING.get(_family.stock_config, None)
        if _tokenizer is not None:
            transformers.AutoTokenizer.register(_config, _tokenizer)
    for _auto, _head in _family.loaders().items():
        getattr(transformers, _auto).register(CONFIGS[_family.name], prunable_class(_head))
        getattr(transformers, _auto).register(_family.config, _head.pruned)

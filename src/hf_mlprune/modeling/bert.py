"""BERT with a structure: the config and models that a pruned checkpoint loads as."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

# Not used here: transformers 5.0 copies, of a local folder, only the files that this one names.
from .block_sparse import BlockSparseLinear  # noqa: F401
from .pruned import LayerPaths, apply_structure, check_loaded
from .structure import LayerSizes, Structure
from .writing import write_text

BERT_PATHS = LayerPaths(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    fc1="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    fc2="output.dense",
)

REPORT_FILE = "pruning_report.json"

#: Stands in the model cards that we write, so that a later save may replace them and no other.
CARD_MARK = "<!-- written by hf-mlprune -->"


class PrunedBertConfig(BertConfig):
    """Config of a pruned BERT: the sizes of the dense model, and which units are left.

    Attributes:
        structure: JSON form of :class:`~.structure.Structure`.
    """

    model_type = "pruned_bert"

    structure: dict[str, Any] | None = None


def bert_layer_sizes(config: BertConfig) -> LayerSizes:
    """Sizes of one dense layer."""
    return LayerSizes(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        ffn_size=config.intermediate_size,
    )


def bert_structure(config: BertConfig) -> Structure:
    """The structure that a config with the field ``structure`` stores.

    Raises:
        ValueError: there is none, or it is not one of this model.
    """
    sizes = [bert_layer_sizes(config)] * config.num_hidden_layers
    return Structure.from_dict(config.structure, sizes)


def unloaded_keys(info: dict[str, Any]) -> set[str]:
    """Keys of a model that its checkpoint did not bring, or brought in another size."""
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return set(info["missing_keys"]) | mismatched


class PrunedBertMixin(PreTrainedModel):
    """Builds the small layers, checks what was loaded, and saves the report beside the weights."""

    config: PrunedBertConfig
    config_class = PrunedBertConfig

    #: JSON report of the run that pruned this model, and its model card; `save_pretrained` writes
    #: what is set, the card only where there is none but our own.
    pruning_report: dict[str, Any] | None = None
    pruning_card: str | None = None

    def _apply_structure(self) -> None:
        config = self.config
        apply_structure(
            self.base_model.encoder.layer,
            bert_structure(config),
            bert_layer_sizes(config),
            BERT_PATHS,
        )

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but never returns an encoder that is only partly loaded.

        Raises:
            ValueError: an encoder weight is missing or of another size (also under
                ``ignore_mismatched_sizes=True``), or an index tensor is damaged.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        broken = sorted(key for key in unloaded_keys(info) if "encoder.layer." in key)
        if broken:
            raise ValueError(
                f"{cls.__name__}: expected every encoder weight in the checkpoint with the shape that "
                f"the structure in config.json gives, but {len(broken)} are missing or of another "
                f"size, e.g. {broken[0]!r}; the checkpoint is incomplete or was edited"
            )
        config = model.config
        check_loaded(
            model.base_model.encoder.layer,
            bert_structure(config),
            bert_layer_sizes(config),
            BERT_PATHS,
        )
        if args and Path(args[0]).is_dir():
            model._read_notes(Path(args[0]) / kwargs.get("subfolder", ""))
        return (model, info) if output_loading_info else model

    def _read_notes(self, folder: Path) -> None:
        """Take over a folder's report and card, so that they are saved again with the model."""
        report, card = folder / REPORT_FILE, folder / "README.md"
        if report.is_file():
            try:
                self.pruning_report = json.loads(report.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{report}: expected JSON ({error}); restore it, or delete it") from None
        if card.is_file():
            text = card.read_text(encoding="utf-8", errors="replace")
            self.pruning_card = text if CARD_MARK in text else None

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As in transformers; also writes the pruning report and card, if this model carries them.

        A report or card of another model that we wrote there before is taken away.
        """
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        report, card = folder / REPORT_FILE, folder / "README.md"
        if self.pruning_report is not None:
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            write_text(report, json.dumps({**self.pruning_report, "file_bytes": size}, indent=2) + "\n")
        else:
            report.unlink(missing_ok=True)
        if card.exists() and CARD_MARK not in card.read_text(encoding="utf-8", errors="replace"):
            return
        if self.pruning_card is not None:
            write_text(card, self.pruning_card)
        else:
            card.unlink(missing_ok=True)


class PrunedBertModel(PrunedBertMixin, BertModel):
    """:class:`~transformers.BertModel` with the layers that were kept."""

    def __init__(self, config: PrunedBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self._apply_structure()
        self.post_init()


class PrunedBertHeadMixin(PrunedBertMixin):
    """A pruned encoder under one of transformers' task heads."""

    def __init__(self, config: PrunedBertConfig) -> None:
        super().__init__(config)
        self._apply_structure()
        self.post_init()


class PrunedBertForSequenceClassification(PrunedBertHeadMixin, BertForSequenceClassification):
    """:class:`~transformers.BertForSequenceClassification` with the layers that were kept."""


class PrunedBertForTokenClassification(PrunedBertHeadMixin, BertForTokenClassification):
    """:class:`~transformers.BertForTokenClassification` with the layers that were kept."""


class PrunedBertForQuestionAnswering(PrunedBertHeadMixin, BertForQuestionAnswering):
    """:class:`~transformers.BertForQuestionAnswering` with the layers that were kept."""


class PrunedBertForMaskedLM(PrunedBertHeadMixin, BertForMaskedLM):
    """:class:`~transformers.BertForMaskedLM` with the layers that were kept."""


class PrunedBertForMultipleChoice(PrunedBertHeadMixin, BertForMultipleChoice):
    """:class:`~transformers.BertForMultipleChoice` with the layers that were kept."""


# `save_pretrained` copies this file and those it imports beside the weights, so that the folder loads
# with `trust_remote_code=True` where hf-mlprune is not installed.
PrunedBertConfig.register_for_auto_class()
PrunedBertModel.register_for_auto_class("AutoModel")
PrunedBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
PrunedBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
PrunedBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
PrunedBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
PrunedBertForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")

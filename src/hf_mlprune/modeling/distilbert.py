"""DistilBERT: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)

# One line per shared file, used or not: of a local folder, transformers 5.0 copies only the files named here.
from .block_sparse import BlockSparseLinear as BlockSparseLinear
from .cards import CARD_MARK as CARD_MARK
from .checkpoint import read_header as read_header
from .family import PrunedConfigMixin, define_family
from .fields import ConfigFields
from .layout import Layout, Matrix
from .pretrained import PrunedMixin
from .pruned import apply_structure as apply_structure
from .standins import RowScatter as RowScatter
from .structure import Structure as Structure

LAYOUT = Layout(
    layers="transformer.layer",
    embeddings="embeddings",
    attention="attention",
    matrices={
        "query": Matrix("attention.q_lin", rows="heads"),
        "key": Matrix("attention.k_lin", rows="heads"),
        "value": Matrix("attention.v_lin", rows="heads"),
        "attention_output": Matrix("attention.out_lin", rows="attention_output", columns="heads"),
        "fc1": Matrix("ffn.lin1", rows="fc1"),
        "fc2": Matrix("ffn.lin2", rows="fc2", columns="fc1"),
    },
    activation="ffn.activation",
    followers={"fc2": "ffn.dropout"},
    head_counts={"n_heads": "heads", "dim": "width"},
)


class PrunedDistilBertConfig(PrunedConfigMixin, DistilBertConfig):
    """Config of a pruned DistilBERT: the sizes of the dense model, and which units are left."""

    model_type = "pruned_distilbert"
    layout = LAYOUT
    config_fields = ConfigFields(
        hidden_size="dim",
        num_layers="n_layers",
        num_heads="n_heads",
        ffn_size="hidden_dim",
        activation="activation",
        numbers=("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"),
    )


class PrunedDistilBertMixin(PrunedMixin):
    """What pruned DistilBERT models have in common."""

    config_class = PrunedDistilBertConfig


class PrunedDistilBertModel(PrunedDistilBertMixin, DistilBertModel):
    """:class:`~transformers.DistilBertModel` with the layers that were kept."""


class PrunedDistilBertForMaskedLM(PrunedDistilBertMixin, DistilBertForMaskedLM):
    """:class:`~transformers.DistilBertForMaskedLM` with the layers that were kept."""


class PrunedDistilBertForSequenceClassification(PrunedDistilBertMixin, DistilBertForSequenceClassification):
    """:class:`~transformers.DistilBertForSequenceClassification` with the layers that were kept."""


class PrunedDistilBertForTokenClassification(PrunedDistilBertMixin, DistilBertForTokenClassification):
    """:class:`~transformers.DistilBertForTokenClassification` with the layers that were kept."""


class PrunedDistilBertForQuestionAnswering(PrunedDistilBertMixin, DistilBertForQuestionAnswering):
    """:class:`~transformers.DistilBertForQuestionAnswering` with the layers that were kept."""


class PrunedDistilBertForMultipleChoice(PrunedDistilBertMixin, DistilBertForMultipleChoice):
    """:class:`~transformers.DistilBertForMultipleChoice` with the layers that were kept."""


FAMILY = define_family(
    PrunedDistilBertConfig,
    {
        "AutoModel": PrunedDistilBertModel,
        "AutoModelForMaskedLM": PrunedDistilBertForMaskedLM,
        "AutoModelForSequenceClassification": PrunedDistilBertForSequenceClassification,
        "AutoModelForTokenClassification": PrunedDistilBertForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedDistilBertForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedDistilBertForMultipleChoice,
    },
)

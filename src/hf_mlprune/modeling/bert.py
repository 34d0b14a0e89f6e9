"""BERT: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

# One line per shared file, used or not: of a local folder, transformers 5.0 copies only the files named here.
from .block_sparse import BlockSparseLinear as BlockSparseLinear
from .cards import CARD_MARK as CARD_MARK
from .checkpoint import read_header as read_header
from .family import PrunedConfigMixin, define_family
from .fields import ConfigFields as ConfigFields
from .layout import BERT_LAYOUT
from .pretrained import PrunedMixin
from .pruned import apply_structure as apply_structure
from .standins import RowScatter as RowScatter
from .structure import Structure as Structure


class PrunedBertConfig(PrunedConfigMixin, BertConfig):
    """Config of a pruned BERT: the sizes of the dense model, and which units are left."""

    model_type = "pruned_bert"
    layout = BERT_LAYOUT


class PrunedBertMixin(PrunedMixin):
    """What pruned BERT models have in common."""

    config_class = PrunedBertConfig


class PrunedBertModel(PrunedBertMixin, BertModel):
    """:class:`~transformers.BertModel` with the layers that were kept."""


class PrunedBertForPreTraining(PrunedBertMixin, BertForPreTraining):
    """:class:`~transformers.BertForPreTraining` with the layers that were kept."""


class PrunedBertForMaskedLM(PrunedBertMixin, BertForMaskedLM):
    """:class:`~transformers.BertForMaskedLM` with the layers that were kept."""


class PrunedBertForNextSentencePrediction(PrunedBertMixin, BertForNextSentencePrediction):
    """:class:`~transformers.BertForNextSentencePrediction` with the layers that were kept."""


class PrunedBertForSequenceClassification(PrunedBertMixin, BertForSequenceClassification):
    """:class:`~transformers.BertForSequenceClassification` with the layers that were kept."""


class PrunedBertForTokenClassification(PrunedBertMixin, BertForTokenClassification):
    """:class:`~transformers.BertForTokenClassification` with the layers that were kept."""


class PrunedBertForQuestionAnswering(PrunedBertMixin, BertForQuestionAnswering):
    """:class:`~transformers.BertForQuestionAnswering` with the layers that were kept."""


class PrunedBertForMultipleChoice(PrunedBertMixin, BertForMultipleChoice):
    """:class:`~transformers.BertForMultipleChoice` with the layers that were kept."""


FAMILY = define_family(
    PrunedBertConfig,
    {
        "AutoModel": PrunedBertModel,
        "AutoModelForPreTraining": PrunedBertForPreTraining,
        "AutoModelForMaskedLM": PrunedBertForMaskedLM,
        "AutoModelForNextSentencePrediction": PrunedBertForNextSentencePrediction,
        "AutoModelForSequenceClassification": PrunedBertForSequenceClassification,
        "AutoModelForTokenClassification": PrunedBertForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedBertForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedBertForMultipleChoice,
    },
)

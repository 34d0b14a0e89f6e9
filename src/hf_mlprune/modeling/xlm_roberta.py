"""XLM-RoBERTa: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)

# One line per shared file, used or not: of a local folder, transformers 5.0 copies only the files named here.
from .block_sparse import BlockSparseLinear as BlockSparseLinear
from .cards import CARD_MARK as CARD_MARK
from .checkpoint import read_header as read_header
from .family import PrunedConfigMixin, define_family
from .fields import ConfigFields
from .layout import BERT_LAYOUT
from .pretrained import PrunedMixin
from .pruned import apply_structure as apply_structure
from .standins import RowScatter as RowScatter
from .structure import Structure as Structure


class PrunedXLMRobertaConfig(PrunedConfigMixin, XLMRobertaConfig):
    """Config of a pruned XLM-RoBERTa: the sizes of the dense model, and which units are left."""

    model_type = "pruned_xlm-roberta"
    layout = BERT_LAYOUT
    config_fields = ConfigFields(positions_behind_padding=True)


class PrunedXLMRobertaMixin(PrunedMixin):
    """What pruned XLM-RoBERTa models have in common."""

    config_class = PrunedXLMRobertaConfig


class PrunedXLMRobertaModel(PrunedXLMRobertaMixin, XLMRobertaModel):
    """:class:`~transformers.XLMRobertaModel` with the layers that were kept."""


class PrunedXLMRobertaForMaskedLM(PrunedXLMRobertaMixin, XLMRobertaForMaskedLM):
    """:class:`~transformers.XLMRobertaForMaskedLM` with the layers that were kept."""


class PrunedXLMRobertaForSequenceClassification(PrunedXLMRobertaMixin, XLMRobertaForSequenceClassification):
    """:class:`~transformers.XLMRobertaForSequenceClassification` with the layers that were kept."""


class PrunedXLMRobertaForTokenClassification(PrunedXLMRobertaMixin, XLMRobertaForTokenClassification):
    """:class:`~transformers.XLMRobertaForTokenClassification` with the layers that were kept."""


class PrunedXLMRobertaForQuestionAnswering(PrunedXLMRobertaMixin, XLMRobertaForQuestionAnswering):
    """:class:`~transformers.XLMRobertaForQuestionAnswering` with the layers that were kept."""


class PrunedXLMRobertaForMultipleChoice(PrunedXLMRobertaMixin, XLMRobertaForMultipleChoice):
    """:class:`~transformers.XLMRobertaForMultipleChoice` with the layers that were kept."""


FAMILY = define_family(
    PrunedXLMRobertaConfig,
    {
        "AutoModel": PrunedXLMRobertaModel,
        "AutoModelForMaskedLM": PrunedXLMRobertaForMaskedLM,
        "AutoModelForSequenceClassification": PrunedXLMRobertaForSequenceClassification,
        "AutoModelForTokenClassification": PrunedXLMRobertaForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedXLMRobertaForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedXLMRobertaForMultipleChoice,
    },
)

"""RoBERTa: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
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


class PrunedRobertaConfig(PrunedConfigMixin, RobertaConfig):
    """Config of a pruned RoBERTa: the sizes of the dense model, and which units are left."""

    model_type = "pruned_roberta"
    layout = BERT_LAYOUT
    config_fields = ConfigFields(positions_behind_padding=True)


class PrunedRobertaMixin(PrunedMixin):
    """What pruned RoBERTa models have in common."""

    config_class = PrunedRobertaConfig


class PrunedRobertaModel(PrunedRobertaMixin, RobertaModel):
    """:class:`~transformers.RobertaModel` with the layers that were kept."""


class PrunedRobertaForMaskedLM(PrunedRobertaMixin, RobertaForMaskedLM):
    """:class:`~transformers.RobertaForMaskedLM` with the layers that were kept."""


class PrunedRobertaForSequenceClassification(PrunedRobertaMixin, RobertaForSequenceClassification):
    """:class:`~transformers.RobertaForSequenceClassification` with the layers that were kept."""


class PrunedRobertaForTokenClassification(PrunedRobertaMixin, RobertaForTokenClassification):
    """:class:`~transformers.RobertaForTokenClassification` with the layers that were kept."""


class PrunedRobertaForQuestionAnswering(PrunedRobertaMixin, RobertaForQuestionAnswering):
    """:class:`~transformers.RobertaForQuestionAnswering` with the layers that were kept."""


class PrunedRobertaForMultipleChoice(PrunedRobertaMixin, RobertaForMultipleChoice):
    """:class:`~transformers.RobertaForMultipleChoice` with the layers that were kept."""


FAMILY = define_family(
    PrunedRobertaConfig,
    {
        "AutoModel": PrunedRobertaModel,
        "AutoModelForMaskedLM": PrunedRobertaForMaskedLM,
        "AutoModelForSequenceClassification": PrunedRobertaForSequenceClassification,
        "AutoModelForTokenClassification": PrunedRobertaForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedRobertaForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedRobertaForMultipleChoice,
    },
)

"""CamemBERT: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    CamembertConfig,
    CamembertForMaskedLM,
    CamembertForMultipleChoice,
    CamembertForQuestionAnswering,
    CamembertForSequenceClassification,
    CamembertForTokenClassification,
    CamembertModel,
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


class PrunedCamembertConfig(PrunedConfigMixin, CamembertConfig):
    """Config of a pruned CamemBERT: the sizes of the dense model, and which units are left."""

    model_type = "pruned_camembert"
    layout = BERT_LAYOUT
    config_fields = ConfigFields(positions_behind_padding=True)


class PrunedCamembertMixin(PrunedMixin):
    """What pruned CamemBERT models have in common."""

    config_class = PrunedCamembertConfig


class PrunedCamembertModel(PrunedCamembertMixin, CamembertModel):
    """:class:`~transformers.CamembertModel` with the layers that were kept."""


class PrunedCamembertForMaskedLM(PrunedCamembertMixin, CamembertForMaskedLM):
    """:class:`~transformers.CamembertForMaskedLM` with the layers that were kept."""


class PrunedCamembertForSequenceClassification(PrunedCamembertMixin, CamembertForSequenceClassification):
    """:class:`~transformers.CamembertForSequenceClassification` with the layers that were kept."""


class PrunedCamembertForTokenClassification(PrunedCamembertMixin, CamembertForTokenClassification):
    """:class:`~transformers.CamembertForTokenClassification` with the layers that were kept."""


class PrunedCamembertForQuestionAnswering(PrunedCamembertMixin, CamembertForQuestionAnswering):
    """:class:`~transformers.CamembertForQuestionAnswering` with the layers that were kept."""


class PrunedCamembertForMultipleChoice(PrunedCamembertMixin, CamembertForMultipleChoice):
    """:class:`~transformers.CamembertForMultipleChoice` with the layers that were kept."""


FAMILY = define_family(
    PrunedCamembertConfig,
    {
        "AutoModel": PrunedCamembertModel,
        "AutoModelForMaskedLM": PrunedCamembertForMaskedLM,
        "AutoModelForSequenceClassification": PrunedCamembertForSequenceClassification,
        "AutoModelForTokenClassification": PrunedCamembertForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedCamembertForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedCamembertForMultipleChoice,
    },
)

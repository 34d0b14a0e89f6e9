"""ELECTRA: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
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


class PrunedElectraConfig(PrunedConfigMixin, ElectraConfig):
    """Config of a pruned ELECTRA: the sizes of the dense model, and which units are left."""

    model_type = "pruned_electra"
    layout = BERT_LAYOUT


class PrunedElectraMixin(PrunedMixin):
    """What pruned ELECTRA models have in common."""

    config_class = PrunedElectraConfig


class PrunedElectraModel(PrunedElectraMixin, ElectraModel):
    """:class:`~transformers.ElectraModel` with the layers that were kept."""


class PrunedElectraForPreTraining(PrunedElectraMixin, ElectraForPreTraining):
    """:class:`~transformers.ElectraForPreTraining` with the layers that were kept."""


class PrunedElectraForMaskedLM(PrunedElectraMixin, ElectraForMaskedLM):
    """:class:`~transformers.ElectraForMaskedLM` with the layers that were kept."""


class PrunedElectraForSequenceClassification(PrunedElectraMixin, ElectraForSequenceClassification):
    """:class:`~transformers.ElectraForSequenceClassification` with the layers that were kept."""


class PrunedElectraForTokenClassification(PrunedElectraMixin, ElectraForTokenClassification):
    """:class:`~transformers.ElectraForTokenClassification` with the layers that were kept."""


class PrunedElectraForQuestionAnswering(PrunedElectraMixin, ElectraForQuestionAnswering):
    """:class:`~transformers.ElectraForQuestionAnswering` with the layers that were kept."""


class PrunedElectraForMultipleChoice(PrunedElectraMixin, ElectraForMultipleChoice):
    """:class:`~transformers.ElectraForMultipleChoice` with the layers that were kept."""


FAMILY = define_family(
    PrunedElectraConfig,
    {
        "AutoModel": PrunedElectraModel,
        "AutoModelForPreTraining": PrunedElectraForPreTraining,
        "AutoModelForMaskedLM": PrunedElectraForMaskedLM,
        "AutoModelForSequenceClassification": PrunedElectraForSequenceClassification,
        "AutoModelForTokenClassification": PrunedElectraForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedElectraForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedElectraForMultipleChoice,
    },
)

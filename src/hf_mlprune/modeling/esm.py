"""ESM (proteins): how its layers lie, and its pruned models."""

from __future__ import annotations

import dataclasses

from transformers import (
    EsmConfig,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
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

# Its forward pass names the activation, a gelu.
LAYOUT = dataclasses.replace(BERT_LAYOUT, activation=None)


class PrunedEsmConfig(PrunedConfigMixin, EsmConfig):
    """Config of a pruned ESM: the sizes of the dense model, and which units are left."""

    model_type = "pruned_esm"
    layout = LAYOUT
    config_fields = ConfigFields(positions_behind_padding=True)


class PrunedEsmMixin(PrunedMixin):
    """What pruned ESM models have in common."""

    config_class = PrunedEsmConfig


class PrunedEsmModel(PrunedEsmMixin, EsmModel):
    """:class:`~transformers.EsmModel` with the layers that were kept."""


class PrunedEsmForMaskedLM(PrunedEsmMixin, EsmForMaskedLM):
    """:class:`~transformers.EsmForMaskedLM` with the layers that were kept."""


class PrunedEsmForSequenceClassification(PrunedEsmMixin, EsmForSequenceClassification):
    """:class:`~transformers.EsmForSequenceClassification` with the layers that were kept."""


class PrunedEsmForTokenClassification(PrunedEsmMixin, EsmForTokenClassification):
    """:class:`~transformers.EsmForTokenClassification` with the layers that were kept."""


FAMILY = define_family(
    PrunedEsmConfig,
    {
        "AutoModel": PrunedEsmModel,
        "AutoModelForMaskedLM": PrunedEsmForMaskedLM,
        "AutoModelForSequenceClassification": PrunedEsmForSequenceClassification,
        "AutoModelForTokenClassification": PrunedEsmForTokenClassification,
    },
)

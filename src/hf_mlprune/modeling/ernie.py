"""ERNIE: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    ErnieConfig,
    ErnieForMaskedLM,
    ErnieForMultipleChoice,
    ErnieForNextSentencePrediction,
    ErnieForPreTraining,
    ErnieForQuestionAnswering,
    ErnieForSequenceClassification,
    ErnieForTokenClassification,
    ErnieModel,
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


class PrunedErnieConfig(PrunedConfigMixin, ErnieConfig):
    """Config of a pruned ERNIE: the sizes of the dense model, and which units are left."""

    model_type = "pruned_ernie"
    layout = BERT_LAYOUT
    config_fields = ConfigFields(bounds={"task_type_vocab_size": (0, 2**16)})


class PrunedErnieMixin(PrunedMixin):
    """What pruned ERNIE models have in common."""

    config_class = PrunedErnieConfig


class PrunedErnieModel(PrunedErnieMixin, ErnieModel):
    """:class:`~transformers.ErnieModel` with the layers that were kept."""


class PrunedErnieForMaskedLM(PrunedErnieMixin, ErnieForMaskedLM):
    """:class:`~transformers.ErnieForMaskedLM` with the layers that were kept."""


class PrunedErnieForSequenceClassification(PrunedErnieMixin, ErnieForSequenceClassification):
    """:class:`~transformers.ErnieForSequenceClassification` with the layers that were kept."""


class PrunedErnieForTokenClassification(PrunedErnieMixin, ErnieForTokenClassification):
    """:class:`~transformers.ErnieForTokenClassification` with the layers that were kept."""


class PrunedErnieForQuestionAnswering(PrunedErnieMixin, ErnieForQuestionAnswering):
    """:class:`~transformers.ErnieForQuestionAnswering` with the layers that were kept."""


class PrunedErnieForMultipleChoice(PrunedErnieMixin, ErnieForMultipleChoice):
    """:class:`~transformers.ErnieForMultipleChoice` with the layers that were kept."""


class PrunedErnieForPreTraining(PrunedErnieMixin, ErnieForPreTraining):
    """:class:`~transformers.ErnieForPreTraining` with the layers that were kept."""


class PrunedErnieForNextSentencePrediction(PrunedErnieMixin, ErnieForNextSentencePrediction):
    """:class:`~transformers.ErnieForNextSentencePrediction` with the layers that were kept."""


FAMILY = define_family(
    PrunedErnieConfig,
    {
        "AutoModel": PrunedErnieModel,
        "AutoModelForMaskedLM": PrunedErnieForMaskedLM,
        "AutoModelForSequenceClassification": PrunedErnieForSequenceClassification,
        "AutoModelForTokenClassification": PrunedErnieForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedErnieForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedErnieForMultipleChoice,
        "AutoModelForPreTraining": PrunedErnieForPreTraining,
        "AutoModelForNextSentencePrediction": PrunedErnieForNextSentencePrediction,
    },
)

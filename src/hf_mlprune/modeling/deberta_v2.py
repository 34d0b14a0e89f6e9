"""DeBERTa, versions 2 and 3: how its layers lie, and its pruned models."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForMultipleChoice,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
)

# One line per shared file, used or not: of a local folder, transformers 5.0 copies only the files named here.
from .block_sparse import BlockSparseLinear as BlockSparseLinear
from .cards import CARD_MARK as CARD_MARK
from .checkpoint import read_header as read_header
from .family import PrunedConfigMixin, define_family
from .fields import ConfigFields
from .layout import DenseLayer, Layout, Matrix
from .pretrained import PrunedMixin
from .pruned import apply_structure as apply_structure
from .standins import RowScatter as RowScatter
from .structure import Structure as Structure

#: Of version 3, whose relative positions are projected by the query and the key of the tokens.
LAYOUT = Layout(
    layers="encoder.layer",
    embeddings="embeddings",
    attention="attention.self",
    matrices={
        "query": Matrix("attention.self.query_proj", rows="heads"),
        "key": Matrix("attention.self.key_proj", rows="heads"),
        "value": Matrix("attention.self.value_proj", rows="heads"),
        "attention_output": Matrix("attention.output.dense", rows="attention_output", columns="heads"),
        "fc1": Matrix("intermediate.dense", rows="fc1"),
        "fc2": Matrix("output.dense", rows="fc2", columns="fc1"),
    },
    activation="intermediate.intermediate_act_fn",
    followers={"attention_output": "attention.output.dropout", "fc2": "output.dropout"},
)
#: Projections of relative positions that some models have besides, and the kind of attention they serve.
POSITIONS = {
    "position_key": ("c2p", Matrix("attention.self.pos_key_proj", rows="heads")),
    "position_query": ("p2c", Matrix("attention.self.pos_query_proj", rows="heads")),
}


class PrunedDebertaV2Config(PrunedConfigMixin, DebertaV2Config):
    """Config of a pruned DeBERTa: the sizes of the dense model, and which units are left."""

    model_type = "pruned_deberta-v2"
    config_fields = ConfigFields(
        bounds={"max_relative_positions": (-1, 2**20), "position_buckets": (-1, 2**20)},
        numbers=("pooler_dropout",),
    )

    @classmethod
    def dense_layer(cls, config: Any) -> DenseLayer:
        """The dense layer that a config of this family, stock or ours, describes."""
        own = getattr(config, "relative_attention", False) and not getattr(config, "share_att_key", False)
        kinds = (config.pos_att_type or ()) if own else ()
        positions = {name: matrix for name, (kind, matrix) in POSITIONS.items() if kind in kinds}
        layout = dataclasses.replace(LAYOUT, matrices={**LAYOUT.matrices, **positions})
        return DenseLayer(layout, cls.config_fields.sizes(config))


class PrunedDebertaV2Mixin(PrunedMixin):
    """What pruned DeBERTa models have in common."""

    config_class = PrunedDebertaV2Config


class PrunedDebertaV2Model(PrunedDebertaV2Mixin, DebertaV2Model):
    """:class:`~transformers.DebertaV2Model` with the layers that were kept."""


class PrunedDebertaV2ForMaskedLM(PrunedDebertaV2Mixin, DebertaV2ForMaskedLM):
    """:class:`~transformers.DebertaV2ForMaskedLM` with the layers that were kept."""


class PrunedDebertaV2ForSequenceClassification(PrunedDebertaV2Mixin, DebertaV2ForSequenceClassification):
    """:class:`~transformers.DebertaV2ForSequenceClassification` with the layers that were kept."""


class PrunedDebertaV2ForTokenClassification(PrunedDebertaV2Mixin, DebertaV2ForTokenClassification):
    """:class:`~transformers.DebertaV2ForTokenClassification` with the layers that were kept."""


class PrunedDebertaV2ForQuestionAnswering(PrunedDebertaV2Mixin, DebertaV2ForQuestionAnswering):
    """:class:`~transformers.DebertaV2ForQuestionAnswering` with the layers that were kept."""


class PrunedDebertaV2ForMultipleChoice(PrunedDebertaV2Mixin, DebertaV2ForMultipleChoice):
    """:class:`~transformers.DebertaV2ForMultipleChoice` with the layers that were kept."""


FAMILY = define_family(
    PrunedDebertaV2Config,
    {
        "AutoModel": PrunedDebertaV2Model,
        "AutoModelForMaskedLM": PrunedDebertaV2ForMaskedLM,
        "AutoModelForSequenceClassification": PrunedDebertaV2ForSequenceClassification,
        "AutoModelForTokenClassification": PrunedDebertaV2ForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedDebertaV2ForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedDebertaV2ForMultipleChoice,
    },
)

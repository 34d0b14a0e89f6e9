"""ModernBERT: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
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
    layers="layers",
    embeddings="embeddings",
    attention="attn",
    matrices={
        "query_key_value": Matrix("attn.Wqkv", rows="heads", parts=("query", "key", "value")),
        "attention_output": Matrix("attn.Wo", rows="attention_output", columns="heads"),
        "fc1": Matrix("mlp.Wi", rows="fc1", parts=("input", "gate")),
        "fc2": Matrix("mlp.Wo", rows="fc2", columns="fc1"),
    },
    activation="mlp.act",
    # Of transformers 5.0; later ones count the heads by their width.
    head_counts={"num_heads": "heads", "all_head_size": "width"},
)


class PrunedModernBertConfig(PrunedConfigMixin, ModernBertConfig):
    """Config of a pruned ModernBERT: the sizes of the dense model, and which units are left."""

    model_type = "pruned_modernbert"
    layout = LAYOUT
    config_fields = ConfigFields(
        activation="hidden_activation",
        bounds={"local_attention": (1, 2**20), "global_attn_every_n_layers": (1, 2**10)},
        numbers=("attention_dropout", "mlp_dropout", "embedding_dropout", "classifier_dropout", "norm_eps"),
    )


class PrunedModernBertMixin(PrunedMixin):
    """What pruned ModernBERT models have in common."""

    config_class = PrunedModernBertConfig


class PrunedModernBertModel(PrunedModernBertMixin, ModernBertModel):
    """:class:`~transformers.ModernBertModel` with the layers that were kept."""


class PrunedModernBertForMaskedLM(PrunedModernBertMixin, ModernBertForMaskedLM):
    """:class:`~transformers.ModernBertForMaskedLM` with the layers that were kept."""


class PrunedModernBertForSequenceClassification(PrunedModernBertMixin, ModernBertForSequenceClassification):
    """:class:`~transformers.ModernBertForSequenceClassification` with the layers that were kept."""


class PrunedModernBertForTokenClassification(PrunedModernBertMixin, ModernBertForTokenClassification):
    """:class:`~transformers.ModernBertForTokenClassification` with the layers that were kept."""


class PrunedModernBertForQuestionAnswering(PrunedModernBertMixin, ModernBertForQuestionAnswering):
    """:class:`~transformers.ModernBertForQuestionAnswering` with the layers that were kept."""


class PrunedModernBertForMultipleChoice(PrunedModernBertMixin, ModernBertForMultipleChoice):
    """:class:`~transformers.ModernBertForMultipleChoice` with the layers that were kept."""


FAMILY = define_family(
    PrunedModernBertConfig,
    {
        "AutoModel": PrunedModernBertModel,
        "AutoModelForMaskedLM": PrunedModernBertForMaskedLM,
        "AutoModelForSequenceClassification": PrunedModernBertForSequenceClassification,
        "AutoModelForTokenClassification": PrunedModernBertForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedModernBertForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedModernBertForMultipleChoice,
    },
)

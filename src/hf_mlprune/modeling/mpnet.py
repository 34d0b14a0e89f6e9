"""MPNet: how its layers lie, and its pruned models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    MPNetConfig,
    MPNetForMaskedLM,
    MPNetForMultipleChoice,
    MPNetForQuestionAnswering,
    MPNetForSequenceClassification,
    MPNetForTokenClassification,
    MPNetModel,
)
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

# One line per shared file, used or not: of a local folder, transformers 5.0 copies only the files named here.
from .block_sparse import BlockSparseLinear as BlockSparseLinear
from .cards import CARD_MARK as CARD_MARK
from .checkpoint import read_header as read_header
from .family import PrunedConfigMixin, define_family
from .fields import ConfigFields
from .layout import Layout, Matrix
from .pretrained import PrunedMixin
from .pruned import apply_structure as apply_structure
from .standins import Selection
from .structure import Structure as Structure


class SelectiveHeads(MPNetSelfAttention):
    """Attention whose heads take their own of the position biases, which are those of all dense heads."""

    select: Selection

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers."""
        if position_bias is not None:
            position_bias = self.select(position_bias)
        return super().forward(
            hidden_states, attention_mask, position_bias, output_attentions=output_attentions, **kwargs
        )


def select_heads(attention: nn.Module, kept: tuple[int, ...]) -> None:
    """Have an attention read the biases of the kept heads, by their places among all."""
    selection = Selection(kept, dim=1)
    attention.__class__ = SelectiveHeads
    attention.select = selection.to(attention.get_parameter("q.bias").device)


LAYOUT = Layout(
    layers="encoder.layer",
    embeddings="embeddings",
    attention="attention.attn",
    matrices={
        "query": Matrix("attention.attn.q", rows="heads"),
        "key": Matrix("attention.attn.k", rows="heads"),
        "value": Matrix("attention.attn.v", rows="heads"),
        "attention_output": Matrix("attention.attn.o", rows="attention_output", columns="heads"),
        "fc1": Matrix("intermediate.dense", rows="fc1"),
        "fc2": Matrix("output.dense", rows="fc2", columns="fc1"),
    },
    activation="intermediate.intermediate_act_fn",
    followers={"attention_output": "attention.dropout", "fc2": "output.dropout"},
    select_heads=select_heads,
)


class PrunedMPNetConfig(PrunedConfigMixin, MPNetConfig):
    """Config of a pruned MPNet: the sizes of the dense model, and which units are left."""

    model_type = "pruned_mpnet"
    layout = LAYOUT
    config_fields = ConfigFields(
        bounds={"relative_attention_num_buckets": (1, 2**16)}, positions_behind_padding=True
    )


class PrunedMPNetMixin(PrunedMixin):
    """What pruned MPNet models have in common."""

    config_class = PrunedMPNetConfig


class PrunedMPNetModel(PrunedMPNetMixin, MPNetModel):
    """:class:`~transformers.MPNetModel` with the layers that were kept."""


class PrunedMPNetForMaskedLM(PrunedMPNetMixin, MPNetForMaskedLM):
    """:class:`~transformers.MPNetForMaskedLM` with the layers that were kept."""


class PrunedMPNetForSequenceClassification(PrunedMPNetMixin, MPNetForSequenceClassification):
    """:class:`~transformers.MPNetForSequenceClassification` with the layers that were kept."""


class PrunedMPNetForTokenClassification(PrunedMPNetMixin, MPNetForTokenClassification):
    """:class:`~transformers.MPNetForTokenClassification` with the layers that were kept."""


class PrunedMPNetForQuestionAnswering(PrunedMPNetMixin, MPNetForQuestionAnswering):
    """:class:`~transformers.MPNetForQuestionAnswering` with the layers that were kept."""


class PrunedMPNetForMultipleChoice(PrunedMPNetMixin, MPNetForMultipleChoice):
    """:class:`~transformers.MPNetForMultipleChoice` with the layers that were kept."""


FAMILY = define_family(
    PrunedMPNetConfig,
    {
        "AutoModel": PrunedMPNetModel,
        "AutoModelForMaskedLM": PrunedMPNetForMaskedLM,
        "AutoModelForSequenceClassification": PrunedMPNetForSequenceClassification,
        "AutoModelForTokenClassification": PrunedMPNetForTokenClassification,
        "AutoModelForQuestionAnswering": PrunedMPNetForQuestionAnswering,
        "AutoModelForMultipleChoice": PrunedMPNetForMultipleChoice,
    },
)

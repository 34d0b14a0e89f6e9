"""What a small model of each family takes. A family that is added to hf_mlprune needs a row here, no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Row:
    """How the tests build one family.

    Attributes:
        config: what a small model without dropout takes, by the family's own names.
        variants: changes that make it of another kind that its checkpoints have.
        even_heads: whether its positions turn pairs of features, so that heads have an even size.
    """

    config: Mapping[str, Any]
    variants: tuple[Mapping[str, Any], ...] = ()
    even_heads: bool = False


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

#: Model type -> row.
TABLE: dict[str, Row] = {
    "bert": Row(NO_DROPOUT),
    "roberta": Row(NO_DROPOUT),
    "xlm-roberta": Row(NO_DROPOUT),
    "camembert": Row(NO_DROPOUT),
    "electra": Row({**NO_DROPOUT, "summary_last_dropout": 0.0, "embedding_size": 16}),
    "ernie": Row(NO_DROPOUT, variants=({"use_task_id": True},)),
    "distilbert": Row(
        {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0}
    ),
    "mpnet": Row(NO_DROPOUT),
    "modernbert": Row(
        # Its own special tokens lie outside of a small vocabulary.
        {"local_attention": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "cls_token_id": 1, "sep_token_id": 2},
        variants=({"attention_bias": True, "mlp_bias": True, "norm_bias": True},),
        even_heads=True,
    ),
    "deberta-v2": Row(
        # As in version 3.
        {**NO_DROPOUT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4,
         "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
         "type_vocab_size": 0},
        variants=(
            {"share_att_key": False},
            {"share_att_key": False, "pos_att_type": ["c2p"], "position_buckets": -1},
            {"relative_attention": False, "position_biased_input": True, "conv_kernel_size": 3},
        ),
    ),
    "esm": Row(
        {**NO_DROPOUT, "pad_token_id": 1, "mask_token_id": 2, "token_dropout": True,
         "position_embedding_type": "rotary"},
        variants=({"position_embedding_type": "absolute", "emb_layer_norm_before": True},),
        even_heads=True,
    ),
    "vit": Row(NO_DROPOUT),
    "deit": Row(NO_DROPOUT),
}  # fmt: skip

each_family = pytest.mark.parametrize("family", TABLE)

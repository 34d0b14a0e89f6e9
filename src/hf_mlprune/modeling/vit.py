"""ViT: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.models.vit import modeling_vit

# One line per shared file, used or not: of a local folder, transformers 5.0 copies only the files named here.
from .block_sparse import BlockSparseLinear as BlockSparseLinear
from .cards import CARD_MARK as CARD_MARK
from .checkpoint import read_header as read_header
from .family import PrunedConfigMixin, define_family
from .fields import IMAGE_BOUNDS, ConfigFields
from .layout import VIT_5_0_LAYOUT, VIT_LAYOUT
from .pretrained import PrunedMixin
from .pruned import apply_structure as apply_structure
from .standins import RowScatter as RowScatter
from .structure import Structure as Structure

# transformers renamed its modules within version 5.
LAYOUT = VIT_LAYOUT if "ViTMLP" in vars(modeling_vit) else VIT_5_0_LAYOUT
# The present code reads it, and so can have fewer heads than its width holds.
HEAD_SIZE = "head_dim" if LAYOUT is VIT_LAYOUT else None


class PrunedViTConfig(PrunedConfigMixin, ViTConfig):
    """Config of a pruned ViT: the sizes of the dense model, and which units are left."""

    model_type = "pruned_vit"
    layout = LAYOUT
    config_fields = ConfigFields(head_size=HEAD_SIZE, bounds=IMAGE_BOUNDS)


class PrunedViTMixin(PrunedMixin):
    """What pruned ViT models have in common."""

    config_class = PrunedViTConfig


class PrunedViTModel(PrunedViTMixin, ViTModel):
    """:class:`~transformers.ViTModel` with the layers that were kept."""


class PrunedViTForMaskedImageModeling(PrunedViTMixin, ViTForMaskedImageModeling):
    """:class:`~transformers.ViTForMaskedImageModeling` with the layers that were kept."""


class PrunedViTForImageClassification(PrunedViTMixin, ViTForImageClassification):
    """:class:`~transformers.ViTForImageClassification` with the layers that were kept."""


FAMILY = define_family(
    PrunedViTConfig,
    {
        "AutoModel": PrunedViTModel,
        "AutoModelForMaskedImageModeling": PrunedViTForMaskedImageModeling,
        "AutoModelForImageClassification": PrunedViTForImageClassification,
    },
)

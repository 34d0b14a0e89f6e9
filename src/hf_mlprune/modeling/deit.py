"""DeiT: how its layers lie, and its pruned models."""

from __future__ import annotations

from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForMaskedImageModeling,
    DeiTModel,
)
from transformers.models.deit import modeling_deit

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
LAYOUT = VIT_LAYOUT if "DeiTMLP" in vars(modeling_deit) else VIT_5_0_LAYOUT
# The present code reads it, and so can have fewer heads than its width holds.
HEAD_SIZE = "head_dim" if LAYOUT is VIT_LAYOUT else None


class PrunedDeiTConfig(PrunedConfigMixin, DeiTConfig):
    """Config of a pruned DeiT: the sizes of the dense model, and which units are left."""

    model_type = "pruned_deit"
    layout = LAYOUT
    config_fields = ConfigFields(head_size=HEAD_SIZE, bounds=IMAGE_BOUNDS)


class PrunedDeiTMixin(PrunedMixin):
    """What pruned DeiT models have in common."""

    config_class = PrunedDeiTConfig


class PrunedDeiTModel(PrunedDeiTMixin, DeiTModel):
    """:class:`~transformers.DeiTModel` with the layers that were kept."""


class PrunedDeiTForMaskedImageModeling(PrunedDeiTMixin, DeiTForMaskedImageModeling):
    """:class:`~transformers.DeiTForMaskedImageModeling` with the layers that were kept."""


class PrunedDeiTForImageClassification(PrunedDeiTMixin, DeiTForImageClassification):
    """:class:`~transformers.DeiTForImageClassification` with the layers that were kept."""


FAMILY = define_family(
    PrunedDeiTConfig,
    {
        "AutoModel": PrunedDeiTModel,
        "AutoModelForMaskedImageModeling": PrunedDeiTForMaskedImageModeling,
        "AutoModelForImageClassification": PrunedDeiTForImageClassification,
    },
)

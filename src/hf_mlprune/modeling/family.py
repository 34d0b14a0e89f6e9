"""A family of encoders as a record, and what the configs of its pruned models have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .fields import ConfigFields, check_config
from .layout import DenseLayer, Layout
from .structure import Structure

#: Heads of one class per row, token or image.
LABELLED = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
)
#: What heads return, where that is not only `logits`.
PREDICTIONS = {
    "AutoModel": ("last_hidden_state", "pooler_output"),
    "AutoModelForQuestionAnswering": ("start_logits", "end_logits"),
    "AutoModelForPreTraining": ("prediction_logits", "seq_relationship_logits"),
    "AutoModelForMaskedImageModeling": ("reconstruction",),
}
#: Auto classes that load a head of another name for the families that have none of their own.
ALSO_LOADED_BY = {"AutoModelForPreTraining": "AutoModelForMaskedLM", "AutoModelForTextEncoding": "AutoModel"}


@dataclass(frozen=True)
class Head:
    """A task head of a family.

    Attributes:
        auto: name of the Auto class that loads it.
        stock: its class in transformers.
        pruned: the class of the same head over a pruned encoder.
    """

    auto: str
    stock: type[PreTrainedModel]
    pruned: type[PreTrainedModel]

    @property
    def has_labels(self) -> bool:
        """Whether `num_labels` and `id2label` of the config say what the head predicts."""
        return self.auto in LABELLED

    @property
    def has_choices(self) -> bool:
        """Whether inputs have an axis of choices before that of tokens."""
        return self.auto == "AutoModelForMultipleChoice"

    @property
    def judges_tokens(self) -> bool:
        """Whether it gives one logit for each token, as ELECTRA's pretraining does; BERT's gives words."""
        pretraining = self.auto == "AutoModelForPreTraining"
        return pretraining and "next_sentence_label" not in signature(self.stock.forward).parameters

    @property
    def predictions(self) -> tuple[str, ...]:
        """Names of the outputs that a head without `return_dict` returns behind its loss, as far as known."""
        return ("logits",) if self.judges_tokens else PREDICTIONS.get(self.auto, ("logits",))


@dataclass(frozen=True)
class Family:
    """The encoders of one model type.

    Attributes:
        config: the config class of pruned models, which says how layers lie and what their sizes are called.
        heads: every head; the first is the encoder alone.
    """

    config: type[PrunedConfigMixin]
    heads: tuple[Head, ...]

    @property
    def name(self) -> str:
        """The model type of stock models."""
        name: str = self.stock_config.model_type
        return name

    def loaders(self) -> dict[str, Head]:
        """Auto classes -> the head that each loads."""
        found = {head.auto: head for head in self.heads}
        if self.takes_images:
            return found
        return {auto: found[head] for auto, head in ALSO_LOADED_BY.items() if head in found} | found

    @property
    def takes_images(self) -> bool:
        """Whether its models are called with pixels, not tokens."""
        return bool(self.heads[0].stock.main_input_name == "pixel_values")

    @property
    def stock_config(self) -> Any:
        """The config class of stock models."""
        return self.heads[0].stock.config_class


def define_family(config: type[PrunedConfigMixin], heads: Mapping[str, type[PreTrainedModel]]) -> Family:
    """Make a family, and have its code saved with its models.

    `save_pretrained` copies the file of a class and those it imports beside the weights, so that the folder
    loads with `trust_remote_code=True` where hf-mlprune is not installed.

    Args:
        config: of its pruned models.
        heads: name of an Auto class -> pruned class; first that of the encoder alone.
    """
    config.register_for_auto_class()  # type: ignore[attr-defined]
    found = []
    for auto, pruned in heads.items():
        pruned.register_for_auto_class(auto)
        # By their defining module, as a checkpoint's own code runs under another name than ours.
        stock = next(base for base in pruned.__mro__ if base.__module__.startswith("transformers.models."))
        found.append(Head(auto, stock, pruned))
        share_conversions(stock.__name__, pruned.__name__)
    config.family = Family(config, tuple(found))
    share_conversions(config.family.name, config.model_type)
    return config.family


def share_conversions(stock: str, ours: str) -> None:
    """Have transformers read old checkpoints into models of ours as into stock ones.

    Args:
        stock: a class name or a model type, whose old tensor names it knows.
        ours: the same of ours.
    """
    conversions = get_checkpoint_conversion_mapping(stock)
    if conversions is not None:
        register_checkpoint_conversion_mapping(ours, conversions, overwrite=True)


class PrunedConfigMixin:
    """Config of pruned models of one family: the sizes of the dense model, and which units are left.

    Attributes:
        layout: how a layer lies, where that is the same for all configs.
        config_fields: what the config class calls its sizes.
        family: set by :func:`define_family`.
        structure: JSON form of :class:`~.structure.Structure`.
    """

    model_type: ClassVar[str]
    layout: ClassVar[Layout]
    config_fields: ClassVar[ConfigFields] = ConfigFields()
    family: ClassVar[Family]

    structure: dict[str, Any] | None = None

    @classmethod
    def dense_layer(cls, config: Any) -> DenseLayer:
        """The dense layer that a config of this family, stock or ours, describes."""
        return DenseLayer(cls.layout, cls.config_fields.sizes(config))

    @classmethod
    def read_structure(cls, config: Any) -> Structure:
        """The structure that a config with the field ``structure`` stores.

        Raises:
            ValueError: there is none, or it is not one of this model.
        """
        check_config(config.to_dict(), cls.config_fields)
        count = getattr(config, cls.config_fields.num_layers)
        return Structure.from_dict(config.structure, cls.dense_layer(config), count)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, for fields that such a model can have.

        Raises:
            ValueError: a field is damaged.
        """
        check_config(config_dict, cls.config_fields)
        with damaged_fields(cls.family):
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


@contextmanager
def damaged_fields(family: Family) -> Iterator[None]:
    """Say of a damaged field that it is one, whatever transformers, which checks few types, makes of it.

    Raises:
        ValueError: for any other error than one of values.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"config.json: expected the config of a model of type {family.name} ({error!r:.300})"
        ) from error

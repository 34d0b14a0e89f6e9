"""Small real models of any family, what they read, and what they put out."""

from __future__ import annotations

import copy
import inspect

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from families import TABLE
from hf_mlprune import PruningConfig, advance, attach, collect, shrink, start
from hf_mlprune.families import FAMILIES, find_encoders
from hf_mlprune.modeling.family import Family, Head
from hf_mlprune.narrowing import compute_all
from hf_mlprune.state import pruning_state

VOCABULARY = 64
TOKENS = 12
LABELS = 3
IMAGE, PATCH = 16, 8

#: Short names of heads -> the Auto classes that load them.
HEADS = {
    "model": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
    "masked": "AutoModelForMaskedLM",
    "choice": "AutoModelForMultipleChoice",
    "pretraining": "AutoModelForPreTraining",
    "next": "AutoModelForNextSentencePrediction",
    "image": "AutoModelForImageClassification",
    "masked_image": "AutoModelForMaskedImageModeling",
}
INPUTS = ("input_ids", "attention_mask", "pixel_values")


def find_family(name: str) -> Family:
    """The record of a family, by its model type."""
    return next(family for family in FAMILIES if family.name == name)


def find_head(head: str, family: str = "bert") -> Head:
    """The record of a head, by its short name."""
    return next(found for found in find_family(family).heads if found.auto == HEADS[head])


def heads_of(family: str = "bert") -> list[str]:
    """Short names of all heads of a family, that of the encoder alone first."""
    short = {auto: name for name, auto in HEADS.items()}
    return [short[head.auto] for head in find_family(family).heads]


def labelled_head(family: str) -> str:
    """The head that predicts one class for each input: what the helpers take where none is named."""
    return "image" if find_family(family).takes_images else "sequence"


def make_config(family: str = "bert", **changes) -> PreTrainedConfig:
    """A stock config; `changes` by BERT's names for sizes and activation, else by the family's own."""
    record = find_family(family)
    fields = record.config.config_fields
    own = {
        "hidden_size": fields.hidden_size,
        "num_hidden_layers": fields.num_layers,
        "num_attention_heads": fields.num_heads,
        "intermediate_size": fields.ffn_size,
        "hidden_act": fields.activation,
    }
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    read = (
        {"image_size": IMAGE, "patch_size": PATCH, "encoder_stride": PATCH}
        if record.takes_images
        else {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
    )
    changes = {own.get(name, name): value for name, value in {**sizes, **changes}.items()}
    return record.stock_config(**{**read, "num_labels": LABELS, **TABLE[family].config, **changes})


def make_model(head: str | None = None, seed: int = 0, family: str = "bert", **changes) -> PreTrainedModel:
    head = head or labelled_head(family)
    set_seed(seed)
    labels = {"num_labels": 2} if head == "span" else {}
    model = find_head(head, family).stock(make_config(family, **labels, **changes))
    with torch.no_grad():
        # Biases start at zero in a fresh model: a lost or misplaced one would not be noticed.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def make_batch(
    head: str | None = None, rows: int = 4, seed: int = 0, family: str = "bert"
) -> dict[str, torch.Tensor]:
    head = head or labelled_head(family)
    generator = torch.Generator().manual_seed(seed)
    if find_family(family).takes_images:
        return _images(head, rows, generator)
    shape = (rows, 2, TOKENS) if head == "choice" else (rows, TOKENS)
    tokens = torch.randint(1, VOCABULARY, shape, generator=generator)
    mask = torch.ones_like(tokens)
    mask[..., TOKENS - 3 :] = 0
    mask[0] = 1
    batch = {"input_ids": tokens, "attention_mask": mask}
    if head == "sequence":
        batch["labels"] = tokens[:, 1] % LABELS
    elif head == "token":
        batch["labels"] = (tokens % LABELS).masked_fill(mask == 0, -100)
    elif head == "masked":
        batch["labels"] = tokens.masked_fill(mask == 0, -100)
    elif head in ("choice", "next"):
        batch["labels"] = tokens.flatten(1)[:, 1] % 2
    elif head == "span":
        batch["start_positions"] = tokens[:, 1] % 5
        batch["end_positions"] = tokens[:, 1] % 5 + 2
    elif head == "pretraining":
        # Replaced or not; as tokens of the vocabulary, they do for the other kind of pretraining, too.
        batch["labels"] = tokens % 2
        if "next_sentence_label" in inspect.signature(find_head(head, family).stock.forward).parameters:
            batch["next_sentence_label"] = tokens[:, 1] % 2
    return batch


def _images(head: str, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    pixels = torch.randn(rows, 3, IMAGE, IMAGE, generator=generator)
    batch = {"pixel_values": pixels}
    if head == "image":
        batch["labels"] = (pixels[:, 0, 0, 0] * 10).long() % LABELS
    elif head == "masked_image":
        batch["bool_masked_pos"] = torch.arange(rows * (IMAGE // PATCH) ** 2).view(rows, -1) % 3 == 0
    return batch


def make_dataset(head: str | None = None, rows: int = 64, family: str = "bert") -> Dataset:
    batch = make_batch(head, rows, seed=1, family=family)
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()})


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(**batch)
    return out.loss if "loss" in out else out.last_hidden_state.square().mean()


def prune(model: nn.Module, config: PruningConfig, *, head: str | None = None, steps: int = 20) -> None:
    """A custom loop from dense to final masks, without a Trainer."""
    family = find_encoders(model)[0][1].name
    attach(model, config)
    start(model, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    for step in range(1, steps + 1):
        loss_of(model, make_batch(head, seed=step, family=family)).backward()
        collect(model)
        optimizer.step()
        optimizer.zero_grad()
        advance(model, step)


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without labels."""
    return {name: value for name, value in batch.items() if name in INPUTS}


def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return {k: v for k, v in model(**inputs_of(batch)).items() if isinstance(v, torch.Tensor)}


def assert_same_outputs(
    first: nn.Module, second: nn.Module, batch: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    a, b = outputs(first, batch), outputs(second, batch)
    assert a.keys() == b.keys()
    for name in a:
        bound = tolerance * max(1.0, float(a[name].abs().max()))
        assert float((a[name] - b[name]).abs().max()) <= bound, name


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that have several, together."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def shrink_without(model, empty, layer: int = 1) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The masked model and its pruned form, when all units of some gates of a layer are gone."""
    # A run that is over computes what its masks kept.
    compute_all(pruning_state(model))
    for name in empty:
        gate = pruning_state(model).gates(layer)[name]
        gate.set_keep(torch.zeros(gate.units, dtype=torch.bool))
    masked = clone(model)
    shrink(model)
    return masked, model

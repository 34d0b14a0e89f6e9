"""What is exported: a model in evaluation mode, the inputs it takes, and examples of them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from ..encoders import Encoder, inspect_encoder, random_batch
from ..families import FAMILIES, head_of, read_config
from ..files import find_file
from ..modeling.block_sparse import BlockSparseLinear
from ..processors import reading_processor
from .plain import replace_blocks
from .pooling import WholeSpladePooling
from .stock import CPU_ATTENTION

Inputs = dict[str, Tensor]

#: Names that hold what is to be predicted, not what a model reads.
LABELS = ("labels", "label", "start_positions", "end_positions", "next_sentence_label")
#: In the folders of sentence-transformers' models.
SENTENCES = "config_sentence_transformers.json"
#: Rows and tokens per row of the batches that an export is compared on.
SIZES = ((1, 5), (2, 24), (3, 40), (8, 17))


class SentenceModel(nn.Module):
    """The modules of a SentenceTransformer or SparseEncoder as one: tokens to ``sentence_embedding``.

    Args:
        modules: its modules, the first of which holds the transformers model as ``model``.
        features: the first so many are its embedding; ``None`` for all.
    """

    def __init__(self, modules: Iterable[nn.Module], features: int | None = None) -> None:
        super().__init__()
        self.features = features
        self.parts = nn.ModuleList(
            WholeSpladePooling(part) if type(part).__name__ == "SpladePooling" else part for part in modules
        )

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Embeddings, ``(batch, features)``."""
        features: dict[str, Any] = dict(inputs)
        for part in self.parts:
            features = part(features)
        return {"sentence_embedding": features["sentence_embedding"][..., : self.features]}


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        module: what is called; in evaluation mode, float32, on the CPU, a copy of the user's.
        model: the transformers model in it, which may be the same.
        encoder: its encoder.
        names: of the inputs.
        processor: tokenizer or image processor that makes them, if it is known.
        dtype: of all weights of the user's model; float32 if they have several.
    """

    module: nn.Module
    model: PreTrainedModel
    encoder: Encoder
    names: tuple[str, ...]
    processor: Any
    dtype: torch.dtype = torch.float32

    def batch(self, rows: int, length: int) -> Inputs:
        """Random inputs; the middle row is padded from the middle on."""
        made = random_batch(self.model, self.encoder, rows, length)
        if "token_type_ids" in self.names:
            made["token_type_ids"] = torch.zeros_like(made["input_ids"])
        missing = [name for name in self.names if name not in made]
        if missing:
            raise ValueError(f"inputs: no example can be made for {missing}; it knows {list(made)}")
        return {name: made[name] for name in self.names}

    def full_batch(self, rows: int, length: int) -> Inputs:
        """The same without padding: as most served batches of one length are."""
        inputs = self.batch(rows, length)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return inputs

    def with_model(self, model: PreTrainedModel) -> Source:
        """The same around another transformers model of the same head."""
        if self.module is self.model:
            return dataclasses.replace(self, module=model, model=model, encoder=inspect_encoder(model))
        module = copy.deepcopy(self.module)
        assert isinstance(module, SentenceModel)
        module.parts[0].model = model
        return dataclasses.replace(self, module=module.eval(), model=model, encoder=inspect_encoder(model))

    def with_blocks_as(self, make: Callable[[BlockSparseLinear], nn.Module]) -> Source:
        """The same with another module in the place of every block-sparse layer."""
        module = copy.deepcopy(self.module)
        model = module if self.module is self.model else module.parts[0].model  # type: ignore[index, union-attr]
        replace_blocks(module, make)
        return dataclasses.replace(self, module=module, model=model)


def read_source(model: Any, processor: Any, given: Iterable[str] | None = None) -> Source:
    """Take a model, or what a folder or hub name holds, as something to export.

    Args:
        model: a transformers model of a known family, pruned or dense; a SentenceTransformer, SparseEncoder
            or CrossEncoder; or the folder or hub name of any of them.
        processor: tokenizer or image processor; that of the folder if left out.
        given: names in the user's batches, of which the model then takes those it can, and a mask; else
            those that its processor makes.

    Raises:
        TypeError: it is none of these, or still has masks.
        ValueError: the folder or the batches hold something else.
        FileNotFoundError: there is no such folder or model.
    """
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise TypeError(
            "processing_class: expected a tokenizer or image processor of transformers, got "
            f"{type(processor).__name__}; such as AutoTokenizer.from_pretrained(...)"
        )
    if isinstance(model, (str, Path)):
        model, processor = _load(str(model), processor)
    package = type(model).__module__.partition(".")[0]
    if package == "sentence_transformers":
        return _sentence_source(model, processor, given)
    head = head_of(model) if isinstance(model, nn.Module) else None
    if head is None:
        raise TypeError(
            "model: expected a transformers model of a known family "
            f"({', '.join(family.name for family in FAMILIES)}), "
            "a SentenceTransformer, SparseEncoder or CrossEncoder, or a folder of one, got "
            f"{type(model).__name__}"
        )
    if not isinstance(model, (head.stock, head.pruned)) or getattr(model.config, "pruning", None):
        raise TypeError(
            f"model: expected a pruned or stock model, got {type(model).__name__}, which still has masks; "
            "call shrink(model) first, or finish its training"
        )
    plain = _plain_copy(model)
    encoder = inspect_encoder(plain)
    names = _input_names(plain, encoder, processor, given)
    return Source(plain, plain, encoder, names, processor, _dtype_of(model))


def _plain_copy(model: nn.Module) -> Any:
    plain = copy.deepcopy(model)
    for module in plain.modules():
        # Autocast, which accelerate puts around the model that it trains.
        if vars(module).pop("_original_forward", None) is not None:
            vars(module).pop("forward", None)
        if isinstance(module, PreTrainedModel):
            if module.config._attn_implementation not in CPU_ATTENTION:
                module.set_attn_implementation("sdpa")
            module.config.return_dict = True
    return plain.cpu().float().eval()


def _dtype_of(model: nn.Module) -> torch.dtype:
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def _load(source: str, processor: Any) -> tuple[Any, Any]:
    """What a folder or hub name holds, and its processor."""
    looks_local = Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if looks_local and not Path(source).exists():
        raise FileNotFoundError(f"model: expected a folder or hub name, got {source}, where nothing is")
    # Of the hub, too: without it, only the transformers model in it would be exported.
    # A model of the cache need not have it; one that is nowhere is refused below.
    sentences = find_file(source, SENTENCES)
    if sentences is not None:
        import sentence_transformers

        kinds = ("SentenceTransformer", "SparseEncoder", "CrossEncoder")
        # Of versions before 5, which had no others.
        kind = json.loads(sentences.read_text(encoding="utf-8")).get("model_type", kinds[0])
        if kind not in kinds:
            raise ValueError(f"{sentences}: expected a model_type of {list(kinds)}, got {kind!r}")
        return getattr(sentence_transformers, kind)(source, device="cpu"), processor
    config = read_config(source, "model: expected a folder")
    classes = {
        kind.__name__: kind
        for family in FAMILIES
        for head in family.heads
        for kind in (head.stock, head.pruned)
    }
    named = config.architectures or ["none"]
    if named[0] not in classes:
        raise ValueError(
            f"{source}: expected a model of a known class in config.json's architectures, got {named[0]}; "
            "load it yourself and pass the model"
        )
    model = classes[named[0]].from_pretrained(source)
    return model, _load_processor(source, model) if processor is None else processor


def _load_processor(source: str, model: PreTrainedModel) -> Any:
    """Tokenizer or image processor of a folder that has its files."""
    loader, files = (
        (AutoImageProcessor, ("preprocessor_config.json",))
        if model.main_input_name == "pixel_values"
        else (AutoTokenizer, ("tokenizer.json", "tokenizer_config.json"))
    )
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        return None
    with reading_processor(source):
        return loader.from_pretrained(source)


def _sentence_source(model: Any, processor: Any, given: Iterable[str] | None) -> Source:
    """A model of sentence-transformers."""
    processor = model.tokenizer if processor is None else processor
    kind = type(model).__name__
    if kind == "CrossEncoder":
        return read_source(model.model, processor, given)
    first = next(iter(model))
    if not isinstance(getattr(first, "model", None), PreTrainedModel) or head_of(first.model) is None:
        raise TypeError(
            f"{kind}: expected a transformers model of a known family in its first module, got "
            f"{type(first).__name__}"
        )
    if getattr(model, "max_active_dims", None) is not None:
        raise TypeError(
            f"{kind}: expected one that keeps all of its dimensions, got max_active_dims="
            f"{model.max_active_dims}, which an engine cannot cut to; set it to None and cut what is served"
        )
    module = SentenceModel(_plain_copy(model), getattr(model, "truncate_dim", None)).eval()
    inner: Any = module.parts[0].model
    encoder = inspect_encoder(inner)
    return Source(module, inner, encoder, _input_names(inner, encoder, processor, given), processor)


def _input_names(
    model: PreTrainedModel, encoder: Encoder, processor: Any, given: Iterable[str] | None
) -> tuple[str, ...]:
    """What a model is called with: what its processor makes of what it takes."""
    if encoder.family.takes_images:
        return ("pixel_values",)
    types = getattr(model.config, "type_vocab_size", 0) > 1
    wanted: Sequence[str] = ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))
    if processor is not None:
        wanted = processor.model_input_names
    taken = inspect.signature(model.forward).parameters
    names = tuple(name for name in wanted if name in taken)
    if given is None:
        return names
    # Without a mask, padding would count in what is served.
    used = {*given, "attention_mask"}
    if "input_ids" not in used:
        raise ValueError(f"data: expected batches with {list(wanted)}, got {sorted(given)}")
    return tuple(name for name in names if name in used)


def inputs_of(batch: Mapping[str, Any], names: Sequence[str]) -> Inputs:
    """Those of a batch that a model reads, as tensors of the types that engines take, on the CPU.

    Without a mask all tokens count, as in transformers.

    Raises:
        ValueError: one is missing.
    """
    if "input_ids" in batch:
        batch = {"attention_mask": torch.ones_like(torch.as_tensor(batch["input_ids"])), **batch}
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(f"data: expected batches with {list(names)}, got one with {sorted(batch)}")
    tensors = {name: torch.as_tensor(batch[name]).detach().cpu() for name in names}
    return {name: x.float() if x.is_floating_point() else x.long() for name, x in tensors.items()}

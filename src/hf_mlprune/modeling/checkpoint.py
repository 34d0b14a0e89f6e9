"""What is checked of a checkpoint's files before a model of its sizes is built, and how one is written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import cached_file

from .pruned import FINGERPRINT

#: Longest header that safetensors reads.
MAX_HEADER = 100_000_000
#: What the hub is asked with; the others are the model's.
HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip
#: The underscore keeps it out of hub uploads of Trainer, should a process be killed while it is there.
PARTIAL = "_partial_checkpoint"
#: What :data:`PARTIAL` is called once it is whole, while its files replace those of the folder.
WHOLE = "_whole_checkpoint"


#: Sizes in a config, and the largest that is taken for one: what is built before the weights are read.
SIZES = {
    "hidden_size": 2**16,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "intermediate_size": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**20,
    "type_vocab_size": 2**16,
}
#: Most heads and rows of all layers together.
MAX_UNITS = 2**22
BOOLEANS = ("is_decoder", "add_cross_attention", "output_hidden_states", "output_attentions", "return_dict")
NUMBERS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps")


def check_config(data: Mapping[str, Any]) -> None:
    """Refuse sizes of a BERT's config that are none, before a model of them is built.

    Args:
        data: the JSON form; fields may be absent.

    Raises:
        ValueError: what was expected of which field, and what came.
    """
    for name, largest in SIZES.items():
        size = data.get(name, 1)
        if type(size) is not int or not 0 < size <= largest:
            raise ValueError(f"config.json: {name}: expected 1 to {largest}, got {size!r:.80}")
    width = data.get("intermediate_size", 1) + 3 * data.get("hidden_size", 1)
    if data.get("num_hidden_layers", 1) * width > MAX_UNITS:
        raise ValueError(f"config.json: expected at most {MAX_UNITS} heads and rows of all layers together")
    for name in NUMBERS:
        number = data.get(name, 0.0)
        if type(number) not in (int, float) or not 0 <= number <= 1:
            raise ValueError(f"config.json: {name}: expected a number from 0 to 1, got {number!r:.80}")
    activation, padding = data.get("hidden_act", "gelu"), data.get("pad_token_id")
    if not callable(activation) and (not isinstance(activation, str) or activation not in ACT2FN):
        raise ValueError(
            f"config.json: hidden_act: expected the name of an activation, got {activation!r:.80}"
        )
    if padding is not None and (type(padding) is not int or not abs(padding) < data.get("vocab_size", 2**24)):
        raise ValueError(
            f"config.json: pad_token_id: expected a token of the vocabulary, got {padding!r:.80}"
        )
    for name in ("dtype", "torch_dtype"):
        dtype = data.get(name)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"config.json: {name}: expected the name of a dtype, got {dtype!r:.80}")
    code = data.get("auto_map") or {}
    if not isinstance(code, Mapping) or not all(isinstance(value, (str, list)) for value in code.values()):
        raise ValueError(f"config.json: auto_map: expected names of classes, got {code!r:.80}")
    for name in BOOLEANS:
        if data.get(name) not in (None, True, False):
            raise ValueError(f"config.json: {name}: expected true or false, got {data[name]!r:.80}")
    if data.get("is_decoder") or data.get("add_cross_attention"):
        raise ValueError("config.json: expected an encoder, got is_decoder or add_cross_attention")
    chunk = data.get("chunk_size_feed_forward", 0)
    if type(chunk) is not int or chunk < 0:
        raise ValueError(f"config.json: chunk_size_feed_forward: expected 0 or more, got {chunk!r:.80}")
    architectures = data.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"config.json: architectures: expected names of classes, got {architectures!r:.80}")
    labels = data.get("num_labels", 1)
    if type(labels) is not int or not 0 <= labels <= 2**20:
        raise ValueError(f"config.json: num_labels: expected 0 to {2**20}, got {labels!r:.80}")


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    is_floating_point: bool


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Names and shapes of a safetensors file's tensors.

    Raises:
        ValueError: the header is damaged, or names a tensor twice.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{path.name}: expected a safetensors header, got one of {length} bytes; {_ADVICE}"
            )
        text = file.read(length)
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
        tensors = {name: _stored(value) for name, value in data.items() if name != "__metadata__"}
        end = max((data[name]["data_offsets"][1] for name in tensors), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name}: damaged safetensors header ({error!r:.200}); {_ADVICE}") from None
    if size != 8 + length + end:
        raise ValueError(f"{path.name}: expected {8 + length + end} bytes, got {size}; {_ADVICE}")
    return tensors


_ADVICE = "download the checkpoint again, or save the model again"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _stored(value: Any) -> StoredTensor:
    shape, dtype = value["shape"], value["dtype"]
    if not isinstance(shape, list) or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"shape {shape!r:.80}")
    return StoredTensor(tuple(shape), dtype.startswith(("F", "BF")))


def stored_tensors(
    source: str | os.PathLike[str], variant: str | None, hub: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Headers of all weight files of a checkpoint.

    Args:
        source: a folder, or a hub name.
        variant: see ``from_pretrained``.
        hub: those of :data:`HUB_ARGUMENTS` that were given.

    Raises:
        ValueError: a file is damaged or missing, leads out of its folder, or a tensor stands in two.
        OSError: there are no weights of safetensors.
    """

    def find(name: str) -> Path | None:
        found = cached_file(source, name, **hub, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    ending = f".{variant}" if variant else ""
    single = find(f"model{ending}.safetensors")
    if single is not None:
        return read_header(single)
    index = find(f"model.safetensors.index{ending}.json")
    if index is None:
        raise OSError(f"{source}: expected weights in model{ending}.safetensors, which is not there")
    tensors: dict[str, StoredTensor] = {}
    for name in _shards(index):
        shard = find(name)
        if shard is None:
            raise ValueError(f"{index.name}: expected the file {name}, which is not there; {_ADVICE}")
        header = read_header(shard)
        twice = sorted(set(header) & set(tensors))
        if twice:
            raise ValueError(f"{name}: {twice[0]!r} stands in another shard, too; {_ADVICE}")
        tensors |= header
    return tensors


def _shards(index: Path) -> list[str]:
    """File names that an index gives.

    Raises:
        ValueError: it is damaged, or a name is not that of a weight file beside it.
    """
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(data["weight_map"].values()))
        dict(data["metadata"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index.name}: expected metadata and a weight_map ({error!r:.200}); {_ADVICE}"
        ) from None
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(f"{index.name}: expected names of files beside it, got {name!r:.80}; {_ADVICE}")
    return names


def keep_present_names(model: nn.Module) -> None:
    """Have a model, and those within it, saved under the names that their tensors have now.

    transformers remembers what it renamed or rewrote at loading and undoes that at saving. Whoever then reads
    the file by the model's own names (`Trainer`, resuming or loading the best checkpoint) finds none of those
    tensors, and nothing says so.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Empty, not absent: without it, transformers looks for what models of this type have.
            module._weight_conversions = []


def _present_name(name: str) -> str:
    """What transformers calls a tensor of an old checkpoint; we kept such names at saving, too, once."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def check_stored(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, Tensor],
    prefix: str,
    *,
    whole: bool,
    ignore_heads: bool,
) -> None:
    """Compare what is stored with what a model of the config would hold, before memory is taken for it.

    Args:
        stored: headers of the weight files.
        expected: the model's tensors, on the meta device.
        prefix: name of the encoder within a model with a head; keys may have it or not.
        whole: whether the checkpoint is of this class, so that its head must be there, too.
        ignore_heads: whether tensors outside the encoder's layers may be of another shape.

    Raises:
        ValueError: a tensor of the encoder is missing, or one is of another shape or kind.
    """
    by_name = {_present_name(name).removeprefix(f"{prefix}."): tensor for name, tensor in stored.items()}
    for key, tensor in expected.items():
        name = key.removeprefix(f"{prefix}.")
        found, inside = by_name.get(name), name.startswith(("encoder.", "embeddings.", FINGERPRINT))
        if found is None:
            if inside or whole:
                raise ValueError(
                    f"expected every weight in the checkpoint, but {key!r} is missing; {_ADVICE}"
                )
        elif found.shape != tuple(tensor.shape) and not (ignore_heads and not inside):
            message = f"{key}: expected the shape {tuple(tensor.shape)} of config.json, got {found.shape}: "
            if inside:
                message += (
                    f"the checkpoint is incomplete or was edited, or its files are of two models; {_ADVICE}"
                )
            else:
                message += "for a new head, e.g. of another num_labels, pass ignore_mismatched_sizes=True"
            raise ValueError(message)
        elif found.is_floating_point != tensor.is_floating_point():
            raise ValueError(f"{key}: expected {tensor.dtype}, got a tensor of another kind; {_ADVICE}")


def write_checkpoint(
    folder: Path, write: Callable[[Path], None], *, variant: str | None = None, keep: Collection[str] = ()
) -> None:
    """Have a checkpoint written beside the files of a folder, and move it to them once it is whole.

    Other files of the folder stay. A process that dies between two moves leaves files of two models and a
    folder :data:`WHOLE`, by which :func:`check_whole` knows.

    Args:
        folder: made, if it is not there.
        write: fills the folder that it is called with.
        variant: see ``save_pretrained``; weights of other variants stay.
        keep: names of files in the folder that are not replaced.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    partial, whole = folder / PARTIAL, folder / WHOLE
    for left in (partial, whole):
        # Of a process that died; what it had is written again now.
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.replace(whole)
    names = sorted(path.name for path in whole.iterdir())
    for name in names:
        if name not in keep:
            (whole / name).replace(folder / name)
    weights = weight_files(variant)
    for path in folder.iterdir():
        # Shards of the model that was there before.
        if weights.fullmatch(path.name) and path.name not in names:
            path.unlink()
    shutil.rmtree(whole)


def weight_files(variant: str | None) -> re.Pattern[str]:
    """Names of the weight files of one variant, of which a folder holds those of one model."""
    ending = re.escape(f".{variant}") if variant else ""
    number = r"(-\d{5}-of-\d{5})?"
    return re.compile(rf"model{ending}{number}\.safetensors|model\.safetensors\.index{ending}\.json")


def check_whole(folder: Path) -> None:
    """Refuse a folder in which one model was about to replace another.

    Raises:
        ValueError: says how to finish that.
    """
    if (folder / WHOLE).is_dir():
        raise ValueError(
            f"{folder}: a process died while it saved a model here, so that files of two models stand side "
            f"by side; save the model again, or move the files of {folder / WHOLE} over those of the folder"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file under its final name only once it is complete.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

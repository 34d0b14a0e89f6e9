"""Validate checkpoint files before building a model; write them whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

#: The part of an encoder that is a head: some checkpoints have none, others another.
POOLER = "pooler."
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


def quantized_weights(model: nn.Module, stored: Collection[str], prefix: str) -> set[str]:
    """Names of the weights that a quantizer stored in a form of its own, whose sizes are its business.

    Of linears and embeddings, that is: other modules no quantizer takes. What it stored of one stands under
    names within that module which the model itself does not have.

    Args:
        model: of the checkpoint's config, not quantized.
        stored: names in the weight files, under the names that transformers gives their tensors.
        prefix: name of the encoder within a model with a head; stored names may have it or not.
    """
    own = {name.removeprefix(f"{prefix}.") for name in model.state_dict()}
    places = set()
    for name in {name.removeprefix(f"{prefix}.") for name in stored} - own:
        while name:
            name = name.rpartition(".")[0]
            places.add(name)
    return {
        f"{path}.weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.Linear, nn.Embedding)) and path.removeprefix(f"{prefix}.") in places
    }


def check_stored(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, Tensor],
    prefix: str,
    *,
    is_encoder: bool,
    whole: bool,
    ignore_heads: bool,
) -> None:
    """Compare what is stored with what a model of the config would hold, before memory is taken for it.

    Args:
        stored: headers of the weight files, under the names that transformers gives their tensors.
        expected: the model's tensors, on the meta device.
        prefix: name of the encoder within a model with a head; stored names may have it or not.
        is_encoder: whether the model is the encoder itself.
        whole: whether the checkpoint is of this class, so that its head must be there, too.
        ignore_heads: whether tensors outside the encoder may be of another shape.

    Raises:
        ValueError: a tensor of the encoder is missing, or one is of another shape or kind.
    """
    by_name = {name.removeprefix(f"{prefix}."): tensor for name, tensor in stored.items()}
    for key, tensor in expected.items():
        name = key.removeprefix(f"{prefix}.")
        found = by_name.get(name)
        inside = (is_encoder or name != key) and not name.startswith(POOLER)
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
        make_readable(partial, partial / "config.json")
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


def make_readable(folder: Path, config: Path) -> None:
    """Give the weight files of a folder the mode of its config.

    safetensors gives them to their owner alone, so that another user's server could not read them.
    """
    for path in folder.rglob("*.safetensors"):
        path.chmod(config.stat().st_mode)


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

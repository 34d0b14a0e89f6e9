"""Which units of each layer are kept, as a pruned checkpoint stores it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .layout import GROUPS, RESIDUAL, DenseLayer

FORMAT_VERSION = 2
#: Of a block, in rows or columns.
LONGEST_SIDE = 4096
#: Group -> what tables call it.
TITLES = dict(zip(GROUPS, ("heads", "O rows", "FC1 rows", "FC2 rows"), strict=True))


@dataclass(frozen=True)
class LayerStructure:
    """Kept units of one layer.

    Attributes:
        kept: group -> sorted indices into the dense layer's units. Rows of O and FC2 that are not kept are
            written as zeros.
        blocks: number of stored blocks per matrix; a matrix that is absent is stored dense.
    """

    kept: Mapping[str, tuple[int, ...]]
    blocks: Mapping[str, int]

    @classmethod
    def full(cls, dense: DenseLayer) -> LayerStructure:
        """The structure of a layer from which nothing was removed."""
        return cls({group: tuple(range(units)) for group, units in dense.units.items()}, {})

    @property
    def widths(self) -> dict[str, int]:
        """Kept units of each group."""
        return {group: len(indices) for group, indices in self.kept.items()}

    def shape(self, name: str, dense: DenseLayer) -> tuple[int, int]:
        """``(rows, columns)`` of the kept part of a matrix."""
        return dense.shape(name, self.widths)

    def is_empty(self, name: str, dense: DenseLayer) -> bool:
        """Whether a matrix has no rows or no columns left."""
        return 0 in self.shape(name, dense)

    def scatter(self, group: str, dense: DenseLayer) -> tuple[int, ...] | None:
        """Places in the residual stream of a group's rows; ``None`` where all or none of them are left."""
        rows = self.kept[group] if group in RESIDUAL else ()
        return rows if 0 < len(rows) < dense.sizes.hidden_size else None


@dataclass(frozen=True)
class Structure:
    """Kept units of every layer of an encoder, and the block layout.

    Attributes:
        layers: one entry per encoder layer.
        block_shape: ``(rows, columns)`` of a block, or ``None`` if no matrix is stored as blocks.
    """

    layers: tuple[LayerStructure, ...]
    block_shape: tuple[int, int] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form: indices as ranges (``"0-3,7"``), with the format version and a fingerprint."""
        data = {
            "version": FORMAT_VERSION,
            "block_shape": list(self.block_shape) if self.block_shape else None,
            "layers": [
                {
                    **{group: format_ranges(layer.kept[group]) for group in GROUPS},
                    "blocks": dict(layer.blocks),
                }
                for layer in self.layers
            ],
        }
        return {**data, "fingerprint": fingerprint(data)}

    def html(self, dense: DenseLayer) -> str:
        """Kept units of all, per layer and group, and stored blocks of all, as a table of HTML."""
        titles = ["layer", *TITLES.values(), *(["blocks"] if self.block_shape else [])]
        rows = []
        for index, layer in enumerate(self.layers):
            cells = [str(index), *(f"{len(layer.kept[group])}/{dense.units[group]}" for group in TITLES)]
            if self.block_shape:
                grids = [grid_shape(layer.shape(name, dense), self.block_shape) for name in layer.blocks]
                cells.append(f"{sum(layer.blocks.values())}/{sum(rows * columns for rows, columns in grids)}")
            rows.append("".join(f"<td>{cell}</td>" for cell in cells))
        head = "".join(f"<th>{title}</th>" for title in titles)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    @classmethod
    def from_dict(cls, data: Any, dense: DenseLayer, count: int) -> Structure:
        """Read and check the JSON form.

        Args:
            data: what :meth:`to_dict` wrote.
            dense: the dense layer.
            count: layers of the encoder.

        Raises:
            ValueError: the data is not a structure of these layers, or its format is newer.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"structure: expected an object, got {type(data).__name__}")
        version = data.get("version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"structure: expected format version {FORMAT_VERSION}, got {version!r}; if a newer "
                "hf-mlprune wrote this checkpoint, upgrade with `pip install -U hf-mlprune`; version 1 was "
                "never released, such a model must be pruned again"
            )
        _expect_keys("structure", data, {"version", "block_shape", "layers", "fingerprint"})
        block_shape = _read_block_shape(data["block_shape"])
        layers = data["layers"]
        if not isinstance(layers, list) or len(layers) != count:
            got = len(layers) if isinstance(layers, list) else type(layers).__name__
            raise ValueError(f"structure: expected {count} layers, got {got}")
        found = cls(
            layers=tuple(_read_layer(index, layer, dense, block_shape) for index, layer in enumerate(layers)),
            block_shape=block_shape,
        )
        if data["fingerprint"] != fingerprint(data):
            raise ValueError(
                f"structure: expected the fingerprint {fingerprint(data)}, got {data['fingerprint']!r:.80}: "
                "it was edited; restore config.json, or save the model again"
            )
        return found


def fingerprint(data: Mapping[str, Any]) -> str:
    """32 hexadecimal digits of a structure's JSON form, which stand in the config and in the weights."""
    rest = {key: value for key, value in data.items() if key != "fingerprint"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def grid_shape(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """Number of block rows and block columns that cover a matrix; edge blocks may be partial."""
    return -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])


def format_ranges(indices: tuple[int, ...]) -> str:
    """Sorted indices as text: ``(0, 1, 2, 3, 7)`` becomes ``"0-3,7"``."""
    parts: list[str] = []
    start = previous = None
    for index in (*indices, None):
        if previous is not None and index == previous + 1:
            previous = index
            continue
        if start is not None:
            parts.append(f"{start}" if start == previous else f"{start}-{previous}")
        start = previous = index
    return ",".join(parts)


def parse_ranges(where: str, text: Any, limit: int) -> tuple[int, ...]:
    """Inverse of :func:`format_ranges` for indices in ``[0, limit)``.

    Raises:
        ValueError: the text is malformed, or an index is repeated, unsorted or out of range.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected ranges such as '0-3,7', got {type(text).__name__}")
    indices: list[int] = []
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        if not (first.isascii() and first.isdigit()) or (_ and not (last.isascii() and last.isdigit())):
            raise ValueError(f"{where}: expected ranges such as '0-3,7', got {part[:40]!r}")
        # Checked before expansion: an edited file may name an enormous range.
        if len(first) > 9 or len(last) > 9 or int(last or first) >= limit:
            raise ValueError(f"{where}: expected indices below {limit}, got {part[:40]!r}")
        start, stop = int(first), int(last or first)
        if stop < start or (indices and start <= indices[-1]):
            raise ValueError(f"{where}: expected increasing indices, got {part[:40]!r}")
        indices.extend(range(start, stop + 1))
    return tuple(indices)


def _read_layer(
    index: int, data: Any, dense: DenseLayer, block_shape: tuple[int, int] | None
) -> LayerStructure:
    where = f"structure: layer {index}"
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    _expect_keys(where, data, {*GROUPS, "blocks"})
    kept = {
        group: parse_ranges(f"{where}: {group}", data[group], units) for group, units in dense.units.items()
    }
    _check_blocks(where, data["blocks"], LayerStructure(kept, {}), dense, block_shape)
    return LayerStructure(kept, dict(data["blocks"]))


def _check_blocks(
    where: str, data: Any, layer: LayerStructure, dense: DenseLayer, block_shape: tuple[int, int] | None
) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: blocks: expected an object, got {type(data).__name__}")
    if data and block_shape is None:
        raise ValueError(f"{where}: blocks are counted, but block_shape is null")
    for name, count in data.items():
        if name not in dense.layout.matrices:
            raise ValueError(f"{where}: blocks: expected one of {tuple(dense.layout.matrices)}, got {name!r}")
        assert block_shape is not None
        rows, columns = grid_shape(layer.shape(name, dense), block_shape)
        if type(count) is not int or not 0 <= count <= rows * columns:
            raise ValueError(f"{where}: blocks of {name}: expected 0 to {rows * columns}, got {count!r}")


def _read_block_shape(data: Any) -> tuple[int, int] | None:
    if data is None:
        return None
    if (
        not isinstance(data, list)
        or len(data) != 2
        or any(type(side) is not int or not 0 < side <= LONGEST_SIDE for side in data)
    ):
        raise ValueError(f"structure: expected block_shape [rows, columns], got {data!r}")
    return data[0], data[1]


def _expect_keys(where: str, data: Mapping[str, Any], keys: set[str]) -> None:
    if set(data) != keys:
        raise ValueError(f"{where}: expected the keys {sorted(keys)}, got {sorted(map(str, data))}")

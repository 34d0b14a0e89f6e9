"""Ways in which a checkpoint's files get damaged, or are edited by somebody who means harm."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

NUMBERS = ["-1", "0", "1", "2", "3", "17", "65", "999", "65536", "99999999", "9999999999"]
NUMBERS += ["1e400", "-1e9", "2.5", "NaN"]
OTHERS = ["null", "true", "false", '""', '"x"', "[]", "{}", "[1, 2]", '{"a": 1}', '"../x"', '"0-99999999"']
OTHERS += ['"3,1"']
DTYPES = ["F32", "F16", "BF16", "F64", "I8", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X", ""]
SIDES = [-1, 0, 1, 7, 2**31, 2**63, "3", None]
NAMES = ["../x.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "config.json", "C:\\x"]


def flip_bits(data: bytes, chance: random.Random, low: int = 0, high: int | None = None) -> bytes:
    """One to eight bits turned over, within a range of bytes."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(low, min(len(out), high or len(out)))
        out[place] ^= 1 << chance.randrange(8)
    return bytes(out)


def cut(data: bytes, chance: random.Random) -> bytes:
    """The beginning of a file, the end of it, or the file with something behind it."""
    place = chance.randrange(len(data))
    return chance.choice([data[:place], data[place:], data + bytes(chance.randrange(1, 99)), b""])


def edit_json(text: str, chance: random.Random) -> str:
    """A value replaced, a key renamed, taken out or given twice."""
    kind = chance.choice(["number", "other", "rename", "drop", "twice"])
    values = list(re.finditer(r'(?<=[:\[,] )(-?[0-9][0-9.e-]*|"[^"\n]*"|null|true|false)|"[0-9,-]+"', text))
    keys = list(re.finditer(r'"(\w+)": ', text))
    if kind in ("number", "other") and values:
        match = chance.choice(values)
        value = chance.choice(NUMBERS if kind == "number" else OTHERS)
        return text[: match.start()] + value + text[match.end() :]
    match = chance.choice(keys)
    if kind == "rename":
        return text[: match.start(1)] + "x" + text[match.start(1) :]
    if kind == "drop":
        end = text.find(",", match.end())
        return text[: match.start()] + text[end + 1 :]
    return (
        text[: match.start()] + f'"{match[1]}": {chance.choice(NUMBERS + OTHERS)}, ' + text[match.start() :]
    )


def mutate_config(folder: Path, chance: random.Random) -> None:
    """Bits, length or values of config.json."""
    path = folder / "config.json"
    data = path.read_bytes()
    kind = chance.randrange(6)
    if kind == 0:
        data = flip_bits(data, chance)
    elif kind == 1:
        data = cut(data, chance)
    else:
        text = data.decode()
        for _ in range(chance.randint(1, 3)):
            text = edit_json(text, chance)
        data = text.encode()
    path.write_bytes(data)


def split_weights(data: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_weights(header: str, data: bytes) -> bytes:
    """The inverse of :func:`split_weights`."""
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


def edit_header(header: dict, body: bytes, chance: random.Random) -> str:
    """Another shape, dtype, place or name of a tensor; one fewer, one more, one twice."""
    names = [name for name in header if name != "__metadata__"]
    name, other = chance.choice(names), chance.choice(names)
    entry = header[name]
    kind = chance.randrange(9)
    if kind == 0:
        entry["shape"] = [chance.choice(SIDES) for _ in range(chance.randrange(4))]
    elif kind == 1:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 2:
        entry["dtype"] = chance.choice(DTYPES)
    elif kind == 3:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = chance.choice(
            [
                [begin, begin],
                [end, begin],
                [0, len(body)],
                [-1, end],
                [begin, 2**62],
                [begin + 4, end + 4],
                [],
                None,
            ]
        )
    elif kind == 4:
        header[name], header[other] = header[other], entry
    elif kind == 5:
        header[f"{name}x"] = header.pop(name)
    elif kind == 6:
        del header[name]
    elif kind == 7:
        return json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[other])}}}'
    else:
        header["__metadata__"] = chance.choice([None, [], {"format": 3}, {"format": "tf"}, {}])
    return json.dumps(header)


def edit_indices(header: dict, body: bytes, chance: random.Random) -> bytes:
    """Other numbers in a tensor that says where blocks or rows belong."""
    names = [
        name for name in header if name.endswith(("_indices", "fingerprint")) and header[name]["shape"] != [0]
    ]
    entry = header[chance.choice(names)]
    begin, end = entry["data_offsets"]
    width = {"I32": 4, "I64": 8, "U8": 1}[entry["dtype"]]
    out = bytearray(body)
    for _ in range(chance.randint(1, 4)):
        place = begin + width * chance.randrange((end - begin) // width)
        out[place : place + width] = chance.choice(
            [
                b"\xff" * width,
                b"\x00" * width,
                b"\xff" * (width - 1) + b"\x7f",
                chance.randbytes(width),
                bytes([3]) + bytes(width - 1),
            ]
        )
    return bytes(out)


def mutate_weights(folder: Path, chance: random.Random) -> None:
    """Bits, length, header or index tensors of a weight file."""
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    header, body = split_weights(data)
    kind = chance.randrange(7)
    if kind == 0:
        data = flip_bits(data, chance, 0, 8)
    elif kind == 1:
        data = flip_bits(data, chance, 8, len(data) - len(body))
    elif kind == 2:
        data = cut(data, chance)
    elif kind == 3 and any(name.endswith("_indices") for name in header):
        data = join_weights(json.dumps(header), edit_indices(header, body, chance))
    else:
        data = join_weights(edit_header(header, body, chance), body)
    path.write_bytes(data)


def mutate_shards(folder: Path, chance: random.Random) -> None:
    """The index of a checkpoint in shards, or which shards there are."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        mutate_weights(folder, chance)
        return
    shards = sorted(folder.glob("*.safetensors"))
    text = path.read_text()
    kind = chance.randrange(5)
    if kind == 0:
        shards[0].unlink()
    elif kind == 1:
        shutil.copy(shards[0], shards[1])
    elif kind == 2:
        name = chance.choice(NAMES)
        text = text.replace(shards[0].name, json.dumps(name)[1:-1], chance.choice([1, -1]))
    elif kind == 3:
        text = edit_json(text, chance)
    else:
        text = flip_bits(text.encode(), chance).decode(errors="replace")
    path.write_text(text)


def mix(other: Path) -> Callable[[Path, random.Random], None]:
    """A mutation that takes the config of another checkpoint."""

    def mutate(folder: Path, chance: random.Random) -> None:
        shutil.copy(other / "config.json", folder / "config.json")

    return mutate

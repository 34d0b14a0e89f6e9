"""What the parts of an encoder take on this machine: thin encoders of random weights are timed in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .budgets.time import PARTS
from .encoders import Encoder, check_length, random_batch, stock_encoder
from .modeling.pruned import apply_structure
from .modeling.structure import LayerStructure, Structure
from .timing import interleave, synchronize

#: Layers of the encoders that are timed: parts of a layer are differences between them.
PROBED_LAYERS = 2
#: Words that they know: dozens of them are in memory at once.
PROBED_VOCABULARY = 1024
#: Points of a table: shares of an FFN's rows, and at most so many counts of heads.
FFN_POINTS = 24
HEAD_POINTS = 12
#: Each encoder is opened anew so many times, as where its weights lie in memory is worth some percent of its
#: time: at most, and at least where calls are so long that fewer points must do.
OPENINGS, LEAST_OPENINGS = 8, 3
#: Rounds that are counted of each opening: at most. One more goes before them. Of widths timed a few times, a
#: run chooses those that only seemed fast: with 3 rounds models came out slower than asked.
ROUNDS = 15
#: Of the timing of a table: at most; no further opening is begun after it.
MOST_SECONDS = 240.0
#: For people who wait.
MEASURING = "measuring the times of the encoder's parts: some minutes, in which nothing else should run here"
#: What a thin encoder takes on average, over the dense one of as many layers.
MEAN_TIME = 0.45

#: Gives a new instance of a network, as something to call.
Opener = Callable[[], Callable[[], object]]
#: Heads, FFN rows and layers of a thin encoder.
Shape = tuple[int, int, int]


def measure_times(
    encoder: Encoder,
    batch: int,
    length: int,
    make: Callable[[nn.Module, Mapping[str, Tensor]], Opener] | None = None,
    ffn_points: int = FFN_POINTS,
) -> dict[str, Tensor]:
    """Nanoseconds of a layer's attention by kept heads, of its FFN by kept rows, and of all else.

    Small encoders with random weights are timed in turn. What two of them differ by is the part that they
    differ in. Of the other part they keep a quarter, as most pruned models do: a large one slows a small one,
    and its noise hides it. Each encoder is opened and timed several times. Where a call takes long, fewer
    widths are timed: of widths timed once a run would choose those that only seemed fast. Sums of parts are
    brought to the times of whole encoders: the dense one, and those of about a half, a quarter, an eighth of
    its heads and rows.

    Args:
        encoder: gives family, sizes, device and dtype.
        batch: sequences, or images.
        length: tokens per sequence.
        make: turns a thin encoder and its inputs into what opens it; in torch, if left out.
        ffn_points: at most so many widths of the FFN are measured, besides 0.

    Raises:
        ValueError: times do not grow with what is kept: the encoder is too small, or the machine is at work.
            The model does not take so many tokens.
    """
    check_length(encoder, length)
    dense, count = encoder.dense, len(encoder.layers)
    probed = min(PROBED_LAYERS, count)
    # Without the padding of the middle sequence: as most served batches of one length are called.
    inputs = random_batch(encoder.module, encoder, batch, length)
    if "input_ids" in inputs:
        inputs["input_ids"] %= PROBED_VOCABULARY
    if make is None:
        inputs.pop("attention_mask", None)
    elif "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])

    def opener(shape: Shape) -> Opener:
        return (make or in_torch)(_thin(encoder, *shape), inputs)

    # Weights are drawn at random: the run's own random numbers go on as if nothing had been.
    with torch.random.fork_rng(devices=[]):
        probe = opener((dense.units["heads"], dense.units["fc1"], probed))()
    with torch.inference_mode():
        seconds = interleave([probe], rounds=3, warmup=1, budget_seconds=10).seconds[0]
    share = share_of_points(seconds, HEAD_POINTS + ffn_points, count / probed)
    heads = points(dense.units["heads"], math.ceil(share * HEAD_POINTS))
    rows = points(dense.units["fc1"], math.ceil(share * ffn_points))
    smaller = [(_nearest(heads, part), _nearest(rows, part)) for part in (8, 4, 2)]
    whole = [*smaller, (heads[-1], rows[-1])]
    few_heads, few_rows = smaller[1]
    shapes = [(*each, count) for each in ((0, 0), *whole)]
    shapes += [(each, few_rows, probed) for each in heads] + [(few_heads, each, probed) for each in rows]
    with torch.random.fork_rng(devices=[]):
        openers = {shape: opener(shape) for shape in dict.fromkeys(shapes)}
    bare, *times = (1e9 * seconds for seconds in _times(openers, shapes))
    widths = {"heads": heads, "fc1": rows}
    found = {"heads": times[len(whole) :][: len(heads)], "fc1": times[len(whole) + len(heads) :]}
    parts = {group: np.maximum(0, np.subtract(found[group], found[group][0])) for group in PARTS}
    if sum(part[-1] for part in parts.values()) <= 0 or times[len(smaller)] <= bare:
        raise ValueError(
            f"speedup, latency: the time of this encoder at {batch} x {length} tokens does not grow with its "
            f"heads and rows ({times[len(smaller)] / 1e6:.2f} ms dense, {bare / 1e6:.2f} ms without any); "
            "use longer batches, a quieter machine, or another target"
        )
    layer = [(time - bare) / count for time in times[: len(whole)]]
    shares = [_share(parts, widths, each) for each in whole]
    tables = {"rest_time": torch.tensor([round(bare)])}
    for group, name in PARTS.items():
        table = torch.full((dense.units[group] + 1,), -1, dtype=torch.int64)
        table[widths[group]] = torch.as_tensor(_calibrated(parts, group, shares, layer)).round().long()
        tables[name] = table
    return tables


def _times(openers: Mapping[Shape, Opener], shapes: Sequence[Shape]) -> list[float]:
    """Seconds of a call of each network: medians over its instances."""
    began, found = time.perf_counter(), []
    for opening in range(OPENINGS):
        if opening >= LEAST_OPENINGS and time.perf_counter() - began > MOST_SECONDS:
            break
        networks = {shape: opened() for shape, opened in openers.items()}
        variants = [networks[shape] for shape in shapes]
        budget = MOST_SECONDS / OPENINGS
        with torch.inference_mode():
            timing = interleave(variants, rounds=ROUNDS, warmup=1, budget_seconds=budget)
        found.append(timing.seconds)
        # Before the next ones are made.
        del networks, variants
    totals = np.sum(found, axis=1, keepdims=True)
    # By shares of all: a machine that drifts slows all networks of an opening alike.
    medians = np.median(np.asarray(found) / totals, axis=0) * np.median(totals)
    return [float(seconds) for seconds in medians]


def _nearest(widths: Sequence[int], part: int) -> int:
    """The width nearest to this part of the last one, but more than none."""
    return min(widths[1:], key=lambda width: abs(width - widths[-1] / part))


def share_of_points(seconds: float, most: int, layers: float) -> float:
    """Share of the points for which there is time; never less than a third.

    Args:
        seconds: of a call of the dense encoder of a few layers.
        most: points, if calls are short.
        layers: of the whole encoder, over those few.
    """
    calls = MOST_SECONDS / (2 * LEAST_OPENINGS) / seconds
    # The whole encoders take the time of two dense ones.
    return min(1.0, max(1 / 3, (calls - 2 * layers) / (MEAN_TIME * most)))


def _share(
    parts: Mapping[str, np.ndarray[Any, Any]], widths: Mapping[str, list[int]], kept: Sequence[int]
) -> float:
    """Time of a layer that keeps so many units of each part, over that of a dense one, as parts add up."""
    times = [parts[group][widths[group].index(units)] for group, units in zip(PARTS, kept, strict=True)]
    return float(sum(times) / sum(part[-1] for part in parts.values()))


def _calibrated(
    parts: Mapping[str, np.ndarray[Any, Any]], group: str, shares: Sequence[float], layer: Sequence[float]
) -> np.ndarray[Any, Any]:
    """Times of one part, so that layers of these shares take the times that whole encoders took.

    Beside more layers, or larger ones, a part finds less of its weights in the caches.
    """
    part, full = parts[group], sum(each[-1] for each in parts.values())
    true = np.maximum.accumulate([0.0, *(time / layer[-1] for time in layer)])
    relative = np.interp(part / max(part[-1], 1e-9), [0.0, *shares], true)
    return np.asarray(relative * (part[-1] / full) * layer[-1])


def points(most: int, count: int) -> list[int]:
    """Widths to measure: 0, ``most``, and up to so many at equal distances between them."""
    step = max(1, -(-most // count))
    return sorted({*range(0, most, step), most})


def _thin(encoder: Encoder, heads: int, rows: int, layers: int) -> nn.Module:
    """A stock encoder of so many layers, cut to so many heads and FFN rows in each."""
    kept = {group: tuple(range(units)) for group, units in encoder.dense.units.items()}
    layer = LayerStructure({**kept, "heads": tuple(range(heads)), "fc1": tuple(range(rows))}, {})
    found: nn.Module = stock_encoder(encoder, _small(encoder, layers))
    modules = found.get_submodule(encoder.dense.layout.layers).children()
    apply_structure(modules, Structure((layer,) * layers, None), encoder.dense)
    found.to(encoder.module.device, encoder.module.dtype)
    return found.eval()


def _small(encoder: Encoder, layers: int) -> dict[str, Any]:
    """Fields of a config that make an encoder have so many layers, and few words."""
    config = encoder.module.config
    changes: dict[str, Any] = {encoder.family.config.config_fields.num_layers: layers}
    if getattr(config, "layer_types", None) is not None:
        changes["layer_types"] = config.layer_types[:layers]
    if not encoder.family.takes_images:
        changes["vocab_size"] = min(config.vocab_size, PROBED_VOCABULARY)
        # It has a place of its own among the words.
        changes["pad_token_id"] = min(config.pad_token_id or 0, changes["vocab_size"] - 1)
    return changes


def in_torch(network: nn.Module, inputs: Mapping[str, Tensor]) -> Opener:
    """What opens a network in torch: all calls are of this network, whose weights an opening moves."""
    device = next(network.parameters()).device

    def call() -> None:
        network(**inputs)
        synchronize(device)

    def opened() -> Callable[[], object]:
        # Another place in memory is all that an instance is: a copy would take it twice.
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
        return call

    return opened

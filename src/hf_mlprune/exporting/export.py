"""export: one call from a pruned model to a folder that an engine serves, checked and measured."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import write_folder, write_json
from ..installed import check_installed
from . import checking, folders, onnx, openvino, programs
from .engine import Engine, Layers, Runner, reference
from .int8 import Gate
from .measuring import EXPORT, ServingLatency, measure
from .metric import ComputeMetrics, Judge
from .onnx_int8 import RECIPES
from .plain import blocks_of
from .proof import proof_batches, prove
from .report import REPORT_FILE, ExportReport
from .source import Source, inputs_of, read_source
from .stock import stock_cost, stock_model

ENGINES: dict[str, Engine] = {
    "onnx": onnx.ONNX,
    "onnx-blocks": onnx.ONNX_BLOCKS,
    "openvino": openvino.OPENVINO,
    "torch": programs.TORCH,
    "aotinductor": programs.AOTINDUCTOR,
    "stock": folders.STOCK,
    "dense": folders.DENSE,
}
#: Batches that ranges of static int8 are taken from, and that outputs are compared on.
CALIBRATION = 32
#: Points that int8 may lose where nothing else is asked for.
MAX_DROP = 0.5


def export(
    model: Any,
    folder: str | Path,
    to: str = "onnx",
    *,
    int8: bool | str = False,
    data: Iterable[Mapping[str, Any]] | None = None,
    compute_metrics: ComputeMetrics | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    processing_class: Any = None,
    latency: Sequence[tuple[int, int]] = ((1, 128),),
    threads: int | None = None,
) -> ExportReport:
    """Write a model for an engine, check that the written files equal the model, and measure them.

    Inputs and outputs have transformers' names, with dynamic batch and length. The model stays as it is.

    Args:
        model: a pruned (or stock) transformers model, a SentenceTransformer, SparseEncoder or CrossEncoder,
            or the folder or hub name of one. A model of sentence-transformers gives ``sentence_embedding``.
        folder: a new one, or one that an earlier export wrote.
        to: ``"onnx"``; ``"onnx-blocks"``, where block-sparse layers are nodes of our operator, which lies
            beside the model for a session to register; ``"openvino"``; ``"torch"``, an exported program;
            ``"aotinductor"``, a compiled package; ``"stock"`` or ``"dense"``, folders that plain transformers
            loads, as small as its classes can be, or of the dense sizes.
        int8: ``True``, or a recipe: ``"dynamic"`` (ONNX Runtime; without data), ``"static"`` (calibrated).
        data: batches that the model accepts, such as ``trainer.get_eval_dataloader()``. They are used to
            calibrate static int8 and, if they have labels, to measure the quality.
        compute_metrics: as for the Trainer; accuracy if it is left out.
        metric: which of its figures counts; larger is better.
        max_drop: maximum loss of the metric by int8, in points. One point is 0.01 if the metric of the float
            model is between -1 and 1, else 1. The default is 0.5. It needs labels; without them the quality
            is not checked. The worst layers stay in float until the loss is small enough; if no layer can be
            quantized, the export is float.
        processing_class: tokenizer or image processor to save with the model; by default that of the folder.
        latency: rows and tokens per row to measure; empty to measure nothing.
        threads: number of threads of the engine; by default that of torch.

    Returns:
        A report of what was written; ``export_report.json`` in the folder has the same content.

    Raises:
        TypeError: a model that cannot be exported.
        ValueError: an engine or recipe that is not known, or data that do not fit.
        FileExistsError: the folder holds something else.
        FileNotFoundError: there is no such folder as the model's.
        ImportError: the engine is not installed.
        RuntimeError: the export does not compute the same as the model. Then nothing is written.
    """
    engine, recipe, target = check_request(
        folder, to, int8=int8, has_data=data is not None, latency=latency, threads=threads
    )
    batches = None if data is None else checking.read_batches(data)
    checking.check_metric(batches, compute_metrics, metric, max_drop, int8=bool(recipe))
    source = read_source(model, processing_class, batches[0] if batches else None)
    judge = None if batches is None else Judge(batches, source.names, compute_metrics, metric)
    if judge is not None:
        checking.check_batches(source, judge.batches)
        if recipe:
            judge.check(reference(source))
    threads = threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work:
        floats = final = Path(work) / "float"
        floats.mkdir()
        layers = engine.write(source, floats)
        proof = prove(engine.load(floats, threads), reference(source), proof_batches(source))
        quantized = None
        if recipe:
            final = Path(work) / "int8"
            allowed = MAX_DROP if max_drop is None else max_drop
            gate = _gate(source, to, recipe, layers, judge, allowed, threads)
            quantized = gate.apply(floats, final)
        if source.processor is not None:
            source.processor.save_pretrained(final)
        found = ExportReport(
            to=to,
            files={file.name: file.stat().st_size for file in sorted(final.iterdir())},
            proof=proof,
            int8=quantized,
            latency=_measure(source, to, engine.load(final, threads), judge, latency, threads),
            cost=_cost(source, to),
            notes=_notes(source.module, engine),
            packages=_versions(engine),
        )
        write_json(final / REPORT_FILE, found.to_dict())
        write_folder(target, lambda partial: _copy(final, partial))
    return found


def check_request(
    folder: str | Path,
    to: str,
    *,
    int8: bool | str,
    has_data: bool,
    latency: Sequence[tuple[int, int]] = (),
    threads: int | None = None,
) -> tuple[Engine, str, Path]:
    """Refuse what :func:`export` cannot do, before model and data are read; see there for errors.

    Returns:
        Engine, recipe of int8 (empty for float), and folder to write.
    """
    engine = _engine(to)
    recipe = _recipe(to, int8, has_data=has_data)
    target = checking.target_of(folder)
    checking.check_numbers(latency, threads)
    packages = (*engine.packages, *(("nncf",) if recipe and to == "openvino" else ()))
    check_installed(packages, extra="serve", needed_by=f"export to {to}")
    return engine, recipe, target


def _engine(to: str) -> Engine:
    if not isinstance(to, str) or to not in ENGINES:
        raise ValueError(f"to: expected one of {list(ENGINES)}, got {to!r}")
    return ENGINES[to]


def _recipe(to: str, int8: bool | str, *, has_data: bool) -> str:
    """The recipe of an engine; empty for float."""
    if int8 is False:
        return ""
    known = [recipe for engine, recipe in RECIPES if engine == to]
    recipe = known[0] if int8 is True and known else int8
    if recipe not in known:
        expected = f"False, True or one of {known}"
        if not known:
            expected = f'False for to="{to}", which has no int8 recipe'
        raise ValueError(f"int8: expected {expected}, got {int8!r}")
    if recipe == "static" and not has_data:
        raise ValueError("int8: static int8 is calibrated; pass data=... with batches, labelled or not")
    return str(recipe)


def _gate(
    source: Source, to: str, recipe: str, layers: Layers, judge: Judge | None, max_drop: float, threads: int
) -> Gate:
    batches = proof_batches(source)
    if judge is not None:
        batches = [inputs_of(batch, source.names) for batch in judge.batches[:CALIBRATION]]
    return Gate(
        recipe=recipe,
        layers=layers,
        quantize=RECIPES[to, recipe](batches),
        load=lambda folder: ENGINES[to].load(folder, threads),
        batches=batches,
        judge=judge if judge is not None and judge.has_labels else None,
        max_drop=max_drop,
    )


def _measure(
    source: Source, to: str, run: Runner, judge: Judge | None, sizes: Sequence[tuple[int, int]], threads: int
) -> tuple[ServingLatency, ...]:
    """The export, and the dense model in torch, in this engine, and in its int8."""
    if not sizes:
        return ()
    dense = source.with_model(stock_model(source.model, smallest=False))
    ways: dict[str, Runner] = {
        EXPORT: run,
        "pruned in torch": reference(source),
        "dense in torch": reference(dense),
    }
    with tempfile.TemporaryDirectory() as work:
        plain = to.removesuffix("-blocks")
        if plain in ("onnx", "openvino"):
            floats = Path(work) / "float"
            floats.mkdir()
            layers = ENGINES[plain].write(dense, floats)
            ways[f"dense in {plain}"] = ENGINES[plain].load(floats, threads)
            recipe = next(recipe for engine, recipe in RECIPES if engine == plain)
            if recipe != "static" or judge is not None:
                gate = _gate(dense, plain, recipe, layers, judge, float("inf"), threads)
                quantized = Path(work) / "int8"
                quantized.mkdir()
                gate.quantize(floats, quantized, ())
                ways[f"dense int8 in {plain}"] = ENGINES[plain].load(quantized, threads)
        return measure(source, ways, sizes, threads)


def _cost(source: Source, to: str) -> Any:
    if to not in ("stock", "dense"):
        return None
    stock = stock_model(source.model, smallest=to == "stock")
    return stock_cost(copy.deepcopy(source.model).to(source.dtype), stock.to(source.dtype))


def _notes(module: nn.Module, engine: Engine) -> tuple[str, ...]:
    blocks = blocks_of(module)
    if engine.keeps_blocks or not blocks:
        return ()
    kept = sum(layer.weight.numel() for layer in blocks)
    dense = sum(layer.in_features * layer.out_features for layer in blocks)
    return (
        f"{len(blocks)} block-sparse layers are dense here: {dense / max(kept, 1):.1f} times the weights "
        "that are left are stored and multiplied",
    )


def _versions(engine: Engine) -> dict[str, str]:
    names = {name.partition(".")[0] for name in engine.packages} | {"torch", "transformers", "hf-mlprune"}
    # Some are installed under another name: onnxruntime-gpu.
    installed = packages_distributions()
    return {name: version(installed.get(name, [name])[0]) for name in sorted(names)}


def _copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        (shutil.copytree if file.is_dir() else shutil.copyfile)(file, target / file.name)

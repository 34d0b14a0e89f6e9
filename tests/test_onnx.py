"""Pruned models as ONNX files: blocks, scattered rows, emptied layers."""

from __future__ import annotations

import numpy
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from hf_mlprune import PruningConfig, shrink
from hf_mlprune.levels import LEVELS
from hf_mlprune.modeling.block_sparse import BlockSparseLinear
from hf_mlprune.state import pruning_state
from support.models import make_batch, make_model, prune

ROWS = ("attention_output", "fc1", "fc2")


def pruned(levels, empty):
    model = make_model()
    shape = {"block_shape": (8, 4)} if "blocks" in levels else {}
    prune(model, PruningConfig.create(0.4, levels=levels, row_sites=ROWS, minimum_units=0, **shape))
    for name in empty:
        gate = pruning_state(model).gates(1)[name]
        gate.set_keep(torch.zeros(gate.units, dtype=torch.bool))
    shrink(model)
    return model.eval()


# Of torch's and onnxscript's own making.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("levels", [("heads", "rows"), LEVELS])
@pytest.mark.parametrize("empty", [(), ("heads", "fc1"), ("attention_output", "fc2")])
def test_the_onnx_file_computes_what_the_model_does(levels, empty, tmp_path):
    model = pruned(levels, empty)
    assert ("blocks" in levels) == any(isinstance(module, BlockSparseLinear) for module in model.modules())
    batch = make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs).logits
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, kwargs=inputs, f=path, dynamo=True, verbose=False)
    onnx.checker.check_model(path)
    found = ReferenceEvaluator(onnx.load(path)).run(
        None, {name: tensor.numpy() for name, tensor in inputs.items()}
    )
    numpy.testing.assert_allclose(found[0], expected.numpy(), atol=1e-5)


def test_a_program_of_torch_export_keeps_the_native_operation():
    layer = BlockSparseLinear(32, 32, (16, 16), 2).eval()
    for strict in (False, True):
        with torch.no_grad():
            program = torch.export.export(layer, (torch.randn(3, 32),), strict=strict)
        native = "hf_mlprune.block_sparse_linear" in str(program.graph)
        assert native == bool(layer._accelerated)

"""What serves models in torch serves pruned ones, of each kind; the table is in docs/serving.md."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import transformers
from optimum.quanto import freeze, qint8, quantization_map, quantize, requantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.export import Dim
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForSequenceClassification, QuantoConfig, TorchAoConfig, pipeline

from hf_mlprune import PruningConfig
from hf_mlprune.kernels.operation import WHY_NOT
from hf_mlprune.levels import LEVELS
from hf_mlprune.modeling.block_sparse import BlockSparseLinear
from hf_mlprune.prunable import CLASSES, CONFIGS
from support.models import (
    assert_same_outputs,
    clone,
    find_head,
    inputs_of,
    labelled_head,
    make_batch,
    make_model,
    outputs,
    prune,
    shrink_without,
)
from support.processes import run_without_package
from support.tokens import make_tokenizer

#: What is pruned -> groups of a layer that lose all they have.
KINDS = {"rows": (), "scatter": (), "empty": ("heads", "fc1"), "blocks": ()}
#: BERT has a module behind O and FC2, which writes rows to their places; ModernBERT has none.
CASES = [*((kind, "bert") for kind in KINDS), ("scatter", "modernbert"), ("empty", "modernbert")]
#: Difference that weights rounded to 8 bits may make, as a share of the largest output: a weight is off by at
#: most half a step, 1/254 of the largest of its row, and errors of many weights mostly cancel.
ROUNDING = 0.02
#: Activations are rounded, too.
ROUNDING_TWICE = 0.04

each_kind = pytest.mark.parametrize("kind", KINDS)


def make_pruned(kind, family="bert", head=None, layers=2):
    model = make_model(head, family=family, num_hidden_layers=layers)
    sites = ("fc1",) if kind == "rows" else ("attention_output", "fc1", "fc2")
    blocks = {"block_shape": (8, 4)} if kind == "blocks" else {}
    levels = LEVELS if kind == "blocks" else ("heads", "rows")
    settings = PruningConfig.create(0.5, levels=levels, row_sites=sites, minimum_units=0, **blocks)
    prune(model, settings, head=head)
    model = shrink_without(model, KINDS[kind], layer=layers - 1)[1].eval()
    assert any(isinstance(module, BlockSparseLinear) for module in model.modules()) == (kind == "blocks")
    return model


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """A pruned model, what it reads, and its folder."""
    kind, family = request.param
    model, folder = make_pruned(kind, family), tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder)
    return model, inputs_of(make_batch(family=family)), folder


def assert_rounded(model, quantized, batch, share):
    """Outputs differ, but by no more than rounding does."""
    expected, found = outputs(model, batch)["logits"], outputs(quantized, batch)["logits"]
    assert 0 < float((found - expected).abs().max()) < share * float(expected.abs().max())


INT8 = {
    "weights": (Int8WeightOnlyConfig(), ROUNDING),
    "weights-and-activations": (Int8DynamicActivationInt8WeightConfig(), ROUNDING_TWICE),
}
each_int8 = pytest.mark.parametrize("int8", INT8)


@each_int8
def test_torchao_by_transformers_saved_and_loaded_again(case, int8, tmp_path):
    model, batch, folder = case
    settings, share = INT8[int8]
    quantized = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=TorchAoConfig(settings)
    )
    assert_rounded(model, quantized, batch, share)
    quantized.save_pretrained(tmp_path)
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_outputs(quantized, again, batch, 0.0)
    plain = [m.weight for m in again.modules() if isinstance(m, nn.Linear)]
    assert all(weight.dtype is torch.float32 and "Int8" in type(weight).__name__ for weight in plain)
    blocks = [m.weight for m in again.modules() if isinstance(m, BlockSparseLinear)]
    assert all(type(weight.data) is torch.Tensor and weight.dtype is torch.float32 for weight in blocks)


@each_int8
def test_torchao_on_a_loaded_model(case, int8, tmp_path):
    model, batch, folder = case
    settings, share = INT8[int8]
    quantized = AutoModelForSequenceClassification.from_pretrained(folder)
    quantize_(quantized, settings)
    assert_rounded(model, quantized, batch, share)
    torch.save(quantized.state_dict(), tmp_path / "weights.pt")
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    again.load_state_dict(torch.load(tmp_path / "weights.pt"), assign=True)
    assert_same_outputs(quantized, again, batch, 0.0)


def test_quanto_by_transformers(case, tmp_path):
    model, batch, folder = case
    quantized = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=QuantoConfig(weights="int8")
    )
    assert_rounded(model, quantized, batch, ROUNDING)
    # As for a stock model.
    with pytest.raises(ValueError, match="quantized with quanto and is not serializable"):
        quantized.save_pretrained(tmp_path)


def test_quanto_on_a_loaded_model_saved_and_loaded_again(case, tmp_path):
    model, batch, folder = case
    quantized = AutoModelForSequenceClassification.from_pretrained(folder)
    quantize(quantized, weights=qint8)
    freeze(quantized)
    assert_rounded(model, quantized, batch, ROUNDING)
    save_file(quantized.state_dict(), tmp_path / "model.safetensors")
    again = type(model)(model.config)
    requantize(again, load_file(tmp_path / "model.safetensors"), quantization_map(quantized))
    assert_same_outputs(quantized, again, batch, 0.0)


def test_dynamic_int8_of_torch(case):
    model, batch, _ = case
    with warnings.catch_warnings():
        # torch says that torchao has its successor, and that its dtypes will go.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert_rounded(model, quantized, batch, ROUNDING_TWICE)


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    make_pruned("scatter").save_pretrained(folder / "float")
    settings = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForSequenceClassification.from_pretrained(folder / "float", quantization_config=settings)
    model.save_pretrained(folder / "int8")
    return folder / "int8"


REMOTE = """
import sys, torch
from transformers import AutoModelForSequenceClassification
folder, out = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
assert not any(name.split(".")[0] == "hf_mlprune" for name in sys.modules)
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 13)[None]).logits, out)
"""


def test_a_quantized_checkpoint_loads_without_the_package(quantized_folder, tmp_path):
    run_without_package(REMOTE, quantized_folder, tmp_path / "out.pt", cache=tmp_path / "cache")
    model = AutoModelForSequenceClassification.from_pretrained(quantized_folder)
    expected = outputs(model, {"input_ids": torch.arange(1, 13)[None]})["logits"]
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)


QUERY = "bert.encoder.layer.0.attention.self.query."


def without_query(tensors):
    for name in [name for name in tensors if name.startswith(f"{QUERY}_")]:
        del tensors[name]


def with_another_in_its_place(tensors):
    without_query(tensors)
    tensors[f"{QUERY}other"] = torch.zeros(1)


DAMAGES = [
    (without_query, f"expected every weight in the checkpoint, but '{QUERY}weight' is missing"),
    (with_another_in_its_place, f"1 are missing or of another size, e.g. '{QUERY}weight'"),
    (
        lambda tensors: tensors.pop("bert.encoder.layer.1.output.LayerNorm.weight"),
        "LayerNorm.weight' is missing",
    ),
    (lambda tensors: tensors.update({f"{QUERY}bias": torch.zeros(3)}), r"query.bias: expected the shape \("),
    (lambda tensors: tensors["bert.structure_fingerprint"].add_(1), "config and weights are not of the same"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_what_is_missing_in_a_quantized_checkpoint_is_refused(damage, message, quantized_folder, tmp_path):
    with safe_open(quantized_folder / "model.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    (tmp_path / "config.json").write_bytes((quantized_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_quantized_checkpoint_whose_config_does_not_say_so_is_refused(quantized_folder, tmp_path):
    config = json.loads((quantized_folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((quantized_folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"query\.weight' is missing"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_quantized_checkpoint_is_not_pruned_further(quantized_folder):
    config = CONFIGS["bert"].from_pretrained(quantized_folder, density=0.3)
    with pytest.raises(TypeError, match="prune first, then quantize"):
        CLASSES["PrunableBertForSequenceClassification"].from_pretrained(quantized_folder, config=config)


def short(batch):
    """A batch of other sizes."""
    return {name: tensor[:2, :7].contiguous() for name, tensor in batch.items()}


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
COMPILED = [
    ("rows", {}),
    *((kind, {"mode": "reduce-overhead", "fullgraph": True, "dynamic": True}) for kind in KINDS),
]


# Of torch's own making.
@needs_compiler
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("kind", "settings"), COMPILED)
def test_torch_compile(kind, settings):
    torch._dynamo.reset()
    model, batch = make_pruned(kind, layers=1), inputs_of(make_batch())
    compiled = torch.compile(model, **settings)
    for inputs in (batch, short(batch)):
        assert_same_outputs(model, compiled, inputs)


def exported(model, batch):
    """A program of torch.export for batches of any number and length."""
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=32)}
    with torch.no_grad():
        return torch.export.export(model, (), kwargs=batch, dynamic_shapes=dict.fromkeys(batch, sizes))


def test_torch_export_saved_and_loaded(case, tmp_path):
    model, batch, _ = case
    torch.export.save(exported(model, batch), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for inputs in (batch, short(batch)):
        with torch.no_grad():
            torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)


LOADED = """
import sys, torch
if sys.argv[2] == "with":
    import hf_mlprune
program = torch.export.load(sys.argv[1]).module()
print(program(input_ids=torch.ones(2, 7).long(), attention_mask=torch.ones(2, 7).long()).logits.shape)
"""


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_a_program_of_blocks_needs_the_package_where_it_is_loaded(tmp_path):
    torch.export.save(
        exported(make_pruned("blocks", layers=1), inputs_of(make_batch())), tmp_path / "model.pt2"
    )
    done = {
        package: subprocess.run(
            [sys.executable, "-c", LOADED, tmp_path / "model.pt2", package], capture_output=True, check=False
        )
        for package in ("with", "without")
    }
    assert done["with"].returncode == 0, done["with"].stderr[-2000:]
    assert done["without"].returncode
    assert b"hf_mlprune" in done["without"].stderr


class AllKinds(nn.Module):
    """A model of each kind: one package takes the compiler no longer than four."""

    def __init__(self):
        super().__init__()
        self.models = nn.ModuleList(make_pruned(kind, layers=1) for kind in KINDS)

    def forward(self, input_ids, attention_mask):
        return tuple(model(input_ids, attention_mask).logits for model in self.models)


# Of torch's own making.
@needs_compiler
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")
def test_aot_inductor_packages(tmp_path):
    models, batch = AllKinds().eval(), inputs_of(make_batch())
    path = torch._inductor.aoti_compile_and_package(
        exported(models, batch), package_path=str(tmp_path / "package.pt2")
    )
    package = torch._inductor.aoti_load_package(path)
    # Contiguous ones: a package reads any others wrong, also that of a stock model.
    for inputs in (batch, short(batch)):
        with torch.no_grad():
            torch.testing.assert_close(tuple(package(**inputs)), models(**inputs))


TEXTS = ["w1 w2 [MASK]", "w3 [MASK] w4 w5 w6 w7", "[MASK]"]
TASKS = {
    "text-classification": ("sequence", {"top_k": None}),
    "token-classification": ("token", {}),
    "fill-mask": ("masked", {}),
    "feature-extraction": ("model", {}),
}


def numbers(found):
    """All scores, or features, in their order."""
    if isinstance(found, dict):
        return numbers(found["score"])
    return (
        [number for part in found for number in numbers(part)] if isinstance(found, list) else [float(found)]
    )


@each_kind
@pytest.mark.parametrize("task", TASKS)
def test_pipelines_with_batches_and_in_bfloat16(task, kind, tmp_path):
    head, settings = TASKS[task]
    model = make_pruned(kind, head=head)
    model.save_pretrained(tmp_path)
    run = {"tokenizer": make_tokenizer(), **settings}
    expected = [numbers(pipeline(task, model=model, **run)(text)) for text in TEXTS]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        served = pipeline(task, model=str(tmp_path), dtype=dtype, **run)
        assert served.model.dtype is dtype
        for text, found in zip(expected, served(TEXTS, batch_size=3), strict=True):
            torch.testing.assert_close(numbers(found)[: len(text)], text, atol=tolerance, rtol=tolerance)


LORA_CASES = [
    *CASES,
    *((kind, family) for kind in ("scatter", "empty", "blocks") for family in ("vit", "distilbert")),
]
QUERIES = {
    "bert": ["query", "value"],
    "modernbert": ["Wqkv"],
    "vit": ["q_proj", "v_proj"],
    "distilbert": ["q_lin", "v_lin"],
}


def test_adapters_of_transformers_are_saved_beside_the_model(tmp_path):
    model, batch = make_pruned("rows", "bert"), make_batch()
    model.save_pretrained(tmp_path / "model")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    expected = outputs(model, batch)["logits"]
    for folder in (tmp_path / "adapter", tmp_path / "model"):
        model.save_pretrained(folder)
        assert (folder / "adapter_model.safetensors").is_file()
        assert not list(folder.glob("_*"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(outputs(loaded, batch)["logits"], expected)


# peft asks transformers by a name that is on its way out.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "family"), LORA_CASES, ids=lambda part: part)
@pytest.mark.parametrize("targets", ["queries", "all-linear"])
def test_lora_trained_merged_saved_and_loaded(targets, kind, family, tmp_path):
    model, batch = make_pruned(kind, family), make_batch(family=family)
    before = clone(model)
    targets = QUERIES[family] if targets == "queries" else targets
    settings = peft.LoraConfig(r=2, target_modules=targets)
    if kind == "blocks" and targets != "all-linear":
        with pytest.raises(ValueError, match=r"Target module BlockSparseLinear\(.*is not supported"):
            peft.get_peft_model(model, settings)
        return
    adapted = peft.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(2):
        losses.append(adapted(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = outputs(adapted, batch)["logits"]
    on_top = peft.PeftModel.from_pretrained(before, tmp_path / "adapter")
    torch.testing.assert_close(outputs(on_top, batch)["logits"], expected)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    auto = getattr(transformers, find_head(labelled_head(family), family).auto)
    merged = auto.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged, batch)["logits"], expected, atol=1e-5, rtol=1e-4)

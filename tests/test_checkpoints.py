"""What is saved, who can load it, and what damaged or foreign checkpoints say."""

from __future__ import annotations

import ast
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    pipeline,
)

import hf_mlprune
from hf_mlprune import (
    PrunableBertConfig,
    PrunableBertForSequenceClassification,
    PruningCallback,
    PruningConfig,
    attach,
    shrink,
)
from hf_mlprune.families import FAMILIES
from hf_mlprune.levels import LEVELS
from hf_mlprune.modeling.bert import PrunedBertForSequenceClassification, PrunedBertModel
from hf_mlprune.modeling.structure import fingerprint
from support.models import LABELS, assert_same_outputs, make_batch, make_model, prune
from support.processes import run_without_package
from support.tokens import write_tokenizer
from support.training import make_trainer

MODELING = Path(hf_mlprune.__file__).parent / "modeling"
FAMILY_FILES = {f"{family.config.__module__.rpartition('.')[2]}.py" for family in FAMILIES}
SHARED = {path.name for path in MODELING.glob("*.py")} - {"__init__.py"} - FAMILY_FILES
CODE = SHARED | {"bert.py"}


@pytest.fixture
def folder(pruned_folder, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pruned_folder, tmp_path / "copy"))


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def test_folder_is_smaller_and_has_code_report_and_no_pickle(pruned_folder, tmp_path):
    make_model().save_pretrained(tmp_path)
    dense = (tmp_path / "model.safetensors").stat().st_size
    assert (pruned_folder / "model.safetensors").stat().st_size < 0.75 * dense
    # training_args.bin is the Trainer's own; nothing of ours is pickled.
    assert {path.name for path in pruned_folder.iterdir()} == {
        "config.json", "model.safetensors", "training_args.bin", "pruning_report.json", "README.md",
        *CODE,
    }  # fmt: skip
    for name in CODE:
        assert (pruned_folder / name).read_bytes() == (MODELING / name).read_bytes()
    report = json.loads((pruned_folder / "pruning_report.json").read_text())
    assert report["density"] <= 0.3
    assert report["max_difference"] <= report["difference_allowed"]
    assert report["file_bytes"] == (pruned_folder / "model.safetensors").stat().st_size
    assert report["parameters"][0] < report["parameters"][1]
    assert {"batch", "length", "threads", "device", "speedup"} <= report["latency"][0].keys()


@pytest.mark.parametrize("file", sorted(FAMILY_FILES))
def test_a_family_names_every_shared_file_and_no_other_family(file):
    """transformers 5.0 copies only those for `trust_remote_code` from a local folder."""
    named = re.findall(r"^from \.(\w+) import", (MODELING / file).read_text(), re.MULTILINE)
    assert {f"{name}.py" for name in named} == SHARED


def test_code_in_checkpoints_imports_torch_transformers_and_the_standard_library_only():
    for name in SHARED | FAMILY_FILES:
        for node in ast.walk(ast.parse((MODELING / name).read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                assert top in {"torch", "transformers"} | sys.stdlib_module_names, (name, module)


def test_auto_classes_and_pipeline_load_it(folder):
    write_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model) is PrunedBertForSequenceClassification
    classify = pipeline("text-classification", model=str(folder))
    assert classify("w1 w2 w3")[0]["label"].startswith("LABEL_")


def test_auto_model_takes_the_encoder_out_of_a_classifier(folder):
    encoder = AutoModel.from_pretrained(folder)
    assert type(encoder) is PrunedBertModel
    whole = AutoModelForSequenceClassification.from_pretrained(folder)
    assert_same_outputs(encoder, whole.bert, make_batch())


def test_it_saves_again_and_trains_on(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(tmp_path / "run", model, max_steps=3, logging_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any("encoder.layer" in name for name in moved)
    trainer.save_model(str(tmp_path / "again"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert_same_outputs(model, again, make_batch())


REMOTE = """
import sys, torch
from transformers import AutoModelForSequenceClassification, pipeline
folder, out = sys.argv[1:]
try:
    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded without consent")
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
assert not any(name.split(".")[0] == "hf_mlprune" for name in sys.modules)
inputs = {"input_ids": torch.arange(1, 13)[None] % 40, "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
with torch.no_grad():
    torch.save(model(**inputs).logits, out)
model.save_pretrained(folder + "_again")
AutoModelForSequenceClassification.from_pretrained(folder + "_again", trust_remote_code=True)
classify = pipeline("text-classification", model=folder, trust_remote_code=True)
assert classify("w1 w2")[0]["score"] > 0
"""


def test_it_loads_without_the_package_and_not_without_consent(folder, tmp_path):
    write_tokenizer(folder)
    out = tmp_path / "logits.pt"
    run_without_package(REMOTE, folder, out, cache=tmp_path / "cache")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = {"input_ids": torch.arange(1, 13)[None] % 40, "attention_mask": torch.ones(1, 12).long()}
    with torch.no_grad():
        torch.testing.assert_close(torch.load(out), model(**inputs).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"levels": ("heads",), "density": 0.8},
        {"levels": ("rows",), "density": 0.8},
        {"levels": ("blocks",), "density": 0.5, "block_shape": (8, 8)},
        {"levels": ("rows",), "row_sites": ("fc2",), "density": 0.9},
    ],
)
def test_a_stock_class_fails_on_it_and_never_half_loads(settings, tmp_path):
    model = make_model()
    prune(model, PruningConfig.create(**settings))
    shrink(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_mid_training_checkpoints_load_as_prunable_models(tmp_path):
    model = make_model()
    trainer = make_trainer(
        tmp_path,
        model,
        PruningCallback(density=0.3, levels=LEVELS, block_shape=(8, 4)),
        save_strategy="steps",
        save_steps=9,
    )
    seen = {}

    class Remember(hf_mlprune.trainer.callback.TrainerCallback):
        def on_save(self, args, state, control, *, model, **kwargs):
            training = model.training
            seen[state.global_step] = model.eval()(**make_batch()).logits.detach()
            model.train(training)

    trainer.add_callback(Remember())
    trainer.train()
    for step in (9, 18):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert type(loaded) is PrunableBertForSequenceClassification
        torch.testing.assert_close(loaded.eval()(**make_batch()).logits, seen[step], atol=1e-6, rtol=0)
        # Without dropout, a loaded model that is put to training computes the same: masks stay at work.
        torch.testing.assert_close(loaded.train()(**make_batch()).logits, seen[step], atol=1e-6, rtol=0)
        shrink(loaded)
        torch.testing.assert_close(loaded.eval()(**make_batch()).logits, seen[step], atol=1e-5, rtol=0)


def test_config_first_reaches_the_same_place(tmp_path, caplog):
    stock = make_model()
    stock.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    config = PrunableBertConfig.from_pretrained(tmp_path, density=0.3, levels=LEVELS, block_shape=[8, 4])
    first = PrunableBertForSequenceClassification.from_pretrained(tmp_path, config=config)
    assert "You are using a model of type" not in caplog.text
    assert first.config.num_labels == LABELS
    second = make_model()
    attach(second, PruningConfig.create(0.3, levels=LEVELS, block_shape=(8, 4)))
    assert_same_outputs(stock, first, make_batch(), 0.0)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert first.config.pruning == second.config.pruning
    for model, name in ((first, "first"), (second, "second")):
        trainer = make_trainer(tmp_path / name, model, PruningCallback())
        trainer.train()
    assert_same_outputs(first, second, make_batch(), 0.0)


def test_config_settings_are_checked_and_survive_saving(tmp_path):
    with pytest.raises(ValueError, match=r"density: expected a value in \(0, 1\], got 1.5"):
        PrunableBertConfig(density=1.5)
    with pytest.raises(ValueError, match="density is missing"):
        PrunableBertConfig(levels=["heads"])
    config = PrunableBertConfig(density=0.4, preset="paper")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PrunableBertConfig
    assert PruningConfig.from_dict(loaded.pruning) == PruningConfig.create(0.4, "paper")
    with pytest.raises(ValueError, match="the config names no density"):
        PrunableBertForSequenceClassification(PrunableBertConfig())


def first_sparse(tensors) -> str:
    return next(name for name in tensors if name.endswith("col_indices") and tensors[name].numel() > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["structure"].update(version=99), "format version 2, got 99"),
        (lambda c: c.update(structure=None), "structure: expected an object, got NoneType"),
        (lambda c: c["structure"]["layers"].pop(), "expected 2 layers, got 1"),
        (lambda c: c["structure"]["layers"][0].update(heads="0-999999999"), "expected indices below 4"),
        (lambda c: c["structure"]["layers"][0].update(fc1="3,2"), "expected increasing indices"),
        (lambda c: c["structure"]["layers"][0].update(fc1="x"), "expected ranges such as"),
        (lambda c: c["structure"]["layers"][0].update(extra=1), "expected the keys"),
        (lambda c: c["structure"].update(block_shape=[0, 4]), "expected block_shape"),
        (
            lambda c: c["structure"]["layers"][0]["blocks"].update(query=10**9),
            "blocks of query: expected 0 to",
        ),
        (lambda c: c["structure"]["layers"][0]["blocks"].update(other=1), "got 'other'"),
    ],
)
def test_an_edited_structure_is_refused(folder, change, message):
    edit_config(folder, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(folder)


def sign(config) -> None:
    """Give an edited structure its own fingerprint."""
    config["structure"]["fingerprint"] = fingerprint(config["structure"])


def test_a_structure_of_another_shape_than_the_weights_is_refused_even_when_told_to_ignore(folder):
    edit_config(folder, lambda c: c["structure"]["layers"][0].update(fc1="0-1"))
    edit_config(folder, lambda c: c["structure"]["layers"][0]["blocks"].update(fc1=1, fc2=1))
    with pytest.raises(ValueError, match=r"expected the fingerprint .* it was edited"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    edit_config(folder, sign)
    with pytest.raises(ValueError, match=r"expected the shape .* of config.json, got .* of two models"):
        AutoModelForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_new_number_of_labels_may_be_asked_for(folder):
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=7, ignore_mismatched_sizes=True
    )
    assert model.classifier.out_features == 7


def test_damaged_index_tensors_are_refused(folder):
    def out_of_range(tensors):
        tensors[first_sparse(tensors)][0] = 10_000

    edit_weights(folder, out_of_range)
    with pytest.raises(ValueError, match="col_indices: expected values from 0 to"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_missing_weights_are_refused(folder):
    def drop(tensors):
        del tensors[next(name for name in tensors if "layer.1.output.dense.weight" in name)]

    edit_weights(folder, drop)
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.weight' is missing"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_missing_head_is_refused_where_the_checkpoint_is_of_that_class(folder):
    edit_weights(folder, lambda tensors: tensors.pop("classifier.weight"))
    with pytest.raises(ValueError, match=r"expected every weight .* 'classifier.weight' is missing"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_an_encoder_without_pooler_and_a_new_head_load(folder, tmp_path):
    AutoModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).pooler is None
    assert AutoModel.from_pretrained(tmp_path).pooler is not None
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).classifier.out_features == 2 + 1


def test_a_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Exception, match=r"(?i)safetensors|incomplete"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_weights_of_another_run_are_noticed_by_their_rows(tmp_path):
    model = make_model()
    config = PruningConfig.create(0.8, levels=("rows",), row_sites=("fc2",))
    prune(model, config)
    shrink(model)
    model.save_pretrained(tmp_path)

    def shift(config):
        layer = next(layer for layer in config["structure"]["layers"] if layer["fc2"] != "0-31")
        kept = hf_mlprune.modeling.structure.parse_ranges("", layer["fc2"], 32)
        other = next(i for i in range(32) if i not in kept)
        rows = tuple(sorted({*kept[1:], other}))
        layer["fc2"] = hf_mlprune.modeling.structure.format_ranges(rows)

    edit_config(tmp_path, shift)
    edit_config(tmp_path, sign)
    with pytest.raises(ValueError, match="config and weights are not of the same model"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_another_preset_brings_its_own_values(tmp_path):
    PrunableBertConfig(density=0.2, stall_steps=7, preset="paper").save_pretrained(tmp_path)
    same = PrunableBertConfig.from_pretrained(tmp_path, density=0.4)
    assert same.pruning == PruningConfig.create(0.4, preset="paper", stall_steps=7).to_dict()
    other = PrunableBertConfig.from_pretrained(tmp_path, preset="default")
    assert other.pruning == PruningConfig.create(0.2, stall_steps=7).to_dict()
    own = {"exclude": [0], "importance_decay": 0.5, "minimum_units": 2}
    PrunableBertConfig(density=0.2, **own).save_pretrained(tmp_path)
    paper = PrunableBertConfig.from_pretrained(tmp_path, preset="paper")
    del own["importance_decay"]
    assert paper.pruning == PruningConfig.create(0.2, preset="paper", **own).to_dict()


@pytest.mark.parametrize(
    ("stored", "settings"),
    [
        ({"speedup": 2.0, "batch": 4, "length": 32}, {"density": 0.4}),
        ({"speedup": 2.0, "batch": 4, "length": 32}, {"targets": [0.5, 0.4]}),
        ({"multiply_adds": 0.5, "length": 32}, {"size": "1 MB"}),
        (
            {"density": 0.2, "levels": ["heads", "blocks"], "block_shape": [8, 8], "structured_density": 0.4},
            {"levels": ["heads"]},
        ),
        ({"density": 0.2, "row_sites": ["fc1"]}, {"levels": ["heads"]}),
        ({"density": 0.2, "method": "group-lasso", "lasso_weight": 1e-3}, {"method": "snip"}),
        ({"density": 0.2, "method": "mlpruning", "lambda_max": 3.0}, {"method": "fisher"}),
    ],
    ids=lambda case: ",".join(case),
)
def test_stored_settings_without_effect_beside_new_ones_go(stored, settings, tmp_path):
    PrunableBertConfig(**stored, stall_steps=7).save_pretrained(tmp_path)
    changed = PrunableBertConfig.from_pretrained(tmp_path, **settings)
    targets = {name: value for name, value in stored.items() if name == "density"}
    expected = PruningConfig.create(**{**targets, **settings, "stall_steps": 7})
    assert changed.pruning == expected.to_dict()
    # What the caller names is refused as ever.
    with pytest.raises(ValueError, match="threads: has no effect here, it needs speedup= or latency="):
        PrunableBertConfig.from_pretrained(tmp_path, **settings, threads=3)


def test_a_field_of_the_users_config_named_like_a_setting_stays_a_field(tmp_path):
    model = make_model(exclude=["a"], method="mine")
    attach(model, PruningConfig.create(0.5))
    assert (model.config.exclude, model.config.method) == (["a"], "mine")
    assert model.config.pruning == PruningConfig.create(0.5).to_dict()
    model.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.exclude, loaded.method, loaded.pruning["method"]) == (["a"], "mine", "fisher")
    changed = PrunableBertConfig.from_pretrained(tmp_path, density=0.3, method="mlpruning")
    assert (changed.method, changed.pruning["method"]) == ("mine", "mlpruning")


def test_what_others_make_of_a_checkpoint_in_the_middle(tmp_path, caplog):
    """As docs/trainer-features.md says."""
    trainer = make_trainer(
        tmp_path, make_model(), PruningCallback(density=0.3), save_strategy="steps", save_steps=12
    )
    trainer.train()
    folder = tmp_path / "checkpoint-12"
    code = (
        "from transformers import AutoModelForSequenceClassification\n"
        f"AutoModelForSequenceClassification.from_pretrained({str(folder)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "`prunable_bert`" in done.stderr
    assert "Transformers does not recognize this architecture" in done.stderr
    _, info = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert info["unexpected_keys"]
    assert all(".pruning." in key for key in info["unexpected_keys"])

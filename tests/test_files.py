"""Full disks, read-only folders, damaged files: what was there stays whole, and the error says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fuzz.__main__ import CORPUS, fuzz
from hf_mlprune import PruningCallback, PruningConfig, shrink
from hf_mlprune.files import write_folder, write_json
from hf_mlprune.modeling.checkpoint import PARTIAL, WHOLE, weight_files
from hf_mlprune.modeling.structure import fingerprint, format_ranges, parse_ranges
from support.methods import SETTINGS, each_method
from support.models import assert_same_outputs, make_batch, make_model, prune
from support.training import make_trainer

ON_A_FULL_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.models import assert_same_outputs, make_batch, make_model, prune
from hf_mlprune import PruningConfig, shrink
from transformers import AutoModelForSequenceClassification
disk = Path(sys.argv[1])

def pruned(seed, **sizes):
    model = make_model(seed=seed, **sizes)
    prune(model, PruningConfig.create(0.3))
    shrink(model)
    return model

first = pruned(0)
first.save_pretrained(disk / "model")
names = sorted(path.name for path in (disk / "model").iterdir())
second = pruned(1, vocab_size=8000)
try:
    second.save_pretrained(disk / "model")
except Exception as error:
    message = f"{type(error).__name__}: {error}"
else:
    raise SystemExit("it fitted")
assert "o space left" in message, message
assert sorted(path.name for path in (disk / "model").iterdir()) == names
loaded = AutoModelForSequenceClassification.from_pretrained(disk / "model")
assert_same_outputs(first, loaded, make_batch())
from hf_mlprune.files import write_json
from support.training import make_trainer
write_json(disk / "report.json", {"a": 1})
(disk / "fill").write_bytes(b"x" * 100)
try:
    write_json(disk / "report.json", {"a": "x" * 2_000_000})
except OSError as error:
    assert "o space left" in str(error), error
else:
    raise SystemExit("it fitted")
assert (disk / "report.json").read_text().split() == ['{', '"a":', '1', '}']
assert not list(disk.glob(".report*"))
"""


def run_on_disk(tmp_path: Path, text: str, options: str) -> None:
    """Run a script with a small tmpfs, mounted in a namespace of its own."""
    unshare = shutil.which("unshare")
    if (
        unshare is None
        or subprocess.run([unshare, "-rm", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this system lets nobody mount a disk")
    script, disk = tmp_path / "script.py", tmp_path / "disk"
    script.write_text(text)
    disk.mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs "{disk}" && exec "$@"'
    python = [sys.executable, "-W", "ignore", str(script), str(disk), str(Path(__file__).parent)]
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", mount, "sh", *python],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    run_on_disk(tmp_path, ON_A_FULL_DISK, "size=600k")


READ_ONLY = """
import subprocess
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.models import make_model, prune
from support.training import make_trainer
from hf_mlprune import PruningCallback, PruningConfig, shrink
from hf_mlprune.levels import LEVELS
from hf_mlprune.files import write_folder, write_json
disk = Path(sys.argv[1])
model = make_model()
prune(model, PruningConfig.create(0.3))
shrink(model)
try:
    model.save_pretrained(disk / "model")
except OSError as error:
    assert "Read-only" in str(error), error
else:
    raise SystemExit("it could be written")
def remount(how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

remount("rw")
trainer = make_trainer(disk / "run", make_model(), PruningCallback(density=0.3))
remount("ro")
try:
    trainer.train()
except OSError as error:
    assert "expected a folder that can be written" in str(error), error
    assert trainer.state.global_step == 0
else:
    raise SystemExit("it trained")
"""


def test_a_read_only_folder_is_refused_before_the_first_step(tmp_path):
    run_on_disk(tmp_path, READ_ONLY, "ro")


def test_the_corpus_of_this_format_loads_computes_and_saves_what_it_did(tmp_path):
    """Checkpoints that an earlier state of this library wrote: the contract with their owners."""
    folders = [path for path in CORPUS.iterdir() if path.is_dir()]
    kinds = set()
    for folder in folders:
        rows = (CORPUS / f"{folder.name}.txt").read_text().splitlines()
        expected = torch.tensor([[float(value) for value in row.split()] for row in rows])
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            torch.testing.assert_close(model(**make_batch()).logits, expected, rtol=1e-4, atol=1e-6)
        kinds.add(model.config.model_type)
        model.save_pretrained(tmp_path / folder.name)
        before, after = ((at / "config.json").read_text() for at in (folder, tmp_path / folder.name))
        structures = [text[text.index('"structure": {') :].partition("\n  }")[0] for text in (before, after)]
        # Byte for byte.
        assert structures[0] == structures[1]
    # Layouts of three kinds.
    assert kinds == {"pruned_bert", "pruned_modernbert", "pruned_mpnet"}


def test_damaged_checkpoints_are_refused_or_loaded_whole():
    """A short run; `python -m fuzz` in tests/ is the long one."""
    outcomes = fuzz(400, seed=1_000_000)
    assert outcomes["ValueError"] > 100
    assert outcomes["loaded"] > 10


def pruned_model(seed: int = 0, density: float = 0.3):
    model = make_model(seed=seed)
    prune(model, PruningConfig.create(density))
    shrink(model)
    return model


def test_saving_over_shards_leaves_one_model(tmp_path):
    first, second = pruned_model(0), pruned_model(1)
    first.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    second.save_pretrained(tmp_path)
    names = [path.name for path in tmp_path.iterdir()]
    assert list(filter(weight_files(None).fullmatch, names)) == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert_same_outputs(second, AutoModelForSequenceClassification.from_pretrained(tmp_path), make_batch())
    first.save_pretrained(tmp_path, max_shard_size="30KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_outputs(first, AutoModelForSequenceClassification.from_pretrained(tmp_path), make_batch())
    assert not (tmp_path / PARTIAL).exists()


def test_what_a_killed_process_left_is_not_in_the_way(tmp_path):
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "model.safetensors").write_bytes(b"half")
    model = pruned_model()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / PARTIAL).exists()
    assert_same_outputs(model, AutoModelForSequenceClassification.from_pretrained(tmp_path), make_batch())


@pytest.mark.parametrize("given", [{"variant": "fp16"}, {"state_dict": {}}])
def test_other_weights_than_its_own_are_not_pushed(given, tmp_path):
    with pytest.raises(ValueError, match="with push_to_hub, which uploads the model as it is"):
        pruned_model().save_pretrained(tmp_path / "small", push_to_hub=True, **given)
    assert not (tmp_path / "small").exists()


def test_a_folder_behind_a_link_is_written_whole(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for text in ("1", "2"):
        write_folder(tmp_path / "link", lambda folder, text=text: (folder / "a").write_text(text))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "2"


def test_a_model_half_replaced_in_a_subfolder_is_refused(tmp_path):
    pruned_model().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / WHOLE).mkdir()
    with pytest.raises(ValueError, match="a process died while it saved a model here"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, subfolder="a")


def test_variants_live_side_by_side_and_replace_their_own(tmp_path):
    first, second = pruned_model(0), pruned_model(0)
    with torch.no_grad():
        second.classifier.bias += 1

    def loaded(**options):
        return AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)

    first.save_pretrained(tmp_path)
    for options in ({}, {"max_shard_size": "30KB"}, {}):
        for model in (first, second):
            model.save_pretrained(tmp_path, variant="fp16", **options)
            assert torch.equal(loaded(variant="fp16").classifier.bias, model.classifier.bias)
            assert torch.equal(loaded().classifier.bias, first.classifier.bias)
    names = [path.name for path in tmp_path.iterdir()]
    assert list(filter(weight_files("fp16").fullmatch, names)) == ["model.fp16.safetensors"]


def test_a_folder_in_which_one_model_was_replacing_another_is_refused(tmp_path, monkeypatch):
    first, second = pruned_model(0), pruned_model(0)
    first.save_pretrained(tmp_path, max_shard_size="30KB")
    replace = Path.replace

    def fail(path, target):
        if path.name.startswith("model-00002"):
            raise OSError("input/output error")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="input/output error"):
            second.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / WHOLE).is_dir()
    with pytest.raises(ValueError, match="files of two models stand side by side; save the model again"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    assert_same_outputs(second, AutoModelForSequenceClassification.from_pretrained(tmp_path), make_batch())


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "{"])
def test_a_damaged_report_is_named(text, tmp_path):
    model = pruned_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "pruning_report.json").write_text(text)
    with pytest.raises(ValueError, match=r"pruning_report.json: expected JSON"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_arguments_by_position_as_in_transformers(tmp_path):
    model = pruned_model()
    model.save_pretrained(tmp_path, True, model.state_dict())
    assert_same_outputs(model, AutoModelForSequenceClassification.from_pretrained(tmp_path), make_batch())


@each_method
def test_frozen_layers_stay_frozen(method):
    model = make_model()
    for parameter in model.bert.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in model.bert.encoder.layer[0].named_parameters()}
    prune(model, PruningConfig.create(0.6, method=method, **SETTINGS[method]))
    for name, parameter in model.bert.encoder.layer[0].named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    shrink(model)
    assert not any(p.requires_grad for p in model.bert.encoder.layer[0].parameters())
    assert all(p.requires_grad for p in model.bert.encoder.layer[1].parameters())


def test_an_edited_checkpoint_in_the_middle_of_training_is_refused(tmp_path):
    trainer = make_trainer(
        tmp_path, make_model(), PruningCallback(density=0.3), save_strategy="steps", save_steps=12
    )
    trainer.train()
    folder = tmp_path / "checkpoint-12"
    path = folder / "config.json"
    text = path.read_text()
    for field, value, message in (
        ("intermediate_size", 10_000_000, "intermediate_size: expected 1 to"),
        ("intermediate_size", 96, "expected the shape"),
        ("pruning", 5, "pruning: expected an object"),
    ):
        path.write_text(json.dumps({**json.loads(text), field: value}))
        with pytest.raises(ValueError, match=message):
            AutoModelForSequenceClassification.from_pretrained(folder)


def test_config_and_weights_of_two_models_are_told_apart(tmp_path):
    first, second = pruned_model(0), pruned_model(1)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    assert first.config.structure != second.config.structure
    shutil.copy(tmp_path / "first" / "config.json", tmp_path / "second")
    with pytest.raises(ValueError, match=r"of two models|are not of the same model"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")


def test_a_config_of_other_heads_is_told_apart_from_the_weights(tmp_path):
    """Of the same shapes throughout: only the fingerprint knows."""
    model = make_model()
    prune(model, PruningConfig.create(0.8, levels=("heads",)))
    shrink(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    layer = next(layer for layer in config["structure"]["layers"] if layer["heads"] != "0-3")
    kept = parse_ranges("heads", layer["heads"], 4)
    layer["heads"] = format_ranges(tuple(sorted((head + 1) % 4 for head in kept)))
    config["structure"]["fingerprint"] = fingerprint(config["structure"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config and weights are not of the same model"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../{shard}", "{folder}/../{shard}", "sub/{shard}"])
def test_an_index_cannot_name_files_elsewhere(name, tmp_path):
    """Though they are there, and whole."""
    folder = tmp_path / "model"
    pruned_model().save_pretrained(folder, max_shard_size="30KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    (folder / "sub").mkdir()
    for elsewhere in (tmp_path, folder / "sub"):
        shutil.copy(shard, elsewhere)
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace(shard.name, name.format(shard=shard.name, folder=folder))
    index.write_text(text)
    with pytest.raises(ValueError, match="expected names of files beside it"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_links_as_in_a_hub_cache_work(tmp_path):
    model = pruned_model()
    model.save_pretrained(tmp_path / "blobs", max_shard_size="30KB")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "snapshot")
    assert_same_outputs(model, loaded, make_batch())


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(NotADirectoryError, match="expected a folder, got the file"):
        pruned_model().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "a file"


def test_an_evaluation_needs_no_folder_that_can_be_written(tmp_path):
    trainer = make_trainer(tmp_path / "never", make_model(), PruningCallback(density=0.3))
    trainer.evaluate()


def test_folders_of_others_beside_one_that_is_replaced_stay(tmp_path):
    for name in ("served.old-20260101", "served.partial-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "served.old-notes").write_text("mine")
    left = tmp_path / f"served.partial-{'0' * 32}"
    left.mkdir()
    for text in ("first", "second"):
        write_folder(tmp_path / "served", lambda partial, text=text: write_json(partial / "a.json", text))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"served", "served.old-20260101", "served.partial-mine", "served.old-notes"}
    assert json.loads((tmp_path / "served" / "a.json").read_text()) == "second"


def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    write_folder(tmp_path / "served", lambda partial: write_json(partial / "a.json", "first"))
    replace = Path.replace

    def interrupted(path, target):
        if ".partial-" in path.name and path.is_dir():
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "served", lambda partial: write_json(partial / "a.json", "second"))
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    assert json.loads((tmp_path / "served" / "a.json").read_text()) == "first"

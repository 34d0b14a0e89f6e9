"""The model card: what it says, that the hub takes it, and that it says nothing of this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetInfo
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForSequenceClassification

from families import each_family
from hf_mlprune import PruningCallback, PruningConfig, report, shrink
from hf_mlprune.modeling.cards import CARD_MARK, is_ours, named_card, pushed_card, sealed
from hf_mlprune.reports.card import CardFacts, model_card, task_of
from hf_mlprune.reports.evaluation import Evaluations, find_evaluations
from hf_mlprune.reports.latency import Latency, processor_name
from hf_mlprune.reports.origin import HubDataset, Origin, find_dataset, find_origin
from hf_mlprune.reports.picture import bar, picture
from support.hub import TASKS, card_errors
from support.models import find_head, heads_of, make_model, prune
from support.processes import run_without_package
from support.training import make_trainer

BASE_CARD = (
    "---\nlicense: other\nlicense_name: open\nlicense_link: LICENSE\nlanguage:\n- en\n- de\n---\nA model.\n"
)


def accuracy(predictions):
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def pruned_model(head: str | None = None):
    model = make_model(head)
    prune(model, PruningConfig.create(0.3), head=head)
    shrink(model)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Trainer at the end of its run, of a model that was loaded from a folder with a card."""
    folder = tmp_path_factory.mktemp("trained")
    make_model().save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text(BASE_CARD)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    trainer = make_trainer(
        folder / "run", model, PruningCallback(0.3), eval_strategy="steps", eval_steps=12, eval_on_start=True
    )
    trainer.compute_metrics = accuracy
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return trainer, folder


def test_the_hub_takes_the_card_and_finds_what_it_sorts_models_by(trained):
    trainer, _ = trained
    assert card_errors(trainer.model.pruning_card) == []
    data = ModelCard(trainer.model.pruning_card).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert {"pruning", "hf-mlprune"} <= set(data.tags)
    assert data.language == ["en", "de"]
    assert (data.license, data.get("license_name")) == ("other", "open")
    # A file beside another card.
    assert data.get("license_link") is None
    assert data.metrics == ["accuracy"]
    assert {result.metric_type for result in data.eval_results} == {"accuracy", "loss"}
    # Neither is known.
    assert data.base_model is data.datasets is data.get("base_model_relation") is None


def test_no_text_beside_the_model_names_a_path_of_this_machine(trained):
    trainer, folder = trained
    trainer.create_model_card()
    files = [path for place in ("model", "run") for path in (folder / place).iterdir() if path.is_file()]
    texts = [path for path in files if path.suffix in (".md", ".json", ".py")]
    assert {"README.md", "PRUNING.md", "config.json"} <= {path.name for path in texts}
    for path in texts:
        assert str(folder) not in path.read_text(), path


def test_trainers_own_card_leaves_ours_beside_it(trained):
    trainer, folder = trained
    trainer.create_model_card()
    assert "generated_from_trainer" in (folder / "run" / "README.md").read_text()
    assert (folder / "run" / "PRUNING.md").read_text() == trainer.model.pruning_card


def test_both_ways_to_load_work_as_they_are_written(trained, tmp_path):
    _, folder = trained
    card = (folder / "model" / "README.md").read_text()
    blocks = [block.replace("this-repository", str(folder / "model"))
              for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]  # fmt: skip
    with_package, without = blocks
    namespace: dict = {}
    exec(with_package, namespace)
    assert type(namespace["model"]).__name__ == "PrunedBertForSequenceClassification"
    run_without_package(without, cache=tmp_path)


def test_metrics_before_and_after_stand_in_the_text_and_only_the_latter_in_the_metadata(trained):
    trainer, _ = trained
    log = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    first, last = log[0], log[-1]
    card = trainer.model.pruning_card
    assert "| metric | all weights (step 0) | pruned |" in card
    assert f"| Loss | {first['eval_loss']:.4g} | {last['eval_loss']:.4g} |" in card
    results = ModelCard(card).data.eval_results
    assert [result.metric_value for result in results if result.metric_type == "loss"] == [last["eval_loss"]]


def test_evaluations_around_the_run_count_and_a_card_of_ones_own_stays(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(0.3))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert ModelCard(trainer.model.pruning_card).data.eval_results is None
    assert "## Evaluation" not in trainer.model.pruning_card
    after = trainer.evaluate()["eval_loss"]
    assert f"| Loss | {before:.4g} | {after:.4g} |" in trainer.model.pruning_card
    assert (tmp_path / "PRUNING.md").read_text() == trainer.model.pruning_card
    trainer.evaluate(metric_key_prefix="test")
    assert "Test" not in trainer.model.pruning_card
    trainer.model.pruning_card = "mine"
    trainer.evaluate()
    assert trainer.model.pruning_card == "mine"


def test_without_evaluation_there_are_no_metrics(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(0.3))
    trainer.train()
    data = ModelCard(trainer.model.pruning_card).data
    assert data.eval_results is data.metrics is None
    assert "model-index" not in trainer.model.pruning_card


def test_evaluations_of_weights_that_are_gone_do_not_count():
    def entry(step, loss, density=None, **others):
        found = {"step": step, "eval_loss": loss, "eval_runtime": 1.0, "eval_steps_per_second": 2.0, **others}
        return found if density is None else {**found, "eval_density": density}

    history = [
        entry(0, 1.0, 1.0), entry(5, 0.9, 1.0), {"step": 5, "eval_other_f1": 0.5, "eval_density": 1.0},
        entry(10, 0.7, 0.3), entry(20, 0.8, 0.3, eval_broken=float("nan"), eval_text="high"),
        {"step": 20, "train_runtime": 1.0},
    ]  # fmt: skip
    last = find_evaluations(history, step=20, ended=len(history))
    assert last == Evaluations({"loss": 0.9, "other_f1": 0.5}, 5, {"loss": 0.8})
    best = find_evaluations(history, step=10, ended=len(history))
    assert best.after == {"loss": 0.7}
    history.append(entry(20, 0.6))
    assert find_evaluations(history, step=10, ended=len(history) - 1).after == {"loss": 0.6}
    assert find_evaluations(history, step=15, ended=len(history)).after == {}
    assert find_evaluations([], step=1, ended=0, dense={"loss": 2.0}) == Evaluations({"loss": 2.0}, 0, {})


@each_family
def test_every_head_has_a_task_of_the_hub_or_none(family):
    tasks = {head: task_of(find_head(head, family)) for head in heads_of(family)}
    assert set(tasks.values()) <= TASKS | {None}
    images = "image" in tasks
    assert tasks["model"] == ("image-feature-extraction" if images else "feature-extraction")
    assert {head for head, task in tasks.items() if task is None} <= {"pretraining", "next", "masked_image"}


def test_a_head_without_a_task_has_no_results():
    model = pruned_model("next")
    facts = CardFacts(evaluations=Evaluations(after={"accuracy": 0.5}))
    card = model_card(report(model), find_head("next"), facts)
    assert ModelCard(card).data.eval_results is None
    assert "| Accuracy | 0.5 |" in card
    assert card_errors(card) == []


def test_all_that_is_known_stands_in_the_card():
    row = Latency("", 1, 128, 2, "A processor (AVX2 x86_64)", 0.01, 0.004, 2.5, 30)
    facts = CardFacts(
        origin=Origin("org/bert", "en", "mit"),
        evaluations=Evaluations({}, 0, {"pearson_correlation": 0.9}),
        trained_on=HubDataset("org/data"),
        evaluated_on=HubDataset("org/data", "pairs", "validation"),
        repository="me/small",
    )
    card = model_card(report(pruned_model(), latency=[row]), find_head("sequence"), facts, ["extra"])
    assert card_errors(card) == []
    data = ModelCard(card).data
    assert (data.base_model, data.get("base_model_relation")) == ("org/bert", "finetune")
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["org/data"])
    assert (data.model_name, data.tags[-1]) == ("small", "extra")
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
        "org/data", "pairs", "validation",
    )  # fmt: skip
    for text in (
        "# small",
        "[org/bert](https://huggingface.co/org/bert), pruned",
        'from_pretrained("me/small", trust_remote_code=True)',
        "| metric | pruned |",
        "| Pearson correlation | 0.9 |",
        "| hardware | threads | batch x tokens | dense ms | pruned ms | dense / pruned |",
        "| A processor (AVX2 x86_64) | 2 | 1 x 128 | 10.00 | 4.00 | 2.50 |",
    ):
        assert text in card


def test_the_picture_has_a_line_per_layer_and_shows_what_was_removed():
    found = report(pruned_model())
    head, *lines = picture(found.layers).splitlines()
    assert head.split() == ["layer", "heads", "FC1", "rows", "weights"]
    assert len(lines) == 2
    for line, layer in zip(lines, found.layers, strict=True):
        heads = line.split()[1]
        assert heads.count("█") == round(10 * layer.heads[0] / layer.heads[1])
        assert len(heads) == 10


def test_a_bar_is_empty_or_full_only_if_that_is_true():
    assert [bar(kept, 1000, 4) for kept in (0, 1, 500, 999, 1000)] == ["░░░░", "█░░░", "██░░", "███░", "████"]
    assert bar(0, 0, 4) == "████"


@pytest.mark.parametrize(
    ("source", "base"),
    [("", None), ("bert-base-uncased", None), ("org/bert", "org/bert"), ("/data/models/bert", None),
     ("runs/bert/checkpoint-5", None), ("../org/bert", None), ("C:\\models\\bert", None)],
)  # fmt: skip
def test_only_names_on_the_hub_are_base_models(source, base):
    assert find_origin(source) == Origin(base)


def test_a_folder_is_known_by_its_card_or_as_a_snapshot(tmp_path):
    folder = tmp_path / "models--org--bert" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    assert find_origin(str(folder)) == Origin("org/bert")
    plain = tmp_path / "plain"
    plain.mkdir()
    card = plain / "README.md"
    card.write_text("---\nbase_model: org/bert\nlicense: [mit]\nlanguage: [en, 3]\n---\n")
    assert find_origin(str(plain)) == Origin("org/bert", ["en"], "mit")
    card.write_text(f"---\nbase_model: {tmp_path}\nlicense: 3\n---\n")
    assert find_origin(str(plain)) == Origin()


@pytest.mark.parametrize("text", [b"---\n: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe", b"no front matter"])
def test_a_card_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    assert find_origin(str(tmp_path)) == Origin()


def test_a_data_set_is_known_if_both_caches_agree(tmp_path):
    folder = tmp_path / "tables" / "org___pairs" / "default" / "0.0.0" / "abc"
    folder.parent.mkdir(parents=True)
    Dataset.from_dict({"a": [1, 2]}).save_to_disk(folder)
    info = DatasetInfo(dataset_name="pairs", config_name="default")
    data = Dataset.from_file(str(next(folder.glob("*.arrow"))), info=info)
    assert find_dataset(data, tmp_path) is None
    (tmp_path / "datasets--org--pairs").mkdir()
    assert find_dataset(data, tmp_path) == HubDataset("org/pairs")
    assert find_dataset(data.select([0]), tmp_path) == HubDataset("org/pairs")
    assert find_dataset(Dataset.from_dict({"a": [1]}), tmp_path) is None
    assert find_dataset([1, 2], tmp_path) is None


def test_the_processor_is_named_by_itself(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some  Processor 3000\nmodel name\t: another\n")
    assert processor_name(file) == "Some Processor 3000"
    assert isinstance(processor_name(tmp_path / "none"), str)


def test_what_somebody_wrote_stays_and_drafts_do_not():
    ours = f"---\ntags:\n- a\n- b\n---\n\n{CARD_MARK}\n\n# ours\n"
    generated = "---\ntags:\n- b\n- c\n---\nThis model card has been automatically generated.\n"
    assert ModelCard(pushed_card(generated, ours)).data.tags == ["a", "b", "c"]
    licensed = ModelCard(pushed_card("---\nlicense: mit\ntags:\n- mine\n---\n", ours))
    assert (licensed.data.license, licensed.data.tags) == ("mit", ["a", "b"])
    assert "# ours" in licensed.text
    code = 'A.from_pretrained("this-repository")'
    assert named_card(code, "me/x") == 'A.from_pretrained("me/x")'
    assert named_card(code, "me/x", "density-0.5") == 'A.from_pretrained("me/x", subfolder="density-0.5")'
    assert pushed_card("# My own words", ours) == "# My own words"
    assert pushed_card(f"{CARD_MARK} old", ours) == ours


def test_a_card_of_ours_that_somebody_edited_is_theirs():
    data = "---\ntags:\n- a\nmodel-index:\n- name: old\n  results: []\n---\n\n"
    old = sealed(f"{data}{CARD_MARK}\n\n# old\n\nPruned.\n")
    new = sealed(f"---\ntags:\n- a\n---\n\n{CARD_MARK}\n\n# new\n")
    assert sealed(old) == old
    named = named_card(sealed(f'{CARD_MARK}\n\nload "this-repository"\n'), "me/x")
    assert '"me/x"' in named
    for ours in (old, named, old.replace("\n", "\r\n"), old.rstrip(), f"{CARD_MARK} of an earlier version"):
        assert is_ours(ours)
        assert "# new" in pushed_card(ours, new)
    edits = {
        "a word": old.replace("Pruned.", "Pruned by me."),
        "a section at the end": f"{old}\n## Limits\n\nNone.\n",
        "a section at the beginning": old.replace("# old", "My model.\n\n# old"),
        "with a name afterwards": named_card(old.replace("Pruned.", "Mine."), "me/x"),
    }
    for edited in edits.values():
        assert not is_ours(edited)
        assert pushed_card(edited, new) == edited
    # Above the mark others write, too; what they add there stays, what described the old model goes.
    licensed = old.replace("tags:\n", "license: mit\ntags:\n", 1)
    assert is_ours(licensed)
    pushed = ModelCard(pushed_card(licensed, new))
    assert (pushed.data.license, pushed.data.eval_results) == ("mit", None)
    assert is_ours(pushed_card(licensed, new))


def test_a_save_leaves_a_card_that_somebody_edited(trained, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(trained[1] / "model")
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    written = card.read_text(encoding="utf-8")
    assert is_ours(written)
    card.write_text(written + "\nUse it with care.\n", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert card.read_text(encoding="utf-8").endswith("Use it with care.\n")
    # A model that is loaded from there has it, too.
    AutoModelForSequenceClassification.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8").endswith("Use it with care.\n")


def test_metrics_do_not_go_with_other_weights_than_theirs(trained, tmp_path):
    source = trained[1] / "model"
    other = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=5, ignore_mismatched_sizes=True
    )
    for name, model in (("head", other), ("encoder", AutoModel.from_pretrained(source))):
        model.save_pretrained(tmp_path / name)
        assert not (tmp_path / name / "README.md").exists()
        assert (tmp_path / name / "pruning_report.json").is_file()


def test_the_card_of_a_model_that_is_loaded_again_is_what_it_was(trained, tmp_path):
    _, folder = trained
    AutoModelForSequenceClassification.from_pretrained(folder / "model").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == Path(folder / "model" / "README.md").read_text()

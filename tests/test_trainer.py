"""PruningCallback in the stock Trainer: what users see, and what is chosen as best."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_mlprune import PruningCallback, PruningConfig, attach, report, shrink
from hf_mlprune.levels import LEVELS
from hf_mlprune.modeling.bert import PrunedBertForSequenceClassification
from hf_mlprune.schedule import Phase, make_schedule
from hf_mlprune.state import pruning_state
from support.models import assert_same_outputs, clone, heads_of, make_batch, make_dataset, make_model, prune
from support.training import make_trainer, training_arguments

FIGURES = {"density", "density_target", "pruning_phase"}


def settings(**changes):
    return {"density": 0.3, "levels": LEVELS, "block_shape": (8, 4), **changes}


class Probe(TrainerCallback):
    """Looks at the model after each step."""

    def __init__(self, look):
        self.look, self.seen = look, {}

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.seen[state.global_step] = self.look(model)


@pytest.mark.parametrize("head", heads_of())
def test_one_callback_prunes_every_head(head, tmp_path):
    if head == "model":
        pytest.skip("a bare encoder returns no loss: a Trainer of its own is needed")
    model = make_model(head)
    teacher = make_model(head, seed=5)
    callback = PruningCallback(**settings(), teacher=teacher)
    trainer = make_trainer(tmp_path, model, callback, head=head)
    trainer.train()
    found = report(trainer.model)
    assert 0.28 <= found.density <= 0.3
    assert type(trainer.model).__name__ == type(teacher).__name__.replace("Bert", "PrunedBert")
    assert trainer.evaluate()["eval_loss"] > 0


def test_progress_is_logged_and_loss_stays_the_task_loss(tmp_path):
    model = make_model()
    look = Probe(lambda model: float(model.eval()(**make_batch()).loss.detach()))
    trainer = make_trainer(
        tmp_path, model, PruningCallback(**settings(), teacher=make_model(seed=3)), callbacks=[look],
        logging_steps=1, eval_strategy="steps", eval_steps=8, save_strategy="steps", save_steps=12,
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 24
    assert all(row.keys() >= FIGURES | {"distillation_loss"} for row in rows)
    assert all(isinstance(row[name], (int, float)) for row in rows for name in FIGURES)
    assert not {"lambda", "penalty", "threshold"} & rows[0].keys()
    # ln 3 classes: the task loss alone, not weighed, and without the distillation loss.
    assert 0.9 < rows[0]["loss"] < 1.3
    assert [row["pruning_phase"] for row in rows] == sorted(row["pruning_phase"] for row in rows)
    assert rows[-1]["density"] <= 0.3
    saved = json.loads((tmp_path / "checkpoint-24" / "trainer_state.json").read_text())
    last = [row for row in saved["log_history"] if "loss" in row][-1]
    assert last["pruning_phase"] == 3
    # Layers are of one size.
    assert sum(last["density_of_layers"]) / 2 == pytest.approx(last["density"])
    assert all("eval_density" in row for row in trainer.state.log_history if "eval_loss" in row)


def test_the_log_has_what_the_method_has_and_names_the_phase(tmp_path, caplog):
    said = []

    class Bar(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            said.append({name: str(value) for name, value in logs.items()})

    callback = PruningCallback(**settings(), method="mlpruning")
    trainer = make_trainer(tmp_path, make_model(), callback, callbacks=[Bar()], logging_steps=1)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[1].keys() >= {"lambda", "penalty", "threshold"}
    thresholds = [row["threshold"] for row in rows if "threshold" in row]
    assert len(set(thresholds)) > 3
    phases = [row["pruning_phase"] for row in said if "loss" in row]
    assert phases[-1] == "recovery"
    assert set(phases) <= {"warm-up", "heads and rows", "blocks", "recovery"}
    assert "pruning_phase" in json.loads(json.dumps(rows[-1]))


def test_report_and_table_at_the_end(tmp_path, capsys):
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(**settings()))
    trainer.train()
    printed = capsys.readouterr().err
    assert "of the encoder's weights are left" in printed
    assert "landed at density" in printed
    data = json.loads((tmp_path / "pruning_report.json").read_text())
    assert data["density"] == pytest.approx(report(trainer.model).density)
    assert data["compared_on"] == 1
    assert [row["batch"] for row in data["latency"]] == [1, 32]
    assert len(data["layers"]) == 2


def test_teacher_is_optional_and_changes_the_run(tmp_path):
    models = []
    for index, teacher in enumerate((None, make_model(seed=3))):
        trainer = make_trainer(
            tmp_path / str(index), make_model(), PruningCallback(**settings(), teacher=teacher)
        )
        trainer.train()
        models.append(trainer.model)
    states = [model.classifier.weight for model in models]
    assert not torch.equal(*states)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def best_trainer(tmp_path, callbacks=(), **changes):
    trainer = make_trainer(
        tmp_path, make_model(), PruningCallback(**settings()), callbacks=callbacks,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="accuracy", greater_is_better=True, **changes,
    )  # fmt: skip
    trainer.compute_metrics = accuracy
    return trainer


def test_best_model_is_a_pruned_one(tmp_path):
    trainer = best_trainer(tmp_path)
    # The dense phases would win: labels follow from the data, and pruning to 30 % hurts.
    trainer.train()
    config = pruning_config_of(tmp_path)
    first = make_schedule(config, 24).blocks_end
    assert int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1]) >= first
    assert report(trainer.model).density <= 0.3
    logged = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    assert len(logged) == 12
    assert all(0 <= value <= 1 for value in logged)


def pruning_config_of(folder) -> PruningConfig:
    data = json.loads((folder / "checkpoint-2" / "config.json").read_text())
    return PruningConfig.from_dict(data["pruning"])


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_cannot_fire_before_the_target(first, tmp_path):
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    trainer = best_trainer(tmp_path, callbacks=() if first else (stop,))
    if first:
        # Before ours in the list of callbacks.
        trainer.callback_handler.callbacks.insert(0, stop)
    trainer.train()
    blocks_end = make_schedule(pruning_config_of(tmp_path), 24).blocks_end
    assert blocks_end <= trainer.state.global_step < 24
    assert report(trainer.model).density <= 0.3


def test_evaluation_in_the_middle_measures_the_masked_model(tmp_path):
    losses = {}

    class Compare(TrainerCallback):
        def on_evaluate(self, args, state, control, *, model, metrics, **kwargs):
            if not hasattr(model.base_model, "pruning"):
                return
            copy = clone_without_hooks(model)
            pruning_state(copy).run = None
            shrink(copy)
            other = make_trainer(tmp_path / "other", copy)
            losses[state.global_step] = (metrics["eval_loss"], other.evaluate()["eval_loss"])

    trainer = make_trainer(
        tmp_path, make_model(), PruningCallback(**settings()), callbacks=[Compare()],
        eval_strategy="steps", eval_steps=6,
    )  # fmt: skip
    trainer.train()
    assert set(losses) >= {6, 12, 18}
    for masked, shrunk in losses.values():
        assert masked == pytest.approx(shrunk, abs=1e-5)


def clone_without_hooks(model):
    state = pruning_state(model)
    (session, run), state.session, state.run = (state.session, state.run), None, None
    copy = clone(model)
    state.session, state.run = session, run
    copy._forward_pre_hooks.clear()
    return copy


def test_trainer_and_custom_loop_make_the_same_model(tmp_path):
    first = make_model()
    batches = [make_batch(seed=step) for step in range(1, 21)]
    config = PruningConfig.create(**settings())
    prune(first, config, steps=20)
    second = make_model()
    data = [{name: value[row] for name, value in batch.items()} for batch in batches for row in range(4)]
    trainer = make_trainer(
        tmp_path, second, PruningCallback(**settings()), max_steps=20, per_device_train_batch_size=4,
        lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train_dataset = data
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(data)
    trainer.train()
    shrink(first)
    assert_same_outputs(first, second, make_batch(), 1e-6)


def test_masks_do_not_eat_the_gradient_clip(tmp_path):
    """The penalty's pull on θ is 20,000-fold; the clipped gradient is that of the weights alone."""
    norms = {}
    for preset in ("default", "paper"):
        trainer = make_trainer(
            tmp_path / preset, make_model(), PruningCallback(**settings(preset=preset, warmup_fraction=0.0)),
            logging_steps=1,
        )  # fmt: skip
        trainer.train()
        norms[preset] = next(row["grad_norm"] for row in trainer.state.log_history if "loss" in row)
    stock = make_trainer(tmp_path / "stock", make_model(), logging_steps=1)
    stock.train()
    dense = next(row["grad_norm"] for row in stock.state.log_history if "loss" in row)
    assert norms["paper"] == pytest.approx(dense, rel=1e-4)
    assert norms["default"] == pytest.approx(dense, rel=1e-4)


def accumulating(tmp_path, preset, look, rows, accumulate, *, taught=True, **changes):
    """A float64 run of 8 rows per step, in one batch or in parts; what `look` saw after each step."""
    teacher = make_model(seed=3).double() if taught else None
    probe = Probe(look)
    trainer = make_trainer(
        tmp_path / f"{preset}-{accumulate}",
        make_model().double(),
        PruningCallback(**settings(preset=preset), teacher=teacher),
        callbacks=[probe],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **changes,
    )
    trainer.train()
    return probe.seen


@pytest.mark.parametrize("taught", [True, False])
def test_accumulated_micro_batches_make_the_masks_of_the_whole_batch(taught, tmp_path):
    def look(model):
        return [gate.keep.clone() for gate in pruning_state(model).all_gates()]

    whole = accumulating(tmp_path, "default", look, 8, 1, taught=taught)
    parts = accumulating(tmp_path, "default", look, 2, 4, taught=taught)
    for step in whole:
        assert all(torch.equal(a, b) for a, b in zip(whole[step], parts[step], strict=True)), step


def test_accumulated_micro_batches_move_scores_and_thresholds_as_the_whole_batch(tmp_path):
    def look(model):
        gates = pruning_state(model).all_gates()
        return [gate.get_buffer(name).clone() for gate in gates for name in ("scores_average", "threshold")]

    # One step: Adam makes all scores alike then, so that rounding alone decides between them later.
    whole, parts = (accumulating(tmp_path, "paper", look, *rows)[1] for rows in ((8, 1), (2, 4)))
    assert any(bool(value.any()) for value in whole)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_any_number_of_steps_from_20_lands(tmp_path):
    for steps in (20, 21, 33):
        trainer = make_trainer(
            tmp_path / str(steps), make_model(), PruningCallback(**settings()), max_steps=steps
        )
        trainer.train()
        assert 0.28 <= report(trainer.model).density <= 0.3


def test_every_phase_has_its_gates_and_no_other():
    model = make_model()
    attach(model, PruningConfig.create(**settings()))
    from hf_mlprune import start

    schedule = make_schedule(PruningConfig.create(**settings()), 40)
    start(model, 40)
    learning = {name for name, gate in pruning_state(model).gates(0).items() if gate.mask is not None}
    assert learning == {"heads", "fc1"}
    assert schedule.phase(0) is Phase.WARMUP
    assert schedule.phase(39) is Phase.FINAL


def test_bfloat16_training_is_proved_in_full_precision(tmp_path):
    callback = PruningCallback(**settings(), teacher=make_model(seed=3))
    trainer = make_trainer(tmp_path, make_model(), callback, bf16=True, use_cpu=True)
    trainer.train()
    assert trainer.model.pruning_report["difference_allowed"] <= 2e-5


def test_a_users_own_subclass_keeps_its_class(tmp_path, caplog):
    from transformers import BertForSequenceClassification

    class Mine(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
            out = super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            out["logits"] = out["logits"] * 2
            return out

    model = make_model()
    model.__class__ = Mine
    trainer = make_trainer(tmp_path, model, PruningCallback(**settings()))
    trainer.train()
    assert type(trainer.model) is Mine
    assert report(trainer.model).density <= 0.3
    assert "It keeps its class" in caplog.text


def test_evaluate_and_save_after_training_see_the_small_model(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(**settings()))
    trainer.train()
    assert type(trainer.model) is PrunedBertForSequenceClassification
    before = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "small"))
    loaded = PrunedBertForSequenceClassification.from_pretrained(tmp_path / "small")
    assert make_trainer(tmp_path / "x", loaded).evaluate()["eval_loss"] == pytest.approx(before, abs=1e-6)


def test_a_stall_is_reported(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path,
        make_model(),
        PruningCallback(**settings(preset="paper", stall_steps=2, score_learning_rate=1e-9)),
    )
    trainer.train()
    assert "density has been 1.0000 for 2 steps" in caplog.text
    assert "train for more steps" in caplog.text
    assert report(trainer.model).density <= 0.3


@pytest.mark.parametrize(
    "target", [{"density": 0.3}, {"density": 0.3, "method": "group-lasso"}, {"multiply_adds": 0.6}]
)
def test_no_stall_is_reported_where_masks_do_what_they_should(target, tmp_path, caplog):
    callback = PruningCallback(**target, stall_steps=3)
    make_trainer(tmp_path, make_model(intermediate_size=1024), callback, max_steps=60).train()
    assert "has been" not in caplog.text


def test_both_models_have_their_own_attention_back_after_the_run(tmp_path):
    model, teacher = make_model(), make_model(seed=3)
    assert model.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    used = Probe(lambda model: (model.config._attn_implementation, teacher.config._attn_implementation))
    make_trainer(
        tmp_path, model, PruningCallback(**settings(preset="paper"), teacher=teacher), callbacks=[used]
    ).train()
    assert used.seen[1] == ("eager", "eager")
    assert model.config._attn_implementation == teacher.config._attn_implementation == "sdpa"


def test_density_is_told_of_the_pruned_layers_and_of_all(tmp_path, capsys):
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(**settings(exclude=(1,))))
    trainer.train()
    layers = report(trainer.model).layers
    assert layers[1].weights[0] == layers[1].weights[1]
    first, both = layers[0].weights[0] / layers[0].weights[1], report(trainer.model).density
    assert 0.28 <= first <= 0.3
    said = " ".join(capsys.readouterr().err.split())
    assert f"landed at density {first:.4f} (target 0.3) without layers [1], " in said
    assert f"{both:.4f} in all" in said


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_density_one_keeps_everything(preset, tmp_path):
    model = make_model()
    trainer = make_trainer(
        tmp_path, model, PruningCallback(1.0, preset=preset, levels=LEVELS, block_shape=(8, 4))
    )
    trainer.train()
    assert report(trainer.model).density == 1.0


def test_blocks_alone_in_the_paper_preset_are_taught_by_the_teacher(tmp_path):
    callback = PruningCallback(
        0.4, preset="paper", levels=("blocks",), block_shape=(8, 4), teacher=make_model(seed=3)
    )
    trainer = make_trainer(tmp_path, make_model(), callback)
    trainer.train()
    assert 0.38 <= report(trainer.model).density <= 0.4
    assert not (tmp_path / "_step1_teacher").exists()


def test_positional_inputs_are_taught_and_compared_on(tmp_path):
    """A script may call the model as it likes."""

    class Positional(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
            return (out.loss, out) if return_outputs else out.loss

    trainer = Positional(
        model=make_model(),
        args=training_arguments(tmp_path),
        train_dataset=make_dataset(),
        callbacks=[PruningCallback(**settings(), teacher=make_model(seed=3))],
    )
    trainer.train()
    assert any("distillation_loss" in row for row in trainer.state.log_history)
    assert trainer.model.pruning_report["compared_on"] == 1


@pytest.mark.parametrize("first_taught", [True, False])
def test_a_second_trainer_has_its_own_teacher(first_taught, tmp_path):
    model, teacher = make_model(), make_model(seed=3)
    first, second = (teacher, None) if first_taught else (None, teacher)
    make_trainer(tmp_path / "first", model, PruningCallback(**settings(), teacher=first))
    trainer = make_trainer(tmp_path / "second", model, PruningCallback(**settings(), teacher=second))
    trainer.train()
    distilled = any("distillation_loss" in row for row in trainer.state.log_history)
    assert distilled is not first_taught


def test_a_run_after_one_that_failed_is_taught_once(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, teacher = make_model(), make_model(seed=3)
    callback = PruningCallback(**settings(), teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "first", model, callback, callbacks=[Fail()]).train()
    make_trainer(tmp_path / "second", model, PruningCallback(**settings(), teacher=teacher)).train()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_report_and_card_are_those_of_the_model_that_is_saved(tmp_path):
    trainer = make_trainer(tmp_path / "run", make_model(), PruningCallback(**settings(density=0.5)))
    trainer.train()
    model, folder = trainer.model, tmp_path / "model"
    model.save_pretrained(folder)
    stored = json.loads((folder / "pruning_report.json").read_text())
    assert stored["settings"] == PruningConfig.create(**settings(density=0.5)).to_dict()
    loaded = type(model).from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "pruning_report.json").read_text())
    # The header of the file may be written otherwise.
    assert {**again, "file_bytes": stored["file_bytes"]} == stored
    assert (tmp_path / "again" / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    prune(model, PruningConfig.create(**settings(density=0.2)))
    shrink(model)
    model.save_pretrained(folder)
    assert not (folder / "pruning_report.json").exists()
    assert not (folder / "README.md").exists()
    (folder / "README.md").write_bytes(b"\xff my own card")
    loaded.save_pretrained(folder, True)
    assert (folder / "README.md").read_bytes() == b"\xff my own card"


def test_the_path_of_blocks_begins_where_heads_and_rows_ended(tmp_path):
    callback = PruningCallback(density=0.25, levels=("heads", "rows", "blocks"), structured_density=0.5)
    trainer = make_trainer(tmp_path, make_model(), callback, max_steps=60, logging_steps=1)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "density_target" in row]
    targets = [row["density_target"] for row in rows if row["pruning_phase"] == Phase.BLOCKS]
    assert len(targets) > 3
    assert max(targets) <= 0.51  # the first is of the step before
    assert targets == sorted(targets, reverse=True)


def test_a_target_of_cost_is_logged_beside_the_cost_and_not_as_a_density(tmp_path):
    callback = PruningCallback(multiply_adds=0.5)
    trainer = make_trainer(tmp_path, make_model(), callback, max_steps=40, logging_steps=1)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "cost" in row]
    assert len(rows) == 40
    assert all("density" in row and "density_target" not in row for row in rows)
    assert rows[0]["cost"] == 1
    assert rows[-1]["cost_target"] - 0.05 < rows[-1]["cost"] <= rows[-1]["cost_target"]
    assert rows[-1]["cost"] != rows[-1]["density"]
    targets = [row["cost_target"] for row in rows]
    assert targets == sorted(targets, reverse=True)

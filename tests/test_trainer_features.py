"""What other people's scripts switch on in the stock Trainer: works, with the callback as without it."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import EarlyStoppingCallback, SchedulerType, Trainer, TrainerCallback, TrainingArguments

from hf_mlprune import PruningCallback, PruningConfig, attach, report
from hf_mlprune.levels import LEVELS
from hf_mlprune.modeling.block_sparse import BlockSparseLinear
from hf_mlprune.state import pruning_state
from hf_mlprune.trainer.session import SMOOTHED_OVER_ITEMS
from support.models import LABELS, make_batch, make_dataset, make_model
from support.processes import run_forked
from support.training import make_trainer, training_arguments

#: Its name before and since it changed within transformers 5.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in fields(TrainingArguments)}
)


FIELDS = {field.name for field in fields(TrainingArguments)}
GROUPED = (
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in FIELDS
    else {"group_by_length": True}
)


def callback(**changes) -> PruningCallback:
    return PruningCallback(**{"density": 0.3, **changes})


def assert_pruned(trainer: Trainer) -> None:
    assert type(trainer.model).__name__.startswith("Pruned")
    assert 0.28 <= report(trainer.model).density <= 0.3
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


class Watch(TrainerCallback):
    """Masks and weights after each step."""

    def __init__(self):
        self.masks, self.weights = [], []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        gates = pruning_state(model).all_gates()
        self.masks.append(torch.cat([gate.keep for gate in gates]))
        self.weights.append(model.classifier.weight.detach().clone())


@pytest.mark.parametrize(
    "changes",
    [
        {CHECKPOINTING: True},
        {"bf16": True, "use_cpu": True},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 1e-6},
        {"label_smoothing_factor": 0.1},
        GROUPED,
        {"auto_find_batch_size": True},
        {"gradient_accumulation_steps": 3},
        {"weight_decay": 0.1, "warmup_steps": 5},
        {"max_steps": -1, "num_train_epochs": 3},
        {"neftune_noise_alpha": 5.0},
        {"torch_empty_cache_steps": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.parametrize("taught", [False, True])
def test_training_arguments(changes, taught, tmp_path):
    teacher = make_model(seed=3) if taught else None
    trainer = make_trainer(tmp_path, make_model(), callback(teacher=teacher), **changes)
    trainer.train()
    assert_pruned(trainer)


def train_with_workers(folder: Path, taught: bool) -> None:
    test_training_arguments({"dataloader_num_workers": 2}, taught, folder)


@pytest.mark.parametrize("taught", [False, True])
def test_data_loaded_by_other_processes(taught, tmp_path):
    """In a process of its own: this one may have threads of other engines, and a fork copies their locks."""
    assert run_forked(train_with_workers, tmp_path, taught) == 0


@pytest.mark.parametrize(
    "name",
    ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"],
)
def test_optimizers(name, tmp_path):
    trainer = make_trainer(tmp_path, make_model(), callback(), optim=name)
    trainer.train()
    assert_pruned(trainer)


class EvaluationWeights(TrainerCallback):
    """Brings in, before our callback, the weights that evaluation measures."""

    def on_train_end(self, args, state, control, optimizer, **kwargs):
        optimizer.eval()


@pytest.mark.parametrize("best", [False, True])
def test_an_optimizer_with_two_sets_of_weights(best, tmp_path):
    """Evaluation measures others than those that are trained: the pruned model has only the former."""
    changes = (
        {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5} if best else {}
    )

    def run(*before):
        model = make_model()
        trainer = Trainer(
            model=model,
            args=training_arguments(
                tmp_path,
                optim="schedule_free_adamw",
                lr_scheduler_type="constant",
                learning_rate=5e-3,
                load_best_model_at_end=best,
                **changes,
            ),
            train_dataset=make_dataset(),
            eval_dataset=make_dataset().select(range(16)),
            callbacks=[*before, callback(density=0.5)],
        )
        trainer.train()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        trainer.evaluate()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        return weights

    first, second = run(), run(EvaluationWeights())
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("polynomial", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("reduce_lr_on_plateau", {}),
        ("cosine_with_min_lr", {"min_lr": 1e-5}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-5}),
        ("warmup_stable_decay", {"num_decay_steps": 5}),
        ("greedy", {}),
    ],
)
def test_learning_rate_schedules(name, kwargs, tmp_path):
    if name not in {kind.value for kind in SchedulerType}:
        pytest.skip(f"this transformers has no schedule {name}")
    trainer = make_trainer(
        tmp_path, make_model(), callback(), lr_scheduler_type=name, lr_scheduler_kwargs=kwargs,
        warmup_steps=2, eval_strategy="steps", eval_steps=8,
    )  # fmt: skip
    trainer.train()
    assert_pruned(trainer)


def test_no_learning_rate_schedule_is_left_out():
    marks = test_learning_rate_schedules.pytestmark
    tested = {name for mark in marks if mark.name == "parametrize" for name, _ in mark.args[1]}
    assert {kind.value for kind in SchedulerType} <= tested


class OwnLoss(Trainer):
    """Class weights, as the documentation of transformers shows them; the labels are taken out, or not."""

    takes_labels_out = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels") if self.takes_labels_out else inputs["labels"]
        out = model(**inputs)
        weight = torch.tensor([1.0, 2.0, 3.0], dtype=out.logits.dtype)
        loss = functional.cross_entropy(out.logits, labels, weight=weight)
        return (loss, out) if return_outputs else loss


class OwnLossWithLabels(OwnLoss):
    takes_labels_out = False


class OwnLossOnBoth(Trainer):
    """A term of the logits on top of the loss that the model returns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        loss = out.loss + 0.01 * out.logits.square().mean()
        return (loss, out) if return_outputs else loss


class OwnLossOnHiddenStates(Trainer):
    """A term of the last hidden states on top."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, output_hidden_states=True)
        loss = out.loss + out.hidden_states[-1].square().mean()
        return (loss, out) if return_outputs else loss


def summed_loss(outputs, labels, num_items_in_batch=None):
    """A `compute_loss_func` as Trainer documents it: a sum over the number of items of the whole step."""
    loss = functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / (num_items_in_batch or len(labels))


def run(folder, kind=Trainer, *, rows=8, accumulate=1, teacher=None, loss=None, **changes):
    """A float64 run of 8 rows per step; its masks, weights and Trainer."""
    watch = Watch()
    trainer = kind(
        model=make_model().double(),
        args=training_arguments(
            folder, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate,
            lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd", learning_rate=0.05, **changes,
        ),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(),
        compute_loss_func=loss,
        callbacks=[callback(teacher=teacher), watch],
    )  # fmt: skip
    trainer.train()
    assert_pruned(trainer)
    return watch, trainer


SCRIPTS = {
    "own loss": {"kind": OwnLoss},
    "own loss, labels left in": {"kind": OwnLossWithLabels},
    "own term on top": {"kind": OwnLossOnBoth},
    "own term of hidden states": {"kind": OwnLossOnHiddenStates},
    "loss function": {"loss": summed_loss},
    "label smoothing": {"label_smoothing_factor": 0.1},
}


def first_gradient(folder, script, *, teacher, **settings):
    """dL/dW of the classifier and of a layer below it in the first step."""
    model, gradients = make_model().double(), {}
    watched = (model.classifier.weight, model.bert.encoder.layer[1].output.LayerNorm.weight)
    for place, weight in enumerate(watched):

        def note(gradient, place=place):
            gradients.setdefault(place, gradient.flatten().clone())

        weight.register_hook(note)
    changes = dict(SCRIPTS[script]) if script else {}
    kind, loss = changes.pop("kind", Trainer), changes.pop("loss", None)
    trainer = kind(
        model=model, args=training_arguments(folder, **changes), train_dataset=make_dataset(),
        compute_loss_func=loss, callbacks=[callback(teacher=teacher, **settings)],
    )  # fmt: skip
    trainer.train()
    return torch.cat([gradients[0], gradients[1]])


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_of_the_script_are_taught_once(script, tmp_path):
    """The gradient is α x the script's + (1 - α) x the distillation's: checked by turning each off."""
    teacher = make_model(seed=3).double()
    alone = first_gradient(tmp_path, script, teacher=None)
    task = first_gradient(tmp_path, script, teacher=teacher, task_weight=1.0)
    taught = first_gradient(tmp_path, script, teacher=teacher, task_weight=0.25)
    stock = first_gradient(tmp_path, None, teacher=teacher, task_weight=0.0)
    torch.testing.assert_close(task, alone)
    torch.testing.assert_close(taught, 0.25 * alone + 0.75 * stock)
    assert not torch.allclose(stock, alone, rtol=0.1)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("script", ["loss function", "label smoothing"])
def test_accumulated_parts_are_the_whole_batch(script, taught, tmp_path):
    if script == "label smoothing" and not taught and not SMOOTHED_OVER_ITEMS:
        pytest.skip("this transformers sums smoothed means over micro-batches")
    changes = SCRIPTS[script]
    runs = []
    for rows, accumulate in ((8, 1), (2, 4)):
        teacher = make_model(seed=3).double() if taught else None
        watch, _ = run(tmp_path / str(rows), rows=rows, accumulate=accumulate, teacher=teacher, **changes)
        runs.append(watch)
    whole, parts = runs
    assert len(whole.masks) == 24
    for step, (a, b) in enumerate(zip(whole.masks, parts.masks, strict=True)):
        assert torch.equal(a, b), step
    torch.testing.assert_close(whole.weights, parts.weights, rtol=1e-6, atol=1e-9)


def test_a_script_that_uses_none_of_the_outputs_is_told(tmp_path):
    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            model(**inputs)
            first = model.bert.encoder.layer[0]
            return first(model.bert.embeddings(inputs["input_ids"])).square().mean()

    trainer = Mine(
        model=make_model(), args=training_arguments(tmp_path), train_dataset=make_dataset(),
        callbacks=[callback(teacher=make_model(seed=3))],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="computes its loss neither from"):
        trainer.train()


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize(
    ("problem", "labels"),
    [("regression", [0.5, -1.0, 2.0]), ("multi_label_classification", [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])],
)
def test_problem_types(problem, labels, taught, tmp_path):
    width = 1 if problem == "regression" else LABELS
    changes = {"num_labels": width, "problem_type": problem}
    batch = make_batch(rows=60, seed=1)
    data = make_dataset(rows=60).remove_columns("labels")
    data = data.add_column("labels", [labels[i % len(labels)] for i in range(60)])
    model = make_model(**changes)
    trainer = Trainer(
        model=model, args=training_arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=data,
        eval_dataset=data, callbacks=[callback(teacher=make_model(seed=3, **changes) if taught else None)],
    )  # fmt: skip
    trainer.train()
    assert_pruned(trainer)
    assert trainer.predict(data).predictions.shape == (len(batch["input_ids"]), width)


def test_a_stream_of_data_with_max_steps(tmp_path):
    stream = make_dataset(rows=256).to_iterable_dataset()
    trainer = Trainer(
        model=make_model(), args=training_arguments(tmp_path), train_dataset=stream, callbacks=[callback()]
    )
    trainer.train()
    assert_pruned(trainer)


def test_batches_of_different_lengths(tmp_path):
    batch = make_batch(rows=64, seed=1)
    rows = [
        {"input_ids": tokens[: 4 + i % 8].tolist(), "labels": int(label)}
        for i, (tokens, label) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True))
    ]

    def collate(features):
        width = max(len(row["input_ids"]) for row in features)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in features])
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.tensor([row["labels"] for row in features]),
        }

    trainer = Trainer(
        model=make_model(), args=training_arguments(tmp_path, **GROUPED),
        train_dataset=rows, data_collator=collate, callbacks=[callback(teacher=make_model(seed=3))],
    )  # fmt: skip
    trainer.train()
    assert_pruned(trainer)


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")
def test_early_stopping_best_model_and_other_callbacks_together(tmp_path):
    watch = Watch()
    trainer = make_trainer(
        tmp_path, make_model(), callback(), callbacks=[watch, EarlyStoppingCallback(2)],
        max_steps=60, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=2,
        eval_on_start=True,
    )  # fmt: skip
    trainer.train()
    assert_pruned(trainer)
    landed = next(i for i, keep in enumerate(watch.masks) if torch.equal(keep, watch.masks[-1]))
    assert trainer.state.best_global_step > landed


def test_training_twice_prunes_once_and_says_why_not_again(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), callback())
    trainer.train()
    with pytest.raises(ValueError, match="make a new Trainer"):
        trainer.train()
    again = make_trainer(tmp_path / "again", trainer.model, callback(density=0.2))
    again.train()
    assert report(again.model).density <= 0.2


@pytest.mark.parametrize("given", [True, False])
def test_optimizers_passed_in(given, tmp_path):
    model = make_model()
    if given:
        attach(model, PruningConfig.create(0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 24)
    trainer = Trainer(
        model=model, args=training_arguments(tmp_path), train_dataset=make_dataset(),
        optimizers=(optimizer, schedule), callbacks=[PruningCallback() if given else callback()],
    )  # fmt: skip
    trainer.train()
    assert_pruned(trainer)


def attached_model(trial=None):
    model = make_model()
    attach(model, PruningConfig.create(0.3))
    return model


def test_model_init_makes_a_new_model_that_is_pruned(tmp_path):
    trainer = make_trainer(tmp_path, None, PruningCallback(), model_init=attached_model)
    trainer.train()
    assert_pruned(trainer)
    trainer.train()
    assert_pruned(trainer)


def test_hyperparameter_search(tmp_path):
    trainer = make_trainer(
        tmp_path, None, PruningCallback(), model_init=attached_model, eval_strategy="steps", eval_steps=12
    )
    best = trainer.hyperparameter_search(
        direction="minimize", backend="optuna", n_trials=2,
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
    )  # fmt: skip
    assert best.hyperparameters["learning_rate"] > 0
    reports = [json.loads(path.read_text()) for path in tmp_path.rglob("pruning_report.json")]
    assert reports
    assert all(0.28 <= found["density"] <= 0.3 for found in reports)


def test_evaluation_and_prediction_before_training_are_of_the_dense_model(tmp_path):
    model = make_model()
    expected = model.eval()(**make_batch()).logits
    trainer = make_trainer(tmp_path, model, callback())
    assert torch.equal(model(**make_batch()).logits, expected)
    metrics = trainer.evaluate()
    predictions = trainer.predict(trainer.eval_dataset)
    assert predictions.metrics["test_loss"] == pytest.approx(metrics["eval_loss"])


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_torch_compile(taught, tmp_path):
    torch.compiler.reset()
    plain, compiled = (
        run_compiled(tmp_path / str(compile), compile=compile, taught=taught) for compile in (False, True)
    )
    for step, (a, b) in enumerate(zip(plain.masks, compiled.masks, strict=True)):
        assert torch.equal(a, b), step
    torch.testing.assert_close(plain.weights, compiled.weights, rtol=1e-6, atol=1e-8)


def run_compiled(folder, *, compile, taught):
    watch = Watch()
    trainer = Trainer(
        model=make_model().double(),
        args=training_arguments(
            folder, torch_compile=compile, torch_compile_backend="aot_eager" if compile else None
        ),
        train_dataset=make_dataset(),
        callbacks=[callback(teacher=make_model(seed=3).double() if taught else None), watch],
    )
    trainer.train()
    assert_pruned(trainer)
    return watch


class OwnModule(nn.Module):
    """A script's own module around an encoder, with labels that it needs."""

    def __init__(self):
        super().__init__()
        self.bert = make_model("model")
        self.head = nn.Linear(self.bert.config.hidden_size, 3)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.head(self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_module_around_an_encoder_is_saved_and_trained_on(optim, tmp_path):
    trainer = make_trainer(
        tmp_path,
        OwnModule(),
        callback(levels=LEVELS, block_shape=(8, 4)),
        save_strategy="steps",
        save_steps=8,
        optim=optim,
    )
    trainer.train()
    trainer.save_model(tmp_path / "pruned")
    again = copy.deepcopy(trainer.model)
    again.load_state_dict(load_file(tmp_path / "pruned" / "model.safetensors"))
    assert any(isinstance(module, BlockSparseLinear) for module in again.modules())
    with torch.no_grad():
        expected = trainer.model.eval()(**make_batch())["logits"]
        torch.testing.assert_close(again.eval()(**make_batch())["logits"], expected)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(again.parameters()), again.parameters())
        torch.testing.assert_close(again(**make_batch())["logits"], expected)
    further = make_trainer(
        tmp_path / "further",
        again,
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=8,
        optim=optim,
    )
    further.train()
    assert not torch.equal(again.eval()(**make_batch())["logits"], expected)

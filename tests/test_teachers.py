"""Teachers of every kind are heard, or refused before the first step."""

from __future__ import annotations

import gc
import io
import weakref
from functools import partial

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from torch.nn import functional
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback

from hf_mlprune import PruningCallback, report
from hf_mlprune.distillation.losses import logits_loss, problem_of, token_divergence
from support.models import LABELS, make_batch, make_dataset, make_model
from support.training import distillation_losses, make_trainer, training_arguments


def dataset(labels=None):
    batch = make_batch("sequence", 64, seed=1)
    if labels is None:
        del batch["labels"]
    else:
        batch["labels"] = labels(batch["labels"])
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()})


def run(folder, model, teacher, *, data=None, trainer=Trainer, settings=None, **changes):
    done = trainer(
        model=model,
        args=training_arguments(folder, **{"remove_unused_columns": False, **changes}),
        train_dataset=make_dataset() if data is None else data,
        callbacks=[PruningCallback(density=0.3, teacher=teacher, **(settings or {}))],
    )
    done.train()
    return done


class OwnLoss(Trainer):
    """Cross entropy of one logit."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels").clamp(max=1).float()
        out = model(**inputs)
        loss = functional.binary_cross_entropy_with_logits(out.logits[:, 0], labels)
        return (loss, out) if return_outputs else loss


def test_one_logit_with_a_loss_of_the_scripts_own_is_taught(tmp_path):
    make = partial(make_model, num_labels=1)
    trainer = run(tmp_path, make(), make(seed=3), trainer=OwnLoss, settings={"hidden_weight": 0.0})
    assert all(loss > 0 for loss in distillation_losses(trainer))


@torch.no_grad()
def divergence(student, teacher):
    inputs = {name: value for name, value in make_batch(rows=64, seed=1).items() if name != "labels"}
    ours, theirs = (each.eval()(**inputs).logits.log_softmax(-1) for each in (student, teacher))
    return float(functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


def test_a_student_learns_from_its_teacher_without_any_label(tmp_path):
    def agreement(teacher_labels):
        model = make_model()
        data = dataset(teacher_labels)
        run(tmp_path, model, teacher, data=data, max_steps=60, learning_rate=3e-3)
        return divergence(model, teacher)

    teacher = make_model(seed=3)
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
    no_column, unlabelled = agreement(None), agreement(lambda labels: torch.full_like(labels, -100))
    start = divergence(make_model(), teacher)
    assert no_column < 0.5 * start
    assert unlabelled < 0.5 * start


@pytest.mark.parametrize("trained_in_bfloat16", [False, True])
def test_a_teacher_in_bfloat16_teaches_the_same(trained_in_bfloat16, tmp_path):
    losses = [
        distillation_losses(
            run(tmp_path, make_model(), make_model(seed=3).to(dtype), bf16=trained_in_bfloat16, use_cpu=True)
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_without_a_labelled_row(accumulation, tmp_path):
    def rare(labels):
        return torch.where(torch.arange(len(labels)) % 20 == 0, labels, -100)

    for teacher in (None, make_model(seed=3)):
        model = make_model()
        trainer = run(tmp_path, model, teacher, data=dataset(rare), gradient_accumulation_steps=accumulation)
        assert report(model).density <= 0.3
        assert all(entry.get("loss", 0.0) == entry.get("loss", 0.0) for entry in trainer.state.log_history)
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_task_weight_does_not_matter_without_labels(tmp_path):
    def run_with(weight):
        model = make_model()
        settings = {"task_weight": weight}
        run(tmp_path, model, make_model(seed=3), data=dataset(), settings=settings, max_grad_norm=0.0)
        return model.state_dict()

    first, second = run_with(0.1), run_with(0.7)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_unlabelled_rows_are_taught_as_labelled_ones_are(tmp_path):
    """The distillation loss does not ask which rows have labels."""

    def first_loss(labels):
        trainer = run(tmp_path, make_model(), make_model(seed=3), data=dataset(labels), logging_steps=1)
        return distillation_losses(trainer)[0]

    def half(labels):
        return torch.where(torch.arange(len(labels)) % 2 == 0, labels, -100)

    assert first_loss(half) == pytest.approx(first_loss(lambda labels: labels))


@pytest.mark.parametrize("family", ["mpnet", "deberta-v2"])
def test_a_teacher_of_another_family_is_loaded_by_its_name(family, tmp_path):
    make_model(seed=1, family=family).save_pretrained(tmp_path / "teacher")
    callback = PruningCallback(density=0.5, teacher=str(tmp_path / "teacher"), hidden_weight=0.0)
    trainer = make_trainer(tmp_path / "run", make_model(), callback)
    trainer.train()
    assert all(loss > 0 for loss in distillation_losses(trainer))


@pytest.mark.parametrize(("rows", "batch", "accumulation"), [(10, 2, 3), (8, 2, 4), (6, 2, 16), (7, 2, 2)])
def test_the_last_step_of_an_epoch_has_fewer_parts(rows, batch, accumulation, tmp_path):
    found = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.append(
                (callback._session.distiller.accumulation, trainer.current_gradient_accumulation_steps)
            )

    callback = PruningCallback(density=0.5, teacher=make_model(seed=1))
    trainer = make_trainer(
        tmp_path, make_model(), callback, callbacks=[Watch()], max_steps=20,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.train_dataset = trainer.train_dataset.select(range(rows))
    trainer.train()
    assert len(found) == 20
    assert all(ours == theirs for ours, theirs in found)


def test_logits_of_another_middle_are_no_tokens():
    student, teacher, mask = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.ones(4, 8)
    found = logits_loss(student, teacher, mask, None, 2.0)
    torch.testing.assert_close(found, token_divergence(student, teacher, 2.0).mean())


def test_a_teacher_is_let_go_at_the_end_of_its_run(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "teacher")
    callback, held = PruningCallback(density=0.5, teacher=str(tmp_path / "teacher")), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            held[:] = [weakref.ref(callback._session.teacher.model)]

    trainer = make_trainer(tmp_path / "run", make_model(), callback, callbacks=[Watch()])
    trainer.train()
    gc.collect()
    assert held[0]() is None
    assert callback.report is not None
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_teacher_has_the_autocast_that_accelerate_was_told(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(callback._session.distiller.autocast_dtype)

    callback = PruningCallback(density=0.5, teacher=make_model(seed=1))
    make_trainer(tmp_path, make_model(), callback, callbacks=[Watch()]).train()
    assert set(found) == {torch.bfloat16}


class Constant(nn.Module):
    """Returns what it is told, whatever its encoder computes."""

    def __init__(self, seed=0, detached=False):
        super().__init__()
        self.encoder = make_model("model", seed)
        self.head = nn.Linear(32, LABELS)
        self.detached = detached

    def forward(self, labels=None, **batch):
        found = self.head(self.encoder(**batch).last_hidden_state[:, 0])
        loss = functional.cross_entropy(found, labels)
        return {"loss": loss, "logits": found.detach() if self.detached else found * 0}


def test_a_teacher_that_is_not_heard_is_an_error(tmp_path):
    settings = {"hidden_weight": 0.0}
    with pytest.raises(
        RuntimeError, match="has been exactly 0 for 12 steps, so that the teacher is not heard"
    ):
        run(tmp_path, Constant(), Constant(3), settings=settings)
    with pytest.raises(
        RuntimeError, match="the loss has no gradient: the model returns its outputs detached"
    ):
        run(tmp_path, Constant(detached=True), Constant(3), settings=settings)


def test_a_teacher_equal_to_the_student_is_heard_once_they_differ(tmp_path):
    model = make_model()
    trainer = run(tmp_path, model, make_model(), logging_steps=1)
    losses = distillation_losses(trainer)
    assert losses[0] == 0.0
    assert losses[-1] > 0


def test_many_equal_passes_before_the_first_update_are_no_silence(tmp_path):
    run(tmp_path, make_model(), make_model(), logging_steps=1, gradient_accumulation_steps=12)


def test_a_teacher_that_is_trained_with_the_student_is_refused(tmp_path):
    student, teacher = make_model(), make_model(seed=3)
    teacher.bert.embeddings.word_embeddings = student.bert.embeddings.word_embeddings
    with pytest.raises(ValueError, match="expected weights of its own, but 1 are the student's"):
        run(tmp_path, student, teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    student.bert.embeddings.word_embeddings.requires_grad_(False)
    run(tmp_path, student, teacher)


class Asks(Trainer):
    """Takes the model's loss, if there is one."""

    labels = "labels"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop(self.labels)
        out = model(**inputs)
        loss = out.loss if out.loss is not None else functional.cross_entropy(out.logits, labels)
        return (loss, out) if return_outputs else loss


def test_a_script_that_asks_whether_there_is_a_loss_keeps_its_own(tmp_path):
    settings = {"task_weight": 1.0}
    logged = [
        run(tmp_path, make_model(), make_model(seed=3), trainer=Asks, settings=settings).state.log_history,
        run(tmp_path, make_model(), None, trainer=Asks).state.log_history,
    ]
    first, second = ([entry["loss"] for entry in history if "loss" in entry] for history in logged)
    assert first == pytest.approx(second, rel=1e-4)


def test_labels_under_another_name_keep_the_scripts_own_loss(tmp_path):
    class Target(Asks):
        labels = "target"

    data = make_dataset().rename_column("labels", "target")
    for rows in (data, list(data)):
        logged = []
        for teacher in (make_model(seed=3), None):
            settings = {"task_weight": 1.0} if teacher else {}
            done = run(tmp_path, make_model(), teacher, data=rows, trainer=Target, settings=settings)
            logged.append([entry["loss"] for entry in done.state.log_history if "loss" in entry])
        assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def generated():
    yield from dataset()


@pytest.mark.parametrize(
    "data",
    [
        lambda: list(dataset()),
        lambda: Subset(list(dataset()), range(32)),
        lambda: dataset().to_iterable_dataset(),
        lambda: IterableDataset.from_generator(generated),
        lambda: dataset().add_column("text", ["words"] * 64),
    ],
    ids=["list", "subset", "stream", "generator", "with a text"],
)
def test_data_of_any_kind_without_labels_are_taught(data, tmp_path):
    def tensors(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}

    trainer = Trainer(
        model=make_model(),
        args=training_arguments(tmp_path, remove_unused_columns=False),
        train_dataset=data(),
        data_collator=tensors,
        callbacks=[PruningCallback(density=0.3, teacher=make_model(seed=3))],
    )
    trainer.train()
    assert all(loss > 0 for loss in distillation_losses(trainer))


def test_a_teacher_equal_to_the_student_may_be_silent_until_something_is_removed(tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, teacher = make_model("model", **still), make_model("model", **still)
    settings = {"warmup_fraction": 0.4}
    done = run(tmp_path, model, teacher, data=dataset(), settings=settings, max_steps=40, logging_steps=2)
    losses = distillation_losses(done)
    assert losses[:6] == [0.0] * 6
    assert losses[-1] > 0


class ManyLabels(nn.Module):
    """Several answers for each row, with the loss of a module of one's own."""

    def __init__(self, seed=0):
        super().__init__()
        self.encoder = make_model("model", seed)
        self.head = nn.Linear(32, LABELS)

    def forward(self, labels=None, **batch):
        logits = self.head(self.encoder(**batch).last_hidden_state[:, 0])
        loss = None if labels is None else functional.binary_cross_entropy_with_logits(logits, labels)
        return {"loss": loss, "logits": logits}


def test_several_labels_are_told_by_the_labels_where_no_config_tells_it(tmp_path):
    """Of all logits alike a softmax would see nothing of the teacher's."""
    student, teacher = ManyLabels(), ManyLabels()
    with torch.no_grad():
        teacher.head.bias.sub_(5.0)
    batch = make_batch("sequence", 64, seed=1)
    many = {**batch, "labels": functional.one_hot(batch["labels"], LABELS).float()}
    data = Dataset.from_dict({name: value.tolist() for name, value in many.items()})
    settings = {"hidden_weight": 0.0}
    done = run(tmp_path, student, teacher, data=data, settings=settings, logging_steps=1, max_steps=20)
    assert distillation_losses(done)[0] > 1.0


def test_the_problem_is_told_by_labels():
    logits = {"logits": torch.zeros(4, 3)}
    shares, numbers = torch.rand(4, 3), torch.randn(4, 3) * 9
    assert problem_of(logits, shares) == "multi_label_classification"
    assert problem_of(logits, numbers) == "regression"
    for labels in (None, torch.zeros(4), torch.zeros(4, 3, dtype=torch.long), torch.rand(4, 5)):
        assert problem_of(logits, labels) is None
    assert problem_of({"embeddings": shares}, shares) is None


def test_a_model_that_counts_items_itself_is_taught_alike_in_parts(tmp_path):
    class Counts(nn.Module):
        def __init__(self, seed=0):
            super().__init__()
            self.model = make_model(
                "sequence", seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )

        def forward(self, input_ids, attention_mask, labels=None, num_items_in_batch=None):
            logits = self.model(input_ids, attention_mask).logits
            if labels is None:
                return {"logits": logits}
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            return {
                "loss": loss / (len(labels) if num_items_in_batch is None else num_items_in_batch),
                "logits": logits,
            }

    def norm(parts):
        changes = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 16 // parts}
        done = run(tmp_path, Counts(), Counts(3), data=make_dataset(rows=16), logging_steps=1, **changes)
        return done.state.log_history[0]["grad_norm"]

    assert norm(4) == pytest.approx(norm(1), rel=1e-3)


@pytest.mark.parametrize("head", ["sequence", "model"])
def test_tuples_without_labels_are_taught(head, tmp_path):
    model, teacher = make_model(head), make_model(head, seed=3)
    model.config.return_dict = teacher.config.return_dict = False
    losses = distillation_losses(run(tmp_path, model, teacher, data=dataset()))
    named = distillation_losses(run(tmp_path, make_model(head), make_model(head, seed=3), data=dataset()))
    assert losses == pytest.approx(named, rel=1e-4)


def test_a_model_can_be_pickled_in_the_middle_of_a_run(tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            torch.save(model, io.BytesIO())

    model = make_model()
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path),
        train_dataset=make_dataset(),
        callbacks=[PruningCallback(density=0.3, teacher=make_model(seed=3)), Save()],
    )
    trainer.train()


def test_rows_without_labels_weigh_alike_in_any_number_of_parts(tmp_path):
    """Where each step has fully, partly and not labelled parts."""

    def some(labels):
        return torch.where(torch.arange(len(labels)) % 8 >= 3, labels, -100)

    def weights(parts):
        model = make_model()
        data = dataset(some)
        changes = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 8 // parts}

        class InOrder(Trainer):
            def _get_train_sampler(self, *args):
                return None

        run(
            tmp_path, model, make_model(seed=3), data=data, settings={"task_weight": 0.0}, optim="sgd",
            max_grad_norm=0.0, lr_scheduler_type="constant", trainer=InOrder, **changes,
        )  # fmt: skip
        return model.state_dict()

    whole, parted = weights(1), weights(4)
    assert whole.keys() == parted.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parted[name], value, rtol=0, atol=1e-6)


class Names(nn.Module):
    def __init__(self, name, width=LABELS, seed=0):
        super().__init__()
        self.encoder = make_model("model", seed)
        self.head = nn.Linear(32, width)
        self.name = name

    def forward(self, labels=None, **batch):
        found = self.head(self.encoder(**batch).last_hidden_state[:, 0])
        return {"loss": functional.cross_entropy(found, labels.clamp(max=1)), self.name: found}


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (
            partial(Names, "answers", seed=3),
            {},
            r"expected predictions that the student makes, too, \['scores'\]",
        ),
        (
            partial(Names, "scores", 2, 3),
            {},
            r"expected scores of the student's shape \(8, 3\), got \(8, 2\)",
        ),
        (lambda: nn.Linear(2, 2), {}, "need a teacher with the student's encoders"),
        (partial(make_model, "model", 3, vocab_size=80), {}, "vocab_size=64 as in the student, got 80"),
    ],
)
def test_teachers_that_cannot_teach_are_refused_before_the_first_step(teacher, settings, message, tmp_path):
    student = Names("scores")
    before = {name: value.clone() for name, value in student.named_parameters()}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, student, teacher(), settings=settings)
    assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())


def test_a_model_that_returns_its_loss_alone_needs_hidden_states(tmp_path):
    class LossAlone(Names):
        def forward(self, labels=None, **batch):
            return {"loss": super().forward(labels=labels, **batch)["loss"]}

    assert all(distillation_losses(run(tmp_path, LossAlone("x"), LossAlone("x", seed=3))))
    with pytest.raises(ValueError, match="got a model that returns none beside its loss"):
        run(tmp_path, LossAlone("x"), LossAlone("x", seed=3), settings={"hidden_weight": 0.0})


def test_passes_for_a_log_or_a_detached_target_are_no_lost_losses(tmp_path):
    class TwoPasses(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            target = model(**inputs).logits.detach()
            out = model(**inputs)
            loss = out.loss + (out.logits - target).square().mean()
            return (loss, out) if return_outputs else loss

    trainer = run(tmp_path, make_model(), make_model(seed=3), trainer=TwoPasses)
    assert all(distillation_losses(trainer))


def test_a_model_can_be_pickled_after_a_run_with_a_teacher(tmp_path):
    model = make_model()
    run(tmp_path, model, make_model(seed=3))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("head", ["sequence", "token", "span", "masked", "choice"])
def test_tuples_are_taught_as_named_outputs_are(head, tmp_path):
    def losses(as_tuple):
        model, teacher = make_model(head), make_model(head, seed=3)
        for each in (model, teacher):
            each.config.return_dict = not as_tuple
        callback = PruningCallback(density=0.5, teacher=teacher)
        trainer = make_trainer(tmp_path, model, callback, head=head)
        trainer.train()
        return distillation_losses(trainer)

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_known_also_where_the_encoders_forward_is_called(implementation, tmp_path):
    """Some libraries call `forward` of the encoder, past its own hooks."""

    class Past(nn.Module):
        def __init__(self, through, seed=0):
            super().__init__()
            self.encoder = make_model("model", seed, attn_implementation=implementation)
            self.head = nn.Linear(32, LABELS)
            self.through = through

        def forward(self, labels=None, **batch):
            call = self.encoder if self.through == "call" else self.encoder.forward
            logits = self.head(call(**batch).last_hidden_state[:, 0])
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    def losses(through):
        torch.manual_seed(0)
        return distillation_losses(run(tmp_path, Past(through), Past(through, 3)))

    assert losses("forward") == pytest.approx(losses("call"), rel=1e-5)

"""Models and inputs as people's scripts have them: their export is rehearsed at the first step, and works."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertForSequenceClassification, BertModel, Trainer
from transformers.utils import ModelOutput

from hf_mlprune import PruningCallback, report, resizing
from hf_mlprune.shrinking import ShrinkError
from support.models import LABELS, make_dataset, make_model
from support.training import distillation_losses, training_arguments


@dataclasses.dataclass
class Answer:
    """An output of the script's own that Trainer can take the loss from."""

    loss: torch.Tensor | None
    logits: torch.Tensor

    def __getitem__(self, index):
        return (self.loss, self.logits)[index]


@dataclasses.dataclass(frozen=True)
class FrozenAnswer:
    """As above, which cannot be written to."""

    loss: torch.Tensor | None
    logits: torch.Tensor

    __getitem__ = Answer.__getitem__


@dataclasses.dataclass
class OfTransformers(ModelOutput):
    """An output class as transformers asks for one."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


Pair = namedtuple("Pair", ["loss", "logits"])


class AttributesOnly(SimpleNamespace):
    """No mapping, no sequence, no dataclass."""

    def __getitem__(self, index):
        return (self.loss, self.logits)[index]


OUTPUTS = {
    "mapping": lambda loss, logits: {"loss": loss, "logits": logits},
    "output class": lambda loss, logits: OfTransformers(loss=loss, logits=logits),
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
    "named tuple": Pair,
    "dataclass": Answer,
    "frozen dataclass": FrozenAnswer,
    "object": lambda loss, logits: AttributesOnly(loss=loss, logits=logits),
    "nested": lambda loss, logits: {"loss": loss, "heads": [{"logits": logits}], "note": "of the script"},
    "loss alone": lambda loss, logits: {"loss": loss},
    "other names": lambda loss, logits: {"loss": loss, "scores": logits},
}


class Own(nn.Module):
    """A module around an encoder, called with everything in a batch."""

    def __init__(self, output="mapping", seed=0):
        super().__init__()
        self.encoder = make_model("model", seed)
        self.head = nn.Linear(32, LABELS)
        self.output = OUTPUTS[output]

    def forward(self, labels=None, **batch):
        logits = self.head(self.encoder(**batch).last_hidden_state[:, 0])
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return self.output(loss, logits)


def own_class(forward):
    """A subclass of the stock class with a forward of its own; as `make_model("sequence")`."""

    class Mail(BertForSequenceClassification):
        pass

    Mail.forward = forward

    def make(seed=0):
        stock = make_model("sequence", seed)
        model = Mail(stock.config)
        model.load_state_dict(stock.state_dict())
        return model

    return make


def labels_needed(self, input_ids, attention_mask, labels):
    logits = self.classifier(self.bert(input_ids, attention_mask).last_hidden_state[:, 0])
    return functional.cross_entropy(logits, labels), logits


def lean(self, input_ids, attention_mask, labels=None):
    return super(type(self), self).forward(input_ids, attention_mask=attention_mask, labels=labels)


def counts_items_itself(self, input_ids, attention_mask, labels, num_items_in_batch=None):
    logits = self.classifier(self.bert(input_ids, attention_mask).last_hidden_state[:, 0])
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return {
        "loss": loss / (len(labels) if num_items_in_batch is None else num_items_in_batch),
        "logits": logits,
    }


def draws_in_evaluation(self, input_ids, attention_mask, labels=None):
    hidden = self.bert(input_ids, attention_mask).last_hidden_state[:, 0]
    logits = self.classifier(functional.dropout(hidden, 0.1, training=True))
    return {"loss": None if labels is None else functional.cross_entropy(logits, labels), "logits": logits}


def rounds_inside(self, input_ids, attention_mask, labels=None):
    with torch.autocast("cpu", torch.bfloat16):
        logits = self.classifier(self.bert(input_ids, attention_mask).last_hidden_state[:, 0]).float()
    return {"loss": None if labels is None else functional.cross_entropy(logits, labels), "logits": logits}


CLASSES = [labels_needed, lean, counts_items_itself, draws_in_evaluation, rounds_inside]


class TwoTowers(nn.Module):
    """One encoder, called twice with parts of a nested batch; strings and numbers among the inputs."""

    def __init__(self, seed=0):
        super().__init__()
        self.encoder = make_model("model", seed)

    def forward(self, pair, scale, names=()):
        assert all(isinstance(name, str) for name in names)
        first, second = (
            self.encoder(**part["tokens"]).last_hidden_state[:, 0]
            for part in (pair["advert"], pair["applicant"])
        )
        loss = 1 - functional.cosine_similarity(first, second).mean() * scale
        return {"loss": loss, "advert": first, "applicant": second}


def nested(rows):
    def part(shift):
        tokens = torch.tensor([row["input_ids"] for row in rows]).roll(shift, 0)
        mask = torch.tensor([row["attention_mask"] for row in rows]).roll(shift, 0)
        return {"tokens": {"input_ids": tokens, "attention_mask": mask}, "from": "a file"}

    return {"pair": {"advert": part(0), "applicant": part(1)}, "scale": 0.5, "names": ["a", "b"]}


def run(folder, model, teacher=None, *, collate=None, callbacks=(), data=None, trainer=Trainer, **changes):
    settings = {
        name: changes.pop(name) for name in ("levels", "block_shape", "hidden_weight") if name in changes
    }
    done = trainer(
        model=model,
        args=training_arguments(folder, remove_unused_columns=False, **changes),
        train_dataset=make_dataset() if data is None else data,
        data_collator=collate,
        callbacks=[PruningCallback(density=0.3, teacher=teacher, **settings), *callbacks],
    )
    done.train()
    return done


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_module_of_the_scripts_own(output, taught, tmp_path):
    model = Own(output)
    trainer = run(tmp_path, model, Own(output, seed=3) if taught else None)
    assert report(model).density <= 0.3
    assert bool(distillation_losses(trainer)) is taught
    assert all(loss > 0 for loss in distillation_losses(trainer))


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("forward", CLASSES, ids=lambda forward: forward.__name__)
def test_a_class_of_the_scripts_own(forward, taught, tmp_path):
    make = own_class(forward)
    model = make()
    trainer = run(tmp_path, model, make(3) if taught else None)
    assert report(model).density <= 0.3
    assert bool(distillation_losses(trainer)) is taught


@pytest.mark.parametrize("taught", [False, True])
def test_nested_inputs_and_an_encoder_called_twice(taught, tmp_path):
    model = TwoTowers()
    trainer = run(tmp_path, model, TwoTowers(3) if taught else None, collate=nested)
    assert report(model).density <= 0.3
    assert bool(distillation_losses(trainer)) is taught


def test_a_stock_teacher_of_a_module_and_the_other_way_round(tmp_path):
    class Around(nn.Module):
        def __init__(self, seed=0):
            super().__init__()
            self.inner = make_model("sequence", seed)

        def forward(self, **batch):
            return self.inner(**batch)

    for student, teacher in ((Around(), make_model(seed=3)), (make_model(), Around(3))):
        assert distillation_losses(run(tmp_path, student, teacher))
        assert report(student).density <= 0.3


def test_parts_that_the_script_keeps_in_another_mode_stay_in_it(tmp_path):
    class Half(Own):
        def train(self, mode=True):
            super().train(mode)
            self.head.eval()
            return self

    model = Half()
    model.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, LABELS))
    modes = []

    def note(module, *_):
        if module.training:
            modes.append(module.head.training)

    model.register_forward_pre_hook(note)
    run(tmp_path, model)
    assert modes
    assert not any(modes)


class Decodes(Own):
    """Returns tags or text in evaluation, which cannot be compared but by its encoder."""

    def forward(self, labels=None, **batch):
        out = super().forward(labels=labels, **batch)
        return out if self.training else {"tags": out["logits"].argmax(-1), "text": "of a decoder"}


class Pairwise(Own):
    """One score for each label and pair of tokens, as large as attention weights are."""

    def forward(self, labels=None, **batch):
        hidden = self.encoder(**batch).last_hidden_state
        scores = torch.stack([hidden @ hidden.transpose(1, 2)] * LABELS, dim=1)
        return {"loss": functional.cross_entropy(scores.mean((2, 3)), labels), "logits": scores}


class Penalized(Own):
    """A penalty on encoder weights in the loss: the pruned model has fewer."""

    def forward(self, labels=None, **batch):
        out = super().forward(labels=labels, **batch)
        penalty = sum(p.square().sum() for p in self.encoder.parameters())
        return {**out, "loss": out["loss"] + 1e-4 * penalty}


class Counts(Own):
    """Keeps a running state in its buffers, in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(LABELS))

    def forward(self, labels=None, **batch):
        out = super().forward(labels=labels, **batch)
        logits = out["logits"] + self.seen
        self.seen = 0.9 * self.seen + out["logits"].detach().mean(0)
        return {**out, "logits": logits}


class Echoes(Own):
    """Returns nothing that comes from its encoder."""

    def forward(self, labels=None, **batch):
        return {**super().forward(labels=labels, **batch), "logits": batch["input_ids"].float()}


@pytest.mark.parametrize("kind", [Decodes, Pairwise, Penalized, Counts, Echoes])
def test_models_that_are_hard_to_compare(kind, tmp_path):
    model = kind()
    run(tmp_path, model)
    assert report(model).density <= 0.3


@pytest.mark.parametrize("kind", [Own, Decodes, Echoes])
def test_a_wrong_shrink_is_found_whatever_the_model_returns(kind, monkeypatch, tmp_path):
    real = resizing._fill

    def wrong(new, *args):
        real(new, *args)
        new.get_parameter("bias").data[0] += 1.0

    monkeypatch.setattr(resizing, "_fill", wrong)
    with pytest.raises(ShrinkError, match="shrunk outputs differ"):
        run(tmp_path, kind())


def test_a_forward_put_onto_the_model_is_the_one_that_is_compared(tmp_path):
    model, calls = make_model(), []
    stock = model.forward

    def forward(input_ids, attention_mask, labels=None, weight=1.0):
        calls.append(model.training)
        return stock(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    model.forward = forward
    run(tmp_path, model)
    assert calls.count(False) >= 4


def test_a_forward_that_fails_in_evaluation_is_refused_at_the_first_step(tmp_path):
    class OnlyTrains(Own):
        def forward(self, labels=None, **batch):
            if not self.training:
                raise NotImplementedError("evaluation is written next week")
            return super().forward(labels=labels, **batch)

    with pytest.raises(ShrinkError, match="its rehearsal did: evaluation is written next week"):
        run(tmp_path, OnlyTrains())


def test_a_forward_that_reads_the_size_of_pruned_layers_is_refused_at_the_first_step(tmp_path):
    class Reads(Own):
        def forward(self, labels=None, **batch):
            out = super().forward(labels=labels, **batch)
            width = self.encoder.encoder.layer[0].intermediate.dense.weight.shape[0]
            return {**out, "logits": out["logits"] * width}

    with pytest.raises(ShrinkError, match=r"its rehearsal did: shrunk outputs differ .*\(output 'logits'"):
        run(tmp_path, Reads())


def test_inputs_of_evaluation_are_rehearsed_at_the_first_evaluation(tmp_path):
    class Odd(Own):
        def forward(self, labels=None, **batch):
            out = super().forward(labels=labels, **batch)
            if len(batch["input_ids"]) == 4:  # the batches of evaluation
                out["logits"] = (
                    out["logits"] + self.encoder.encoder.layer[0].intermediate.dense.weight.shape[0]
                )
            return out

    with pytest.raises(ShrinkError, match="would fail, as its rehearsal"):
        run(
            tmp_path,
            Odd(),
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=4,
            trainer=lambda **kwargs: Trainer(eval_dataset=make_dataset().select(range(8)), **kwargs),
        )


def test_a_bare_encoder_is_taught_without_labels(tmp_path):
    model, teacher = make_model("model"), make_model("model", seed=3)
    trainer = run(tmp_path, model, teacher, data=make_dataset("model"))
    assert isinstance(model, BertModel)
    losses = distillation_losses(trainer)
    assert losses[-1] < losses[0]


def test_attention_weights_and_hidden_states_among_the_outputs(tmp_path):
    model = make_model(attn_implementation="eager", output_attentions=True, output_hidden_states=True)
    run(tmp_path, model, make_model(seed=3, attn_implementation="eager"))
    assert report(model).density <= 0.3


class PartByPart(Trainer):
    """Calls encoder and head, and never the model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model.classifier(model.bert(**inputs).pooler_output)
        loss = functional.cross_entropy(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


def test_a_script_that_calls_parts_of_the_model(tmp_path):
    model = make_model()
    run(tmp_path, model, trainer=PartByPart)
    assert report(model).density <= 0.3
    with pytest.raises(RuntimeError, match="the model was not called in training mode in this step"):
        run(tmp_path, make_model(), make_model(seed=3), trainer=PartByPart)

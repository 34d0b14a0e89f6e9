"""A real pretrained BERT (2 layers, 128 wide) on real sentences, through the stock Trainer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    pipeline,
    set_seed,
)

from hf_mlprune import PruningCallback, report
from support.training import training_arguments

GOOD = ["a warm and funny film", "the cast is superb", "i loved every minute", "a small masterpiece"]
BAD = ["a dull and noisy mess", "the plot is a bore", "i left half way through", "a waste of time"]


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_classifier_learns_while_it_is_pruned_and_serves_by_pipeline(tiny_bert, preset, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts = [*GOOD, *BAD] * 4
    rows = Dataset.from_dict({**tokenizer(texts), "labels": ([1] * 4 + [0] * 4) * 4})
    set_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    student = AutoModelForSequenceClassification.from_pretrained(tiny_bert)

    def fit(model, steps, callbacks=()):
        trainer = Trainer(
            model=model,
            args=training_arguments(tmp_path / "run", max_steps=steps),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    fit(teacher, 40).save_model(str(tmp_path / "teacher"))
    callback = PruningCallback(density=0.4, preset=preset, teacher=str(tmp_path / "teacher"))
    fit(student, 80, [callback]).save_model(str(tmp_path / "small"))
    assert 0.38 <= report(student).density <= 0.4
    classify = pipeline("text-classification", model=str(tmp_path / "small"))
    found = [row["label"] for row in classify([*GOOD, *BAD])]
    assert found == ["LABEL_1"] * 4 + ["LABEL_0"] * 4
    small = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert small < (tmp_path / "teacher" / "model.safetensors").stat().st_size


def test_masked_language_model_keeps_its_tied_embeddings(tiny_bert, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model = AutoModelForMaskedLM.from_pretrained(tiny_bert)
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path / "run", max_steps=20),
        train_dataset=Dataset.from_dict(tokenizer([*GOOD, *BAD])),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer),
        callbacks=[PruningCallback(density=0.5)],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "small").eval()
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    inputs = tokenizer(GOOD, return_tensors="pt", padding=True)
    with torch.no_grad():
        difference = (loaded(**inputs).logits - model.eval()(**inputs).logits).abs().max()
    assert float(difference) <= 1e-5 * 30

"""sentence-transformers: its trainers with the callback, its files, its encode."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
from sentence_transformers.sparse_encoder import (
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast, set_seed

from hf_mlprune import PruningCallback, PruningConfig, export, report, shrink
from support.models import VOCABULARY, make_model, prune
from support.training import distillation_losses

WORDS = VOCABULARY - 5
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def texts(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (count, 9), generator=generator)
    return [" ".join(f"w{int(word)}" for word in row) for row in words]


def save_encoder(folder, head: str, seed: int = 0, **changes) -> str:
    make_model(head, seed, **changes).save_pretrained(folder)
    tokenizer = Tokenizer(
        WordLevel(
            {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])},
            unk_token="[UNK]",
        )
    )
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=24,
    ).save_pretrained(folder)
    return str(folder)


def sentence_transformer(folder, seed: int = 0) -> SentenceTransformer:
    part = Transformer(save_encoder(folder, "model", seed), max_seq_length=24)
    return SentenceTransformer(modules=[part, Pooling(32)], device="cpu")


def train(kind, arguments, folder, model, data, loss, callback, **changes):
    set_seed(0)
    settings = {
        "max_steps": 24,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = kind(
        model=model,
        args=arguments(str(folder), **{**settings, **changes}),
        train_dataset=data,
        loss=loss,
        callbacks=[callback],
    )
    trainer.train()
    return trainer


def pairs(rows: int = 64) -> Dataset:
    sentences = texts(rows + 1)
    return Dataset.from_dict({"anchor": sentences[:-1], "positive": sentences[1:]})


def scored_pairs(rows: int = 64) -> Dataset:
    return pairs(rows).add_column("label", [float(i % 2) for i in range(rows)])


def train_sentences(folder, model, callback, loss=MultipleNegativesRankingLoss, **changes):
    return train(
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        folder,
        model,
        pairs(),
        loss(model),
        callback,
        **changes,
    )


@pytest.mark.parametrize("taught", [False, True])
def test_sentence_transformer(taught, tmp_path):
    model = sentence_transformer(tmp_path / "base")
    teacher = sentence_transformer(tmp_path / "teacher", seed=3) if taught else None
    trainer = train_sentences(tmp_path / "run", model, PruningCallback(density=0.4, teacher=teacher))
    assert report(model).density <= 0.4
    losses = distillation_losses(trainer)
    assert bool(losses) is taught
    assert all(loss > 0 for loss in losses)
    trainer.save_model(str(tmp_path / "final"))
    loaded = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    expected = model.encode(texts(4, seed=5))
    np.testing.assert_allclose(loaded.encode(texts(4, seed=5)), expected, atol=1e-5)
    # By sentence-transformers alone.
    script = (
        "import sys; sys.modules['hf_mlprune'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(tmp_path / 'final')!r}, device='cpu', trust_remote_code=True)\n"
        f"print(model.encode({texts(4, seed=5)!r}).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    np.testing.assert_allclose(np.array(json.loads(done.stdout)), expected, atol=1e-5)


def test_a_sentence_transformer_of_each_target_is_one(tmp_path):
    model = sentence_transformer(tmp_path / "base")
    train_sentences(tmp_path / "run", model, PruningCallback(targets=[0.7, 0.4]), max_steps=40)
    larger = SentenceTransformer(str(tmp_path / "run" / "density-0.7"), device="cpu")
    assert 0.4 < report(larger).density <= 0.7
    assert [type(part) for part in larger] == [type(part) for part in model]
    assert larger.encode(texts(2)).shape == model.encode(texts(2)).shape


def test_a_sentence_transformer_is_taught_without_labels_to_be_like_its_teacher(tmp_path):
    def distance(teacher_weight):
        model = sentence_transformer(tmp_path / "base")
        teacher = sentence_transformer(tmp_path / "teacher", seed=3)
        callback = PruningCallback(
            density=0.6, teacher=teacher, task_weight=teacher_weight, hidden_weight=0.0
        )
        train_sentences(tmp_path / "run", model, callback, max_steps=60)
        return np.square(model.encode(texts(16)) - teacher.encode(texts(16))).mean()

    assert distance(0.0) < 0.5 * distance(1.0)


def test_losses_that_call_the_model_in_parts(tmp_path):
    model = sentence_transformer(tmp_path / "base")
    teacher = sentence_transformer(tmp_path / "teacher", seed=3)

    def loss(model):
        return CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)

    train_sentences(tmp_path / "run", model, PruningCallback(density=0.4, teacher=teacher), loss=loss)
    assert report(model).density <= 0.4


def test_a_sentence_transformer_resumes_as_if_it_had_not_stopped(tmp_path):
    def run(folder, resume=None):
        model = sentence_transformer(tmp_path / "base")
        set_seed(0)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                str(folder),
                max_steps=24,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                save_steps=8,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=pairs(),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[PruningCallback(density=0.4)],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run(tmp_path / "run")
    resumed = run(tmp_path / "again", resume=str(tmp_path / "run" / "checkpoint-8"))
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("taught", [False, True])
def test_cross_encoder(taught, tmp_path):
    model = CrossEncoder(save_encoder(tmp_path / "base", "sequence", num_labels=1), device="cpu")
    teacher = (
        CrossEncoder(save_encoder(tmp_path / "teacher", "sequence", seed=3, num_labels=1), device="cpu")
        if taught
        else None
    )
    trainer = train(
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        tmp_path / "run",
        model,
        scored_pairs(),
        BinaryCrossEntropyLoss(model),
        PruningCallback(density=0.4, teacher=teacher),
    )
    assert report(model).density <= 0.4
    losses = distillation_losses(trainer)
    assert bool(losses) is taught
    assert all(loss > 0 for loss in losses)
    trainer.save_model(str(tmp_path / "final"))
    loaded = CrossEncoder(str(tmp_path / "final"), device="cpu")
    asked = list(zip(texts(4, seed=5), texts(4, seed=6), strict=True))
    np.testing.assert_allclose(loaded.predict(asked), model.predict(asked), atol=1e-5)


@pytest.mark.parametrize("taught", [False, True])
def test_sparse_encoder(taught, tmp_path):
    model = SparseEncoder(save_encoder(tmp_path / "base", "masked"), device="cpu")
    teacher = (
        SparseEncoder(save_encoder(tmp_path / "teacher", "masked", seed=3), device="cpu") if taught else None
    )
    loss = SpladeLoss(
        model,
        SparseMultipleNegativesRankingLoss(model),
        document_regularizer_weight=1e-4,
        query_regularizer_weight=1e-4,
    )
    trainer = train(
        SparseEncoderTrainer,
        SparseEncoderTrainingArguments,
        tmp_path / "run",
        model,
        pairs(),
        loss,
        PruningCallback(density=0.4, teacher=teacher),
    )
    assert report(model).density <= 0.4
    losses = distillation_losses(trainer)
    assert bool(losses) is taught
    trainer.save_model(str(tmp_path / "final"))
    loaded = SparseEncoder(str(tmp_path / "final"), device="cpu")
    found, expected = (each.encode(texts(4, seed=5)).to_dense() for each in (loaded, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_teacher_of_other_embeddings_is_refused_at_the_first_step(tmp_path):
    model = sentence_transformer(tmp_path / "base")
    part = Transformer(save_encoder(tmp_path / "wide", "model", hidden_size=64), max_seq_length=24)
    teacher = SentenceTransformer(modules=[part, Pooling(64)], device="cpu")
    callback = PruningCallback(density=0.4, teacher=teacher, hidden_weight=0.0)
    with pytest.raises(ValueError, match=r"expected sentence_embedding of the student's shape \(8, 32\)"):
        train_sentences(tmp_path / "run", model, callback)
    named = PruningCallback(density=0.4, teacher=str(tmp_path / "wide"))
    with pytest.raises(TypeError, match="load the teacher yourself and pass the model"):
        train_sentences(tmp_path / "run", sentence_transformer(tmp_path / "base"), named)


def test_a_setfit_model_is_refused_in_words(tmp_path):
    class SetFitModel:
        """As setfit's, which is no module and holds one."""

        model_body = None

    callback = PruningCallback(density=0.4)
    with pytest.raises(TypeError, match="expected a torch module to prune, got SetFitModel"):
        callback.on_init_end(None, None, None, model=SetFitModel())


def test_losses_that_use_one_pass_several_times_are_refused_with_a_teacher(tmp_path):
    def loss(model):
        return MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), matryoshka_dims=[32, 16])

    model = sentence_transformer(tmp_path / "base")
    train_sentences(tmp_path / "run", model, PruningCallback(density=0.4), loss=loss)
    assert report(model).density <= 0.4
    teacher = sentence_transformer(tmp_path / "teacher", seed=3)
    callback = PruningCallback(density=0.4, teacher=teacher)
    with pytest.raises(RuntimeError, match=r"without running its encoder; .*MatryoshkaLoss"):
        train_sentences(tmp_path / "run", sentence_transformer(tmp_path / "base"), callback, loss=loss)


# Of torch's and onnxscript's own making.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_embeddings_that_are_cut_are_served_so(tmp_path):
    model = sentence_transformer(tmp_path / "base")
    model.truncate_dim = 8
    export(model, tmp_path / "served", latency=())
    session = onnxruntime.InferenceSession(str(tmp_path / "served" / "model.onnx"))
    tokens = model.tokenizer(texts(2), padding=True, return_tensors="np")
    given = {value.name: tokens[value.name] for value in session.get_inputs()}
    found = session.run(["sentence_embedding"], given)[0]
    np.testing.assert_allclose(found, model.encode(texts(2)), atol=1e-5)


def test_modules_without_a_transformer_are_refused_in_words(tmp_path):
    tokenizer = sentence_transformer(tmp_path / "base").tokenizer
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=8)])
    with pytest.raises(TypeError, match="first module, got StaticEmbedding"):
        export(static, tmp_path / "served")


# Of torch's and onnxscript's own making.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["dense embeddings", "sparse embeddings", "reranker"])
def test_models_of_the_library_are_exported_as_they_are_used(kind, tmp_path):
    """To the embedding, or the logit of a pair, with the tokenizer beside it; also from a folder."""
    if kind == "dense embeddings":
        model, output = sentence_transformer(tmp_path / "base"), "sentence_embedding"
        inner, texts_of = model[0].model, lambda: texts(4)
    elif kind == "sparse embeddings":
        model, output = (
            SparseEncoder(save_encoder(tmp_path / "base", "masked"), device="cpu"),
            "sentence_embedding",
        )
        inner, texts_of = model[0].model, lambda: texts(4)
    else:
        folder = save_encoder(tmp_path / "base", "sequence", num_labels=1)
        model, output = CrossEncoder(folder, device="cpu", activation_fn=torch.nn.Identity()), "logits"
        inner, texts_of = model.model, lambda: list(zip(texts(4), texts(4, seed=1), strict=True))
    prune(inner, PruningConfig.create(0.4), head="masked" if kind == "sparse embeddings" else None)
    shrink(inner)
    # What its latency is compared with is the same for all kinds.
    timed = kind == "dense embeddings"
    found = export(model, tmp_path / "served", latency=((1, 8),) if timed else ())
    assert found.proof.difference <= 1e-4
    if timed:
        assert found.latency[0].speedup.keys() >= {"dense in torch", "dense in onnx"}
    session = onnxruntime.InferenceSession(str(tmp_path / "served" / "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "served")
    asked = texts_of()
    pairs_or_texts = [list(column) for column in zip(*asked, strict=True)] if kind == "reranker" else [asked]
    tokens = tokenizer(*pairs_or_texts, padding=True, return_tensors="np", truncation=True)
    taken = {value.name for value in session.get_inputs()}
    given = {name: value for name, value in tokens.items() if name in taken}
    value = session.run([output], given)[0]
    if kind == "reranker":
        np.testing.assert_allclose(value[:, 0], model.predict(asked), atol=1e-5)
    elif kind == "sparse embeddings":
        np.testing.assert_allclose(value, model.encode(asked).to_dense().numpy(), atol=1e-5)
    else:
        np.testing.assert_allclose(value, model.encode(asked), atol=1e-5)
    model.save_pretrained(str(tmp_path / "saved"))
    again = export(str(tmp_path / "saved"), tmp_path / "again", latency=())
    assert again.files["model.onnx"] == found.files["model.onnx"]

"""A run killed at any moment, and taken up again, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_mlprune import PruningCallback, last_complete_checkpoint
from hf_mlprune.levels import LEVELS
from hf_mlprune.trainer.resuming import missing_parts
from support.models import make_model
from support.processes import run_forked
from support.training import make_trainer


class KillAtFile:
    """Notes every file event under a folder, and kills the process at one of them, as a power cut would.

    Args:
        folder: whose files count.
        number: of the event to die at; -1 for none.
        log: where events are noted.
    """

    EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree", "os.rmdir")

    def __init__(self, folder: Path, number: int, log: Path) -> None:
        self.folder, self.number, self.seen = str(folder), number, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in self.EVENTS or not str(arguments[0]).startswith(self.folder):
            return
        os.write(self.log, f"{arguments[0]}\n".encode())
        if self.seen == self.number:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1


def train_and_save(folder: Path, number: int, log: Path) -> None:
    """A script that anybody would write: take up what is there, train, save."""
    torch.set_num_threads(1)
    teacher = str(folder.parent / "teacher")
    callback = PruningCallback(0.3, levels=LEVELS, block_shape=(8, 4), preset="paper", teacher=teacher)
    sys.addaudithook(KillAtFile(folder, number, log))
    trainer = make_trainer(
        folder, make_model(hidden_dropout_prob=0.1), callback, save_strategy="steps", save_steps=3
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model(str(folder / "final"))


def run(folder: Path, number: int = -1) -> int:
    """Exit code of a process of its own."""
    log = folder.parent / f"{folder.name}.log"
    return run_forked(train_and_save, folder, number, log)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    make_model(seed=7).save_pretrained(folder / "teacher")
    assert run(folder / "run") == 0
    return folder


def kill_points(log: Path) -> list[int]:
    """File events: some of each kind of file that is ours, and some of all."""
    events = log.read_text().splitlines()
    chance = random.Random(0)
    ours = [
        [number for number, path in enumerate(events) if part in path]
        for part in ("_step1_teacher", "/final", "pruning_report")
    ]
    assert all(ours)
    points = {number for numbers in ours for number in chance.sample(numbers, min(3, len(numbers)))}
    return sorted(points | set(chance.sample(range(len(events)), 7)))


def test_killed_at_any_file_it_writes(straight, tmp_path):
    expected = load_file(straight / "run" / "final" / "model.safetensors")
    shutil.copytree(straight / "teacher", tmp_path / "teacher")
    points = kill_points(straight / "run.log")
    assert len(points) > 12
    for number in points:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        assert run(folder, number) == -signal.SIGKILL
        assert run(folder) == 0, number
        found = load_file(folder / "final" / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (number, name)
        assert [
            path.name for path in folder.rglob("*") if "partial" in path.name or ".old" in path.name
        ] == []


def cut_short(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-40])


def interrupted(folder: Path):
    callback = PruningCallback(0.3)
    make_trainer(folder, make_model(), callback, save_strategy="steps", save_steps=8).train()
    shutil.rmtree(folder / "checkpoint-24")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_an_incomplete_checkpoint_is_named_with_the_last_complete_one(name, damage, tmp_path, caplog):
    interrupted(tmp_path)
    newest = tmp_path / "checkpoint-16"
    (newest / name).unlink() if damage == "missing" else cut_short(newest, name)
    assert missing_parts(newest) == [name]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(0.3))
    assert f"checkpoint-16 is incomplete ({name}); the last complete one is" in caplog.text
    with pytest.raises(Exception, match=r"(?s).*") as raised:
        trainer.train(resume_from_checkpoint=True)
    if name in ("optimizer.pt", "scheduler.pt") and damage == "missing":
        # Trainer itself says nothing of it.
        assert isinstance(raised.value, ValueError)
        assert "resume: the checkpoint is incomplete (optimizer.pt or scheduler.pt)" in str(raised.value)
        assert "checkpoint-8" in str(raised.value)


@pytest.mark.parametrize("complete", [True, False])
def test_a_checkpoint_of_another_folder_is_judged_by_itself(complete, tmp_path):
    interrupted(tmp_path / "old")
    interrupted(tmp_path / "new")
    given, other = (tmp_path / name / "checkpoint-16" for name in ("old", "new"))
    ((other if complete else given) / "optimizer.pt").unlink()
    trainer = make_trainer(tmp_path / "new", make_model(), PruningCallback(0.3))
    if complete:
        trainer.train(resume_from_checkpoint=str(given))
    else:
        with pytest.raises(ValueError, match="with a fresh optimizer"):
            trainer.train(resume_from_checkpoint=str(given))


def test_an_optimizer_without_state_resumes(tmp_path):
    for steps in (0, 8):
        trainer = make_trainer(
            tmp_path, make_model(), PruningCallback(0.3), save_strategy="steps", save_steps=8, optim="sgd"
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}") if steps else None)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw_torch"])
def test_weights_alone_are_no_checkpoint_of_any_optimizer(optimizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 8, "optim": optimizer, "save_only_model": True}
    make_trainer(tmp_path, make_model(), PruningCallback(0.3), **settings).train()
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(0.3), **settings)
    with pytest.raises(ValueError, match="resume: the checkpoint is incomplete"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_checkpoint_with_towers_in_folders_of_their_own_is_complete(tmp_path):
    make_trainer(tmp_path, make_model(), PruningCallback(0.3), save_strategy="steps", save_steps=12).train()
    shutil.rmtree(tmp_path / "checkpoint-24")
    folder = tmp_path / "checkpoint-12"
    (folder / "modules.json").write_text("[]")
    for tower in ("query_0_Transformer", "document_0_Transformer"):
        shutil.copytree(folder, tmp_path / tower, ignore=shutil.ignore_patterns("*.pt", "*.pth"))
    for tower in ("query_0_Transformer", "document_0_Transformer"):
        shutil.move(tmp_path / tower, folder / tower)
    (folder / "model.safetensors").unlink()
    assert last_complete_checkpoint(tmp_path) == str(folder)
    weights = folder / "query_0_Transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert missing_parts(folder) == ["query_0_Transformer/model.safetensors"]


def test_no_complete_checkpoint_at_all(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert last_complete_checkpoint(tmp_path) is None

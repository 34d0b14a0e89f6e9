"""Resumed == straight: a run killed in any phase ends with the same masks and weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_mlprune import PruningCallback, PruningConfig, attach
from hf_mlprune.budgets.time import PARTS
from hf_mlprune.encoders import inspect_encoder
from hf_mlprune.latency_table import table_to_json
from hf_mlprune.levels import LEVELS
from hf_mlprune.schedule import make_schedules
from hf_mlprune.trainer.resuming import check_resumed
from support.methods import SETTINGS
from support.models import make_model
from support.processes import run_forked
from support.training import make_trainer


class Kill(TrainerCallback):
    """Kills its own process, as the out-of-memory killer would, right after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


#: Two presets, each killed in every phase, and the other methods.
RUNS = {
    "default": SETTINGS["fisher"],
    "paper": {**SETTINGS["mlpruning"], "preset": "paper"},
    "targets": {"targets": [0.7, 0.3]},
    **{
        name: {**row, "method": name} for name, row in SETTINGS.items() if name not in ("fisher", "mlpruning")
    },
}


def steps_of(name: str) -> int:
    return 24 * len(RUNS[name].get("targets", [1]))


def train_and_save(folder: Path, name: str, kill: int, resume: bool) -> None:
    """Trains some steps with a checkpoint after each; `kill` of 0 is never reached."""
    torch.set_num_threads(1)
    teacher = str(folder.parent / "teacher")
    callback = PruningCallback(0.3, teacher=teacher, **RUNS[name])
    trainer = make_trainer(
        folder,
        make_model(hidden_dropout_prob=0.1),
        callback,
        callbacks=[Kill(kill)],
        max_steps=steps_of(name),
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        gradient_accumulation_steps=2,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))


def run(folder: Path, name: str, kill: int = 0, *, resume: bool = False) -> int:
    """Exit code of a process of its own."""
    return run_forked(train_and_save, folder, name, kill, resume)


@pytest.fixture(scope="module", params=list(RUNS))
def straight(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("straight")
    make_model(seed=7).save_pretrained(folder / "teacher")
    assert run(folder / "run", request.param) == 0
    return request.param, folder


def phase_steps(name: str) -> list[int]:
    """A step inside each phase, and one at each boundary; of methods that share a preset, one each."""
    first, *others = make_schedules(PruningConfig.create(0.3, **RUNS[name]), steps_of(name))
    if others:
        (last,) = others
        edge, half = last.start, (last.start + last.blocks_end) // 2
        return [first.blocks_end + 1, edge - 1, edge, edge + 1, half, last.blocks_end]
    plan = first
    edges = [plan.structured_end, plan.blocks_end]
    if name not in ("default", "paper"):
        return [edges[0] - 2, (edges[0] + edges[1]) // 2]
    return sorted({1, edges[0] - 2, edges[0], edges[0] + 2, edges[1], 23})


def test_a_run_killed_in_each_phase_ends_as_if_it_had_not_been(straight, tmp_path):
    name, reference = straight
    expected = load_file(reference / "run" / "final" / "model.safetensors")
    structure = json.loads((reference / "run" / "final" / "config.json").read_text())["structure"]
    shutil.copytree(reference / "teacher", tmp_path / "teacher")
    for index, kill in enumerate(phase_steps(name)):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        assert run(folder, name, kill) == -signal.SIGKILL, index
        assert not (folder / "final").exists()
        assert run(folder, name, resume=True) == 0
        found = load_file(folder / "final" / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (kill, key)
        assert json.loads((folder / "final" / "config.json").read_text())["structure"] == structure
        for other in (reference / "run").glob("density-*/model.safetensors"):
            same = load_file(folder / other.relative_to(reference / "run"))
            assert all(torch.equal(same[key], tensor) for key, tensor in load_file(other).items())


def interrupted(tmp_path, callback, *, stop=12, **changes):
    """A trainer that is given up after some steps, its checkpoints left behind."""
    trainer = make_trainer(
        tmp_path, make_model(), callback, save_strategy="steps", save_steps=stop, **changes
    )
    trainer.train()
    for later in tmp_path.glob("checkpoint-*"):
        if int(later.name.split("-")[1]) > stop:
            shutil.rmtree(later)
    return trainer


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"density": 0.4}, {}, "resume: expected density=0.3 as in the interrupted run, got 0.4"),
        # Its own settings differ, too, and are not what the user changed.
        ({"method": "magnitude"}, {}, "resume: expected method='fisher' as in the interrupted run, got"),
        ({"block_shape": (4, 4)}, {}, "is of a run with another block_shape"),
        ({}, {"max_steps": 40}, "resume: expected 24 steps in all as in the interrupted run, got 40"),
    ],
)
def test_resuming_another_run_is_refused(settings, changes, message, tmp_path):
    same = {"density": 0.3, "levels": LEVELS, "block_shape": (8, 4)}
    interrupted(tmp_path, PruningCallback(**same))
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(**{**same, **settings}), **changes)
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer.train(resume_from_checkpoint=True)


def test_a_table_of_times_may_lie_elsewhere_when_a_run_is_resumed(tmp_path):
    model = make_model()
    units = inspect_encoder(model).dense.units
    times = {name: 1000 * torch.arange(units[group] + 1) for group, name in PARTS.items()}
    times["rest_time"] = torch.tensor([1000])
    about = {"engine": "torch", "batch": 1, "length": 16, "threads": 1}

    def written(name: str, factor: int) -> Path:
        slowed = {part: factor * table for part, table in times.items()}
        file = tmp_path / name
        file.write_text(json.dumps(table_to_json(slowed, inspect_encoder(model), **about)))
        return file

    before, after = written("before.json", 1), written("after.json", 3)

    def callback(file):
        return PruningCallback(speedup=1.2, length=16, latency_table=file)

    straight = interrupted(tmp_path / "run", callback(before)).model.state_dict()
    before.unlink()
    trainer = make_trainer(
        tmp_path / "run", make_model(), callback(after), save_strategy="steps", save_steps=12
    )
    trainer.train(resume_from_checkpoint=True)
    resumed = trainer.model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_resuming_other_settings_config_first_is_refused(tmp_path):
    def trainer(density):
        model = make_model()
        attach(model, PruningConfig.create(density))
        return make_trainer(tmp_path, model, PruningCallback(), save_strategy="steps", save_steps=12)

    trainer(0.3).train()
    shutil.rmtree(tmp_path / "checkpoint-24")
    with pytest.raises(ValueError, match=r"resume: expected density=0.3 as in the interrupted run, got 0.8"):
        trainer(0.8).train(resume_from_checkpoint=True)


def test_a_left_over_partial_folder_is_not_in_the_way(tmp_path):
    for name in (f"_step1_teacher.partial-{os.getpid()}", "_step1_teacher.partial-12345678"):
        (tmp_path / name).mkdir()
    callback = PruningCallback(0.3, preset="paper", block_shape=(8, 4), teacher=make_model(seed=3))
    make_trainer(tmp_path, make_model(), callback).train()
    assert (tmp_path / "_step1_teacher" / "model.safetensors").exists()


def test_resuming_without_the_teacher_object_is_refused(tmp_path):
    interrupted(tmp_path, PruningCallback(density=0.3, teacher=make_model(seed=3)))
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(density=0.3))
    with pytest.raises(ValueError, match="the interrupted run had a teacher, this one has none"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_without_the_step1_teacher_is_refused(tmp_path):
    make_model(seed=3).save_pretrained(tmp_path / "teacher")
    callback = {
        "density": 0.3,
        "preset": "paper",
        "block_shape": (8, 4),
        "teacher": str(tmp_path / "teacher"),
    }
    interrupted(tmp_path / "run", PruningCallback(**callback), stop=14)
    assert (tmp_path / "run" / "_step1_teacher" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "run" / "_step1_teacher")
    trainer = make_trainer(tmp_path / "run", make_model(), PruningCallback(**callback))
    with pytest.raises(ValueError, match="resume: expected the step-1 teacher in"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_a_dense_run_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), save_strategy="steps", save_steps=12)
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-24")
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(density=0.3))
    with pytest.raises(ValueError, match="the checkpoint is not of a pruning run"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_a_model_without_masks_is_refused(tmp_path):
    interrupted(tmp_path, PruningCallback(density=0.3))
    trainer = make_trainer(tmp_path, make_model())
    trainer.add_callback(PruningCallback(density=0.3))
    with pytest.raises(ValueError, match=r"call `attach\(model, config\)` inside"):
        trainer.train(resume_from_checkpoint=True)


def test_attach_inside_model_init_resumes(tmp_path):
    settings = {"density": 0.3, "levels": LEVELS, "block_shape": (8, 4)}

    def model_init():
        model = make_model()
        attach(model, PruningConfig.create(**settings))
        return model

    interrupted(tmp_path, PruningCallback(**settings))
    trainer = make_trainer(tmp_path, None, PruningCallback(**settings), model_init=model_init)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 24


TEACHERS = {
    "a trailing slash": lambda folder: f"{folder}/teacher/",
    "a relative path": lambda folder: os.path.relpath(folder / "teacher"),
    "a Path": lambda folder: folder / "teacher",
    "a copy elsewhere": lambda folder: str(shutil.copytree(folder / "teacher", folder / "moved")),
    "an object": lambda folder: make_model(seed=3),
}


def resumed_with(tmp_path, teacher, **changes):
    trainer = make_trainer(
        tmp_path / "run",
        make_model(),
        PruningCallback(density=0.3, teacher=teacher),
        save_strategy="steps",
        save_steps=12,
        **changes,
    )
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize("given", TEACHERS)
def test_a_teacher_is_the_same_however_it_is_given(given, tmp_path):
    make_model(seed=3).save_pretrained(tmp_path / "teacher")
    first = PruningCallback(density=0.3, teacher=str(tmp_path / "teacher"))
    straight = interrupted(tmp_path / "run", first).model.state_dict()
    resumed = resumed_with(tmp_path, TEACHERS[given](tmp_path)).model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_a_teacher_object_that_was_used_before_is_the_same(tmp_path):
    teacher = make_model(seed=3)
    interrupted(tmp_path / "run", PruningCallback(density=0.3, teacher=teacher))
    resumed_with(tmp_path, teacher)


@pytest.mark.parametrize("given", ["object", "folder"])
def test_another_teacher_under_the_same_name_is_refused(given, tmp_path):
    make_model(seed=3).save_pretrained(tmp_path / "teacher")
    interrupted(tmp_path / "run", PruningCallback(density=0.3, teacher=str(tmp_path / "teacher")))
    make_model(seed=4).save_pretrained(tmp_path / "teacher")
    other = make_model(seed=4) if given == "object" else str(tmp_path / "teacher")
    with pytest.raises(
        ValueError, match=r"resume: expected the teacher of the interrupted run .* other weights"
    ):
        resumed_with(tmp_path, other)


@pytest.mark.parametrize("given", ["object", "folder", "none"])
def test_a_callback_that_trainer_makes_anew_from_its_state(given, tmp_path):
    make_model(seed=3).save_pretrained(tmp_path / "teacher")
    teacher = {"object": make_model(seed=3), "folder": str(tmp_path / "teacher"), "none": None}[given]
    straight = interrupted(tmp_path / "run", PruningCallback(density=0.3, teacher=teacher)).model.state_dict()
    changes = {"restore_callback_states_from_checkpoint": True}
    resumed = resumed_with(tmp_path, teacher, **changes).model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


@pytest.mark.parametrize("settings", [{}, {"levels": LEVELS, "block_shape": (8, 4)}])
@pytest.mark.parametrize("start", ["dense", "pruned"])
def test_resuming_from_the_final_folder_says_that_the_run_is_over(settings, start, tmp_path):
    trainer = make_trainer(tmp_path / "run", make_model(), PruningCallback(density=0.3, **settings))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    model = make_model() if start == "dense" else type(trainer.model).from_pretrained(tmp_path / "final")
    again = make_trainer(tmp_path / "run", model, PruningCallback(density=0.3, **settings))
    with pytest.raises(ValueError, match="resume: the checkpoint is a pruned model, so its run is over"):
        again.train(resume_from_checkpoint=str(tmp_path / "final"))


def test_a_run_begun_by_a_version_that_wrote_other_settings_goes_on():
    """Earlier versions wrote the settings of all methods, and not those that came later."""
    now = PruningCallback(0.3).state()
    earlier = {
        name: value for name, value in now["args"].items() if name not in ("speedup", "recovery_dropout")
    }
    stored = {**now, "args": {**earlier, "lambda_max": 20000.0, "threshold_init": 10.0}}
    stored["attributes"] = {**now["attributes"], "planned_steps": 24}
    check_resumed(stored, now, 24)
    stored["args"]["density"] = 0.4
    with pytest.raises(ValueError, match=r"expected density=0\.4 as in the interrupted run, got 0\.3"):
        check_resumed(stored, now, 24)

"""Bad input: a clear error before any step is run or any file replaced."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as prune_of_torch
from transformers import (
    AlbertConfig,
    AutoModel,
    BartConfig,
    BertConfig,
    BertForSequenceClassification,
    DebertaConfig,
    DPRConfig,
    DPRQuestionEncoder,
    GPT2Config,
    MixtralConfig,
    T5Config,
    Trainer,
)

from hf_mlprune import (
    PrunableBertConfig,
    PruningCallback,
    PruningConfig,
    advance,
    attach,
    report,
    shrink,
    start,
)
from hf_mlprune.families import FAMILIES
from hf_mlprune.levels import LEVELS
from hf_mlprune.modeling.layout import GROUPS
from hf_mlprune.shrinking import ShrinkError
from hf_mlprune.state import is_attached, pruning_state
from hf_mlprune.trainer.checks import check_arguments
from support.models import make_batch, make_config, make_model, prune
from support.training import make_trainer, training_arguments
from test_nested import make_pair


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"density: expected a value in \(0, 1\], got 0"),
        ({"density": 1.01}, r"density: expected a value in \(0, 1\], got 1.01"),
        ({"density": float("nan")}, "density: expected a finite number, got nan"),
        ({"density": "0.2"}, "density: expected a finite number, got '0.2'"),
        ({"density": 0.2, "block_shape": (0, 4)}, "block_shape: expected two whole numbers from 1 to 4096"),
        ({"density": 0.2, "block_shape": (16,)}, "block_shape: expected two whole numbers"),
        ({"density": 0.2, "block_shape": (16, 2.5)}, "block_shape: expected two whole numbers"),
        ({"density": 0.2, "levels": ("head",)}, "levels: expected any of .* got 'head'"),
        ({"density": 0.2, "levels": "heads"}, "levels: expected a list, got 'heads'"),
        ({"density": 0.2, "levels": ()}, "levels: expected at least one"),
        ({"density": 0.2, "levels": ("rows", "rows")}, "levels: expected each at most once"),
        ({"density": 0.2, "preset": "papr"}, r"preset: expected one of \['default', 'paper'\], got 'papr'"),
        (
            {"density": 0.2, "structured_density": 0.5},
            "structured_density: has no effect here, it needs blocks after",
        ),
        (
            {"density": 0.2, "block_shape": (8, 8)},
            "block_shape: has no effect here, it needs the level 'blocks'",
        ),
        ({"density": 0.2, "lambda_max": 3.0}, "lambda_max: has no effect here, it needs the method"),
        (
            {"density": 0.2, "preset": "paper", "importance_decay": 0.5},
            "importance_decay: has no effect here",
        ),
        ({"density": 0.2, "levels": ("heads",), "row_sites": ("fc2",)}, "row_sites: has no effect here"),
        (
            {"density": 0.2, "desnity": 1},
            r"unknown pruning setting 'desnity'; did you mean 'density'\? known",
        ),
        ({"density": 0.2, "qqq": 1}, "unknown pruning setting 'qqq'; known are"),
        ({"density": 0.2, "exclude": (-1,)}, "exclude: expected layer indices from 0 up"),
        ({"density": 0.2, "structured_density": 0.1}, "structured_density: expected at least density=0.2"),
        ({"density": 0.2, "structured_fraction": 0.9}, "expected less than 1, so that steps are left"),
        (
            {"density": 0.2, "method": "mlpruning", "temperature": 0},
            "temperature: expected more than 0, got 0",
        ),
        ({"density": 0.2, "minimum_units": -1}, "minimum_units: expected a whole number from 0 up"),
        ({"density": 0.2, "stall_steps": True}, "stall_steps: expected a whole number from 1 up"),
        ({"density": 0.2, "importance_decay": 1.0}, "importance_decay: expected less than 1"),
        ({"density": 0.2, "task_weight": -0.1}, r"task_weight: expected a value in \[0, 1\]"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(**settings)


@pytest.mark.parametrize("levels", [("attention", "ffn"), ("heads", "ffn"), ("attention", "rows")])
def test_modules_that_are_always_kept(levels):
    model = make_model()
    with pytest.raises(
        ValueError, match=r"minimum_units: expected 0 with the level '(attention|ffn)', whose one"
    ):
        attach(model, PruningConfig.create(0.5, levels=levels))
    assert not is_attached(model)


@pytest.mark.parametrize("levels", [("heads", "blocks"), ("heads",), ("attention",)])
def test_levels_of_which_nothing_is_left(levels):
    model = make_model()
    attach(model, PruningConfig.create(0.2, levels=("attention",), minimum_units=0, exclude=()))
    for gate in pruning_state(model).all_gates():
        gate.set_keep(torch.zeros(1, dtype=torch.bool))
    pruning_state(model).landed.fill_(2)
    shrink(model)
    blocks = {"block_shape": (8, 8)} if "blocks" in levels else {}
    with pytest.raises(ValueError, match="pruned before and has no heads, rows or modules left of"):
        attach(model, PruningConfig.create(0.1, levels=levels, minimum_units=0, **blocks))
    assert not is_attached(model)


def test_numbers_of_numpy_are_numbers():
    config = PruningConfig.create(np.float32(0.5), minimum_units=np.int64(2), exclude=list(np.arange(1)))
    assert (config.minimum_units, config.exclude, type(config.density)) == (2, (0,), float)
    with pytest.raises(ValueError, match="minimum_units: expected a whole number from 0 up, got -1"):
        PruningConfig.create(0.5, minimum_units=np.int64(-1))


def test_a_stock_class_around_an_encoder_that_no_class_could_load():
    model = DPRQuestionEncoder(DPRConfig(**make_config().to_dict()))
    with pytest.raises(TypeError, match="got DPRQuestionEncoder, whose pruned checkpoint could not"):
        attach(model, PruningConfig.create(0.5))


@pytest.mark.parametrize("settings", [{"speedup": 2}, {"density": 0.2, "levels": ("blocks",)}])
def test_a_density_between_needs_both_steps(settings):
    with pytest.raises(ValueError, match="structured_density: has no effect here, it needs blocks"):
        PruningConfig.create(**settings, structured_density=0.5)


def test_a_preset_that_is_no_name():
    with pytest.raises(ValueError, match=r"preset: expected one of .* got \['paper'\]"):
        PruningConfig.create(0.2, preset=["paper"])


def test_settings_without_density():
    with pytest.raises(ValueError, match=r"\['densty'\] are given; did you mean density=\?"):
        PruningCallback(densty=0.3)
    with pytest.raises(ValueError, match=r"density is missing, but \['preset'\] are given"):
        PruningCallback(preset="paper")


def test_no_density_anywhere(tmp_path):
    with pytest.raises(ValueError, match="density is missing"):
        make_trainer(tmp_path, make_model(), PruningCallback())


@pytest.mark.parametrize("activation", ["sigmoid", "gelu_10"])
def test_activation_that_does_not_map_zero_to_zero(activation):
    model = make_model(hidden_act=activation)
    if activation == "gelu_10":
        attach(model, PruningConfig.create(0.5))
        return
    with pytest.raises(ValueError, match=r"expected an activation with act\(0\) = 0"):
        attach(model, PruningConfig.create(0.5))


UNKNOWN = [
    (AlbertConfig, "got AlbertModel with none; albert is not supported: its layers are one and the same"),
    (T5Config, "got T5Model with none; t5 is not supported: a table in its first layer holds"),
    (BartConfig, "got BartModel with none; bart is not supported: its encoder is no model"),
    (
        DebertaConfig,
        "got DebertaModel with none; deberta is not supported: .*deberta-v2 and v3 are supported",
    ),
    (GPT2Config, "got GPT2Model with none$"),
    (MixtralConfig, "got MixtralModel with none$"),
]


@pytest.mark.parametrize(("kind", "message"), UNKNOWN)
def test_families_that_are_not_known_are_refused_by_the_names_of_those_that_are(kind, message):
    with torch.device("meta"):
        model = AutoModel.from_config(kind())
    known = ", ".join(family.name for family in FAMILIES)
    with pytest.raises(TypeError, match=rf"of a known family \({known}\), {message}"):
        attach(model, PruningConfig.create(0.5))


def test_decoder():
    model = BertForSequenceClassification(make_config(is_decoder=True))
    with pytest.raises(ValueError, match="expected an encoder"):
        attach(model, PruningConfig.create(0.5))


def test_old_pruned_heads():
    model = make_model()
    model.config.pruned_heads = {0: [1]}
    with pytest.raises(ValueError, match="pruned_heads is set, which transformers 5 ignores"):
        attach(model, PruningConfig.create(0.5))


def test_quantized_model():
    model = make_model()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(TypeError, match="expected a plain model, got a quantized one"):
        attach(model, PruningConfig.create(0.5))


def test_model_with_foreign_linears():
    model = make_model()

    class LoraLinear(nn.Linear):
        pass

    model.bert.encoder.layer[0].intermediate.dense.__class__ = LoraLinear
    with pytest.raises(TypeError, match=r"layer 0, fc1: expected nn.Linear, got LoraLinear"):
        attach(model, PruningConfig.create(0.5))
    # Nothing was changed.
    assert type(model.bert.encoder.layer[0].attention.self.query) is nn.Linear


REPARAMETRIZED = {
    "pruning of torch": lambda linear: prune_of_torch.l1_unstructured(linear, "weight", 0.5),
    "old weight norm": lambda linear: torch.nn.utils.weight_norm(linear),
    "weight norm": lambda linear: torch.nn.utils.parametrizations.weight_norm(linear),
    "spectral norm": lambda linear: torch.nn.utils.parametrizations.spectral_norm(linear),
    "orthogonal": lambda linear: torch.nn.utils.parametrizations.orthogonal(linear),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("path", ["attention.self.key", "output.dense"])
@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_reparametrized_linears(kind, path, tmp_path):
    model = make_model()
    REPARAMETRIZED[kind](model.bert.encoder.layer[1].get_submodule(path))
    names = sorted(name for name, _ in model.named_parameters())
    with pytest.raises(TypeError, match=r"layer 1, .* its weight is reparametrized; .*prune\.remove"):
        make_trainer(tmp_path, model, PruningCallback(density=0.5))
    assert sorted(name for name, _ in model.named_parameters()) == names


def test_peft_model():
    model = make_model()
    module = type("LoraModel", (nn.Module,), {"__module__": "peft.tuners.lora"})()
    model.add_module("adapter", module)
    with pytest.raises(TypeError, match="got one with peft modules"):
        attach(model, PruningConfig.create(0.5))


@pytest.mark.parametrize("exclude", [(2,), (0, 1)])
def test_excluded_layers_that_are_not_there_or_all(exclude):
    with pytest.raises(ValueError, match="exclude: expected some of the layers 0 to 1"):
        attach(make_model(), PruningConfig.create(0.5, exclude=exclude))


def test_attached_twice():
    model = make_model()
    attach(model, PruningConfig.create(0.5))
    with pytest.raises(ValueError, match="has masks already"):
        attach(model, PruningConfig.create(0.5))


def test_density_that_cannot_be_reached():
    model = make_model()
    attach(model, PruningConfig.create(0.2, levels=("rows",)))
    with pytest.raises(ValueError, match=r"density 0.2 cannot be reached: what is always kept"):
        start(model, 100)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "snip"},
        {"minimum_units": 0},
        {"minimum_units": 0, "levels": ("attention", "ffn")},
    ],
)
def test_a_density_that_would_leave_nothing_of_the_encoder(settings):
    model = make_model(num_hidden_layers=1)
    attach(model, PruningConfig.create(1e-5, **settings))
    with pytest.raises(ValueError, match=r"density 1e-05 cannot be reached: what is always kept .* one unit"):
        start(model, 100)


@pytest.mark.parametrize(
    "settings", [{}, {"row_sites": GROUPS[1:]}, {"preset": "paper", "attention_weight": 0.0}]
)
def test_a_pruned_model_is_only_trained_at_the_density_that_it_has(settings, tmp_path):
    """It is a little below what was asked for, by less than a unit."""
    callback = PruningCallback(density=0.3, levels=("heads", "rows"), **settings)
    make_trainer(tmp_path, model := make_model(), callback).train()
    before, weights = report(model), model.classifier.weight.clone()
    assert before.density < 0.3
    teacher = make_model(seed=3)
    callback = PruningCallback(density=0.3, levels=("heads", "rows"), teacher=teacher, **settings)
    make_trainer(tmp_path, model, callback).train()
    assert report(model).layers == before.layers
    assert not torch.equal(model.classifier.weight, weights)


def test_density_above_what_a_pruned_model_has():
    model = make_model()
    prune(model, PruningConfig.create(0.5, levels=("rows", "heads")))
    shrink(model)
    attach(model, PruningConfig.create(0.9))
    with pytest.raises(ValueError, match="expected at most the model's own"):
        start(model, 20)


def test_a_run_too_short_for_phases(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(density=0.5), max_steps=19)
    with pytest.raises(ValueError, match="expected at least 20 optimizer steps to prune in, got 19"):
        trainer.train()


def test_calls_out_of_order():
    model = make_model()
    with pytest.raises(ValueError, match="has no masks: call `attach"):
        start(model, 20)
    attach(model, PruningConfig.create(0.5))
    with pytest.raises(ValueError, match=r"call `start\(model, max_steps\)`"):
        advance(model, 1)


def test_loss_that_does_not_reach_the_masks():
    from hf_mlprune import collect

    model = make_model()
    attach(model, PruningConfig.create(0.5))
    start(model, 20)
    with pytest.raises(RuntimeError, match="no gradient reached the masks"):
        collect(model)


def test_a_loop_that_forgets_to_collect():
    model = make_model()
    attach(model, PruningConfig.create(0.5))
    start(model, 20)
    with pytest.raises(RuntimeError, match=r"learned nothing in this step; call `collect\(model\)`"):
        advance(model, 1)


@pytest.mark.parametrize("step", [0, 2, 20, -3, 0.5])
def test_steps_that_are_not_the_next(step):
    model = make_model()
    attach(model, PruningConfig.create(0.5))
    start(model, 20)
    with pytest.raises(ValueError, match=rf"advance: expected step 1, the next one, got {step}"):
        advance(model, step)


@pytest.mark.parametrize("steps", [(25.5, 0), (20, -1), (20, 21), ("20", 0)])
def test_numbers_of_steps_that_are_none(steps):
    model = make_model()
    attach(model, PruningConfig.create(0.5))
    with pytest.raises(ValueError, match="start: expected whole numbers with 0 <= step <= max_steps"):
        start(model, *steps)


def test_a_diverged_loss():
    from hf_mlprune import collect

    model = make_model().train()
    attach(model, PruningConfig.create(0.5))
    start(model, 20)
    (model(**make_batch()).loss * float("inf")).backward()
    with pytest.raises(FloatingPointError, match="is not finite"):
        collect(model)


def test_callback_given_twice(tmp_path):
    with pytest.raises(ValueError, match="expected one PruningCallback, got several"):
        make_trainer(
            tmp_path, make_model(), PruningCallback(density=0.5), callbacks=[PruningCallback(density=0.5)]
        )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fp16", True, "use bf16=True"),
        ("deepspeed", "config.json", "DeepSpeed and FSDP"),
        ("fsdp", ["full_shard"], "DeepSpeed and FSDP"),
        ("_n_gpu", 2, "expected one GPU per process, got 2"),
    ],
)
def test_training_arguments_that_are_not_supported(name, value, message, tmp_path):
    args = training_arguments(tmp_path)
    args._setup_devices  # noqa: B018  (a cached property that would overwrite the number of GPUs)
    object.__setattr__(args, name, value)
    with pytest.raises(ValueError, match=message):
        check_arguments(args)


def test_fp16_of_the_launcher_is_refused_at_start(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(
        ValueError, match=r"mixed_precision fp16 \(of accelerate\): .* use bf16=True, or neither"
    ):
        make_trainer(tmp_path, make_model(), PruningCallback(density=0.5))


@pytest.mark.parametrize("switch", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_training_is_refused_at_start(switch, tmp_path, monkeypatch):
    """As `accelerate launch` asks for it; on a CPU accelerate itself goes no further with either."""
    args = training_arguments(tmp_path)
    monkeypatch.setenv(switch, "true")
    with pytest.raises(ValueError, match="DeepSpeed and FSDP shard the weights that masks multiply"):
        check_arguments(args)


def test_optimizer_of_another_model(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(make_model().parameters())
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path),
        train_dataset=[{k: v[0] for k, v in make_batch().items()}],
        callbacks=[PruningCallback(density=0.5)],
        optimizers=(optimizer, None),
    )
    with pytest.raises(ValueError, match="expected every trainable encoder weight in the optimizer"):
        trainer.train()


def test_an_optimizer_made_before_attaching_works(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = make_trainer(tmp_path, model, PruningCallback(density=0.5))
    trainer.optimizer = optimizer
    trainer.train()


def test_a_second_train_after_shrinking_is_refused_in_words(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), PruningCallback(density=0.5))
    trainer.train()
    with pytest.raises(ValueError, match="make a new Trainer"):
        trainer.train()


def test_a_callback_added_later_or_model_init_works_without_resume(tmp_path):
    from hf_mlprune import report

    trainer = make_trainer(tmp_path, make_model())
    trainer.add_callback(PruningCallback(density=0.5, levels=LEVELS, block_shape=(4, 4)))
    trainer.train()
    assert report(trainer.model).density <= 0.5


def test_a_callback_added_later_knows_the_encoders_of_the_masks(tmp_path):
    model = make_pair()
    attach(model, PruningConfig.create(0.5, encoder=["first", "second"]))
    trainer = make_trainer(tmp_path, model)
    trainer.add_callback(PruningCallback())
    trainer.train()
    assert not is_attached(model)


def test_several_targets_are_refused_in_a_search(tmp_path):
    trainer = make_trainer(
        tmp_path, None, PruningCallback(targets=[0.6, 0.3]), model_init=lambda trial=None: make_model()
    )
    with pytest.raises(ValueError, match="targets: expected one target in hyperparameter_search"):
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
            backend="optuna",
            n_trials=1,
        )


def test_a_run_stopped_before_it_landed_says_so(tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 5

    trainer = make_trainer(tmp_path, make_model(), PruningCallback(density=0.5), callbacks=[Stop()])
    with pytest.raises(RuntimeError, match="training ended at step 5 of 24, before pruning did"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 4}, "teacher: expected num_labels=3 as in the student, got 4"),
        ({"vocab_size": 65}, "teacher: expected vocab_size=64 as in the student, got 65"),
        ({"hidden_size": 64}, "teach by its logits only: set hidden_weight=0"),
        ({"num_hidden_layers": 3}, "teach by its logits only: set hidden_weight=0"),
    ],
)
def test_teachers_that_cannot_teach(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(
            tmp_path, make_model(), PruningCallback(density=0.5, teacher=make_model(seed=1, **changes))
        )


def test_a_teacher_that_was_not_fine_tuned(tmp_path):
    make_model("model").save_pretrained(tmp_path / "encoder")
    callback = PruningCallback(density=0.5, teacher=str(tmp_path / "encoder"))
    with pytest.raises(ValueError, match=r"expected a fine-tuned .* lacks 2 weights, e.g. 'classifier.bias'"):
        make_trainer(tmp_path, make_model(), callback)


def test_a_teacher_of_another_task(tmp_path):
    callback = PruningCallback(density=0.5, teacher=make_model("token", seed=1))
    with pytest.raises(ValueError, match="expected a BertForSequenceClassification as the student is"):
        make_trainer(tmp_path, make_model(), callback)


def test_teacher_with_other_label_names(tmp_path):
    student, teacher = make_model(), make_model(seed=1)
    student.config.id2label = {0: "a", 1: "b", 2: "c"}
    teacher.config.id2label = {0: "b", 1: "a", 2: "c"}
    with pytest.raises(ValueError, match="teacher: expected the student's labels"):
        make_trainer(tmp_path, student, PruningCallback(density=0.5, teacher=teacher))


def test_a_wider_teacher_teaches_by_its_logits(tmp_path):
    teacher = make_model(seed=1, hidden_size=64, num_hidden_layers=3)
    trainer = make_trainer(
        tmp_path, make_model(), PruningCallback(density=0.5, teacher=teacher, hidden_weight=0)
    )
    trainer.train()
    assert any("distillation_loss" in row for row in trainer.state.log_history)


def test_a_step1_teacher_of_a_users_own_class(tmp_path):
    class Mine(BertForSequenceClassification):
        pass

    model = make_model()
    model.__class__ = Mine
    callback = PruningCallback(density=0.3, preset="paper", teacher=make_model(seed=1))
    message = r"expected a class of transformers, got Mine.* set block_teacher='teacher'"
    with pytest.raises(TypeError, match=message):
        make_trainer(tmp_path, model, callback)


def test_the_student_as_its_own_teacher(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="another model than the one that is pruned"):
        make_trainer(tmp_path, model, PruningCallback(density=0.5, teacher=model))


def test_a_shrink_that_would_change_outputs_is_undone(monkeypatch):
    model = make_model()
    prune(model, PruningConfig.create(0.5))
    before = model.eval()(**make_batch()).logits.detach()
    import hf_mlprune.resizing as resizing

    real = resizing._fill

    def wrong(new, *args):
        real(new, *args)
        new.bias.data.add_(1.0)

    monkeypatch.setattr(resizing, "_fill", wrong)
    with pytest.raises(ShrinkError, match=r"differ from masked ones by .* nothing was removed"):
        shrink(model)
    torch.testing.assert_close(model.eval()(**make_batch()).logits, before)
    monkeypatch.undo()
    shrink(model)
    assert isinstance(model.config, BertConfig)


def test_a_preset_that_is_not_applied():
    with pytest.raises(ValueError, match=r"use PruningConfig.create\(density, preset='paper'\)"):
        PruningConfig(0.2, preset="paper")


def test_a_misspelt_setting_config_first(tmp_path):
    make_config().save_pretrained(tmp_path)
    for make in (PrunableBertConfig, functools.partial(PrunableBertConfig.from_pretrained, tmp_path)):
        with pytest.raises(ValueError, match="unknown setting 'levles': did you mean 'levels'"):
            make(density=0.3, levles=("heads",))


def test_config_first_from_a_folder_stored_as_blocks(pruned_folder):
    with pytest.raises(ValueError, match=r"got one stored as blocks; load it with its Auto class"):
        PrunableBertConfig.from_pretrained(pruned_folder, density=0.2)


@pytest.mark.parametrize("teacher", [123, {}])
def test_teachers_that_are_none(teacher):
    with pytest.raises(TypeError, match="teacher: expected a torch module, a folder or a hub name"):
        PruningCallback(density=0.5, teacher=teacher)


def test_a_refused_teacher_leaves_the_model_as_it_was(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="teacher: expected num_labels"):
        make_trainer(tmp_path, model, PruningCallback(density=0.5, teacher=make_model(num_labels=5)))
    assert type(model) is BertForSequenceClassification
    make_trainer(tmp_path, model, PruningCallback(density=0.4)).train()


@pytest.mark.parametrize(
    ("settings", "differing"),
    [
        ({"density": 0.4}, "density=0.5"),
        ({"density": 0.5, "method": "magnitude"}, "method='fisher', importance_"),
    ],
)
def test_masks_of_other_settings(settings, differing, tmp_path):
    model = make_model()
    make_trainer(tmp_path, model, PruningCallback(density=0.5))
    with pytest.raises(ValueError, match=rf"of other settings than the callback \({differing}"):
        make_trainer(tmp_path, model, PruningCallback(**settings))

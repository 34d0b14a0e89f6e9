"""Small layers are linears like any other: adapters, quantizers and meta devices take them as they come."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_mlprune import (
    PrunableBertConfig,
    PrunableBertForSequenceClassification,
    PruningConfig,
    attach,
    report,
    shrink,
)
from hf_mlprune.levels import LEVELS
from hf_mlprune.modeling.bert import PrunedBertForSequenceClassification
from hf_mlprune.modeling.block_sparse import BlockSparseLinear
from hf_mlprune.modeling.layout import GROUPS
from hf_mlprune.modeling.pruned import FINGERPRINT
from hf_mlprune.modeling.standins import RowScatter, scatter_output
from hf_mlprune.state import pruning_state
from support.models import assert_same_outputs, clone, make_batch, make_model, outputs, prune, shrink_without

ROWS = ("attention_output", "fc1", "fc2")


def pruned(*empty, levels=("heads", "rows"), **changes):
    """A pruned model, its masked form, and groups of layer 1 that are emptied, `blocks_query` among them."""
    model = make_model(**changes)
    shape = {"block_shape": (8, 4)} if "blocks" in levels else {}
    prune(model, PruningConfig.create(0.5, levels=levels, row_sites=ROWS, minimum_units=0, **shape))
    return shrink_without(model, empty)


EMPTY = [
    *((site,) for site in GROUPS),
    GROUPS,
    ("heads", "fc1"),
    ("heads", "fc2"),
    ("fc1", "attention_output"),
]


def assert_honest(model) -> None:
    """No matrix or activation without elements, and linears give as many features as they say."""
    for name, parameter in model.named_parameters():
        assert parameter.numel(), name

    def check(module, inputs, output):
        for tensor in (*inputs, output):
            assert not isinstance(tensor, torch.Tensor) or tensor.numel(), module
        if isinstance(module, nn.Linear):
            assert inputs[0].shape[-1] == module.in_features
            assert output.shape[-1] == module.out_features == len(module.bias)

    hooks = [module.register_forward_hook(check) for module in model.modules()]
    outputs(model, make_batch())
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("empty", [(), *EMPTY])
def test_linears_are_what_they_say_and_none_is_empty(empty, tmp_path):
    masked, model = pruned(*empty)
    assert_same_outputs(masked, model, make_batch())
    assert_honest(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_outputs(model, loaded, make_batch(), 0.0)
    assert_honest(loaded)
    assert report(loaded).density == pytest.approx(pruning_state(masked).density())
    dense = sum(parameter.numel() for parameter in make_model().parameters())
    assert report(model).parameters == (sum(p.numel() for p in loaded.parameters()), dense)
    loaded.train()(**make_batch()).loss.backward()


@pytest.mark.parametrize(
    "empty", [("blocks_query",), ("blocks_attention_output", "blocks_fc1"), ("blocks_fc2",)]
)
def test_layers_without_blocks_hold_a_bias_only_and_can_grow_again(empty, tmp_path):
    masked, model = pruned(*empty, levels=LEVELS)
    assert any(isinstance(m, BlockSparseLinear) and not len(m.weight) for m in model.modules())
    assert_same_outputs(masked, model, make_batch())
    assert_honest(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_outputs(model, loaded, make_batch(), 0.0)
    attach(loaded, PruningConfig.create(0.4, levels=LEVELS, row_sites=ROWS, block_shape=(4, 4)))
    assert_same_outputs(model, loaded, make_batch())


@pytest.mark.parametrize("empty", EMPTY)
def test_a_model_with_emptied_layers_can_be_pruned_further(empty, tmp_path):
    _, model = pruned(*empty)
    before = clone(model)
    attach(model, PruningConfig.create(0.3, levels=("heads", "rows"), row_sites=ROWS, minimum_units=0))
    assert_same_outputs(before, model, make_batch())
    for gate in pruning_state(model).all_gates():
        gate.set_keep(torch.arange(gate.units) % 3 > 0)
    masked = clone(model)
    shrink(model)
    assert_same_outputs(masked, model, make_batch())
    assert_honest(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_outputs(model, loaded, make_batch(), 0.0)


def test_layers_left_out_of_a_second_run_stay_as_they_are():
    _, model = pruned("heads", "fc2")
    before = copy.deepcopy(model.bert.encoder.layer[1].state_dict())
    attach(model, PruningConfig.create(0.3, exclude=(1,), row_sites=ROWS))
    for gate in pruning_state(model).all_gates():
        gate.set_keep(torch.arange(gate.units) % 2 > 0)
    masked = clone(model)
    shrink(model)
    assert_same_outputs(masked, model, make_batch())
    after = model.bert.encoder.layer[1].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_dropout_behind_a_row_scatter_still_drops():
    _, model = pruned(hidden_dropout_prob=0.5)
    scatters = [module for module in model.modules() if isinstance(module, RowScatter)]
    assert {scatter.p for scatter in scatters} == {0.5}
    scatter, x = scatters[0].train(), torch.ones(50, 8, len(scatters[0].rows))
    places = list(scatter.rows)
    y = scatter(x)
    assert {0.0, 2.0} == set(y[..., places].flatten().tolist())
    assert float(y.sum()) == float(y[..., places].sum())
    scatter.p = 0.0
    assert torch.equal(scatter(x)[..., places], x)
    assert float(scatter.eval()(x).sum()) == x.numel()


UNPICKLED = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
holder = model.vit.layers[0].mlp
for _ in range(50):
    holder.register_forward_hook(lambda *given: None)
torch.save(model(pixel_values=torch.ones(1, 3, 16, 16)).logits.detach(), sys.argv[2])
"""


def test_rows_are_scattered_in_a_process_that_has_hooks_of_its_own(tmp_path):
    model = make_model(family="vit")
    prune(model, PruningConfig.create(0.9, levels=("rows",), row_sites=("fc2",)))
    shrink(model.eval())
    assert list(model.vit.layers[0].mlp._forward_hooks.values()) == [scatter_output]
    torch.save(model, tmp_path / "model.pt")
    subprocess.run(
        [sys.executable, "-c", UNPICKLED, tmp_path / "model.pt", tmp_path / "out.pt"], check=True, timeout=120
    )
    expected = outputs(model, {"pixel_values": torch.ones(1, 3, 16, 16)})["logits"]
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)


@pytest.mark.parametrize("empty", [(), *EMPTY])
def test_dynamic_quantization_takes_them(empty):
    _, model = pruned(*empty)
    expected = outputs(model, make_batch())["logits"]
    with warnings.catch_warnings():
        # torch says that torchao has its successor, and that its dtypes will go.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        small = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
        found = outputs(small, make_batch())["logits"]
    assert float((found - expected).abs().max()) < 0.1 * max(1.0, float(expected.abs().max()))


# peft asks transformers by a name that is on its way out.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("targets", [["dense"], ["query", "value"]])
def test_adapters_train_on_them(targets):
    _, model = pruned()
    assert any(isinstance(module, RowScatter) for module in model.modules())
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets)
    adapted = peft.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    before = adapted(**make_batch()).loss
    before.backward()
    optimizer.step()
    assert not torch.equal(adapted(**make_batch()).loss, before)
    assert_honest(adapted.merge_and_unload())


def test_indices_that_the_structure_gives_are_not_stored(tmp_path):
    _, model = pruned(levels=LEVELS)
    assert any(name.endswith(".row_indices") for name, _ in model.named_buffers())
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.endswith(".row_indices")]


@pytest.mark.parametrize("levels", [("heads", "rows"), LEVELS])
def test_folders_that_store_them_load_as_before(levels, tmp_path):
    _, model = pruned(levels=levels)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for index, layer in enumerate(model.base_model.encoder.layer):
        for name, part in (("attention.output", layer.attention.output), ("output", layer.output)):
            for key, places in part.named_buffers():
                if key.endswith(".row_indices"):
                    tensors[f"bert.encoder.layer.{index}.{name}.dense.row_indices"] = places
    assert any(key.endswith(".row_indices") for key in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert_same_outputs(model, loaded, make_batch(), 0.0)
    if "blocks" not in levels:
        config = PrunableBertConfig.from_pretrained(tmp_path, density=0.3, levels=("heads", "rows"))
        kind = PrunableBertForSequenceClassification
        loaded, info = kind.from_pretrained(tmp_path, config=config, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert_same_outputs(model, loaded, make_batch())


def buffers(model) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers())


@pytest.mark.parametrize("levels", [("heads", "rows"), LEVELS])
def test_a_model_made_of_config_and_state_dict_is_whole(levels):
    _, model = pruned(levels=levels)
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_outputs(model, loaded, make_batch(), 0.0)
    assert buffers(loaded).keys() == buffers(model).keys()
    assert all(torch.equal(buffer, buffers(loaded)[name]) for name, buffer in buffers(model).items())
    tensors = {key: value for key, value in model.state_dict().items() if not key.endswith(FINGERPRINT)}
    with pytest.raises(ValueError, match=rf"1 are missing or of another size, e.g. 'bert.{FINGERPRINT}'"):
        type(model).from_pretrained(None, config=model.config, state_dict=tensors)


class Outer(PrunedBertForSequenceClassification):
    """What a loader does with a model whose layers no checkpoint brings."""

    @classmethod
    def from_nothing(cls, config):
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.fill_(7)
        model.initialize_weights()
        return model


@pytest.mark.parametrize("levels", [("heads", "rows"), LEVELS])
@pytest.mark.parametrize("empty", [(), ("heads", "fc1"), ("fc2",)])
def test_a_model_built_on_meta_gets_all_it_needs(levels, empty):
    _, model = pruned(*empty, levels=levels)
    found = Outer.from_nothing(model.config)
    for name, buffer in buffers(model).items():
        if name.endswith((".row_indices", FINGERPRINT)):
            assert torch.equal(buffers(found)[name], buffer), name
    for module in found.modules():
        if isinstance(module, BlockSparseLinear):
            module.matrix().validate()
    largest = [float(parameter.detach().abs().max()) for parameter in found.parameters()]
    assert max(largest) == 1.0
    assert outputs(found, make_batch())["logits"].isfinite().all()


def test_a_pruned_model_loaded_to_be_pruned_further_knows_its_rows(tmp_path):
    _, model = pruned("heads", "fc2")
    model.save_pretrained(tmp_path)
    config = PrunableBertConfig.from_pretrained(tmp_path, density=0.3, levels=("heads", "rows"))
    loaded = PrunableBertForSequenceClassification.from_pretrained(tmp_path, config=config)
    assert_same_outputs(model, loaded, make_batch())
    assert BertForSequenceClassification in type(loaded).__mro__

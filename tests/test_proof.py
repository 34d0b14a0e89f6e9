"""The comparison of masked and shrunk model, whatever the script has switched on."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_mlprune import PruningCallback, PruningConfig, shrink
from hf_mlprune.calls import Call, map_tensors, named_tensors
from hf_mlprune.levels import LEVELS
from hf_mlprune.proof import compare, outputs
from hf_mlprune.shrinking import ShrinkError
from support.models import make_batch, make_model, prune
from support.training import make_trainer

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.linear)


class RoundedProducts(TorchDispatchMode):
    """Float32 products rounded to 10 bits of mantissa, as TF32 or an autocast inside do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            return self.rounded(function(*(self.rounded(arg) for arg in args), **(kwargs or {})))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def rounded(value):
        if not isinstance(value, torch.Tensor) or value.dtype is not torch.float32 or value.dim() < 2:
            return value
        return (value.contiguous().view(torch.int32) & -8192).view(torch.float32)


def masked(**changes):
    model = make_model(**changes)
    prune(model, PruningConfig.create(0.4))
    return model


def test_rounded_float32_products_are_decided_in_float64():
    with RoundedProducts():
        result = shrink(masked(hidden_size=256, intermediate_size=1024), [make_batch(rows=256)])
    assert result.dtype == "float64"
    assert result.max_difference <= result.tolerance < 1e-11


def test_float32_is_enough_where_products_are_exact():
    assert shrink(masked(), [make_batch()]).dtype == "float32"


def test_a_wrong_model_is_found_in_rounded_products(monkeypatch):
    import hf_mlprune.resizing as resizing

    real = resizing._fill

    def wrong(new, *args):
        real(new, *args)
        new.get_parameter("bias").data[0] += 0.1

    monkeypatch.setattr(resizing, "_fill", wrong)
    with RoundedProducts(), pytest.raises(ShrinkError, match="nothing was removed"):
        shrink(masked(), [make_batch()])


SWITCHES = {
    "all": torch.backends,
    "cuda": torch.backends.cuda.matmul,
    "cpu": torch.backends.mkldnn.matmul,
    "convolutions": torch.backends.cudnn.conv,
}


@pytest.fixture
def switches():
    before = {name: each.fp32_precision for name, each in SWITCHES.items()}
    yield SWITCHES
    for name, each in SWITCHES.items():
        each.fp32_precision = before[name]


@pytest.mark.parametrize("value", ["tf32", "ieee", "none"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_precision_switches_are_ieee_in_the_proof_and_put_back(switch, value, switches):
    switches[switch].fp32_precision = value
    before = {name: each.fp32_precision for name, each in SWITCHES.items()}
    seen = []
    model = masked()
    model.classifier.register_forward_hook(
        lambda *_: seen.append({name: each.fp32_precision for name, each in SWITCHES.items()})
    )
    shrink(model, [make_batch()])
    assert seen
    assert all(set(values.values()) == {"ieee"} for values in seen)
    assert {name: each.fp32_precision for name, each in SWITCHES.items()} == before


def test_the_older_switch_is_put_back(switches):
    torch.set_float32_matmul_precision("high")
    shrink(masked(), [make_batch()])
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


def test_numbers_drawn_in_evaluation_are_drawn_alike_in_both_models_and_not_from_the_script(tmp_path):
    model = masked()

    def noise(module, args, out):
        return out + torch.rand_like(out) + random.random() + np.random.rand()

    model.classifier.register_forward_hook(noise)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    shrink(model, [make_batch()])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))


def test_the_loss_of_a_batch_without_labels_is_no_difference():
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    shrink(masked(), [batch])


def test_infinite_outputs_that_agree_are_equal():
    a = [("x", torch.tensor([1.0, -torch.inf, torch.inf]))]
    assert compare(a, a, torch.float32).equal
    b = [("x", torch.tensor([1.0, torch.inf, torch.inf]))]
    assert not compare(a, b, torch.float32).equal


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ([("x", torch.zeros(2, 2))], "expected the outputs"),
        ([("y", torch.zeros(2))], "expected the outputs"),
        ([], "expected the outputs"),
    ],
)
def test_outputs_of_other_names_or_shapes_are_not_compared(after, message):
    with pytest.raises(ValueError, match=message):
        compare([("x", torch.zeros(2))], after, torch.float32)


def test_half_precision_inputs_are_cast_with_the_model():
    model = make_model().bfloat16()
    embeds = torch.randn(2, 6, 32, dtype=torch.bfloat16)
    found = outputs(model, [Call((), {"inputs_embeds": embeds})], torch.float64)
    assert {tensor.dtype for _, tensor in found} == {torch.float64}
    assert next(model.parameters()).dtype is torch.bfloat16


def test_bf16_runs_with_blocks_are_proved(tmp_path):
    model = make_model()
    make_trainer(
        tmp_path,
        model,
        PruningCallback(density=0.3, levels=LEVELS, block_shape=(8, 4)),
        bf16=True,
        use_cpu=True,
    ).train()


NESTED = st.recursive(
    st.sampled_from(["text", 3, None]) | st.integers(1, 4).map(torch.zeros),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(NESTED)
def test_a_call_is_remembered_at_any_nesting(value):
    call = Call.remember((value,), {"named": value})
    names = [name for name, _ in named_tensors(value)]
    assert [name for name, _ in named_tensors(call.args[0])] == names
    changed = map_tensors(lambda name, tensor: name, value)
    assert repr(type(changed)) == repr(type(value)) or isinstance(value, torch.Tensor)
    assert call.length() is None


def test_a_script_that_writes_into_its_batch_does_not_change_the_call():
    batch = {"inner": {"input_ids": torch.ones(2, 3, dtype=torch.int64)}}
    call = Call.remember((batch,), {})
    batch["inner"].clear()
    assert call.length() == 3

"""While masks learn, gradients are those of weights that are multiplied by masks, whatever is left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn import functional

from families import TABLE, each_family
from hf_mlprune import PruningConfig, attach, start
from hf_mlprune.learning import LearningLinear, Places
from hf_mlprune.levels import ROW_SITES
from hf_mlprune.state import pruning_state
from support.models import loss_of, make_batch, make_model


def masked_by_hand(family, model, state, batch, variant):
    """Loss and gradients of the stock model with weights ``W · M``; gradients of weights and of masks."""
    stock = make_model(family=family, **variant).double()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    masks = [gate.keep.double().requires_grad_() for gate in state.all_gates()]
    of_gate = dict(zip(map(id, state.all_gates()), masks, strict=True))
    weights = dict(leaves)
    for name, module in model.named_modules():
        rows = module.masks.rows if module in state.linears else None
        if rows is not None and any(rows.masked):
            part = of_gate[id(rows.gate)].repeat_interleave(rows.span)
            expanded = torch.cat([part if masked else torch.ones_like(part) for masked in rows.masked])
            weights[f"{name}.weight"] = leaves[f"{name}.weight"] * expanded[:, None]
            if module.bias is not None:
                weights[f"{name}.bias"] = leaves[f"{name}.bias"] * expanded
    out = functional_call(stock.train(), weights, kwargs=batch)
    loss = out.loss if "loss" in out else out.last_hidden_state.square().mean()
    loss.backward()
    return loss, {name: leaf.grad for name, leaf in leaves.items()}, [mask.grad for mask in masks]


@each_family
@pytest.mark.parametrize("method", ["fisher", "mlpruning"])  # by whether query and key are masked
@pytest.mark.parametrize("targets", [[], [0.6, 0.3]], ids=["one target", "a later target"])
def test_gradients_are_those_of_masked_weights(family, method, targets):
    for variant in ({}, *TABLE[family].variants):
        model = make_model(family=family, **variant)
        attach(model, PruningConfig.create(0.3, targets=targets, method=method, row_sites=ROW_SITES))
        model.double().train()
        start(model, 48)
        state = pruning_state(model)
        generator = torch.Generator().manual_seed(0)
        for gate in state.all_gates():
            keep = torch.rand(gate.units, generator=generator) < 0.4
            keep[0] = True
            if targets:
                # What the target before left: of the others nothing is computed.
                gate.candidates.copy_(keep | (torch.rand(gate.units, generator=generator) < 0.4))
            gate.set_keep(keep)
        batch = make_batch(family=family)
        batch = {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}
        loss = loss_of(model, batch)
        loss.backward()
        wanted = masked_by_hand(family, model, state, batch, variant)
        torch.testing.assert_close(loss, wanted[0])
        # Of a removed head's query and key, rounding is all that is left there.
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[1][name], atol=1e-9, rtol=1e-5, msg=name)
        for gate, gradient in zip(state.all_gates(), wanted[2], strict=True):
            may_stay = gate.candidates if targets else torch.ones_like(gate.keep)
            torch.testing.assert_close(gate.mask.grad.double(), gradient * may_stay, atol=1e-6, rtol=1e-5)


@given(
    rows=st.lists(st.booleans(), min_size=1, max_size=7),
    columns=st.lists(st.booleans(), min_size=1, max_size=7),
    biased=st.booleans(),
    frozen=st.booleans(),
)
def test_the_function_against_finite_differences(rows, columns, biased, frozen):
    torch.manual_seed(0)
    row_keep, column_keep = torch.tensor(rows), torch.tensor(columns)
    x = (torch.randn(2, 3, len(columns)).double() * column_keep).requires_grad_()
    weight = torch.randn(len(rows), len(columns)).double().requires_grad_(not frozen)
    bias = torch.randn(len(rows)).double().requires_grad_() if biased else None
    mask = row_keep.double().requires_grad_()
    places = Places(*(keep.nonzero().flatten() for keep in (row_keep, ~row_keep, column_keep)))
    y = LearningLinear.apply(x, weight, bias, mask, places)
    wanted = functional.linear(x, weight, bias) * mask
    torch.testing.assert_close(y, wanted)
    seed = torch.randn_like(y)
    given_ = [tensor for tensor in (x, weight, bias, mask) if tensor is not None and tensor.requires_grad]
    found = torch.autograd.grad(y, given_, seed)
    expected = list(torch.autograd.grad(wanted, given_, seed))
    # Weights of columns without input get no gradient either way.
    torch.testing.assert_close(list(found), expected, atol=1e-6, rtol=1e-6)


def test_under_autocast_dtypes_are_those_of_torch():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6), torch.randn(5)
    weight.requires_grad_()
    bias.requires_grad_()
    mask = torch.tensor([1.0, 0, 1, 0, 1], requires_grad=True)
    places = Places(torch.tensor([0, 2, 4]), torch.tensor([1, 3]), None)
    with torch.autocast("cpu", torch.bfloat16):
        y = LearningLinear.apply(x, weight, bias, mask, places)
        wanted = functional.linear(x, weight * mask[:, None], bias * mask)
    assert y.dtype is torch.bfloat16
    leaves = (x, weight, bias, mask)
    found = torch.autograd.grad(y.float().square().sum(), leaves)
    expected = torch.autograd.grad(wanted.float().square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is other.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.5)

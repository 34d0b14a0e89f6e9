"""The native operation y = act(x W^T + b) with a block-sparse W."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..modeling.block_sparse import ACTIVATIONS, BlockSparseMatrix, split_blocks

NATIVE = Path(__file__).with_name("native.so")
#: Written by a build that left the native code out.
NOT_BUILT = NATIVE.with_suffix(".not_built.txt")
#: The numbers that the native code knows these by; the best instruction set is 0.
ACTIVATION_NUMBERS = {"none": 0, "gelu": 1, "relu": 2, "gated_gelu": 3}
INSTRUCTION_SETS = {"": 0, "avx2": 1, "avx512": 2}
INSTEAD = "use torch.nn.functional.linear with to_dense()"


def _load() -> str:
    """Load the native code; why there is none, or an empty string."""
    if not NATIVE.is_file():
        built = NOT_BUILT.read_text(encoding="utf-8").strip() if NOT_BUILT.is_file() else ""
        return f"native code was not built ({built or 'installed from source without a build'})"
    try:
        torch.ops.load_library(NATIVE)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"native code does not load ({error})"
    for name, fake in (
        ("hf_mlprune::block_sparse_linear", _fake),
        ("hf_mlprune::block_sparse_linear.scattered", _fake_scattered),
    ):
        torch.library.register_fake(name, fake)
    if not torch.ops.hf_mlprune.instruction_set():
        return "this processor lacks AVX2 and FMA, which the native code needs"
    return ""


def _fake(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor,
    activation: int = 0,
    instruction_set: int = 0,
) -> Tensor:
    return _fake_output(x, values, crow_indices, col_indices, bias, size=bias.shape[0])


def _fake_scattered(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor,
    row_indices: Tensor,
    scatter_size: int,
    activation: int = 0,
    instruction_set: int = 0,
) -> Tensor:
    return _fake_output(x, values, crow_indices, col_indices, bias, row_indices, size=scatter_size)


def _fake_output(x: Tensor, *others: Tensor, size: int) -> Tensor:
    # One meta tensor among real ones comes here, too: there is nothing to compute then.
    if any(other.device != x.device for other in others):
        devices = sorted({str(tensor.device) for tensor in (x, *others)})
        raise RuntimeError(
            f"block_sparse_linear: expected all tensors on one device, got {', '.join(devices)}"
        )
    return x.new_empty(*x.shape[:-1], size)


#: Why there is no native code on this machine; empty where there is.
WHY_NOT = _load()
# Looked up once: at one token the lookup would be felt.
_plain = None if WHY_NOT else torch.ops.hf_mlprune.block_sparse_linear.default
_scattered = None if WHY_NOT else torch.ops.hf_mlprune.block_sparse_linear.scattered


def instruction_set() -> str:
    """What the native code uses on this processor: ``"avx512"``, ``"avx2"``, or ``""`` without it."""
    return "" if WHY_NOT else str(torch.ops.hf_mlprune.instruction_set())


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work, which only dense products follow.

    torch has no public question for either.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def block_sparse_linear(
    x: Tensor,
    matrix: BlockSparseMatrix,
    bias: Tensor | None = None,
    *,
    row_indices: Tensor | None = None,
    scatter_size: int | None = None,
    activation: str = "none",
    instruction_set: str = "",
) -> Tensor:
    """``act(x W^T + b)``, of which only stored blocks are computed.

    Differentiable in reverse mode (through a dense W). Fastest where blocks are at least 16 rows tall; lower
    ones leave lanes of the processor's vectors idle.

    Args:
        x: ``(..., columns)``, float32 or bfloat16, on the CPU, any strides.
        matrix: W, of the dtype of x; values that are not contiguous are copied at every call.
        bias: ``(rows,)``.
        row_indices: int64 ``(rows,)``, increasing: place of each row among ``scatter_size`` outputs, the
            others zero.
        scatter_size: see ``row_indices``.
        activation: ``"none"``, ``"gelu"`` (by erf), ``"relu"``, or ``"gated_gelu"``: a gelu of the first half
            of the rows.
        instruction_set: ``"avx2"`` or ``"avx512"``; by default the best of this processor.

    Returns:
        ``(..., rows)``, or ``(..., scatter_size)``.

    Raises:
        RuntimeError: there is no native code, an argument is not as described, or a transform of
            ``torch.func`` or forward-mode differentiation runs.
    """
    if is_transformed():
        raise RuntimeError(f"block_sparse_linear: no torch.func, no forward-mode differentiation; {INSTEAD}")
    for what, name, names in (
        ("activation", activation, ACTIVATION_NUMBERS),
        ("instruction_set", instruction_set, INSTRUCTION_SETS),
    ):
        if name not in names:
            raise RuntimeError(f"{what}: expected one of {list(names)}, got {name!r}")
    rows, columns = matrix.shape
    if bias is not None and bias.shape != (rows,):
        raise RuntimeError(f"bias: expected one entry for each of {rows} rows, got {tuple(bias.shape)}")
    if (row_indices is None) != (scatter_size is None) or (
        row_indices is not None and row_indices.shape != (rows,)
    ):
        raise RuntimeError(f"row_indices: expected {rows} entries and scatter_size, or neither")
    return product(
        x,
        matrix.values,
        matrix.crow_indices,
        matrix.col_indices,
        columns,
        matrix.values.new_zeros(rows) if bias is None else bias,
        row_indices,
        scatter_size,
        activation,
        instruction_set,
    )


def product(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    columns: int,
    bias: Tensor,
    row_indices: Tensor | None,
    scatter_size: int | None,
    activation: str,
    instruction_set: str = "",
) -> Tensor:
    """:func:`block_sparse_linear` for layers, which know their parts to fit one another and have a bias.

    At one token each step of Python is felt: the operation itself takes a W as wide as x.

    Returns:
        As :func:`block_sparse_linear`.
    """
    if _plain is None or _scattered is None:
        raise RuntimeError(f"block_sparse_linear: {WHY_NOT}; {INSTEAD}")
    shape = x.shape
    if not shape or shape[-1] != columns:
        raise RuntimeError(f"x: expected (..., {columns}), got {tuple(shape)}")
    if (
        torch.is_grad_enabled()
        and (x.requires_grad or values.requires_grad or bias.requires_grad)
        # What torch.jit traces cannot hold a Python function.
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    ):
        y: Tensor = _Differentiable.apply(  # type: ignore[no-untyped-call]
            x, values, crow_indices, col_indices, columns, bias, row_indices, scatter_size, instruction_set
        )
        return ACTIVATIONS[activation](y) if activation != "none" else y
    # Numbers cost time, defaults less.
    if row_indices is None and activation == "none" and not instruction_set:
        return _plain(x, values, crow_indices, col_indices, bias)  # type: ignore[no-any-return]
    numbers = ACTIVATION_NUMBERS[activation], INSTRUCTION_SETS[instruction_set]
    if row_indices is None:
        return _plain(x, values, crow_indices, col_indices, bias, *numbers)  # type: ignore[no-any-return]
    return _scattered(  # type: ignore[no-any-return]
        x, values, crow_indices, col_indices, bias, row_indices, scatter_size, *numbers
    )


class _Differentiable(torch.autograd.Function):
    """The native product forwards, dense products backwards."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        values: Tensor,
        crow_indices: Tensor,
        col_indices: Tensor,
        columns: int,
        bias: Tensor,
        row_indices: Tensor | None,
        scatter_size: int | None,
        instruction_set: str,
    ) -> Tensor:
        ctx.save_for_backward(x, values, crow_indices, col_indices, bias, row_indices)  # type: ignore[arg-type]
        return product(
            x,
            values,
            crow_indices,
            col_indices,
            columns,
            bias,
            row_indices,
            scatter_size,
            "none",
            instruction_set,
        )

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, crow_indices, col_indices, bias, row_indices = ctx.saved_tensors  # type: ignore[attr-defined]
        if row_indices is not None:
            gradient = gradient.index_select(-1, row_indices)
        matrix = BlockSparseMatrix(values, crow_indices, col_indices, (len(bias), x.shape[-1]))
        tokens = math.prod(x.shape[:-1])
        flat = gradient.reshape(tokens, len(bias))
        of_x = of_values = of_bias = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            of_x = gradient @ matrix.to_dense()
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            of_dense = flat.T @ x.reshape(tokens, x.shape[-1])
            of_values = split_blocks(of_dense, matrix.block_shape)[matrix.places()].transpose(1, 2)
        if ctx.needs_input_grad[5]:  # type: ignore[attr-defined]
            of_bias = flat.sum(dim=0)
        return of_x, of_values, *(None,) * 3, of_bias, *(None,) * 3

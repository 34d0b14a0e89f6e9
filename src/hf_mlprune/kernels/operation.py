"""The native operation y = act(x W^T + b) with a block-sparse W."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..modeling.block_sparse import ACTIVATIONS, BlockSparseMatrix

NATIVE = Path(__file__).with_name("native.so")
#: Written by a build that left the native code out.
NOT_BUILT = Path(__file__).with_name("not_built.txt")
#: The numbers that the native code knows these by; the best instruction set is 0.
ACTIVATION_NUMBERS = {"none": 0, "gelu": 1, "relu": 2}
INSTRUCTION_SETS = {"": 0, "avx2": 1, "avx512": 2}
DTYPES = (torch.float32, torch.bfloat16)


def _load() -> str:
    """Load the native code; why there is none, or an empty string."""
    if not NATIVE.is_file():
        built = NOT_BUILT.read_text(encoding="utf-8").strip() if NOT_BUILT.is_file() else ""
        return f"native code was not built ({built or 'installed from source without a build'})"
    try:
        torch.ops.load_library(NATIVE)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"native code does not load ({error})"
    torch.library.register_fake("hf_mlprune::block_sparse_linear", _fake)
    if not torch.ops.hf_mlprune.instruction_set():
        return "this processor lacks AVX2 and FMA, which the native code needs"
    return ""


def _fake(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    row_indices: Tensor | None,
    columns: int,
    outputs: int,
    activation: int = 0,
    instruction_set: int = 0,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


#: Why there is no native code on this machine; empty where there is.
WHY_NOT = _load()
# Looked up once: at one token the lookup would be felt.
_operation = None if WHY_NOT else torch.ops.hf_mlprune.block_sparse_linear.default


def instruction_set() -> str:
    """What the native code uses on this processor: ``"avx512"``, ``"avx2"``, or ``""`` without it."""
    return "" if WHY_NOT else str(torch.ops.hf_mlprune.instruction_set())


def packed(values: Tensor) -> Tensor:
    """Blocks ``(blocks, rows, columns)`` laid out as the native code reads them; the same values.

    Each block stands transposed in memory, so that 16 rows of one column are one vector. Other layouts
    are right, too, but copied at every call.
    """
    return values.transpose(1, 2).contiguous().transpose(1, 2)


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

    Differentiable (through a dense W). Fastest where blocks are at least 16 rows tall; lower ones leave
    lanes of the processor's vectors idle.

    Args:
        x: ``(..., columns)``, float32 or bfloat16, on the CPU, any strides.
        matrix: W, of the dtype of x; fastest if its values are :func:`packed`.
        bias: ``(rows,)``.
        row_indices: int64 ``(rows,)``, place of each row among ``scatter_size`` outputs, the others zero.
        scatter_size: see ``row_indices``.
        activation: ``"none"``, ``"gelu"`` (by erf) or ``"relu"``.
        instruction_set: ``"avx2"`` or ``"avx512"``; by default the best of this processor.

    Returns:
        ``(..., rows)``, or ``(..., scatter_size)``.

    Raises:
        RuntimeError: there is no native code, or an argument is not as described.
    """
    if _operation is None:
        raise RuntimeError(f"block_sparse_linear: {WHY_NOT}; use torch.nn.functional.linear with to_dense()")
    rows, columns = matrix.shape
    outputs = rows
    if row_indices is not None and scatter_size is not None and len(row_indices) == rows:
        outputs = scatter_size
    elif row_indices is not None or scatter_size is not None:
        raise RuntimeError(f"row_indices: expected {rows} entries and scatter_size, or neither")
    values, crow, col = matrix.values, matrix.crow_indices, matrix.col_indices
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, values, bias)):
        isa = _number("instruction_set", instruction_set, INSTRUCTION_SETS)
        y = _Differentiable.apply(x, values, crow, col, bias, row_indices, rows, outputs, isa)  # type: ignore[no-untyped-call]
        return ACTIVATIONS[activation](y) if activation != "none" else y
    # Arguments cost time, defaults less.
    if activation == "none" and not instruction_set:
        return _operation(x, values, crow, col, bias, row_indices, columns, outputs)  # type: ignore[no-any-return]
    act = _number("activation", activation, ACTIVATION_NUMBERS)
    isa = _number("instruction_set", instruction_set, INSTRUCTION_SETS)
    return _operation(x, values, crow, col, bias, row_indices, columns, outputs, act, isa)  # type: ignore[no-any-return]


def _number(what: str, name: str, names: dict[str, int]) -> int:
    number = names.get(name)
    if number is None:
        raise RuntimeError(f"{what}: expected one of {list(names)}, got {name!r}")
    return number


class _Differentiable(torch.autograd.Function):
    """The native product forwards, dense products backwards."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        values: Tensor,
        crow_indices: Tensor,
        col_indices: Tensor,
        bias: Tensor | None,
        row_indices: Tensor | None,
        rows: int,
        outputs: int,
        instruction_set: int,
    ) -> Tensor:
        ctx.save_for_backward(x, values, crow_indices, col_indices, bias, row_indices)  # type: ignore[arg-type]
        ctx.rows = rows  # type: ignore[attr-defined]
        return torch.ops.hf_mlprune.block_sparse_linear(  # type: ignore[no-any-return]
            x, values, crow_indices, col_indices, bias, row_indices, x.shape[-1], outputs, 0, instruction_set
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, crow_indices, col_indices, bias, row_indices = ctx.saved_tensors  # type: ignore[attr-defined]
        if row_indices is not None:
            gradient = gradient.index_select(-1, row_indices)
        shape = (ctx.rows, x.shape[-1])  # type: ignore[attr-defined]
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            dense = BlockSparseMatrix(leaf, crow_indices, col_indices, shape).to_dense()
        flat = gradient.reshape(-1, shape[0])
        outer = flat.T @ x.reshape(-1, shape[1])
        (value_gradient,) = torch.autograd.grad(dense, leaf, outer)
        return (
            gradient @ dense.detach(),
            value_gradient,
            None,
            None,
            None if bias is None else flat.sum(dim=0),
            *(None,) * 4,
        )

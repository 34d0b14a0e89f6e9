"""The native product as an operator of ONNX Runtime (docs/kernel.md says what it takes)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Protocol

#: Works wherever it is copied: it needs neither this package nor torch. Under this module's own name Python
#: would take it for the module.
LIBRARY = Path(__file__).with_name("onnxruntime_operator.so")
#: Written by a build that left it out.
NOT_BUILT = LIBRARY.with_suffix(".not_built.txt")
#: What a node of an ONNX graph names it by; version 1 of the domain.
DOMAIN = "hf_mlprune"
OPERATOR = "BlockSparseLinear"


class SessionOptions(Protocol):
    """What is needed of ``onnxruntime.SessionOptions``."""

    def register_custom_ops_library(self, path: str, /) -> None:
        """Load a library of operators."""


def _why_not() -> str:
    if not LIBRARY.is_file():
        built = NOT_BUILT.read_text(encoding="utf-8").strip() if NOT_BUILT.is_file() else ""
        return f"{LIBRARY.name} was not built ({built or 'installed from source without a build'})"
    try:
        instruction_set = ctypes.CDLL(str(LIBRARY)).hf_mlprune_instruction_set
    except OSError as error:
        return f"{LIBRARY.name} does not load ({error})"
    instruction_set.restype = ctypes.c_char_p
    return "" if instruction_set() else "this processor lacks AVX2 and FMA, which the native code needs"


#: Why it cannot be used on this machine; empty where it can.
WHY_NOT = _why_not()


def register(options: SessionOptions) -> None:
    """Let sessions of these options run :data:`OPERATOR`.

    Raises:
        RuntimeError: it cannot be used on this machine.
    """
    if WHY_NOT:
        raise RuntimeError(f"{OPERATOR}: {WHY_NOT}")
    options.register_custom_ops_library(str(LIBRARY))

"""What an export is, and what it gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .int8 import Int8Result
from .measuring import ServingLatency
from .proof import Proof
from .stock import StockCost

REPORT_FILE = "export_report.json"
REPORT_VERSION = 1


@dataclass(frozen=True)
class ExportReport:
    """What :func:`~hf_mlprune.export` wrote; ``export_report.json`` holds it.

    Attributes:
        to: the engine.
        files: name -> bytes.
        proof: in float32, of the files against the model.
        int8: what int8 did, if it was asked for.
        latency: measured times, if any.
        cost: of a stock folder.
        notes: what there is to know besides.
        packages: versions of what wrote it.
    """

    to: str
    files: dict[str, int]
    proof: Proof
    int8: Int8Result | None
    latency: tuple[ServingLatency, ...]
    cost: StockCost | None
    notes: tuple[str, ...]
    packages: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"version": REPORT_VERSION, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """Lines for people."""
        lines = [
            f"{self.to}: {sum(self.files.values()) / 1e6:.1f} MB; outputs differ from torch by "
            f"{self.proof.difference:.1e} of the largest one at most"
        ]
        if self.int8 is not None:
            line = f"int8 ({self.int8.recipe}): outputs differ from float by {self.int8.difference:.1%}"
            if self.int8.metric is not None:
                line += f"; metric {self.int8.metric[0]:.4f} before, {self.int8.metric[1]:.4f} after"
            if self.int8.float_layers:
                line += f"; left float: {', '.join(self.int8.float_layers)}"
            lines.append(line)
        return "\n".join([*lines, *map(str, self.latency), *self.notes])

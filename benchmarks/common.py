"""What every benchmark needs: the machine's description, and results with the command beside them."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_mlprune.files import write_json
from hf_mlprune.reports.latency import cpu_capability, processor_name

RESULTS = Path(__file__).with_name("results")


def machine() -> dict[str, Any]:
    """Processor, cores and versions that figures were measured with."""
    return {
        "processor": processor_name() or platform.machine(),
        "instruction_set": cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def command() -> str:
    """The command line, folders by their last name: where they lie on one machine is nobody's concern."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}"]
    words += [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    return " ".join(["python", *words])


def write_result(figures: dict[str, Any], name: str = "") -> Path:
    """Write a benchmark's figures to ``results/<name>.json``; the script's name, if none is given."""
    path = RESULTS / f"{name or Path(sys.argv[0]).stem}.json"
    write_json(path, {"command": command(), "machine": machine(), **figures})
    return path

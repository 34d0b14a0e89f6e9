"""What every benchmark needs: the machine's description, and results with the command beside them."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
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


def print_peak_memory() -> None:
    """Print the resident peak of this process, in megabytes, for the one that started it to read."""
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20))


def peak_megabytes(options: Sequence[str]) -> float:
    """What a fresh process of this script prints as its peak, called with more options.

    Ask before anything else: on Linux a process's peak includes that of the one that started it.
    """
    # Freed tensors go back to the system at once, so that the figure repeats from run to run (glibc).
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    run = [sys.executable, *sys.argv, *options]
    done = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


def write_result(figures: dict[str, Any], name: str = "") -> Path:
    """Write a benchmark's figures to ``results/<name>.json``; the script's name, if none is given."""
    path = RESULTS / f"{name or Path(sys.argv[0]).stem}.json"
    write_json(path, {"command": command(), "machine": machine(), **figures})
    return path

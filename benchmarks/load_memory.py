"""Peak memory of loading a block-sparse model, against what it reads: in a fresh process (Linux).

BERT-base shapes with random weights, half of the heads and rows, 40 % of the blocks of what is left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write_result

REQUIRED = 1.2


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def peak_bytes() -> int:
    """Resident peak of this process since it was last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def reset_peak() -> int:
    """Let the peak begin at what is resident now, and say how much that is (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def print_peak(folder: str) -> None:
    """Load the model in this process, run it once, and print what that took on top of the imports."""
    import torch
    from transformers import AutoModel

    import hf_mlprune  # noqa: F401  (registers the Auto classes)

    # The first product brings torch's threads and buffers, which are no matter of the model.
    torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64))
    before = reset_peak()
    model = AutoModel.from_pretrained(folder)
    loaded = peak_bytes()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 8, dtype=torch.int64))
    print(json.dumps([loaded - before, peak_bytes() - before]))


def main() -> None:
    """Measure."""
    args = parse_arguments()
    if args.peak_of:
        print_peak(args.peak_of)
        return
    from encoder import MODELS, pruned_model

    model = pruned_model(MODELS["bert-base"], "both")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        embeddings = sum(p.numel() * p.element_size() for p in model.embeddings.parameters())
        command = [sys.executable, sys.argv[0], "--peak-of", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    load, run = json.loads(done.stdout.splitlines()[-1])
    figures = {
        "file_bytes": size,
        "embedding_bytes": embeddings,
        "load_peak_bytes": load,
        "load_and_run_peak_bytes": run,
        "peak_of_file": load / size,
        "peak_of_file_and_embeddings": load / (size + embeddings),
        "required_of_file_and_embeddings": REQUIRED,
    }
    print(json.dumps(figures, indent=2))
    print(f"written: {write_result({'results': figures})}")


if __name__ == "__main__":
    main()

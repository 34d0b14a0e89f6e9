"""Two processes on the CPU: the same run as one process with the same global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.methods import SETTINGS

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"],
    # Two processes on the CPU; with `--cpu` it starts one, unless there is MPI.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                   "--mixed_precision=no", "--dynamo_backend=no"],
}  # fmt: skip


def launch(launcher: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore"]
    if launcher is not None:
        module, *options = LAUNCHERS[launcher]
        port = "--main_process_port" if "accelerate" in launcher else "--master_port"
        command += ["-m", module, *options, f"{port}={free_port()}"]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*command, str(HERE / "support" / "distributed_run.py"), *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def seen(folder: Path, rank: int) -> dict:
    return torch.load(folder / f"rank{rank}.pt")


@pytest.mark.parametrize(
    ("launcher", "taught", "runs"),
    [
        # One start for all: processes take longer to begin than to train.
        ("torchrun", "alone", [{"method": name, **row} for name, row in SETTINGS.items()]),
        ("accelerate", "taught", [{"preset": "paper", "block_shape": (8, 4)}, {"targets": [0.7, 0.3]}]),
    ],
)
def test_two_processes_are_one_with_the_same_batch(launcher, taught, runs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, starter, rows in ((one, None, "8"), (two, launcher, "4")):
        folder.mkdir()
        done = launch(starter, str(folder), rows, taught, *map(json.dumps, runs))
        assert done.returncode == 0, done.stderr[-3000:]
    for index, settings in enumerate(runs):
        assert_same_run(one / str(index), two / str(index), settings)


def assert_same_run(one: Path, two: Path, settings: dict) -> None:
    alone, first, second = seen(one, 0), seen(two, 0), seen(two, 1)
    assert (alone["processes"], first["processes"]) == (1, 2), settings
    assert len(first["masks"]) == (48 if "targets" in settings else 24), settings
    assert torch.equal(first["masks"], second["masks"]), settings
    assert torch.equal(first["masks"], alone["masks"]), settings
    assert first["weights"].keys() == alone["weights"].keys()
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-5, atol=1e-7)
        assert torch.equal(first["weights"][name], second["weights"][name]), (settings, name)
    ours = (
        "pruning_report",
        "_step1_teacher",
        "README",
        "model.safetensors",
        "config.json",
        "_partial",
        "/model",
    )
    assert any(name in path for path in first["wrote"] for name in ours)
    assert [path for path in second["wrote"] for name in ours if name in path] == []


def test_weights_of_two_processes_stay_the_same_where_the_proof_changes_their_dtype(tmp_path):
    done = launch("torchrun", str(tmp_path), "4", "bfloat16", json.dumps(SETTINGS["fisher"]))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = seen(tmp_path / "0", 0), seen(tmp_path / "0", 1)
    assert torch.equal(first["masks"], second["masks"])
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())

"""Processes of their own: that may be killed, or that know nothing of hf_mlprune."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

#: A process that has imported everything and run nothing: its forks start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["accelerate", "datasets", "hf_mlprune"])

WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_mlprune":
            raise ImportError("not installed here")
sys.meta_path.insert(0, Refuse())
"""


def run_forked(target, *arguments) -> int:
    """Exit code of a process of its own, which may kill itself."""
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(timeout=300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def run_without_package(code: str, *arguments: str | Path, cache: Path) -> None:
    """Run code in a process in which `hf_mlprune` cannot be imported.

    Args:
        code: a script.
        arguments: its `sys.argv[1:]`.
        cache: folder in which code of checkpoints is put that are loaded with `trust_remote_code=True`.
    """
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        env={**os.environ, "HF_HOME": str(cache)}, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

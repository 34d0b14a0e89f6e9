"""Builds the native code of `hf_mlprune.kernels`; everything else stands in pyproject.toml and setup.cfg."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/hf_mlprune/kernels/native")
# Per file: only what runs after a look at the processor may use its newer instructions.
SOURCES = {
    "avx2.cpp": ["-mavx2", "-mfma"],
    "avx512.cpp": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    "library.cpp": [],
}
# The two warnings are wrong ones of gcc 12 in its own headers.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
# What `hf_mlprune.kernels` reads to say why there is no native code.
NOTE = "not_built.txt"
# The oldest torch whose stable ABI is used: 2.10.
TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")


class BuildNative(build_ext):
    """Compiles one shared object that any torch from 2.10 up loads; without a compiler, none."""

    def get_ext_filename(self, fullname: str) -> str:
        """`native.so`: it is loaded by torch, not imported by Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build, or say why not and leave a note that `hf_mlprune.kernels` repeats."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.with_name(NOTE)
        for old in (note, FOLDER.parent / NOTE):
            old.unlink(missing_ok=True)
        try:
            self.build_native(target)
        except Exception as error:  # whatever is wrong with a compiler: the package works without
            target.unlink(missing_ok=True)
            reason = f"{type(error).__name__}: {error}"
            note.write_text(reason + "\n", encoding="utf-8")
            sys.stderr.write(f"hf_mlprune.kernels: native code left out: {reason}\n")

    def copy_extensions_to_source(self) -> None:
        """For builds in place and editable installs."""
        super().copy_extensions_to_source()
        note = Path(self.build_lib, *self.extensions[0].name.split(".")).with_name(NOTE)
        if note.is_file():
            self.copy_file(str(note), str(FOLDER.parent / NOTE))

    def build_native(self, target: Path) -> None:
        """Compile and link; with the sanitizers that ``SANITIZE`` names (see `make sanitize`)."""
        sanitize = [f"-fsanitize={names}", "-g"] if (names := os.environ.get("SANITIZE")) else []
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise RuntimeError(f"there is none for {platform.system()} on {platform.machine()}")
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise RuntimeError(
                "torch is needed to build: install it, then build without isolation"
            ) from error
        objects = [
            made
            for name, flags in SOURCES.items()
            for made in self.compiler.compile(
                [str(FOLDER / name)],
                output_dir=self.build_temp,
                macros=[TARGET],
                include_dirs=include_paths(),
                extra_postargs=[*FLAGS, *flags, *sanitize],
            )
        ]
        self.compiler.link_shared_object(
            objects, str(target), libraries=["torch", "torch_cpu", "c10"], library_dirs=library_paths(),
            extra_postargs=sanitize or ["-Wl,--strip-all"], target_lang="c++",
        )  # fmt: skip


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The native code does not use Python's own ABI."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension("hf_mlprune.kernels.native", [str(FOLDER / name) for name in SOURCES], optional=True)
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)

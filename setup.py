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
    "onnxruntime.cpp": [],
}
PRODUCTS = ["avx2.cpp", "avx512.cpp"]
# Shared objects, beside each other in the package.
LIBRARIES = {"native": [*PRODUCTS, "library.cpp"], "onnxruntime_operator": [*PRODUCTS, "onnxruntime.cpp"]}
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
# Name endings of what `hf_mlprune.kernels` reads to say why a library is not there.
NOTE = ".not_built.txt"
# The oldest torch whose stable ABI is used: 2.10.
TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")


def torch_paths() -> tuple[list[str], list[str]]:
    """Folders of torch's headers and of its libraries."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise RuntimeError("torch is needed to build: install it, then build without isolation") from error
    return include_paths(), library_paths()


class BuildNative(build_ext):
    """Compiles shared objects that any torch from 2.10 up and ONNX Runtime load; without a compiler, none."""

    def run(self) -> None:
        """Build what is declared below."""
        self.compiled: dict[str, list[str]] = {}
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """`native.so`: these are not imported by Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build, or say why not and leave a note that `hf_mlprune.kernels` repeats."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.with_suffix(NOTE)
        for old in (note, FOLDER.parent / note.name):
            old.unlink(missing_ok=True)
        try:
            self.build_native(target)
        except Exception as error:  # whatever is wrong with a compiler: the package works without
            target.unlink(missing_ok=True)
            reason = f"{type(error).__name__}: {error}"
            note.write_text(reason + "\n", encoding="utf-8")
            sys.stderr.write(f"hf_mlprune.kernels: {target.name} left out: {reason}\n")

    def copy_extensions_to_source(self) -> None:
        """For builds in place and editable installs."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            note = Path(self.build_lib, *ext.name.split(".")).with_suffix(NOTE)
            if note.is_file():
                self.copy_file(str(note), str(FOLDER.parent / note.name))

    def build_native(self, target: Path) -> None:
        """Compile and link; with the sanitizers that ``SANITIZE`` names (see `make sanitize`)."""
        sanitize = [f"-fsanitize={names}", "-g"] if (names := os.environ.get("SANITIZE")) else []
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise RuntimeError(f"there is none for {platform.system()} on {platform.machine()}")
        uses_torch = "library.cpp" in LIBRARIES[target.stem]
        include_dirs, library_dirs = torch_paths() if uses_torch else ([], [])
        for name in LIBRARIES[target.stem]:
            # What both libraries have takes the longest.
            if name not in self.compiled:
                self.compiled[name] = self.compiler.compile(
                    [str(FOLDER / name)],
                    output_dir=self.build_temp,
                    macros=[TARGET] if uses_torch else [],
                    include_dirs=include_dirs,
                    extra_postargs=[*FLAGS, *SOURCES[name], *sanitize],
                )
        self.compiler.link_shared_object(
            [made for name in LIBRARIES[target.stem] for made in self.compiled[name]],
            str(target),
            libraries=["torch", "torch_cpu", "c10"] if uses_torch else [],
            library_dirs=library_dirs,
            extra_postargs=sanitize or ["-Wl,--strip-all"],
            target_lang="c++",
        )


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The native code does not use Python's own ABI."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(f"hf_mlprune.kernels.{library}", [str(FOLDER / name) for name in names], optional=True)
        for library, names in LIBRARIES.items()
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)

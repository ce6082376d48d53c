"""C that is compiled for this machine's CPU when it is first needed, and kept.

`$CC`, else `cc`, makes a library in about a second. It is kept in the cache folder
(:func:`velora_torch.paths.cache_folder`) under a name that changes with the source and with what
the compiler makes of `-march=native`, so that a home folder which machines share does not give one
the other's instructions. A library is code: one that others can have written is not loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path

from velora_torch.atomic import write_whole
from velora_torch.paths import cache_folder

OFF = "VELORA_NATIVE"
"""The environment variable that, set to 0, leaves everything to PyTorch's operators."""
X86 = ("x86_64", "amd64")
SECONDS = 60
"""That the compiler may take."""


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """Return a C file as a library; None without a compiler, without the wish, and on Windows.

    Args:
        source: the file; it needs nothing but the C library.

    Warns:
        UserWarning: there is a compiler, and it cannot make the library.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if os.name != "posix" or os.environ.get(OFF) == "0" or shutil.which(compiler[0]) is None:
        return None
    try:
        return _library(source, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{' '.join(compiler)} cannot make a library of {source.name}; PyTorch's operators "
            "take its place, which is several times slower. Set CC to a C compiler that can, or "
            f"{OFF}=0 to do without one. It said: {said.strip()[-400:]}",
            stacklevel=2,
        )
        return None


def _library(source: Path, compiler: list[str]) -> ctypes.CDLL:
    """The kept library, or one that is made now.

    Raises:
        OSError: the compiler cannot be started, or what it has made cannot be loaded.
        subprocess.SubprocessError: it has failed.
    """
    for_this_cpu = "-march=native" if platform.machine().lower() in X86 else "-mcpu=native"
    made_for = _run([*compiler, for_this_cpu, "-v", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256(f"{made_for}\n{source.read_text()}".encode()).hexdigest()[:16]
    kept = cache_folder() / "native" / f"{source.stem}-{key}.so"
    if _only_ours(kept):
        with contextlib.suppress(OSError):  # damaged: made again
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as work:
        made = Path(work) / kept.name
        command = [*compiler, "-O3", for_this_cpu, "-ffp-contract=off", "-shared", "-fPIC"]
        try:
            _run([*command, "-fopenmp", str(source), "-o", str(made)])
        except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
            _run([*command, str(source), "-o", str(made)])
        library = ctypes.CDLL(str(made))
        with contextlib.suppress(OSError):  # a full or read-only disk: made again next time
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(kept, made.read_bytes())
        return library


def _only_ours(file: Path) -> bool:
    """Whether a file and its folder are there, and nobody else may change them."""
    try:
        found = (file.stat(), file.parent.stat())
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return all(of.st_uid == os.getuid() and not of.st_mode & others for of in found)


def _run(command: list[str]) -> str:
    """What a command says, on its error output."""
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=SECONDS
    )
    return done.stderr

"""Folding in C on a processor that is not this one: the loops as GCC makes them for ARM, emulated.

Runs where Debian's `gcc-aarch64-linux-gnu` and `qemu-user` are installed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from velora_torch.subtoken.kernels.fold import SOURCE, TYPES

from ..closeness import assert_bitwise
from .test_fold_native import DTYPES, HALVES, at_every_size, expected, noise_of, operands

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR}",
)
MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include SOURCE

static void *next(long bytes) {
    void *numbers = malloc(bytes);
    if (fread(numbers, 1, bytes, stdin) != (size_t)bytes)
        exit(1);
    return numbers;
}

int main(void) {
    const int *how = next(7 * sizeof(int));
    const long type = how[0], O = how[3], D = how[4], G = how[5], M = how[6];
    const long bytes = O * D * (type == FLOAT32 ? 4 : 2);
    const float *decay = next(4);
    void *w = next(bytes);
    const float *c = next(4 * O * G), *e = next(4 * G * M);
    const int *a = how[2] ? next(4 * O) : NULL, *b = how[2] ? next(4 * D) : NULL;
    if (how[1])
        fold_transposed(type, w, c, e, a, b, *decay, O, D, M, 1);
    else
        fold(type, w, c, e, a, b, *decay, O, D, G, M, 1);
    return fwrite(w, 1, bytes, stdout) != (size_t)bytes;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("arm")
    (work / "main.c").write_text(MAIN)
    flags = ["-O3", "-ffp-contract=off", "-static", f'-DSOURCE="{SOURCE}"']
    subprocess.run([COMPILER, *flags, "main.c", "-o", "fold"], cwd=work, check=True)
    return work / "fold"


def bytes_of(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def folded(
    program: Path,
    weight: Tensor,
    coef: Tensor,
    e: Tensor,
    decay: float,
    noise: tuple[Tensor, Tensor] | None,
    transposed: bool,
) -> Tensor:
    """What the program makes of a weight."""
    how = [TYPES[weight.dtype], transposed, noise is not None, *weight.shape, *e.shape]
    stored, given = (weight.t(), coef.t()) if transposed else (weight, coef)
    numbers = [torch.tensor(how, dtype=torch.int32), torch.tensor(decay, dtype=torch.float32)]
    numbers += [stored, given, e, *(noise or ())]
    done = subprocess.run(
        [EMULATOR, str(program)],
        input=b"".join(bytes_of(x.reshape(-1)) for x in numbers),
        capture_output=True,
        check=True,
    )
    result = torch.frombuffer(bytearray(done.stdout), dtype=weight.dtype).view(stored.shape)
    return result.t() if transposed else result


@pytest.mark.parametrize("transposed", [False, True], ids=["OD", "DO-view"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(7, 15, 5), (7, 30, 8), (7, 3, 8), (9, 96, 32), (300, 256, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_is_that_of_the_equations(program, dtype, shape, stochastic, transposed):
    """Shapes: outputs, features and M."""
    weight, coef, e = operands(*shape, dtype)
    noise = noise_of(weight) if stochastic else None
    aim = expected(weight, coef, e, 0.9375, noise)
    assert_bitwise(folded(program, weight, coef, e, 0.9375, noise, transposed), aim)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_at_every_size(program: Path, dtype: torch.dtype, stochastic: bool):
    weight, coef, e = at_every_size(dtype)
    noise = noise_of(weight) if stochastic else None
    aim = expected(weight, coef, e, 1.0, noise)
    assert_bitwise(folded(program, weight, coef, e, 1.0, noise, False), aim)

"""Half-precision products through float32: values, gradients, and that nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.closeness import TOLERANCE, assert_bitwise, assert_close
from velora_torch.bench.writing import _machine
from velora_torch.half_products import are_float32, float32_products, slow_types
from velora_torch.report.environment import machine_info

HALF = (torch.bfloat16, torch.float16)
PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "mm": (torch.mm, ((7, 5), (5, 3))),
    "bmm": (torch.bmm, ((2, 7, 5), (2, 5, 3))),
    "addmm": (torch.addmm, ((3,), (7, 5), (5, 3))),
    "baddbmm": (torch.baddbmm, ((2, 1, 3), (2, 7, 5), (2, 5, 3))),
    "linear": (functional.linear, ((2, 7, 5), (3, 5), (3,))),
    "einsum": (lambda a, b: torch.einsum("bhd,bhe->hde", a, b), ((7, 2, 5), (7, 2, 3))),
    "no rows": (torch.mm, ((0, 5), (5, 3))),
    "no sum": (torch.mm, ((7, 0), (0, 3))),
}


def operands(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def assert_rounded(result: Tensor, exact: Tensor, given: list[Tensor], wide: list[Tensor]) -> None:
    """The result is the exact one, rounded; the gradients of what it was given are close."""
    dtype = given[0].dtype
    assert result.dtype == dtype
    assert_bitwise(result, exact.to(dtype))
    torch.manual_seed(1)
    grad = torch.randn(result.shape).to(dtype)
    result.backward(grad)
    exact.backward(grad.float())
    for narrow, reference in zip(given, wide, strict=True):
        assert narrow.grad is not None
        assert narrow.grad.dtype == dtype
        assert_close(narrow.grad, reference.grad, TOLERANCE[dtype])


@pytest.fixture
def emulated() -> object:
    with float32_products(HALF):
        yield


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_and_gradients_are_those_of_float32_rounded(
    emulated: object, name: str, dtype: torch.dtype
) -> None:
    product, shapes = PRODUCTS[name]
    given = operands(shapes, dtype)
    wide = [t.detach().float().requires_grad_() for t in given]
    result, exact = product(*given), product(*wide)
    assert_rounded(result, exact, given, wide)


needs_kernels = pytest.mark.skipif(
    not hasattr(torch.library, "get_kernel"), reason="this PyTorch hands out no kernels"
)


def attention_masks(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    if kind == "causal":
        return {"is_causal": True}
    hidden = torch.zeros(2, 1, 7, 9, dtype=torch.bool)
    hidden[1, :, :, 6:] = True
    if kind == "bool mask":
        return {"attn_mask": ~hidden}
    if kind == "bias":
        return {"attn_mask": torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -9.0)}
    return {"scale": 0.25} if kind == "scale" else {}


@needs_kernels
@pytest.mark.parametrize("kind", ["plain", "causal", "bool mask", "bias", "scale"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_attention_and_its_gradients_are_those_of_float32_rounded(
    emulated: object, kind: str, dtype: torch.dtype
) -> None:
    given = operands(((2, 3, 7, 5), (2, 3, 9, 5), (2, 3, 9, 5)), dtype)
    wide = [t.detach().float().requires_grad_() for t in given]
    narrow_mask, wide_mask = attention_masks(kind, dtype), attention_masks(kind, torch.float32)
    result = functional.scaled_dot_product_attention(*given, **narrow_mask)
    exact = functional.scaled_dot_product_attention(*wide, **wide_mask)
    assert_rounded(result, exact, given, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_in_other_types_stays_as_it_is(dtype: torch.dtype) -> None:
    def attend() -> list[Tensor]:
        given = operands(((2, 3, 7, 5), (2, 3, 7, 5), (2, 3, 7, 5)), dtype)
        result = functional.scaled_dot_product_attention(*given, is_causal=True)
        return [result, *torch.autograd.grad(result.square().sum(), given)]

    plain = attend()
    with float32_products(HALF):
        covered = attend()
    for mine, theirs in zip(covered, plain, strict=True):
        assert_bitwise(mine, theirs)


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.complex64, torch.int64], ids=str
)
def test_other_types_stay_as_they_are(name: str, dtype: torch.dtype) -> None:
    product, shapes = PRODUCTS[name]
    given = [(torch.randn(shape) * 9).to(dtype) for shape in shapes]
    plain = product(*given)
    with float32_products(HALF):
        assert_bitwise(product(*given), plain)


def test_scales_of_addmm(emulated: object) -> None:
    c, a, b = (t.detach() for t in operands(((7, 3), (7, 5), (5, 3)), torch.bfloat16))
    expected = torch.addmm(c.float(), a.float(), b.float(), beta=0.5, alpha=-2.0).bfloat16()
    assert_bitwise(torch.addmm(c, a, b, beta=0.5, alpha=-2.0), expected)
    broken = torch.full_like(c, torch.nan)
    assert_bitwise(torch.addmm(broken, a, b, beta=0), (a.float() @ b.float()).bfloat16())


def test_a_sum_does_not_stop_at_the_resolution_of_its_type(emulated: object) -> None:
    """A sum in bfloat16 itself ends at 256: 256 + 1 is 256 there."""
    ones = torch.ones(1, 1024, dtype=torch.bfloat16)
    assert (ones @ ones.T).item() == 1024


def test_wrong_shapes_and_types_are_refused_as_before(emulated: object) -> None:
    a, b = torch.ones(3, 4).bfloat16(), torch.ones(3, 4).bfloat16()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        a @ b
    with pytest.raises(RuntimeError, match="dtype"):
        a @ b.T.float()


def test_a_training_step_under_autocast_in_another_thread(emulated: object) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)), torch.randn(11, 5)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    rounded = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    for grad, parameter in zip(rounded, model.parameters(), strict=True):
        assert_close(grad, parameter.grad, 2 * TOLERANCE[torch.bfloat16])


def test_contexts_nest_and_end() -> None:
    assert not are_float32()
    with float32_products(HALF):
        with float32_products(HALF), float32_products(()):
            assert are_float32()
        assert are_float32()

    @float32_products(HALF)
    def fails() -> None:
        assert are_float32()
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not are_float32()
    with float32_products(()):
        assert not are_float32()


def test_a_machine_says_how_it_multiplied() -> None:
    assert machine_info().half_products == "native"
    with float32_products(HALF):
        assert machine_info().half_products == "float32"
        about = vars(machine_info()) | {"cpu": "Example", "cores": 2}

    for instructions, kind in (("AVX2", "Example (AVX2)"), ("", "Example")):
        row = SimpleNamespace(machine=about | {"instructions": instructions})
        assert _machine(row) == f"{kind}, 2 cores without bfloat16 instructions"


def test_slow_types_are_what_the_cpu_lacks() -> None:
    for dtype, supported in zip(
        HALF,
        (
            torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        ),
        strict=True,
    ):
        assert (dtype in slow_types()) != supported

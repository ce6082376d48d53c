import gc
import time
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _leave_out() -> None:
    """Let the garbage collector search no more what is there now.

    A run collects more than once, and a search of all that torch and transformers define takes
    longer than most of what is tested.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _imported_is_left_out() -> None:
    _leave_out()


@pytest.fixture(autouse=True)
def _imported_meanwhile_is_left_out() -> Iterator[None]:
    start = time.perf_counter()
    yield
    if time.perf_counter() - start > 1:
        _leave_out()

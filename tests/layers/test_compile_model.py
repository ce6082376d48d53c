"""A whole LLaMA with compressed layers is one graph, and is not compiled after its second step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import velora_torch
from velora_torch import VeloraConfig

from ..closeness import assert_close
from ..tiny_models import VOCABULARY

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

STEPS = 5
SETTINGS = [
    pytest.param({}, id="average"),
    pytest.param({"gradient": "dense"}, id="dense"),
    pytest.param(
        {"init": "random", "vectors": "per_group", "refresh_every": 2}, id="random-redrawn"
    ),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A backend that counts the graphs it is given, and runs them with autograd traced."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


def llama() -> nn.Module:
    from ..tiny_models import llama

    model = llama().double().train()
    model.config.use_cache = False
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(3, VOCABULARY, (2, 7), generator=generator) for _ in range(STEPS)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_graph_no_breaks_no_recompilation_after_the_second_step(settings: dict[str, Any]):
    model = velora_torch.compress(llama(), VeloraConfig(num_groups=8, **settings))
    eager = copy.deepcopy(model)
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)
        for m in (model, eager)
    ]
    for step, batch in enumerate(batches()):
        # An error, rather than a graph more, from the third step on.
        stance = "default" if step < 2 else "fail_on_recompile"
        losses = []
        for run, optimizer in zip((compiled, eager), optimizers, strict=True):
            with torch.compiler.set_stance(stance):
                loss = run(**batch).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
        assert_close(*losses, 1e-9)
    assert backend.graphs <= 2
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-7, atol=1e-9)

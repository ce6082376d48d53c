"""Cases that take milliseconds, and steps that take no time at all."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from velora_torch.bench.speed.cases import LARGE, Case, linear, llama
from velora_torch.bench.speed.prepare import Prepared

WIDTH, TOKENS = 64, 48


def _llama() -> dict[str, Any]:
    settings = llama(WIDTH, 96, 4, 2, 2)
    return {**settings, "length": 8, "config": {**settings["config"], "vocab_size": 64}}


LAYER = Case("layer", "layer", "full", "a layer", linear(WIDTH, "bf16", TOKENS))
LORA_LAYER = Case("layer-lora", "layer", "lora", "with LoRA", linear(WIDTH, "bf16", TOKENS))
PARTS = Case("parts", "parts", "full", "its parts", linear(WIDTH, "bf16", TOKENS))
MODEL = Case("model", "model", "full", "a model", _llama())
LARGER = Case("larger", "layer", "full", "another layer", linear(WIDTH, "fp32", TOKENS), LARGE)
CASES = [MODEL, LAYER, LORA_LAYER, PARTS, LARGER]

SECONDS = {"plain": 1.0, "plain+gc": 1.5, "factored": 0.7, "factored+gc": 0.9, "step": 2.0}


class Clock:
    """Time that only prepared steps pass; each costs what `SECONDS` says, times the round."""

    def __init__(self, fail: dict[str, Exception] | None = None, bad: tuple[str, ...] = ()) -> None:
        self.now, self.fail, self.bad = 0.0, fail or {}, bad
        self.prepared: list[str] = []
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def prepare(self, variant: Any, workload: Any) -> Prepared:
        self.prepared.append(variant.name)
        if variant.name in self.fail:
            raise self.fail[variant.name]
        numbers = itertools.count(1)

        def step() -> None:
            self.ran.append(variant.name)
            self.now += SECONDS.get(variant.name, 0.5) * next(numbers)

        value = float("nan") if variant.name in self.bad else 1.0
        flops, saved = (100, 4096) if variant.name == "plain" else (70, 1024)
        return Prepared(step, flops, lambda: torch.tensor(value), saved)

"""Hugging Face's `Trainer` with DeepSpeed and without; run by itself, since it must find DeepSpeed.

Prints JSON: whether weights and vectors have the same bits with it and without, and when resumed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from tests.distributed.training import Setup, batches, build
from tests.distributed.zero import deepspeed

deepspeed()

from transformers import Trainer, TrainingArguments  # noqa: E402

from velora_torch.integrations.transformers import VeloraTrainerMixin  # noqa: E402
from velora_torch.model import compressed_layers  # noqa: E402

STEPS, SAVED = 6, 3


class InOrder(VeloraTrainerMixin, Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def trainer(setup: Setup, folder: str, stage: int | None) -> Any:
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=0.0,
        optim="adamw_torch",
        save_steps=SAVED,
        use_cpu=stage is None,
        deepspeed=None if stage is None else config,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in batches(setup).flatten(0, 2)]
    return InOrder(model=build(setup), args=arguments, train_dataset=rows)


def state(trained: Any) -> dict[str, Tensor]:
    result = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    layers = compressed_layers(trained.model)
    assert {layer.velora.steps for layer in layers.values()} == {STEPS}
    return result | {f"{name}.vectors": layer.velora_vectors for name, layer in layers.items()}


def compare(folder: str, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    config = {"init": "rademacher", "num_groups": 4, "refresh_every": 2}
    setup = Setup(config=config, dtype=dtype, steps=STEPS)
    told: dict[str, Any] = {}
    if dtype == torch.float32:
        plain = trainer(setup, f"{folder}/plain", None)
        plain.train()
        expected = state(plain)
    whole = trainer(setup, f"{folder}/zero", stage)
    whole.train()
    zero = whole.optimizer.optimizer
    told["optimizer"] = type(zero).__name__
    told["types"] = [sorted({str(p.dtype) for p in group}) for group in zero.bit16_groups]
    result = state(whole)
    if dtype == torch.float32:
        told["bits_of_plain"] = all(torch.equal(result[k], v) for k, v in expected.items())
    again = trainer(setup, f"{folder}/zero", stage)
    again.train(resume_from_checkpoint=f"{folder}/zero/checkpoint-{SAVED}")
    told["bits_when_resumed"] = all(
        torch.equal(value, result[key]) for key, value in state(again).items()
    )
    return told


if __name__ == "__main__":
    cases = {"float32": 2, "bfloat16": 1}
    told = {n: compare(f"{sys.argv[1]}/{n}", s, getattr(torch, n)) for n, s in cases.items()}
    print(json.dumps(told))

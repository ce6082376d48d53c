"""What the server of processes imports, once, so that no rank does: most of a short run is that."""

from __future__ import annotations

import gc
import importlib
import importlib.util

_USED = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "velora_torch",
    "transformers.trainer",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "accelerate",
    "datasets",
    "pandas",
    "peft",
    "velora_torch.training.trainer",
    "velora_torch.training.pretraining.prepare",
    "velora_torch.report.page",
    "tests.distributed.runs",
)

for name in _USED:
    if importlib.util.find_spec(name.partition(".")[0]) is not None:
        importlib.import_module(name)

gc.collect()
gc.freeze()  # so that no rank's garbage collector searches all of it, more than once

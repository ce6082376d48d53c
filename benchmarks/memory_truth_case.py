"""One case of memory_truth.py: a real model that really trains, in a process of its own.

    python benchmarks/memory_truth_case.py NAME {predicted,tracked,growth} [--cuda]

prints one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import velora_torch as velora
from velora_torch.blocks import repeated_blocks
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.simulator.architecture import Architecture, resolve
from velora_torch.memory.simulator.presets import preset
from velora_torch.memory.simulator.setup import Setup, dtype_named
from velora_torch.memory.simulator.simulate import simulate
from velora_torch.memory.simulator.steps import track
from velora_torch.memory.simulator.task import auto_class, choose_task

STEPS = 2
PACKAGED = "smollm2-135m-instruct"
"""The one preset whose real weights a Python package ships."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    model: str
    batch: int
    seq: int | None = None
    dtype: str = "float32"
    setup: Setup = field(default_factory=Setup)


def coefficients(size: int = 8, **fields: Any) -> velora.VeloraConfig:
    """VeLoRA on all linear layers, sub-tokens of 8 features."""
    return velora.VeloraConfig(**({"sub_token_size": size} | fields))


def adapters(**fields: Any) -> Setup:
    """LoRA adapters as a recipe of ours makes them, without dropout."""
    return Setup(**({"method": "lora"} | fields))


V = coefficients()
V_LORA = velora.VeloraConfig(targets=["lora_A"], sub_token_size=8)

CASES = {
    "llama-60m": Case("llama-60m", 8, 256),
    "llama-60m, bf16": Case("llama-60m", 16, 256, "bfloat16"),
    "llama-60m, SGD": Case("llama-60m", 16, 256, setup=Setup(optimizer="sgd")),
    "llama-60m, 2 micro-batches": Case("llama-60m", 8, 256, setup=Setup(accumulation=2)),
    "llama-60m, 8-bit AdamW": Case("llama-60m", 16, 256, setup=Setup(optimizer="adamw_8bit")),
    "llama-130m": Case("llama-130m", 8, 256),
    "llama-130m, bf16": Case("llama-130m", 16, 256, "bfloat16"),
    "llama-130m, VeLoRA": Case("llama-130m", 8, 256, setup=Setup(velora=V)),
    "llama-130m, VeLoRA, bf16": Case("llama-130m", 16, 256, "bfloat16", Setup(velora=V)),
    "llama-130m, dense VeLoRA on value and down": Case(
        "llama-130m",
        8,
        256,
        setup=Setup(velora=coefficients(targets=["v_proj", "down_proj"], gradient="dense")),
    ),
    "llama-130m, GC": Case("llama-130m", 8, 256, setup=Setup(checkpoint_every=1)),
    "llama-130m, GC of every other block, bf16": Case(
        "llama-130m", 16, 256, "bfloat16", Setup(checkpoint_every=2)
    ),
    "llama-130m, GC + VeLoRA": Case(
        "llama-130m", 8, 256, setup=Setup(checkpoint_every=1, velora=V)
    ),
    "llama-130m, GC + VeLoRA, bf16": Case(
        "llama-130m", 16, 256, "bfloat16", Setup(checkpoint_every=1, velora=V)
    ),
    "llama-130m, recomputed, chunked loss": Case(
        "llama-130m", 8, 256, setup=Setup(recompute=True, chunked_loss=True)
    ),
    "llama-130m, recomputed, chunked loss, VeLoRA, bf16": Case(
        "llama-130m",
        16,
        256,
        "bfloat16",
        Setup(recompute=True, chunked_loss=True, velora=V),
    ),
    "llama-130m, LoRA": Case("llama-130m", 8, 256, setup=adapters()),
    "llama-130m, LoRA, bf16": Case("llama-130m", 16, 256, "bfloat16", adapters()),
    "llama-130m, LoRA + VeLoRA": Case("llama-130m", 8, 256, setup=adapters(velora=V_LORA)),
    "llama-130m, QLoRA": Case("llama-130m", 8, 256, "bfloat16", adapters(method="qlora")),
    "roberta-base": Case("roberta-base", 8, 256),
    "roberta-base, VeLoRA": Case("roberta-base", 8, 256, setup=Setup(velora=V)),
    "vit-b-16": Case("vit-b-16", 16),
    "vit-b-16, LoRA": Case("vit-b-16", 16, setup=adapters()),
    f"{PACKAGED}, bf16": Case(PACKAGED, 4, 256, "bfloat16"),
    f"{PACKAGED}, LoRA, GC, bf16": Case(PACKAGED, 8, 256, "bfloat16", adapters(checkpoint_every=1)),
    f"{PACKAGED}, QLoRA": Case(PACKAGED, 4, 256, "bfloat16", adapters(method="qlora")),
}
"""On 2 CPU cores, each below 5 GB."""

_CARD: dict[str, Any] = {"dtype": "bfloat16", "seq": 1024}
CUDA_CASES = {
    "llama-350m": Case("llama-350m", 8, **_CARD),
    "llama-350m, GC": Case("llama-350m", 16, **_CARD, setup=Setup(checkpoint_every=1)),
    "llama-1b": Case("llama-1b", 4, **_CARD),
    "llama-1b, VeLoRA": Case("llama-1b", 4, **_CARD, setup=Setup(velora=V)),
    "llama-1b, GC + VeLoRA": Case(
        "llama-1b", 16, **_CARD, setup=Setup(checkpoint_every=1, velora=V)
    ),
    "llama-1b, recomputed, chunked loss": Case(
        "llama-1b", 8, **_CARD, setup=Setup(recompute=True, chunked_loss=True)
    ),
    "llama-1b, LoRA": Case("llama-1b", 4, **_CARD, setup=adapters()),
    "llama-1b, QLoRA": Case("llama-1b", 4, **_CARD, setup=adapters(method="qlora")),
    "llama-1b, 8-bit AdamW": Case("llama-1b", 4, **_CARD, setup=Setup(optimizer="adamw_8bit")),
    "llama-1b, fused AdamW": Case("llama-1b", 4, **_CARD, setup=Setup(optimizer="adamw_fused")),
    "roberta-base": Case("roberta-base", 64, 512, "bfloat16"),
    "vit-b-16": Case("vit-b-16", 128, dtype="bfloat16"),
}
"""For a GPU of 40 GB."""


# ------------------------------------------------------------------ what is predicted


def predicted(case: Case, device: str) -> dict[str, Any]:
    """The simulation, which loads no weights."""
    result = simulate(
        case.model,
        batch=case.batch,
        seq=case.seq,
        dtype=case.dtype,
        device=device,
        steps=STEPS,
        setup=case.setup,
    )
    return {
        "peak": result.peak_bytes,
        "saved": result.saved,
        "gradients": result.gradients,
        "optimizer_state": result.optimizer_state,
        "weights": result.weights,
        "segments": result.segments,
    }


# ------------------------------------------------------------------ a real model


def prepare(case: Case, device: str) -> tuple[nn.Module, Optimizer, Callable[[], Tensor], Any]:
    """Model, optimizer, loss and batch, on real tensors."""
    torch.manual_seed(0)
    architecture = resolve(case.model)
    model = _model(case, architecture, device).train()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    eight_bit = case.setup.optimizer == "adamw_8bit"
    setup = dataclasses.replace(case.setup, optimizer="sgd") if eight_bit else case.setup
    if setup.method == "qlora":  # quantised already
        setup = dataclasses.replace(setup, method="lora")
    model, optimizer = setup.apply(model, None, device)
    if eight_bit:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = _batch(case, architecture, device)
    return model, optimizer, lambda: architecture.loss(model, batch), batch


def _model(case: Case, architecture: Architecture, device: str) -> nn.Module:
    dtype = dtype_named(case.dtype)
    if case.setup.method == "qlora":
        return _quantised(case, architecture, device)
    if case.model == PACKAGED:
        from velora_torch.training.assets import resolve_model

        auto = auto_class(choose_task(_config(architecture)))
        return auto.from_pretrained(resolve_model(PACKAGED), dtype=dtype).to(device)
    return _random(architecture, dtype, device)


def _config(architecture: Architecture) -> Any:
    return preset(architecture.name)


def _random(architecture: Architecture, dtype: torch.dtype, device: str) -> nn.Module:
    with torch.device(device):
        auto = auto_class(choose_task(_config(architecture)))
        return auto.from_config(_config(architecture), dtype=dtype)


def _quantised(case: Case, architecture: Architecture, device: str) -> nn.Module:
    """As ``velora train`` loads it, through transformers and bitsandbytes."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from velora_torch.integrations.bitsandbytes import keep_differentiable
    from velora_torch.training.assets import resolve_model

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder:
        source: Any = resolve_model(PACKAGED)
        if case.model != PACKAGED:
            source = folder
            random: Any = _random(architecture, dtype_named(case.dtype), "cpu")
            random.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype_named(case.dtype),
            quantization_config=quantization,
            device_map={"": device},
        )
    keep_differentiable(model)
    checkpointing = case.setup.checkpoint_every is not None
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)


def _batch(case: Case, architecture: Architecture, device: str) -> dict[str, Tensor]:
    """Random numbers in the shape of the simulated batch."""
    fake = architecture.batch(FakeWorld(), case.batch, case.seq, dtype_named(case.dtype))
    classes = _config(architecture).num_labels
    real = {}
    for name, tensor in fake.items():
        if tensor.is_floating_point():
            real[name] = torch.randn(tensor.shape, dtype=tensor.dtype)
        else:
            most = classes if tensor.dim() == 1 else _config(architecture).vocab_size
            real[name] = torch.randint(0 if tensor.dim() == 1 else 3, most, tensor.shape)
    return {name: tensor.to(device) for name, tensor in real.items()}


# ------------------------------------------------------------------ what really happens


def tracked(case: Case, device: str) -> dict[str, Any]:
    """The same steps on real tensors, under the same tracker."""
    model, optimizer, loss, batch = prepare(case, device)
    trace = track(
        model,
        optimizer,
        loss,
        list(batch.values()),
        blocks=dict(repeated_blocks(model)),
        steps=STEPS,
        accumulation=case.setup.accumulation,
        vocab=resolve(case.model).vocab,
    )
    return {
        "peak": max(peak.total for peak in trace.peaks.values()),
        "saved": trace.saved,
        "gradients": trace.gradients,
        "optimizer_state": trace.optimizer_state,
        "weights": trace.weights,
        "segments": trace.segments(),
    }


def growth(case: Case, device: str) -> dict[str, Any]:
    """How much the process grows, without the tracker: from before the model to its largest."""
    _train(_small(case), device)  # libraries' threads, code and workspaces
    meter = _Card() if device == "cuda" else _Process()
    model, optimizer, loss, _batch = prepare(case, device)
    meter.restart()
    _steps(case, model, optimizer, loss)
    return {"baseline": meter.baseline, "growth": meter.largest() - meter.baseline}


def _small(case: Case) -> Case:
    """The same training of a few tokens, in a small model if there is one of the kind."""
    model = case.model if case.model in ("roberta-base", "vit-b-16") else "llama-60m"
    return dataclasses.replace(case, model=model, batch=1, seq=32)


def _train(case: Case, device: str) -> None:
    model, optimizer, loss, _batch = prepare(case, device)
    _steps(case, model, optimizer, loss)


def _steps(case: Case, model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    for _ in range(STEPS):
        for _ in range(case.setup.accumulation):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class _Process:
    """Resident memory of this process, from /proc."""

    def __init__(self) -> None:
        gc.collect()
        self._trim()
        self.baseline = _status("VmRSS")

    def restart(self) -> None:
        """Forget what building the model took besides the model."""
        gc.collect()
        self._trim()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM back to VmRSS

    def largest(self) -> int:
        return _status("VmHWM")

    def _trim(self) -> None:
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


class _Card:
    """Memory that torch has allocated on the GPU."""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        self.baseline = torch.cuda.memory_allocated()  # workspaces of the matrix library

    def restart(self) -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()

    def largest(self) -> int:
        return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("what", choices=["predicted", "tracked", "growth"])
    parser.add_argument("--cuda", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    device = "cuda" if options.cuda else "cpu"
    case = (CUDA_CASES if options.cuda else CASES)[options.name]
    measure = {"predicted": predicted, "tracked": tracked, "growth": growth}[options.what]
    with contextlib.suppress(ImportError):  # before the baseline is read
        import bitsandbytes  # noqa: F401
    print(json.dumps(measure(case, device)))


if __name__ == "__main__":
    main()

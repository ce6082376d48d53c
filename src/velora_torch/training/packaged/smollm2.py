"""SmolLM2-135M-Instruct out of a GGUF file: its weights as plain bfloat16 numbers."""

from __future__ import annotations

import gc
from pathlib import Path

from velora_torch.training.packaged.quiet import quiet


def convert_smollm2(source: Path, folder: Path) -> None:
    """Dequantise a GGUF file into bfloat16 safetensors and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        # The weights are plain numbers now; what says otherwise would stop save_pretrained.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.save_pretrained(folder)
    del model
    gc.collect()

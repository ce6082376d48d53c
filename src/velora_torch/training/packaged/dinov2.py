"""DINOv2-S/14 out of an ONNX file: the initialisers of its backbone, renamed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora_torch.training.packaged.quiet import quiet

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 112
"""Pixels a side of the images that the converted folder asks for: 8 × 8 patches."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_PATCH = 14
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def convert_dinov2(source: Path, folder: Path) -> None:
    """Write the backbone of an ONNX file as a Hugging Face folder.

    The position embeddings stay as they are shipped, 37 × 37 (hence `image_size` 518 in the
    configuration); transformers interpolates them to the grid of an image as it comes.
    """
    from transformers import Dinov2Config, Dinov2Model

    state = _state(source)
    layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layer."))
    width = state["embeddings.cls_token"].shape[-1]
    patches = state["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        patch_size=_PATCH,
        image_size=_PATCH * round(patches**0.5),
    )
    with quiet():
        model = Dinov2Model(config)
        model.load_state_dict(state)
        model.save_pretrained(folder)
        _preprocessor().save_pretrained(folder)


def _preprocessor() -> Any:
    from transformers import BitImageProcessor

    return BitImageProcessor(
        do_resize=True,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=3,  # bicubic, as DINOv2 was trained
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        do_convert_rgb=True,
    )


def _state(source: Path) -> dict[str, torch.Tensor]:
    """Weights under the names of `Dinov2Model`."""
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(source).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in arrays.items():
        if name.startswith("backbone."):
            state[_renamed(name.removeprefix("backbone."))] = tensor
    # The export folded the transposed weights of linear layers into anonymous constants; the
    # node that multiplies by one still carries the layer's path.
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            constants = [name for name in node.input if name in arrays]
            if constants:
                key = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
                state[_renamed(key + ".weight")] = arrays[constants[0]].T.contiguous()
    state["embeddings.position_embeddings"] = _positions(graph, arrays)
    # Only masked pre-training uses it, and it is not in the file.
    state["embeddings.mask_token"] = torch.zeros(1, state["embeddings.cls_token"].shape[-1])
    return state


def _positions(graph: Any, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Join the class token's position and the patches', (1, 1 + 37·37, D)."""
    import torch

    constants = {
        (node.op_type, name)
        for node in graph.node
        for name in node.input
        if node.name.startswith("/backbone/embeddings/") and name in arrays
    }
    of_class = [arrays[n] for op, n in constants if op == "Concat" and not n.startswith("backbone")]
    of_patches = [arrays[n] for op, n in constants if op == "Reshape" and arrays[n].ndim == 3]
    assert len(of_class) == 1
    assert len(of_patches) == 1
    return torch.cat([of_class[0], of_patches[0]], dim=1)


def _renamed(name: str) -> str:
    """Turn a name of the checkpoint into transformers' name for the module."""
    name = re.sub(
        r"attention\.attention\.(query|key|value)",
        lambda match: f"attention.{_PROJECTIONS[match[1]]}",
        name,
    )
    return name.replace("attention.output.dense", "attention.o_proj")

"""What a simulation runs on: a model from a name, a configuration or a module, without its data."""

from __future__ import annotations

import copy
import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from velora_torch import blocks
from velora_torch.heads import output_heads
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.simulator.four_bit import is_bitsandbytes, stand_in
from velora_torch.memory.simulator.presets import PRESETS, preset
from velora_torch.memory.simulator.task import Task, auto_class, choose_task, task_of_class
from velora_torch.paths import as_path
from velora_torch.remote_code import check_code, explain, trust

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Batch = dict[str, Tensor]


class Architecture:
    """A model's structure, from which fake models of any depth and fake batches are made.

    Made by :func:`resolve`.
    """

    name: str
    depth: int | None
    """Number of repeated blocks; ``None`` where a few of them do not speak for all."""
    vocab: int | None
    """Size of the logits dimension: the output features of the output head, if there is one."""
    config: Any
    """The configuration of transformers; ``None`` for a module that has none."""

    def __init__(self, name: str, skeleton: nn.Module, task: Task | None, config: Any) -> None:
        self.name = name
        self.depth = blocks.uniform_depth(skeleton)
        heads = [head for head in output_heads(skeleton) if head is not None]
        self.vocab = getattr(heads[0], "out_features", None) if heads else None
        self._task, self.config = task, config
        self._positions = _positions(skeleton, config)
        self._dtype: torch.dtype | None = None

    def build(
        self, world: FakeWorld, dtype: torch.dtype | None, depth: int | None = None
    ) -> nn.Module:
        """A new model on fake CPU tensors, in training mode and without a key-value cache.

        Args:
            world: the fake world that the model and its batches live in.
            dtype: type of the weights of a model made from a configuration; ``None`` takes the
                configuration's own. A model that was built before keeps its types.
            depth: number of blocks; all by default.

        Raises:
            ValueError: the model cannot be cut to that depth.
        """
        model = self._build(world, dtype).train()
        if depth is not None and depth != self.depth:
            blocks.cut(model, depth)
        for config in {id(c): c for m in model.modules() if (c := vars(m).get("config"))}.values():
            if getattr(config, "use_cache", False):
                config.use_cache = False
            if depth is not None and getattr(config, "num_hidden_layers", None) == self.depth:
                _shorten(config, depth)
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        return model

    def _build(self, world: FakeWorld, dtype: torch.dtype | None) -> nn.Module:
        raise NotImplementedError

    def batch(
        self, world: FakeWorld, batch: int, seq: int | None = None, dtype: torch.dtype | None = None
    ) -> Batch:
        """Keyword arguments for the model's forward, labels included: a full batch, no padding.

        Args:
            world: the fake world of the model.
            batch: number of examples.
            seq: tokens of each; by default 1024, or as many as the model has positions.
            dtype: type of images; by default that of the model built last.

        Raises:
            ValueError: ``seq`` is beyond the model's positions, or what the model reads is unknown.
        """
        if self._task is None:
            raise ValueError(
                f"what {self.name} reads is unknown, so no batch can be made for it; give one: a "
                f"dict (keyword arguments of its forward), a tuple (positional ones) or a tensor"
            )
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        with world:
            if self._task.images:
                return _images(self.config, batch, dtype or self._dtype or torch.float32)
            ids = torch.zeros(batch, self.seq(seq) or 1, dtype=torch.long)
            if self._task.labels_each_token:
                return {"input_ids": ids, "labels": torch.zeros_like(ids)}
            return {"input_ids": ids, "labels": _class_labels(self.config, batch)}

    def seq(self, seq: int | None = None) -> int | None:
        """The number of tokens that a batch has if ``seq`` is asked for; ``None`` for images."""
        if self._task is not None and self._task.images:
            return None
        limit = self._positions
        if seq is None:
            return min(1024, limit or 1024)
        if seq < 1 or (limit is not None and seq > limit):
            raise ValueError(
                f"seq must be between 1 and {limit or 'any length'}, the positions that "
                f"{self.name} has, got {seq}"
            )
        return seq

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model reads; ``None`` for any length."""
        return self._positions

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the forward and return a 0-d loss.

        It is ``.loss`` of the output, or where there is none the sum of its floating tensors.
        """
        if isinstance(batch, dict):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if loss is not None:
            return loss
        tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
        terms = [x.float().sum() for x in tensors if x.is_floating_point()]
        if not terms:
            raise ValueError(
                f"the output of {self.name} has neither a loss nor floating tensors to sum up: "
                f"give a loss function"
            )
        return torch.stack(terms).sum()


class _FromConfig(Architecture):
    def __init__(self, name: str, config: PretrainedConfig) -> None:
        config = copy.deepcopy(config)
        self._auto = choose_task(config)
        for key in self._auto.special_tokens:
            if getattr(config, key, None) is None:
                setattr(config, key, 0)
        super().__init__(name, self._meta(config, None), self._auto, config)

    def _build(self, world: FakeWorld, dtype: torch.dtype | None) -> nn.Module:
        return world.model(self._meta(self.config, dtype))

    def _meta(self, config: PretrainedConfig, dtype: torch.dtype | None) -> nn.Module:
        config = copy.deepcopy(config)
        dtype = dtype or config.dtype or torch.float32
        with torch.device("meta"):
            model: nn.Module = auto_class(self._auto).from_config(config, dtype=dtype, **trust())
        return model


class _FromModule(Architecture):
    def __init__(self, name: str, model: nn.Module) -> None:
        self._model = model
        reader = _transformers_model(model)
        config = getattr(reader, "config", None)
        super().__init__(name, model, task_of_class(type(reader)) if reader else None, config)

    def _build(self, world: FakeWorld, dtype: torch.dtype | None) -> nn.Module:
        return world.model(_on_meta(self._model))


def resolve(model: str | Path | PretrainedConfig | nn.Module) -> Architecture:
    """Find out what a model is.

    Args:
        model: a preset's name (see ``presets.PRESETS``), a folder with a ``config.json`` or that
            file, a hub id, a transformers configuration, or a module.

    Raises:
        ValueError: nothing of that name, or an architecture that transformers does not know.
    """
    if isinstance(model, Architecture):
        return model
    if isinstance(model, nn.Module):
        return _FromModule(type(model).__name__, model)
    if isinstance(model, (str, Path)):
        return _from_name(str(model))
    from transformers import PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return _FromConfig(model.model_type or type(model).__name__, model)
    raise TypeError(
        f"a model is a name, a path, a transformers configuration or a module, got "
        f"{type(model).__name__}"
    )


def _from_name(name: str) -> Architecture:
    if name in PRESETS:
        return _FromConfig(name, preset(name))
    path = as_path(name)
    if path.exists():
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"the folder {name} holds no config.json, so it is not a model")
        resolved = file.resolve()
        own = resolved.parent.name if resolved.name == "config.json" else resolved.stem
        return _FromConfig(own, _read_config(file))
    if re.match(r"[./~]", name) or name.endswith(".json") or name.count("/") > 1:
        raise ValueError(f"no folder or file {name}; presets: {', '.join(PRESETS)}")
    return _FromConfig(name, _hub_config(name))


def _read_config(file: Path) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}), so it is not a model's config") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    check_code(file.parent)
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if not known and not ("auto_map" in content and trust()["trust_remote_code"]):
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), 3, 0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"{file} has model_type {kind!r}, which transformers does not know{hint}. Set the "
            f"model_type, install a transformers that knows it, or pass a built module"
        )
    source = file.parent if file.name == "config.json" else file  # code lies next to it
    return AutoConfig.from_pretrained(source, **trust())


def _hub_config(name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    near = difflib.get_close_matches(name, PRESETS, 2, 0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"presets: {', '.join(PRESETS)}"
    if "/" not in name and difflib.get_close_matches(name, PRESETS, 1, 0.9):
        raise ValueError(f"no model {name!r}: {hint}")  # a slip: not worth asking the hub
    try:
        return AutoConfig.from_pretrained(name, **trust())
    except (OSError, ValueError) as error:
        reason = explain(name, error)
        raise ValueError(
            f"no model {name!r}: it is no preset ({hint}), no folder or config.json, and its "
            f"configuration is neither in the hub's local cache nor could it be read from the hub "
            f"({reason}). Check the name, or download its config.json and give the path of that"
        ) from error


def _shorten(config: Any, depth: int) -> None:
    """Tell a configuration that there are fewer layers; its lists with an entry for each as well.

    Some forwards count layers by the configuration and not by their list.
    """
    full = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == full:
            setattr(config, key, value[:depth])
    config.num_hidden_layers = depth


def _positions(model: nn.Module, config: Any) -> int | None:
    """Tokens that a model can read; position embeddings may start behind a padding index."""
    text = config.get_text_config() if config is not None else None
    limit: int | None = getattr(text, "max_position_embeddings", None)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit:
            return limit if module.padding_idx is None else limit - module.padding_idx - 1
    return limit


def _images(config: Any, batch: int, dtype: torch.dtype) -> Batch:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.zeros(batch, getattr(config, "num_channels", 3), height, width, dtype=dtype)
    return {"pixel_values": pixels, "labels": _class_labels(config, batch)}


def _class_labels(config: Any, batch: int) -> Tensor:
    """One label each; a head with a single output is a regression in transformers."""
    return torch.zeros(batch, dtype=torch.float32 if config.num_labels == 1 else torch.long)


def _transformers_model(model: nn.Module) -> nn.Module | None:
    """The outermost transformers model in a module, which may be an adapter's wrapper."""
    return next((m for m in model.modules() if task_of_class(type(m)) is not None), None)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without data: it shares no tensor with other copies, nor a fake world with them."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for module in model.modules():
        tensors += [value for value in vars(module).values() if isinstance(value, Tensor)]
        if is_bitsandbytes(module):
            memo[id(module)] = stand_in(module)
    memo |= {id(tensor): _meta_twin(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo)


def _meta_twin(tensor: Tensor) -> Tensor:
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad)

"""The order of examples when the longest batch has to come first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class LongestFirst(Sampler[int]):
    """Every example once, in an order that seed and epoch give; the longest one leads.

    A batch is padded to its longest example, so the first batch is as large as any that follows.

    Args:
        lengths: of the examples.
        seed: of the order.
        group: examples in a batch; sorts batches by length within stretches of many batches.
    """

    def __init__(self, lengths: list[int], seed: int, group: int | None = None) -> None:
        self._lengths, self._seed, self._group = lengths, seed, group
        self._epoch = 0

    @staticmethod
    def of(dataset: Any, args: Any) -> LongestFirst:
        """The order of a tokenised data set under `TrainingArguments`."""
        lengths = [len(ids) for ids in dataset["input_ids"]]
        grouped = args.train_sampling_strategy == "group_by_length"
        examples = args.train_batch_size * args.gradient_accumulation_steps
        return LongestFirst(lengths, args.seed, examples if grouped else None)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader: each epoch has an order of its own, also when resumed."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Indices of one epoch."""
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        if self._group is None:
            order = torch.randperm(len(self), generator=generator).tolist()
        else:
            order = get_length_grouped_indices(self._lengths, self._group, generator=generator)
        longest = max(order, key=lambda index: self._lengths[index], default=None)
        if longest is not None:
            order.remove(longest)
            order.insert(0, longest)
        return iter(order)

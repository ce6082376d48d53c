"""Hugging Face's `Trainer` with layers split over processes that take the same examples.

The model is split while it trains, and whole before and after, so that it is loaded, evaluated and
saved as ever.
"""

from __future__ import annotations

from typing import Any

from velora_torch.integrations.tensor_parallel import SplitModel, whole_state

SIZE = "_tp_size"
"""What `Trainer` reads of a model to know how many processes take the same examples."""


class TensorParallelTrainerMixin:
    """Put before `VeloraTrainerMixin`, and that before `Trainer` or a class of its kind."""

    args: Any
    model: Any
    accelerator: Any
    gather_function: Any
    tensor_parallel: int = 1
    """Processes that split each layer; all that there are, or 1."""
    _split: SplitModel | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the model's layers are split meanwhile."""
        if self.tensor_parallel == 1:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        self._split = SplitModel(self.model, self.tensor_parallel)
        gather, former = self.gather_function, getattr(self.model, SIZE, None)
        # All have the losses of the same examples.
        self.gather_function = lambda tensors, *rest, **options: tensors
        setattr(self.model, SIZE, self.tensor_parallel)
        try:
            result = super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.gather_function = gather
            setattr(self.model, SIZE, former)
        self._split.join()
        self._split = None
        return result

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if self._split is not None and training:
            # Prepared like this, nothing wraps it that would average gradients.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return super()._wrap_model(model, training, dataloader)  # type: ignore[misc]

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]
        if self._split is not None and hasattr(loader.batch_sampler, "num_processes"):
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, with the groups of a model that is not split.

        `Trainer` gives split tensors a group of their own, since one kernel can't take both kinds.
        """
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self._split is None:
            return optimizer
        decayed = set(self.get_decay_parameter_names(self.model))  # type: ignore[attr-defined]
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        common = {**optimizer.param_groups[0], "foreach": False}
        optimizer.param_groups = [
            {
                **common,
                "weight_decay": self.args.weight_decay if decays else 0.0,
                "params": [p for name, p in trained if (name in decayed) == decays],
            }
            for decays in (True, False)
        ]
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._split is not None and state_dict is None:
            state_dict = whole_state(self.model)
        super()._save(output_dir, state_dict)  # type: ignore[misc]

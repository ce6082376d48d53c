"""Conversations: TRL's `SFTTrainer` applies the chat template and the loss on answers."""

from __future__ import annotations

from typing import Any

from velora_torch.training.data import PreparedData
from velora_torch.training.models import ModelError
from velora_torch.training.schema import Recipe
from velora_torch.training.trainer import RecordingTrainerMixin


def build_chat_trainer(
    recipe: Recipe, data: PreparedData, settings: dict[str, Any], shared: dict[str, Any]
) -> Any:
    """An `SFTTrainer` that records and keeps the state of compressed layers.

    Raises:
        ModelError: TRL is not installed.
    """
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise ModelError("data.format: chat needs TRL: pip install 'velora-torch[chat]'") from None

    class RecordingChatTrainer(RecordingTrainerMixin, SFTTrainer):
        """The trainer of conversations."""

    config = SFTConfig(
        **settings,
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        assistant_only_loss=data.assistant_only_loss,
        # Prompts with one answer: the loss on the answer alone.
        completion_only_loss=(recipe.data.answers_only and not data.assistant_only_loss) or None,
    )
    return RecordingChatTrainer(args=config, **shared)

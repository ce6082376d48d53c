"""What the libraries below say to their own developers, silenced for a command's user."""

from __future__ import annotations

import logging
import os
import warnings

LOGGERS = ("bitsandbytes", "torch.utils._pytree")
"""The second one warns about torchao when that is imported."""


def quiet() -> None:
    """Silence deprecations among libraries and notes about missing accelerators.

    Imports nothing: it has to come before what it silences.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)

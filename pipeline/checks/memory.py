"""The batch and adapter sizes that peak memory depends on, from the params.

Not in ``settings``, which every stage reads: what a trial computes must not count for stages that run none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.params import Evaluate, Quantize, Recover
from pipeline.settings import settings_of

if TYPE_CHECKING:
    from pipeline.trial.setting import Setting


def memory_setting(recovery: Recover, evaluation: Evaluate, adapters: Quantize) -> Setting:
    """Return the batch and adapter sizes that peak memory depends on, by sections of these names."""
    from pipeline.compress import quantize  # these import torch, which a check of the params may not need
    from pipeline.trial import context, recover

    return context.memory_setting(
        settings_of(recover.Settings, recovery), evaluation.batch_tokens, settings_of(quantize.Settings, adapters)
    )

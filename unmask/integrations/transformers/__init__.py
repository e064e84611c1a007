"""transformers' habits: ``generate``'s arguments, ``custom_generate`` in both its forms, streamers.

Nothing here imports transformers: models, configurations and streamers of it are taken as they come.
"""

from pathlib import Path

from unmask.integrations.transformers.arguments import sampler_settings
from unmask.integrations.transformers.generate import custom_generate, generate

CUSTOM_GENERATE = str(Path(__file__).parent)
"""A folder with ``custom_generate/generate.py``, for ``model.generate(..., custom_generate=CUSTOM_GENERATE,
trust_remote_code=True)``; uploaded to the hub, it serves whoever has ``unmask`` installed."""

__all__ = ["CUSTOM_GENERATE", "custom_generate", "generate", "sampler_settings"]

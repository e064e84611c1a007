"""What transformers runs for ``model.generate(..., custom_generate=THIS_REPOSITORY, trust_remote_code=True)``."""

from unmask.integrations.transformers import generate

__all__ = ["generate"]

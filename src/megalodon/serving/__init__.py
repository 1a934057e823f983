"""The HTTP face of inference: OpenAI's endpoints, contexts that live on disk, limits, metrics, and a page."""

from megalodon.serving.app import create_app
from megalodon.serving.settings import Settings

__all__ = ["Settings", "create_app"]

"""The HTTP face of inference: OpenAI's endpoints, contexts that live on disk, limits, metrics, and a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megalodon.serving.settings import Settings

if TYPE_CHECKING:
    from megalodon.serving.app import create_app

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module 'megalodon.serving' has no attribute {name!r}")
    from megalodon.serving.app import create_app  # with all that serving needs, which `serve --help` does not

    return create_app

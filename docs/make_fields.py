"""Writes the table of request fields in serving.md from the schemas: `python docs/make_fields.py`."""

from __future__ import annotations

from pathlib import Path

from megalodon.serving.fields import table, written_into
from megalodon.serving.response_schemas import ResponsesRequest
from megalodon.serving.schemas import ChatRequest, CompletionRequest, EmbeddingsRequest

ENDPOINTS = {
    "completions": CompletionRequest,
    "chat": ChatRequest,
    "responses": ResponsesRequest,
    "embeddings": EmbeddingsRequest,
}
"""Those whose fields are in the table."""

if __name__ == "__main__":
    page = Path(__file__).with_name("serving.md")
    page.write_text(written_into(page.read_text(encoding="utf-8"), table(ENDPOINTS)), encoding="utf-8")
    print(f"written: {page}")

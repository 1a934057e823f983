"""Clients as people install them. Each test is skipped, with the reason, where its client is not installed:

pip install openai litellm langchain-openai instructor llm "lm-eval[api]" guidellm
(cd tests/serving/clients && npm install)
"""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field
from serving_cases import Server


class Person(BaseModel):
    """A structured answer that a model with random weights can finish."""

    mood: Literal["calm", "wild"]
    age: int = Field(ge=1, le=99)


@pytest.fixture
def person() -> type[Person]:
    return Person


@pytest.fixture
def base_url(server: Server) -> str:
    return f"{server.url}/v1"

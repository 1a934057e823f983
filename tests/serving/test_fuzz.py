"""The API fuzzed from its own OpenAPI schema: no 500, and every refusal an error object."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from serving_cases import Server, eventually


def fuzz(server: Server, examples: int) -> None:
    """Send generated requests, right and wrong ones, to every operation.

    An upload that says nothing is a wrong one too, so operations that keep what they are sent are included.
    """
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    failures: list[str] = []
    for result in schema.get_all_operations():
        operation = result.ok()

        def send(case: schemathesis.Case) -> None:
            answer = case.call(base_url=server.url, timeout=600)
            if answer.status_code >= 500:
                failures.append(f"{answer.status_code} {case.as_curl_command()}")
            if answer.status_code >= 400:
                error = answer.json()["error"]
                if error.keys() != {"message", "type", "param", "code"}:
                    failures.append(f"{error} {case.as_curl_command()}")

        for mode in schemathesis.GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)
            run_one = settings(
                max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
            )
            with suppress(Unsatisfiable):  # an operation that has no wrong requests
                run_one(given(strategy)(send))()
    assert not failures, "\n".join(failures[:5])
    assert eventually(lambda: server.engine.idle)


def test_a_few_requests_from_the_schema(serve: Callable[..., Server]) -> None:
    fuzz(serve(max_tokens=20, max_prompt_tokens=5000), 7)


@pytest.mark.slow
def test_many_requests_from_the_schema(serve: Callable[..., Server]) -> None:
    fuzz(serve(max_tokens=20, max_prompt_tokens=5000), 400)

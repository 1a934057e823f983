"""openai-node and the Vercel AI SDK, in Node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def run(script: str, base_url: str) -> Any:
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules").is_dir():
        pytest.skip(f"needs Node and its packages: npm install in {HERE}")
    done = subprocess.run([node, script, base_url], cwd=HERE, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_openai_node(base_url: str) -> None:
    found = run("openai_node.mjs", base_url)
    assert found["turns"] == 6 and found["streamed"] and found["response"] and found["next"]
    assert found["parsed"]["mood"] in ("calm", "wild") and isinstance(found["parsed"]["ok"], bool)
    assert found["embeddings"] == [32, 32]
    assert found["error"] == {"status": 400, "param": "max_tokens", "code": "max_tokens_too_large"}


def test_vercel_ai_sdk(base_url: str) -> None:
    for found in run("ai_sdk.mjs", base_url).values():
        assert found["turns"] == 6 and found["streamed"] and found["error"] == 400
        assert found["object"]["mood"] in ("calm", "wild")

"""What a linearised model is good for: it is served with contexts, trained on, evaluated and generated from, as any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from megalodon.cli import main
from megalodon.inference import load_model
from megalodon.linearize import linearize, plan, read_config, recipe_of
from megalodon.serving import Settings, create_app
from megalodon.serving.launch import EngineOptions

pytestmark = pytest.mark.slow

RECIPES = {"gecko": ["chunk_size=8"], "lolcats": ["window=8"], "supra": []}
BODY = {"model": "out", "max_tokens": 12, "seed": 1, "logprobs": 0, "ignore_end": True}


@pytest.fixture(scope="module", params=sorted(RECIPES))
def out(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama after each of some recipes, a few steps in each stage."""
    folder, recipe = tmp_path_factory.mktemp(request.param), recipe_of(request.param)
    text = folder / "text.txt"
    text.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(600)))
    keys = [f"data.corpus.source={text}", "data.sequence_length=32", "data.batch_size=2", "finetune.tokens=256"]
    keys += [f"data.cache_folder={folder / 'cache'}", *RECIPES[request.param]]
    keys += [] if request.param == "supra" else ["transfer.tokens=256"]
    assert not linearize(plan(teacher, folder / "out", recipe, read_config(recipe.config, None, keys)))
    return folder / "out"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints that ends well."""
    with pytest.raises(SystemExit) as caught:
        main([str(one) for one in arguments])
    printed = capsys.readouterr().out
    assert caught.value.code == 0, printed
    return printed


def served(out: Path, contexts: Path) -> TestClient:
    """A server of the model, as `megalodon serve` makes it."""
    engine = EngineOptions(out, device="cpu", slots=4, prefix_memory=1 << 20).engine()
    return TestClient(create_app(engine, Settings(model_name="out", contexts=str(contexts))))


def outcome(answer: dict[str, Any]) -> tuple[str, list[float]]:
    choice = answer["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def test_it_is_served_with_contexts(out: Path, tmp_path: Path) -> None:
    """Far longer than the teacher's rows; the context is there for the next server too."""
    text = "".join(f"{number} plus {number} is {2 * number}.\n" for number in range(100))

    def complete(client: TestClient, **body: object) -> dict[str, Any]:
        answer = client.post("/v1/completions", json={**BODY, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    with served(out, tmp_path) as client:
        made = client.post("/v1/contexts", content=text.encode(), headers={"Content-Type": "text/plain"})
        assert made.status_code == 201 and made.json()["tokens"] == len(text) > 1000, made.text
        kept = made.json()["id"]
        whole, gone_on = complete(client, prompt=text + "7 plus"), complete(client, context=kept, prompt="7 plus")
    assert gone_on["usage"]["prompt_tokens_details"]["cached_tokens"] > 1500  # whole pieces; the rest is read again
    with served(out, tmp_path) as client:
        later = complete(client, context=kept, prompt="7 plus")
    for answer in (gone_on, later):
        assert outcome(answer)[0] == outcome(whole)[0]
        assert outcome(answer)[1] == pytest.approx(outcome(whole)[1], abs=1e-4)


def test_it_trains_on(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a stream whose state goes on from row to row, which attention's could not."""
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"{number} squared is {number * number}.\n" for number in range(900)))
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{init_from: {out}}}\n")
    keys = ["data.mode=streamed", "data.sequence_length=64", "data.batch_size=2", "run.steps=30", f"run.folder={run}"]
    keys += [f"data.corpus.source={text}", f"data.cache_folder={tmp_path / 'cache'}", "optimizer.learning_rate=3e-3"]
    command(capsys, "train", config, *keys, "schedule.warmup_steps=0", "evaluation.every=null")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in lines if "loss" in record]
    assert sum(losses[-5:]) < sum(losses[:5])
    before, after = (load_model(folder, "cpu") for folder in (out, run / "model"))
    assert after.config.mixer_of(0) == before.config.mixer_of(0) and after.config.state_kind == "constant"
    assert any(not torch.equal(x, y) for x, y in zip(before.parameters(), after.parameters(), strict=True))


def test_it_is_evaluated_and_generated_from(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(100)))
    assert "bits/byte" in command(capsys, "evaluate", "perplexity", out, text, "--max-tokens", "900")
    assert command(capsys, "generate", out, "3 times 3 is", "--max-tokens", "5")

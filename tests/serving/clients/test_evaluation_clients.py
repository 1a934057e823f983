"""lm-eval's API model and guidellm run to a result that is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from serving_cases import Server

from engine_cases import make_model
from megalodon.data import ByteTokenizer

QUESTIONS = [
    {"question": f"Question {i}: which of these is next? ", "choices": [f"first {i}", "second", "the third one"]}
    for i in range(12)
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


def expected_accuracy() -> float:
    """By full forwards: how often the first choice is the likeliest."""
    model, right = make_model(), 0
    for one in QUESTIONS:
        scores = []
        for choice in one["choices"]:
            ids = list((one["question"] + choice).encode())
            with torch.inference_mode():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            begin = len(one["question"].encode())
            scores.append(sum(float(logprobs[place - 1, ids[place]]) for place in range(begin, len(ids))))
        right += scores.index(max(scores)) == 0
    return right / len(QUESTIONS)


def test_lm_eval(server: Server, base_url: str, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="lm-eval's API model needs its extra `api`")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    ByteTokenizer().save(tmp_path / "tokenizer")
    model = LocalCompletionsAPI(
        base_url=f"{base_url}/completions",
        model="tiny",
        tokenizer=str(tmp_path / "tokenizer"),
        tokenizer_backend="huggingface",
        batch_size=4,
        max_length=2048,
    )
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "local_choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=["local_choice"], task_manager=manager, bootstrap_iters=0)
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(expected_accuracy())
    asked = Instance("generate_until", {}, ("Once upon", {"until": ["zz"], "max_gen_toks": 7, "temperature": 0}), 0)
    plain = server.openai().completions.create(model="tiny", prompt="Once upon", max_tokens=7, temperature=0)
    assert model.generate_until([asked])[0] == plain.choices[0].text


def test_guidellm(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("guidellm")
    ByteTokenizer().save(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "guidellm", "run", "--profile", "kind=synchronous", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={server.url},model=tiny"]
    command += ["--constraint", "kind=max_requests,count=4"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={tmp_path / 'tokenizer'}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=48,output_tokens=16"]
    command += ["--output", f"kind=json,path={tmp_path / 'report.json'}"]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    requests = report["benchmarks"][0]["requests"]
    assert len(requests["successful"]) == 4 and not requests["errored"]
    assert {one["output_tokens"] for one in requests["successful"]} == {16}

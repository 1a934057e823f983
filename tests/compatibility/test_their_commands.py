"""`lm_eval` and `trl`, as processes that never heard of us, on a saved folder.

`transformers serve` cannot: it takes a model's class from Transformers alone, whatever is trusted.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compatibility_cases import byte_tokenizer, tiny
from transformers import AutoModelForCausalLM

SOURCE = Path(__file__).resolve().parents[2] / "src"
TEXTS = ["".join(f"{i} times {i} is {i * i}. " for i in range(start, start + 9)) for start in (3, 40, 77)]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its tokenizer."""
    place = tmp_path_factory.mktemp("saved") / "model"
    tiny().save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def command(name: str, *arguments: str) -> list[str]:
    found = Path(sys.executable).parent / name
    if not found.exists():
        pytest.skip(f"the command {name} is not installed")
    return [str(found), *arguments]


def environment(place: Path) -> dict[str, str]:
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(place / "hf"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**os.environ, **offline, "PYTHONPATH": str(SOURCE)}


def run(words: list[str], place: Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env=environment(place), cwd=place)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@torch.no_grad()
def nats(text: str, begin: bool) -> tuple[float, int]:
    """Of all tokens but the first, or of all after <s>, from one pass; how many they are."""
    ids = torch.tensor([[byte_tokenizer().bos_token_id] * begin + byte_tokenizer()(text).input_ids])
    logits = tiny()(ids[:, :-1], use_cache=False).logits.double()
    return float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum")), ids.shape[1] - 1


def test_lm_eval_scores_a_local_task(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "rolling.yaml").write_text(
        f"task: our_rolling\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'rows.jsonl'}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    options = ["--tasks", "our_rolling", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2"]
    theirs = command(
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"
    )
    ours = [
        sys.executable,
        "-m",
        "megalodon.evaluation.harness",
        "--model",
        "megalodon",
        "--model_args",
        f"pretrained={folder}",
    ]
    expected = sum(nats(text, True)[0] for text in TEXTS) / sum(map(len, TEXTS)) / math.log(2)
    for number, words in enumerate((theirs, ours)):
        run([*words, *options, "--output_path", str(tmp_path / f"out{number}")], tmp_path)
        (written,) = (tmp_path / f"out{number}").rglob("results*.json")
        found = json.loads(written.read_text())["results"]["our_rolling"]["bits_per_byte,none"]
        assert found == pytest.approx(expected, rel=1e-5)


def test_trl_fine_tunes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    words = [
        "sft",
        "--model_name_or_path",
        str(folder),
        "--trust_remote_code",
        "--dataset_name",
        str(tmp_path / "data"),
    ]
    words += [
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "3",
        "--use_cpu",
    ]
    words += [
        "--logging_steps",
        "1",
        "--report_to",
        "none",
        "--dtype",
        "float32",
        "--bf16",
        "False",
        "--eos_token",
        "</s>",
    ]
    words += ["--gradient_checkpointing", "False", "--disable_tqdm", "True", "--learning_rate", "1e-3"]
    run(command("trl", *words), tmp_path)
    (state,) = (tmp_path / "out").rglob("trainer_state.json")
    losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    scored = [nats(text + "</s>", False) for text in TEXTS]
    assert losses[0] == pytest.approx(sum(s for s, _ in scored) / sum(n for _, n in scored), rel=1e-3)
    assert losses[1] < losses[0]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(trained.lm_head.weight, tiny().lm_head.weight)

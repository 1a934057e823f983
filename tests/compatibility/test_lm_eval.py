"""lm-evaluation-harness: whole texts, at their true lengths, through its own model class and through ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility_cases import byte_tokenizer, tiny

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra dev)")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megalodon.evaluation import harness

MODEL, TOKENIZER = tiny(), byte_tokenizer()
TEXT = "".join(f"{i} times {i} is {i * i}. " for i in range(150))


@torch.no_grad()
def truth(context: str, answer: str) -> tuple[float, bool]:
    """From one pass over the whole; the harness scores a context's last spaces, and begins with <s> if it is empty."""
    spaces = len(context) - len(context.rstrip())
    context, answer = context.rstrip(), " " * spaces + answer
    before = TOKENIZER(context).input_ids or [TOKENIZER.bos_token_id]
    ids = torch.tensor([before + TOKENIZER(answer).input_ids])
    logits = MODEL(ids[:, :-1], use_cache=False).logits[:, len(before) - 1 :].double()
    targets = ids[:, len(before) :]
    likely = logits.log_softmax(-1).gather(-1, targets[..., None]).sum()
    return float(likely), bool((logits.argmax(-1) == targets).all())


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def models(batch_size: int) -> list[Any]:
    given = {"pretrained": MODEL, "tokenizer": TOKENIZER, "batch_size": batch_size, "device": "cpu"}
    return [HFLM(**given), lm_eval.api.registry.get_model("megalodon")(**given)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_whole_texts(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PIECE", 500)
    monkeypatch.setattr(harness, "LOGITS_AT_ONCE", 700)
    assert len(TEXT) > 3000
    pairs = [(TEXT[:cut], TEXT[cut : cut + size]) for cut, size in ((2900, 12), (40, 5), (2500, 700), (0, 30))]
    likeliest = MODEL.generate(**TOKENIZER(TEXT[:49], return_tensors="pt"), max_new_tokens=1, do_sample=False)[0, -1:]
    pairs.append((TEXT[:49], TOKENIZER.decode(likeliest)))
    expected = [truth(*pair) for pair in pairs]
    for lm in models(batch_size):
        assert lm.max_length > 1_000_000
        found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True)
        assert rolling == pytest.approx([truth("", TEXT)[0]], rel=1e-5)


def test_a_limit_that_is_given_holds() -> None:
    ours = models(1)[1]
    ours._max_length = 64
    end = 1 + TEXT.index("is", 900)
    pair = (TEXT[: end - 10].rstrip(), TEXT[len(TEXT[: end - 10].rstrip()) : end])
    (found,) = ours.loglikelihood(requests("loglikelihood", [pair]), disable_tqdm=True)
    ids = torch.tensor([TOKENIZER(TEXT[end - 65 : end]).input_ids])
    logits = MODEL(ids[:, :-1]).logits[0, -len(pair[1]) :].detach()
    kept = -torch.nn.functional.cross_entropy(logits, ids[0, -len(logits) :], reduction="sum")
    assert found[0] == pytest.approx(float(kept), rel=1e-5) and found[0] != pytest.approx(truth(*pair)[0], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_generation_is_the_models(batch_size: int) -> None:
    prompts = [TEXT[:2600], TEXT[:7], TEXT[:300]]
    given = {"until": ["@"], "max_gen_toks": 9, "do_sample": False}
    expected = []
    for prompt in prompts:
        ids = TOKENIZER(prompt, return_tensors="pt").input_ids
        new = MODEL.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        expected.append(TOKENIZER.decode(new, skip_special_tokens=True))
    for lm in models(batch_size):
        found = lm.generate_until(
            requests("generate_until", [(prompt, given) for prompt in prompts]), disable_tqdm=True
        )
        assert found == [text.split("@")[0] for text in expected]


def test_local_tasks_from_a_saved_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    MODEL.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = [
        {"text": TEXT[i : i + 400 + i], "question": f"{i} times 2 is", "choices": [f" {2 * i}", " 7"], "answer": 0}
        for i in (3, 500)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'rows.jsonl'}}}\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        f"task: our_choice\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "rolling.yaml").write_text(
        f"task: our_rolling\n{data}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    results = lm_eval.simple_evaluate(
        model="megalodon",
        model_args={"pretrained": str(tmp_path / "model")},
        tasks=["our_choice", "our_rolling"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
    )["results"]
    right = [
        truth(row["question"], row["choices"][0])[0] > truth(row["question"], row["choices"][1])[0] for row in rows
    ]
    assert results["our_choice"]["acc,none"] == sum(right) / 2
    bits = -sum(truth("", row["text"])[0] for row in rows) / sum(len(row["text"]) for row in rows) / 0.6931471805599453
    assert results["our_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)

"""What other people's tools make of our models: the table docs/compatibility.md, one figure for each thing tried.

    python benchmarks/compatibility.py

Needs the tools that it names (`pip install trl lm-eval torchao peft`); a missing one is a row that says so. All models
are tiny and random, so figures are differences from what is right, and losses that are known beforehand.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from megalodon import MegalodonConfig, MegalodonForCausalLM  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
SIZES = {"num_layers": 2, "model_dim": 128, "z_dim": 64, "value_dim": 128, "ffn_hidden_dim": 128, "chunk_size": 32}
QUIET: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


class Trial(NamedTuple):
    """One row: the tool's distribution, what was tried, and what gives the figure."""

    tool: str
    tried: str
    figure: Callable[[Path], str]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = {c: i + 3 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0, "<s>": 1, "</s>": 2} | letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny() -> MegalodonForCausalLM:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return MegalodonForCausalLM(MegalodonConfig(**SIZES, **ids, vocab_size=259)).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(1))


def saved(folder: Path) -> str:
    tiny().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def largest(difference: torch.Tensor) -> str:
    return f"{float(difference.abs().max()):.1e}"


@torch.no_grad()
def generated_error(model: Any, length: int = 1) -> torch.Tensor:
    """Logits of `generate` less those of one pass over the whole text."""
    given = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(input_ids=tokens(1, length), **given)
    return (
        torch.stack(out.logits, 1)
        - model(input_ids=out.sequences[:, :-1], use_cache=False).logits[:, -len(out.logits) :]
    )


# --- Transformers and PyTorch ---------------------------------------------------------------------------------------


@torch.no_grad()
def packed(folder: Path) -> str:
    model, texts = tiny(), [tokens(1, size)[0] for size in (37, 21, 1, 50)]
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": text.tolist()} for text in texts])
    del batch["labels"]
    alone = torch.cat([model(text[None]).logits for text in texts], 1)
    return f"largest difference {largest(model(**batch).logits - alone)}"


def new_process(folder: Path) -> str:
    call = f"AutoModelForCausalLM.from_pretrained({saved(folder)!r}, trust_remote_code=True)"
    code = f"from transformers import AutoModelForCausalLM; print(type({call}).__name__)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def smoothed(folder: Path) -> str:
    model, ids = tiny(), tokens(2, 30)
    trainer = Trainer(model, TrainingArguments(str(folder), label_smoothing_factor=0.1, **QUIET))
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    right = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    return f"difference from the loss of the next token {largest(loss - right)}"


def labelled(folder: Path) -> str:
    head = AutoModelForSequenceClassification.from_pretrained(saved(folder), num_labels=3).eval()
    logits = head(F.pad(tokens(2, 30), (0, 9)), attention_mask=F.pad(torch.ones(2, 30), (0, 9))).logits
    return f"padded and alone: largest difference {largest(logits - head(tokens(2, 30)).logits)}"


def stepped(folder: Path) -> str:
    model = tiny()
    generated_error(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(model.parameters(), 0.05, fused=True).step()
    return f"decoding beside a full pass, after the step: {largest(generated_error(model))}"


def written(folder: Path) -> str:
    model = tiny()
    generated_error(model)
    for p in model.parameters():
        p.data.mul_(1.3)
    return f"decoding beside a full pass, after the write: {largest(generated_error(model))}"


# --- PEFT, TRL, lm-eval, torchao ------------------------------------------------------------------------------------


def merged(folder: Path) -> str:
    from peft import LoraConfig, get_peft_model

    targets = ["embed_tokens", "v_proj", "o_proj", "lm_head"]
    model = get_peft_model(tiny(), LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    errors = [generated_error(model)]
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        errors.append(generated_error(model))
    return f"decoding beside a full pass: {largest(torch.stack(errors))}"


def prompted(folder: Path) -> str:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    loss = model(input_ids=tokens(2, 20), attention_mask=torch.ones(2, 20), labels=tokens(2, 20)).loss
    loss.backward()
    return f"loss {loss.item():.2f}, gradients at the prompt only"


def sft(**options: Any) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        import trl

        rows = [{"text": f"{i}: " + "one two three "[: 2 + 5 * (i % 3)]} for i in range(16)]
        tokenizer, model = byte_tokenizer(), tiny()
        arguments = trl.SFTConfig(
            str(folder),
            per_device_train_batch_size=16,
            num_train_epochs=1,
            logging_steps=1,
            bf16=False,
            **QUIET,
            **options,
        )
        trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        total = count = 0.0
        for row in rows:
            ids = torch.tensor([[*tokenizer(row["text"]).input_ids, 2]])
            with torch.no_grad():
                total += float(F.cross_entropy(tiny()(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        return f"first loss less that of each document alone {abs(first - total / count):.1e}"

    return run


def trained(kind: str, **options: Any) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        import trl

        rows = [{"prompt": f"{i} and", "chosen": f" {i + 1}", "rejected": " no"} for i in range(8)]
        given = {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "bf16": False,
            **QUIET,
            **options,
        }
        arguments = getattr(trl, f"{kind}Config")(output_dir=str(folder / "out"), **given)
        extra: dict[str, Any] = {}
        if kind in ("GRPO", "RLOO"):
            extra["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
            rows = [{"prompt": row["prompt"]} for row in rows]
        trainer = getattr(trl, f"{kind}Trainer")(
            saved(folder), args=arguments, train_dataset=Dataset.from_list(rows), **extra
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return f"two steps; first loss {losses[0]:.4f}"

    return run


def harness(name: str) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        from lm_eval.api.instance import Instance
        from lm_eval.api.registry import get_model

        import megalodon.evaluation.harness  # noqa: F401

        model, tokenizer = tiny(), byte_tokenizer()
        lm = get_model(name)(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
        text = "".join(f"{i} times {i} is {i * i}." for i in range(200))
        answer = len(text) - text.rindex("mes")  # the harness would score a context's last spaces with the answer
        pair = (text[:-answer], text[-answer:])
        request = Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
        found = lm.loglikelihood([request], disable_tqdm=True)[0][0]
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            likely = model(ids[:, :-1]).logits[0, -answer:].log_softmax(-1).gather(-1, ids[0, -answer:, None]).sum()
        return f"{ids.shape[1]} tokens as one: difference {abs(found - float(likely)):.1e}"

    return run


def quantized(name: str) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        from torchao import quantization

        model = tiny()
        quantization.quantize_(model, getattr(quantization, name)())
        return f"decoding beside a full pass: {largest(generated_error(model, 20))}"

    return run


TRIALS = [
    Trial("transformers", "`DataCollatorWithFlattening`: packed documents and each alone", packed),
    Trial("transformers", "`AutoModelForCausalLM` with `trust_remote_code=True`, in a new process", new_process),
    Trial("transformers", "`Trainer` with `label_smoothing_factor`", smoothed),
    Trial("transformers", "`AutoModelForSequenceClassification` from a language model's folder", labelled),
    Trial("torch", "`AdamW(fused=True)` between two generations from one token", stepped),
    Trial("torch", "weights written through `.data` between two generations from one token", written),
    Trial("peft", "LoRA on embedding, layers and head: adapted, merged, unmerged", merged),
    Trial("peft", "prompt tuning", prompted),
    Trial("trl", "`SFTTrainer`, packing `bfd`", sft(packing=True, packing_strategy="bfd", max_length=64)),
    Trial("trl", "`SFTTrainer`, packing `bfd_split`", sft(packing=True, packing_strategy="bfd_split", max_length=64)),
    Trial("trl", "`SFTTrainer`, `padding_free=True`", sft(padding_free=True, max_length=None)),
    Trial("trl", "`DPOTrainer` from a path; log 2 is right", trained("DPO")),
    Trial("trl", "`RewardTrainer` from a path", trained("Reward")),
    Trial(
        "trl",
        "`GRPOTrainer` from a path, beta 0.1",
        trained("GRPO", beta=0.1, num_generations=2, max_completion_length=6),
    ),
    Trial(
        "trl",
        "`RLOOTrainer` from a path, beta 0.1",
        trained("RLOO", beta=0.1, num_generations=2, max_completion_length=6),
    ),
    Trial("lm-eval", "`hf`, likelihood after a long context", harness("hf")),
    Trial("lm-eval", "`megalodon`, likelihood after a long context", harness("megalodon")),
    Trial("torchao", "int8 weight-only", quantized("Int8WeightOnlyConfig")),
    Trial("torchao", "intx weight-only", quantized("IntxWeightOnlyConfig")),
    Trial(
        "torchao",
        "dynamic int8; activations are rounded by how many there are",
        quantized("Int8DynamicActivationInt8WeightConfig"),
    ),
]

HEAD = """# Compatibility

What other people's tools make of our models. The table is made by `benchmarks/compatibility.py`, on tiny models with
random weights. Figures are differences from what is right, or losses that are known beforehand.

| tool | version | tried | figure |
|---|---|---|---|
"""


def main() -> None:
    lines = []
    for trial in TRIALS:
        try:
            installed = version(trial.tool)
        except PackageNotFoundError:
            lines.append(f"| {trial.tool} | not installed | {trial.tried} | |\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            figure = trial.figure(Path(folder))
        lines.append(f"| {trial.tool} | {installed.split('+')[0]} | {trial.tried} | {figure} |\n")
        print(lines[-1], end="", flush=True)
    PAGE.write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()

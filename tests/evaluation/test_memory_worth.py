"""What the memory is worth: forgetting everything is a cut, every part is one too, and together they are everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megalodon import MegalodonConfig
from megalodon.cli import main
from megalodon.data import ByteTokenizer, Document
from megalodon.evaluation import evaluate_memory, evaluate_perplexity, memory_parts
from megalodon.models import CausalLM, Config, build_model
from megalodon.models.gecko.config import GeckoConfig
from megalodon.models.kin.config import KinConfig

TEXT = "The sea was calm, and the whale lay upon it like an island. " * 12
SIZES = {
    **{"num_layers": 2, "model_dim": 32, "z_dim": 16, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 32},
    **{"vocab_size": 256, "cema_ndim": 4, "chunk_size": 16, "norm_num_groups": 4},
}
KIN = {"num_layers": 2, "model_dim": 32, "num_heads": 2, "vocab_size": 256}
PARTED = [
    MegalodonConfig(**SIZES),
    GeckoConfig(**SIZES),
    KinConfig(**KIN, mixers=["mamba2", "gated_delta"]),
    KinConfig(**KIN, mixers=["h3", "based"]),
    KinConfig(**KIN, mixers=["gla", "mamba"]),
]
HYBRID = KinConfig(
    **KIN,
    mixers=["gecko", "megalodon"],
    mixer_parameters={"gecko": {"chunk_size": 16}, "megalodon": {"chunk_size": 16}},
)


def trained(config: Config) -> CausalLM:
    """A model whose memory matters: every parameter is away from where it starts."""
    torch.manual_seed(3)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", PARTED, ids=lambda c: str(getattr(c, "mixers", c.model_type)))
@torch.no_grad()
def test_parts_change_what_is_read_and_together_are_everything(config: Config) -> None:
    model = trained(config)
    x, y = torch.randint(0, 256, (2, 64)), torch.randint(0, 256, (2, 40))
    state = model(x, use_cache=True).past_key_values
    kept = state.clone()
    carried, fresh = model(y, past_key_values=state).logits, model(y).logits
    left = state
    for part in state.parts:
        assert not torch.allclose(model(y, past_key_values=state.forget(part)).logits, carried, atol=1e-6), part
        left = left.forget(part)
    assert torch.allclose(model(y, past_key_values=left).logits, fresh, atol=1e-5)
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, state.state_dict()[name])  # a state is a value


@torch.no_grad()
def test_parts_of_a_hybrid_leave_the_rest_as_it_is() -> None:
    model = trained(HYBRID)
    state = model(torch.randint(0, 256, (1, 50)), use_cache=True).past_key_values
    assert state.parts == ("average", "statistics", "working_memory")
    before, after = state.state_dict(), state.forget("average").state_dict()
    for name in before:
        assert after[name].any() == (name.endswith("average") is False and before[name].any()), name


def test_a_part_that_is_not_there_or_cannot_be_told_apart() -> None:
    model = trained(PARTED[0])
    state = model(torch.randint(0, 256, (1, 20)), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"'chunks'.*average, statistics"):
        state.forget("chunks")
    with pytest.raises(ValueError, match="chunk of 16"):
        state.forget("statistics")
    with pytest.raises(ValueError, match=r"parts has 'key'.*average"):
        evaluate_memory(model, ByteTokenizer(), lambda: [Document("a", [TEXT])], [32], ["key"])
    with pytest.raises(ValueError, match="cuts has 0"):
        evaluate_memory(model, ByteTokenizer(), lambda: [Document("a", [TEXT])], [0])


def test_report_is_that_of_the_losses() -> None:
    model, tokenizer = trained(PARTED[0]), ByteTokenizer()
    documents = lambda: [Document("a", [TEXT]), Document("b", [TEXT[100:400]])]  # noqa: E731
    report = evaluate_memory(model, tokenizer, documents, [64, 24])
    whole = evaluate_perplexity(model, tokenizer, documents())["overall"]
    assert report["never"]["loss"] == whole["loss"]
    found = {(entry["every"], entry["part"]): entry for entry in report["cuts"]}
    assert list(found) == [(cut, part) for cut in (24, 64) for part in (None, "average", "statistics")]
    assert memory_parts(model) == ("average", "statistics")
    for cut in (24, 64):
        expected = evaluate_perplexity(model, tokenizer, documents(), reset_every=cut)["overall"]
        assert found[cut, None]["loss"] == pytest.approx(expected["loss"])
    assert "left_out" in found[24, "average"] and "loss" not in found[24, "average"]

    # By hand: the text in pieces of 64, the average forgotten before each.
    ids, state, nats = torch.tensor([list(TEXT.encode())]), None, 0.0
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, 64):
            piece = ids[:, start : start + 65]
            state = None if state is None else state.forget("average")
            output = model(piece[:, :-1], past_key_values=state, use_cache=True)
            state = output.past_key_values
            nats += float(torch.nn.functional.cross_entropy(output.logits[0], piece[0, 1:], reduction="sum"))
    alone = evaluate_memory(model, tokenizer, lambda: documents()[:1], [64], ["average"])
    assert alone["cuts"][1]["loss"] == pytest.approx(nats / (len(TEXT) - 1), rel=1e-5)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(PARTED[2])
    model.save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    given = [tmp_path / "model", tmp_path / "text.txt", "--cuts", "50,200", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "memory", *map(str, given)])
    assert not exit.value.code
    report = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert [(entry["every"], entry["part"]) for entry in report["cuts"]] == [
        (cut, part) for cut in (50, 200) for part in (None, "state", "convolution")
    ]
    printed = capsys.readouterr().out
    assert "never" in printed and f"{report['never']['bits_per_byte']:.4f}" in printed
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "memory", *map(str, given[:2]), "--cuts", "many"])
    assert exit.value.code == 2 and "--cuts many" in capsys.readouterr().err

"""A step: the reference's trajectory, accumulation, carried states, what is not finite."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from megalodon import MegalodonForCausalLM
from megalodon.convert import config_from_reference, state_dict_from_reference
from megalodon.data import Batch, ByteTokenizer, DocumentSet, Loader, TokenizedCorpus
from megalodon.training.optimizer import OptimizerConfig, build_optimizer, set_learning_rate
from megalodon.training.schedule import ScheduleConfig, learning_rate_ratio
from megalodon.training.step import NonFiniteError, split_batch, train_step

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 256,
    "num_layers": 2,
    "model_dim": 32,
    "z_dim": 16,
    "value_dim": 32,
    "ffn_hidden_dim": 48,
    "norm_num_groups": 4,
    "cema_ndim": 4,
    "chunk_size": 16,
}


def make_model(**fields):
    from megalodon import MegalodonConfig

    torch.manual_seed(1)
    return MegalodonForCausalLM(MegalodonConfig(**{**SIZES, **fields})).train()


def make_loader(**settings):
    texts = [(f"{i}.txt", "".join(chr(97 + (i * j * j) % 26) for j in range(60 + 50 * i))) for i in range(5)]
    documents = DocumentSet.of(TokenizedCorpus.from_documents(texts, ByteTokenizer()))
    return Loader(documents, **{"mode": "streamed", "batch_size": 4, "sequence_length": 24, **settings})


def plain_batch(tokens):
    """A packed batch of [B, L+1] tokens, as a loader would make it."""
    return Batch(
        input_ids=tokens[:, :-1],
        labels=tokens[:, 1:],
        segment_ids=None,
        continues=None,
        num_tokens=tokens[:, 1:].numel(),
        num_bytes=None,
        rows=(),
        documents=None,
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_trajectory_equals_the_reference(shared, parts):
    with safe_open(shared / "golden" / "train_cosine.safetensors", "pt") as golden:
        meta = json.loads(golden.metadata()["meta"])
        tensors = {name: golden.get_tensor(name) for name in golden.keys()}  # noqa: SIM118
    config = config_from_reference(meta["config"])

    def weights(prefix):
        named = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        return state_dict_from_reference(named, config)

    model = MegalodonForCausalLM(config).train()
    model.load_state_dict(weights("param."))
    optim = meta["optim"]
    settings = OptimizerConfig(
        learning_rate=optim["lr"],
        betas=(optim["beta1"], optim["beta2"]),
        epsilon=optim["epsilon"],
        weight_decay=optim["weight_decay"],
        max_grad_norm=optim["clip"],
    )
    schedule = ScheduleConfig(
        kind=optim["scheduler"],
        warmup_steps=optim["warmup"],
        init_ratio=optim["lr_init_ratio"],
        end_ratio=optim["lr_end_ratio"],
        cycles=optim["cycles"],
    )
    optimizer = build_optimizer(model, settings)
    losses, norms = [], []
    for step, tokens in enumerate(tensors["tokens"]):
        set_learning_rate(optimizer, settings.learning_rate * learning_rate_ratio(step, meta["steps"], schedule))
        batch = split_batch(replace(plain_batch(tokens), rows=(None,) * len(tokens)), parts)
        result = train_step(model, optimizer, batch, [None] * parts, max_grad_norm=settings.max_grad_norm, device=CPU)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    torch.testing.assert_close(torch.tensor(losses), tensors["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(norms), tensors["grad_norms"], rtol=1e-4, atol=0)
    after = weights("after.")
    for name, tensor in model.state_dict().items():
        difference = (tensor - after[name]).norm() / after[name].norm().clamp_min(1e-12)
        assert difference < 1e-4, name


@pytest.mark.parametrize("mode", ["packed", "streamed"])
def test_accumulation_equals_the_whole_batch(mode):
    """Parts with unequal numbers of targets: the loss is the mean over targets, not over parts."""
    results = []
    for parts in (1, 2, 4):
        model = make_model()
        optimizer = build_optimizer(model, OptimizerConfig())
        states = [None] * parts
        numbers = []
        loader = make_loader(mode=mode)
        for _ in range(4):
            batch = next(loader)
            batch.labels[0, :10] = -100
            batch = replace(batch, num_tokens=int((batch.labels != -100).sum()))
            result = train_step(model, optimizer, split_batch(batch, parts), states, max_grad_norm=1.0, device=CPU)
            states = result.states
            numbers += [result.loss, result.grad_norm, result.num_targets]
        results.append(torch.tensor(numbers))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-6)


def test_states_are_carried_and_reset():
    """Streamed losses equal those of the rows' whole texts so far, read at once, without updates."""
    model = make_model()
    loader = make_loader(isolate=False, shuffle=False)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-30, weight_decay=0.0))
    states = [None]
    batches = [next(loader) for _ in range(3)]
    losses = []
    for batch in batches:
        result = train_step(model, optimizer, [batch], states, max_grad_norm=None, device=CPU)
        states = result.states
        losses.append(result.loss)
    rows = [row for row in range(4) if all(bool(batch.continues[row]) for batch in batches[1:])]
    assert rows, "the corpus should let some rows read on"
    assert all(bool(batch.continues.all()) for batch in batches[1:])
    with torch.no_grad():
        whole = model(
            torch.cat([batch.input_ids for batch in batches], 1),
            shift_labels=torch.cat([batch.labels for batch in batches], 1),
        ).loss
    assert sum(losses) / 3 == pytest.approx(whole.item(), rel=1e-5)
    assert not any(moment.requires_grad for moment in states[0].layers[0].moments)


def test_rows_that_begin_anew_forget():
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-30, weight_decay=0.0))
    batch = next(make_loader())
    fresh = train_step(model, optimizer, [batch], [None], max_grad_norm=None, device=CPU)
    begins = replace(batch, continues=torch.zeros(4, dtype=torch.bool))
    again = train_step(model, optimizer, [begins], fresh.states, max_grad_norm=None, device=CPU)
    assert again.loss == pytest.approx(fresh.loss, rel=1e-6)
    continues = replace(batch, continues=torch.ones(4, dtype=torch.bool))
    other = train_step(model, optimizer, [continues], fresh.states, max_grad_norm=None, device=CPU)
    assert abs(other.loss - fresh.loss) > 1e-4


def test_not_finite_changes_nothing():
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="loss nan"):
        train_step(model, optimizer, [next(make_loader())], [None], max_grad_norm=1.0, device=CPU)
    assert not optimizer.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_gradient_checkpointing_and_bfloat16_train():
    losses = {}
    for precision, checkpointing in (("float32", False), ("float32", True), ("bfloat16", True)):
        model = make_model()
        if checkpointing:
            model.activation_checkpointing_enable()
        optimizer = build_optimizer(model, OptimizerConfig())
        states, loader, losses[precision, checkpointing] = [None], make_loader(), []
        for _ in range(3):
            result = train_step(
                model, optimizer, [next(loader)], states, max_grad_norm=1.0, device=CPU, precision=precision
            )
            states = result.states
            losses[precision, checkpointing].append(result.loss)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses["float32", True] == pytest.approx(losses["float32", False], rel=1e-6)
    assert losses["bfloat16", True] == pytest.approx(losses["float32", False], rel=2e-2)
    assert losses["bfloat16", True] != losses["float32", False]

"""MEGABYTE: equal to the public re-implementation's vectors, and the promise that all models here give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kin_cases import Golden, golden, relative
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from megalodon import MegabyteConfig, MegabyteForCausalLM, MegabyteState
from megalodon.convert import megabyte_from_reference
from megalodon.convert.megabyte import _ours
from megalodon.ops import layout_of

CASES = ["plain", "positions", "three"]

# --- the vectors ----------------------------------------------------------------------------------------------------


def brought_over(shared: Path, case: str) -> tuple[Golden, MegabyteForCausalLM]:
    vectors = golden(shared, "megabyte", case)
    return vectors, megabyte_from_reference(vectors.config, vectors.named("param."))


def loss_of(model: MegabyteForCausalLM, x: Tensor) -> Tensor:
    """As there: the first byte from the start alone, the others from those before; byte 0 is never trained."""
    logits = torch.cat([model.start_logits().expand(len(x), 1, -1), model(x).logits], dim=1)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), x.flatten(), ignore_index=0)


@pytest.mark.parametrize("case", CASES)
def test_golden(shared: Path, case: str) -> None:
    vectors, model = brought_over(shared, case)
    x = vectors.tensors["tokens"]
    assert relative(model(x).logits, vectors.tensors["logits"]) < 1e-5
    loss = loss_of(model, x)
    assert relative(loss, vectors.tensors["loss"]) < 1e-5
    loss.backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    stages = len(vectors.config["dim"])
    tables = own.pop("model.embed_tokens.weight").chunk(stages, dim=1)[::-1]
    for name, gradient in vectors.named("grad.").items():
        if name in [f"token_embs.{i}{'.0' if i else ''}.weight" for i in range(stages)]:
            assert relative(tables[int(name.split(".")[1])], gradient) < 1e-4, name
        for ours, expected in _ours(name, gradient, stages).items():
            assert relative(own[ours], expected) < 1e-4, name


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_published_sampling_from_nothing_uses_other_logits_than_training(shared: Path, case: str) -> None:
    """There the context of the first patch is added to the finest start; ours gives what was trained."""
    vectors, model = brought_over(shared, case)
    network = model.model
    told = network.stages[0].start[None, None]
    for stage, frame in enumerate(network.stages):
        start = frame.start if stage == 0 else frame.start + told
        x = torch.as_tensor(start).reshape(1, 1, -1)
        layers = network.layers if stage == 0 else network.finer_layers[stage - 1]
        for layer in layers:
            x, _ = layer(x, None, layout_of(1, 1, x.device))
        x = frame.final_norm(x)
        if frame.project is not None:
            told = frame.project(x)[..., : network.config.widths[stage + 1]]
    empty = model.lm_head(x)[0, 0]
    assert relative(empty, vectors.tensors["logits_empty"][0, 0]) < 1e-5
    assert (empty - model.start_logits()).abs().max() > 0.1


# --- the promise ----------------------------------------------------------------------------------------------------

SHAPES = {
    "two": {"patch_sizes": [4], "coarse_dims": [12], "depths": [2, 1]},
    "three": {"patch_sizes": [2, 3], "coarse_dims": [8, 8], "depths": [2, 1, 1]},
}
shapes = pytest.mark.parametrize("shape", sorted(SHAPES))


def tiny(shape: str, **changed: object) -> MegabyteForCausalLM:
    torch.manual_seed(5)
    config = MegabyteConfig(
        **{"vocab_size": 50, "model_dim": 8, "num_heads": 2, "head_dim": 4, **SHAPES[shape], **changed}
    )
    model = MegabyteForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def read(model: MegabyteForCausalLM, pieces: list[Tensor]) -> tuple[Tensor, MegabyteState]:
    state, logits = None, []
    for piece in pieces:
        out = model(piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), state


@shapes
@settings(max_examples=15)
@given(sizes=st.lists(st.integers(0, 11), min_size=1, max_size=8), batch=st.integers(1, 3))
@torch.no_grad()
def test_pieces_equal_the_whole(shape: str, sizes: list[int], batch: int) -> None:
    model, x = tiny(shape), torch.randint(0, 50, (batch, sum(sizes)))
    whole = model(x, use_cache=True)
    logits, state = read(model, list(x.split(sizes, 1)))
    assert not x.numel() or relative(logits, whole.logits) < 1e-5
    theirs = whole.past_key_values.state_dict()
    for name, tensor in state.state_dict().items():
        assert tensor.shape == theirs[name].shape and relative(tensor, theirs[name]) < 1e-5, name


@shapes
@torch.no_grad()
def test_no_output_sees_the_future(shape: str) -> None:
    model, x = tiny(shape), torch.randint(0, 50, (1, 23))
    logits = model(x).logits
    for place in range(1, 23):
        changed = x.clone()
        changed[:, place] = (x[:, place] + 1) % 50
        assert relative(model(changed).logits[:, :place], logits[:, :place]) < 1e-6


@shapes
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4), left=st.booleans())
@torch.no_grad()
def test_padded_rows_equal_each_row_alone(shape: str, lengths: list[int], left: bool) -> None:
    model, longest = tiny(shape), max(lengths)
    x, mask = torch.randint(0, 50, (len(lengths), longest)), torch.zeros(len(lengths), longest, dtype=torch.long)
    where = [slice(longest - n, longest) if left else slice(0, n) for n in lengths]
    for row, columns in enumerate(where):
        mask[row, columns] = 1
    following = torch.randint(0, 50, (len(lengths), 9))
    first = model(x, attention_mask=mask, use_cache=True)
    second = model(following, past_key_values=first.past_key_values)
    for row, columns in enumerate(where):
        alone, _ = read(model, [x[row : row + 1, columns], following[row : row + 1]])
        assert relative(first.logits[row, columns], alone[0, :-9]) < 1e-5
        assert relative(second.logits[row], alone[0, -9:]) < 1e-5


@shapes
@settings(max_examples=8)
@given(documents=st.lists(st.integers(1, 15), min_size=1, max_size=5), before=st.sampled_from([0, 3, 10]))
@torch.no_grad()
def test_packed_documents_equal_themselves_alone(shape: str, documents: list[int], before: int) -> None:
    model, x = tiny(shape), torch.randint(0, 50, (2, sum(documents)))
    state = read(model, [torch.randint(0, 50, (2, before))])[1]
    ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(2, -1)
    out = model(x, segment_ids=ids, past_key_values=state, use_cache=True)
    for number, document in enumerate(x.split(documents, 1)):
        alone = model(document, past_key_values=state if number == 0 else None, use_cache=True)
        assert relative(out.logits[:, ids[0] == number], alone.logits) < 1e-5
    following = torch.randint(0, 50, (2, 9))
    after = model(following, past_key_values=out.past_key_values).logits
    assert relative(after, model(following, past_key_values=alone.past_key_values).logits) < 1e-5


@shapes
def test_gradients_flow_through_states(shape: str) -> None:
    model, x = tiny(shape), torch.randint(0, 50, (2, 25))
    weights = torch.randn(2, 25, 50)
    found = []
    for sizes in ([25], [5, 1, 13, 6]):
        model.zero_grad()
        (read(model, list(x.split(sizes, 1)))[0] * weights).sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[1].items():
        assert relative(gradient, found[0][name]) < 1e-4, name


@shapes
@torch.no_grad()
def test_states_are_values_and_are_saved(shape: str, tmp_path: Path) -> None:
    model, x = tiny(shape), torch.randint(0, 50, (2, 8))
    state = read(model, [torch.randint(0, 50, (2, 13))])[1]
    logits = [model(x, past_key_values=state).logits for _ in range(2)]
    assert torch.equal(*logits)
    state.save(tmp_path / "state")
    loaded = MegabyteState.load(tmp_path / "state", model.config)
    assert torch.equal(model(x, past_key_values=loaded).logits, logits[0])
    turned = MegabyteState.concatenate([state[1], state[0]])
    assert relative(model(x.flip(0), past_key_values=turned).logits.flip(0), logits[0]) < 1e-6
    fresh = state.reset(torch.tensor([True, False]))
    assert relative(model(x, past_key_values=fresh).logits[0], model(x[:1]).logits[0]) < 1e-5


@shapes
@torch.no_grad()
def test_generation_byte_by_byte_equals_reading(shape: str, tmp_path: Path) -> None:
    model, x = tiny(shape), torch.randint(0, 50, (2, 7))
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    out = model.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    again = model(out, attention_mask=torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], 1)).logits
    assert torch.equal(out[:, 7:], again[:, 6:-1].argmax(-1))
    model.save_pretrained(tmp_path)
    loaded = MegabyteForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_learned_positions_have_an_end() -> None:
    model = tiny("two", max_patches=3)
    x = torch.randint(0, 50, (1, 12))
    state = read(model, [x])[1]
    with pytest.raises(ValueError, match="max_patches=3, but a document has 4 patches of 4 bytes"):
        model(x[:, :1], past_key_values=state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_sizes": [4, 2]}, "patch_sizes=.* makes 3 stages"),
        ({"depths": [1, 0]}, "depths="),
        ({"model_dim": 7}, "widths must be even"),
        ({"share_emb": True}, "share_emb=True"),
        ({"num_layers": 5}, "num_layers=5 contradicts depths"),
        ({"patch_size": 4}, "did you mean patch_sizes"),
    ],
)
def test_bad_config_names_the_field(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MegabyteConfig(**{"coarse_dims": [8], "depths": [1, 1], "patch_sizes": [4], **fields})


def test_defaults_make_a_model_that_trains() -> None:
    config = MegabyteConfig(model_dim=16, num_heads=2, head_dim=8, depths=[1, 1])
    model, x = MegabyteForCausalLM(config), torch.randint(0, 256, (2, 30))
    loss = model(x, labels=x).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_adapters_on_every_linear_layer_train_and_generate() -> None:
    model = tiny("two")
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    adapted = get_peft_model(model, LoraConfig(target_modules=sorted(names), init_lora_weights=False)).eval()
    x = torch.randint(0, 50, (1, 22))
    adapted(x, labels=x).loss.backward()
    expected = adapted(x).logits
    merged = adapted.merge_and_unload()
    assert relative(merged(x).logits, expected) < 1e-5

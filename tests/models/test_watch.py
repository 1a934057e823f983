"""No second copy of a weight is stale, however the weight was changed; and no shortcut passes over what others see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from model_cases import relative, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from megalodon import MegalodonForCausalLM
from megalodon.inference.static_decoding import StaticDecoder
from megalodon.models.layers.projection import Projection
from megalodon.models.layers.watch import Watch
from megalodon.models.megalodon.token_step import TokenStep

Change = Callable[[MegalodonForCausalLM], object]


def noise_like(x: Tensor) -> Tensor:
    return 0.2 * torch.randn_like(x)


def data_copy(model: MegalodonForCausalLM) -> None:
    for p in model.parameters():
        p.data.copy_(p.data + noise_like(p))


def data_mul(model: MegalodonForCausalLM) -> None:
    for p in model.parameters():
        p.data.mul_(1.3)


def foreach(model: MegalodonForCausalLM) -> None:
    torch._foreach_mul_([p.data for p in model.parameters()], 0.7)


def numpy_views(model: MegalodonForCausalLM) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] *= 1.2


def ema_swap(model: MegalodonForCausalLM) -> None:
    average = AveragedModel(copy.deepcopy(model))
    data_mul(average.module)
    for mine, theirs in zip(model.parameters(), average.module.parameters(), strict=True):
        mine.data, theirs.data = theirs.data, mine.data


def ema_copy(model: MegalodonForCausalLM) -> None:
    for p in model.parameters():
        p.data.lerp_(noise_like(p), 0.1)


def by_hand(model: MegalodonForCausalLM) -> None:
    gradients_of(model)
    for p in model.parameters():
        p.data -= 0.1 * p.grad.sign()


def gradients_of(model: MegalodonForCausalLM) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def fused(kind: type[torch.optim.Optimizer]) -> Change:
    def step(model: MegalodonForCausalLM) -> None:
        gradients_of(model)
        kind(model.parameters(), lr=0.05, fused=True).step()

    return step


def fused_step_of_one_value(model: MegalodonForCausalLM) -> None:
    weight = model.lm_head.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[23, 5] = 1.0
    torch.optim.SGD([weight], lr=9.0, fused=True).step()


OPTIMISERS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
CHANGES: dict[str, Change] = {
    **{f.__name__: f for f in (data_copy, data_mul, foreach, numpy_views, ema_swap, ema_copy, by_hand)},
    **{f"fused {kind.__name__}": fused(kind) for kind in OPTIMISERS},
    "fused step of one value": fused_step_of_one_value,
}


def one_value(name: str) -> Change:
    def write(model: MegalodonForCausalLM) -> None:
        values = model.get_parameter(name).data.view(-1)
        values[values.numel() // 2 + 3] += 9.0

    return write


@pytest.fixture(params=["blocked", "numba"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MegalodonForCausalLM:
    monkeypatch.setenv("MEGALODON_BACKEND", request.param)
    return tiny_model(model_dim=64, z_dim=32, norm_prior_count=2).eval()


@torch.no_grad()
def generated_error(model: MegalodonForCausalLM, prompt: Tensor) -> float:
    """How far the logits of `generate` are from those of one pass over the whole text."""
    given = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(prompt, **given)
    whole = model(out.sequences[:, :-1], use_cache=False).logits[:, -6:]
    return relative(torch.stack(out.logits, 1), whole)


@torch.no_grad()
def step(model: MegalodonForCausalLM, token: Tensor, state) -> Tensor:
    return model(token, past_key_values=state, use_cache=True).logits


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_token_of_a_kept_state_follows(change: str, model: MegalodonForCausalLM) -> None:
    x = tokens(2, 12)
    with torch.no_grad():
        state = model(x[:, :11], use_cache=True).past_key_values
    model(x, labels=x).loss.backward()
    model.zero_grad()
    old = step(model, x[:, 11:], state)
    CHANGES[change](model)
    new = step(model, x[:, 11:], state)
    with torch.enable_grad():  # the long way, with nothing prepared
        expected = model(x[:, 11:], past_key_values=state).logits
    assert relative(new, expected) < 1e-5 and relative(new, old) > 1e-3


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize(
    "change",
    [
        *CHANGES.values(),
        *map(one_value, ("lm_head.weight", "model.layers.1.attention.r_proj.weight", "model.layers.0.cema.delta")),
    ],
)
def test_generation_starts_from_the_weights_as_they_are(
    length: int, change: Change, model: MegalodonForCausalLM
) -> None:
    prompt = tokens(1, length)
    assert generated_error(model, prompt) < 1e-5
    model.generate(prompt, max_new_tokens=4, do_sample=False)  # the last thing that ran was decoding
    change(model)
    assert generated_error(model, prompt) < 1e-5


@torch.no_grad()
def test_generation_from_a_state_and_one_token_starts_from_the_weights_as_they_are(model) -> None:
    x = tokens(1, 8)
    state = model(x[:, :7], use_cache=True).past_key_values

    def first() -> Tensor:
        given = {"attention_mask": torch.ones_like(x), "cache": state, "max_new_tokens": 2, "do_sample": False}
        return model.generate(x[:, 7:], output_logits=True, return_dict_in_generate=True, **given).logits[0]

    first()
    one_value("model.layers.1.feed_forward.down_proj.weight")(model)
    one_value("lm_head.weight")(model)
    with torch.enable_grad():
        expected = model(x[:, 7:], past_key_values=state).logits[:, 0]
    assert relative(first(), expected) < 1e-5


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.double(),
        lambda model: model.load_state_dict({name: 1.2 * x for name, x in model.state_dict().items()}),
    ],
    ids=["double", "load"],
)
def test_weights_may_be_swapped_after_decoding(convert: Change, model: MegalodonForCausalLM) -> None:
    """PyTorch exchanges two tensors only where nothing but the module holds them."""
    assert generated_error(model, tokens(2, 1)) < 1e-4
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        convert(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert generated_error(model, tokens(2, 1)) < 1e-4


@pytest.mark.parametrize("length", [1, 9])
def test_adapters_that_are_merged_and_unmerged(length: int, model: MegalodonForCausalLM) -> None:
    targets = ["v_proj", "o_proj", "down_proj", "lm_head"]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    prompt = tokens(1, length)
    for change in (adapted.merge_adapter, adapted.unmerge_adapter, adapted.merge_adapter):
        assert generated_error(model, prompt) < 1e-5
        change()
    assert generated_error(model, prompt) < 1e-5
    merged = adapted.merge_and_unload()
    assert merged is model and generated_error(model, prompt) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_static_decoding_follows(change: str, model: MegalodonForCausalLM) -> None:
    x = tokens(2, 14)
    state = model(x[:, :11], use_cache=True).past_key_values
    decoder = StaticDecoder(model, state)
    decoder.step(x[:, 11])
    CHANGES[change](model)
    halfway = decoder.state
    logits = [decoder.step(x[:, i]).clone() for i in (12, 13)]
    assert relative(torch.stack(logits, 1), model(x[:, 12:], past_key_values=halfway).logits) < 1e-5


def test_a_generation_reads_all_weights_once(model: MegalodonForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read, packed = [], []
    same, make = Watch.same_weights, Projection.__init__
    monkeypatch.setattr(Watch, "same_weights", lambda self: (read.append(1), same(self))[1])
    monkeypatch.setattr(Projection, "__init__", lambda *a, **k: (packed.append(1), make(*a, **k))[1])
    for _ in range(3):
        model.generate(tokens(1, 5), max_new_tokens=12, do_sample=False)
    products = 5 * len(model.model.layers)
    assert len(read) == 4, "the blocks' and the head's, at the second and third start"
    assert len(packed) in (products, products + 1), "once, and the head's unless a kernel reads it where it lies"


def test_training_holds_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_BACKEND", "blocked")
    model = tiny_model().eval()
    alive: set[int] = set()
    made, freed = Projection.__init__, []
    monkeypatch.setattr(Projection, "__init__", lambda self, *a, **k: (alive.add(id(self)), made(self, *a, **k))[1])
    monkeypatch.setattr(Projection, "__del__", lambda self: freed.append(id(self)), raising=False)
    model.generate(tokens(1, 5), max_new_tokens=3, do_sample=False)
    assert alive and not freed
    x = tokens(1, 5)
    model.train()(x, labels=x)
    assert set(freed) == alive


# --- what others see ------------------------------------------------------------------------------------------------


@pytest.fixture
def state_and_token(model: MegalodonForCausalLM) -> tuple:
    x = tokens(1, 12)
    with torch.no_grad():
        state = model(x[:, :11], use_cache=True).past_key_values
    step(model, x[:, 11:], state)
    return state, x[:, 11:]


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is nn.functional.linear else out


def global_hook(model, monkeypatch) -> Iterator[None]:
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 2 * out if type(module) is nn.Linear else None
    )
    yield
    handle.remove()


def global_pre_hook(model, monkeypatch) -> Iterator[None]:
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: (2 * given[0], *given[1:]) if type(module) is nn.Linear else None
    )
    yield
    handle.remove()


def patched(owner: object, name: str) -> Callable:
    def patch(model, monkeypatch) -> Iterator[None]:
        old = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: 2 * old(*given, **named))
        yield
        monkeypatch.setattr(owner, name, old)

    return patch


def patched_call(model, monkeypatch) -> Iterator[None]:
    old = nn.Module.__call__

    def call(self, *given, **named):
        out = old(self, *given, **named)
        return 2 * out if type(self) is nn.Linear else out

    monkeypatch.setattr(nn.Module, "__call__", call)
    yield
    monkeypatch.setattr(nn.Module, "__call__", old)


def function_mode(model, monkeypatch) -> Iterator[None]:
    with Doubled():
        yield


def attribute(path: str, name: str, value: float) -> Callable:
    def change(model, monkeypatch) -> Iterator[None]:
        module = model.get_submodule(path)
        old = getattr(module, name)
        setattr(module, name, value)
        yield
        setattr(module, name, old)

    return change


INTRUSIONS: dict[str, Callable] = {
    "global hook": global_hook,
    "global hook before": global_pre_hook,
    "nn.Linear.forward": patched(nn.Linear, "forward"),
    "F.linear": patched(nn.functional, "linear"),
    "a norm's class": patched(type(tiny_model().model.layers[0].memory_norm), "forward"),
    "nn.Module.__call__": patched_call,
    "a mode": function_mode,
    "eps of the final norm": attribute("model.final_norm", "eps", 0.5),
    "eps of a block's norm": attribute("model.layers.1.timestep_norm", "eps", 0.5),
    "eps of the memory's norm": attribute("model.layers.0.memory_norm", "eps", 0.5),
    "eps of the queries": attribute("model.layers.0.attention", "eps", 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("intrusion", INTRUSIONS)
def test_what_others_changed_counts_in_decoding(intrusion: str, model, state_and_token, monkeypatch) -> None:
    state, token = state_and_token
    before = step(model, token, state)
    changing = INTRUSIONS[intrusion](model, monkeypatch)
    next(changing)
    with torch.enable_grad():
        expected = model(token, past_key_values=state).logits
    assert relative(step(model, token, state), expected) < 1e-5
    assert relative(expected, before) > 1e-4
    assert next(changing, None) is None
    assert relative(step(model, token, state), before) < 1e-6


@torch.no_grad()
def test_modules_in_training_mode_drop_out_in_decoding(state_and_token) -> None:
    state, token = state_and_token
    model = tiny_model(model_dim=64, z_dim=32, norm_prior_count=2, hidden_dropout=0.5).eval()
    assert torch.equal(step(model, token, state), step(model, token, state))
    model.model.layers[1].feed_forward.train()
    assert not torch.equal(step(model, token, state), step(model, token, state))


@torch.no_grad()
def test_counters_of_operations_see_the_model_and_devices_change_nothing(model, state_and_token, monkeypatch) -> None:
    state, token = state_and_token
    packed = []
    advance = TokenStep.advance
    monkeypatch.setattr(TokenStep, "advance", lambda *given: (packed.append(1), advance(*given))[1])
    with FlopCounterMode(display=False) as counter:
        step(model, token, state)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert counter.get_total_flops() >= 2 * sum(m.weight.numel() for m in layers) and not packed
    with torch.device("cpu"):
        step(model, token, state)
    assert packed


def test_decoders_refuse_what_they_would_pass_over(model, state_and_token) -> None:
    state, _ = state_and_token
    with model.model.layers[1].cema.register_forward_hook(lambda *_: None):
        with pytest.raises(ValueError, match=r"layers\.1\.cema has hooks"):
            StaticDecoder(model, state)
        from megalodon.inference.slots import slot_decoder

        with pytest.raises(ValueError, match=r"layers\.1\.cema has hooks"):
            slot_decoder(model, 1)


@pytest.mark.parametrize("size", [1, 3])
def test_another_tensor_of_the_same_values_is_another_tensor(size: int) -> None:
    module = nn.Linear(1, size)
    watch = Watch(module, [module.weight])
    assert watch.unchanged()
    before, module.bias = module.bias, nn.Parameter(module.bias.detach().clone())
    assert not watch.unchanged()
    module.bias = before
    assert watch.unchanged()
    module.other = nn.Identity()
    assert not watch.unchanged()

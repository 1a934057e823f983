"""One continuation: what its logits are made of before a token is chosen, and how it ends."""

from __future__ import annotations

import torch

from megalodon.data import ByteTokenizer
from megalodon.inference.continuation import Continuation, choose_tokens
from megalodon.inference.guidance import Grammars
from megalodon.inference.request import FinishReason, Generation
from megalodon.inference.sampling import Sampling

FLAT = torch.zeros(256)


def make(**fields: object) -> Continuation:
    generation = Generation(**{"max_tokens": 20, "sampling": Sampling(0), "seed": 1, **fields})
    return Continuation(0, generation, ByteTokenizer(), [97], ("read", 97), None, None)


def take(continuation: Continuation, text: str) -> tuple[str, FinishReason | None]:
    shown, reason = "", None
    for token in text.encode():
        delta, reason = continuation.take(token, FLAT)
        shown += delta.text if delta else ""
    return shown, reason


def test_penalties_count_what_was_generated() -> None:
    one = make(frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((98, 3.0), (99, -1.0)))
    assert one.adjusted(FLAT)[97] == 0, "the prompt does not count"
    take(one, "aab")
    adjusted = one.adjusted(FLAT)
    assert [float(adjusted[token]) for token in (97, 98, 99, 100)] == [-1.25, 2.25, -1.0, 0.0]
    assert not FLAT.any(), "nobody else's logits are changed"


def test_nothing_ends_before_the_least_length() -> None:
    one = make(min_tokens=3, stop_tokens=frozenset((120,)), stop=("b",), ignore_end=False)
    for text in ("a", "b"):
        adjusted = one.adjusted(FLAT)
        assert adjusted[0] == adjusted[120] == -torch.inf and adjusted[98] == 0
        assert take(one, text) == (text, None), "a stop string does not count yet"
    assert one.adjusted(FLAT)[0] == -torch.inf
    take(one, "c")
    assert torch.equal(one.adjusted(FLAT), FLAT)
    assert take(one, "x") == ("", FinishReason.stop)


def test_what_ends_the_text_is_told_only_if_wanted() -> None:
    for told in (False, True):
        one = make(tell_end=told, logprobs=0)
        delta, reason = one.take(0, FLAT)
        assert reason is FinishReason.stop and delta is not None
        assert [token.token for token in delta.tokens] == ([0] if told else [])


def test_a_complete_form_ends_the_text() -> None:
    one = make(grammar=Grammars(ByteTokenizer()).choice(["yes", "no"]), ignore_end=True)
    allowed = one.adjusted(FLAT).isfinite().nonzero()[:, 0].tolist()
    assert sorted(allowed) == sorted(b"yn")
    assert take(one, "yes") == ("yes", FinishReason.stop)


def test_rows_with_wishes_of_their_own_leave_the_others_alone() -> None:
    logits = torch.randn(5, 256)
    makers = [
        lambda: make(sampling=Sampling(0.9)),
        lambda: make(sampling=Sampling(0.9), logit_bias=((5, 4.0),)),
        lambda: make(sampling=Sampling(0.9), min_tokens=4),
        lambda: make(sampling=Sampling(0.9), grammar=Grammars(ByteTokenizer()).regex("[a-f]{9}")),
        lambda: make(sampling=Sampling(0.9), frequency_penalty=1.0),
    ]
    together = choose_tokens([one() for one in makers], logits)
    alone = [choose_tokens([one()], logits[row : row + 1])[0] for row, one in enumerate(makers)]
    assert together == alone and together[3] in b"abcdef"


def test_what_cannot_be_followed_fails_alone() -> None:
    stuck = make(grammar=Grammars(ByteTokenizer()).choice(["yes"]))
    stuck._follower._matcher.consume_token(97)  # as if something else had been chosen
    chosen = choose_tokens([make(), stuck], torch.randn(2, 256))
    assert isinstance(chosen[0], int) and isinstance(chosen[1], ValueError)


def test_a_form_is_made_once_and_followed_apart() -> None:
    grammar = Grammars(ByteTokenizer()).choice(["abc", "axy"])
    one, other = make(grammar=grammar), make(grammar=grammar)
    take(one, "ab")
    take(other, "ax")
    allowed = [made.adjusted(FLAT).isfinite().nonzero()[:, 0].tolist() for made in (one, other, make(grammar=grammar))]
    assert allowed == [[ord("c")], [ord("y")], [ord("a")]]


def test_many_biases_add_as_each_would() -> None:
    biases = tuple((token, (token * 37 % 199 - 99) / 3) for token in range(0, 256, 3))
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(256).to(dtype)
        expected = logits.clone()
        for token, bias in biases:
            expected[token] += bias
        assert torch.equal(make(logit_bias=biases).adjusted(logits), expected)

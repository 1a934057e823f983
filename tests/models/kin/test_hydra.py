"""Hydra against its authors' code, and alone in its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kin_cases import check_mixer, relative, whole_file

from megalodon import KinConfig, KinForCausalLM
from megalodon.convert import mixer_from_reference
from megalodon.ops import Layout, layout_of


def test_golden(shared: Path) -> None:
    vectors = whole_file(shared, "hydra")
    mixer = mixer_from_reference("hydra", vectors.config["config"], vectors.named("param."))
    check_mixer(mixer, vectors)


def encoder() -> torch.nn.Module:
    parameters = {"hydra": {"state_size": 4, "head_dim": 8}}
    config = KinConfig(
        mixers="hydra",
        num_layers=2,
        model_dim=16,
        num_heads=2,
        vocab_size=97,
        two_way=True,
        mixer_parameters=parameters,
    )
    return KinForCausalLM(config).eval()


@torch.no_grad()
def test_documents_and_padded_rows_are_alone() -> None:
    mixer = encoder().model.layers[0].mixer
    x = torch.randn(2, 17, 16)
    ids = torch.tensor([[0] * 6 + [1] * 11, [0] * 17])
    y, _ = mixer(x, None, Layout(2, 17, segment_ids=ids, lengths=[17, 9]))
    for row, span in ((0, slice(0, 6)), (0, slice(6, 17)), (1, slice(0, 9))):
        piece = x[row : row + 1, span]
        alone, _ = mixer(piece, None, layout_of(1, piece.shape[1], x.device))
        assert relative(y[row, span], alone[0]) < 1e-5


@torch.no_grad()
def test_every_token_sees_both_sides() -> None:
    model, x = encoder(), torch.randint(0, 97, (1, 12))
    for place in (0, 11):
        changed = x.clone()
        changed[:, place] = (x[:, place] + 1) % 97
        moved = (model(changed).logits - model(x).logits).abs().amax(-1)[0]
        assert (moved > 0).all()


def test_a_language_model_of_it_is_refused() -> None:
    with pytest.raises(ValueError, match="two_way=True"):
        KinConfig(mixers="hydra", num_layers=1, model_dim=16, num_heads=2, vocab_size=97)

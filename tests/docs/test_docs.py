"""README and docs: links lead somewhere, snippets run, every page is in the site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pages import BLOCK, PAGES, ROOT, blocks, name

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.data import ByteTokenizer

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def snippets() -> list:
    return [
        pytest.param(text, id=f"{name(page)}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks(page, "python"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    missing = []
    for link in LINK.findall(prose):
        target = link.partition("#")[0]
        if target and "://" not in target and not (page.parent / target).exists():
            missing.append(link)
    assert missing == []


def test_every_page_is_in_the_site() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!!python", ""))
    listed = set(re.findall(r"[\w/-]+\.md", str(config["nav"])))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the models stand that the texts speak of."""
    place = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    sizes = {"z_dim": 32, "value_dim": 64, "ffn_hidden_dim": 32, "cema_ndim": 4, "norm_num_groups": 4, "chunk_size": 16}
    model = MegalodonForCausalLM(MegalodonConfig(num_layers=1, model_dim=32, vocab_size=257, **sizes))
    for run in ("demo", "books", "first"):
        model.save_pretrained(place / "runs" / run / "model")
        ByteTokenizer().save(place / "runs" / run / "model")
    return place


@pytest.mark.parametrize("code", snippets())
def test_snippets_run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="the site needs the extra `docs`")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "MegalodonForCausalLM" in (tmp_path / "reference" / "models" / "index.html").read_text(encoding="utf-8")

"""Every command of README and docs is run: on small stand-ins for the files it names, with fewer steps.

What is not run, and why, stands in `NOT_RUN`. What takes long, or a process of its own, is marked slow.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from pages import BLOCK, PAGES, ROOT, blocks, name
from transformers import LlamaConfig, LlamaForCausalLM

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.cli import main
from megalodon.comparison import load_comparison
from megalodon.convert.folders import pretrained_to_reference
from megalodon.data import ByteTokenizer
from megalodon.training import load_config

NOT_RUN = {
    "pip install": "needs the network; that the extras exist is tested",
    "python3 -m venv": "makes the environment that everything else is run in",
    "make": "sets up an environment from the network; what its targets run is tested, and that they exist",
    "python benchmarks/gpu/": "needs a GPU; its rehearsal on a CPU is in tests/benchmarks",
    "python benchmarks/": "measures for minutes to hours; tests/benchmarks runs them small, options are read here",
    "python -m lm_eval": "its task is fetched from the network; tests/compatibility runs the command on a local task",
    "python -m megalodon.evaluation.harness": "as `python -m lm_eval`",
}
"""How commands begin that are not run here, and the reason."""
SIZES = {"num_layers": 1, "model_dim": 32, "z_dim": 32, "value_dim": 64, "ffn_hidden_dim": 32, "norm_num_groups": 4}
FEW_STEPS = [
    *("data.corpus.source=text.txt", "data.held_out={fraction: 0.2}", "data.sequence_length=32", "data.batch_size=2"),
    *("run.steps=2", "schedule.warmup_steps=0", "evaluation.max_tokens=50", "sampling.max_new_tokens=3"),
]
SMALLER = {  # what is put behind the words of a command, or in the place of some, so that it takes seconds
    "train": [*FEW_STEPS],
    "compare": ["--dry-run"],
    "linearize": [
        *(*FEW_STEPS[:4], "data.sequence_length=160", "transfer.tokens=320", "finetune.tokens=320"),
        "evaluation.max_tokens=50",
    ],
    "evaluate recall": ["--dry-run"],
    "generate": ["--max-tokens", "5"],
}
TEXT = "".join(f"{number} times {number} is {number * number}.\n" for number in range(200))


def lines(page: Path) -> Iterator[str]:
    """The commands of a page's blocks, without their remarks."""
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words)


def commands(start: str, but: str = "\0") -> list:
    found = dict.fromkeys(
        line for page in PAGES for line in lines(page) if line.startswith(start) and not line.startswith(but)
    )
    return [pytest.param(line, id=line[:80]) for line in found]


def mentioned() -> list:
    """Commands within the prose."""
    found = {}
    for page in PAGES:
        prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
        for line in re.findall(r"`(megalodon [a-z][^`]*)`", prose.replace("\n", " ")):
            found.setdefault(line, name(page))
    return [pytest.param(line, id=f"{page}-{line[:60]}") for line, page in found.items()]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages' commands name, small."""
    place = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    model = MegalodonForCausalLM(MegalodonConfig(vocab_size=257, cema_ndim=4, chunk_size=16, **SIZES))
    first = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))["model"]
    MegalodonForCausalLM(MegalodonConfig(vocab_size=257, **first)).save_pretrained(place / "runs/first/model")
    ByteTokenizer().save(place / "runs/first/model")
    for folder in ("runs/books/model", "runs/compare/mine/jobs/RUN/run/model", "MODEL"):
        model.save_pretrained(place / folder)
        ByteTokenizer().save(place / folder)
    pretrained_to_reference(place / "MODEL", place / "CHECKPOINT")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes, eos_token_id=256)).save_pretrained(place / "path/to/llama")
    ByteTokenizer().save(place / "path/to/llama")
    for file in ("long.txt", "war-and-peace.txt", "book.txt", "text.txt", "books/a.txt", "my-texts/a.txt"):
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_text(TEXT)
    for part in ("train", "valid", "test"):
        (place / "books" / part).mkdir()
        (place / "books" / part / "a.txt").write_text(f"{part} {TEXT}")
    (place / "docs").mkdir()
    for page in ("README.md", "docs/index.md"):
        (place / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    (place / "prompts.jsonl").write_text('{"prompt": "And so", "max_tokens": 3}\n{"prompt": "he", "max_tokens": 3}\n')
    shutil.copytree(ROOT / "configs", place / "configs")
    run = {"model": {**SIZES, "chunk_size": 16}, "mesh": {"shard": 2}, "data": {"corpus": {"source": "text.txt"}}}
    run |= {"run": {"folder": "runs/books", "steps": 2}, "checkpoint": {"every": 2}}
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    return place


@pytest.fixture
def folder(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins, for one test alone, where it stands."""
    shutil.copytree(stand_ins, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MEGALODON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


def smaller(words: list[str]) -> list[str]:
    """The same command with less to do."""
    extra = SMALLER.get(" ".join(words[:2]), SMALLER.get(words[0], []))
    if words[0] == "train":
        goes_on = any(word.startswith("model.init_from") for word in words)  # whose sizes stand
        extra = [*extra, *([] if goes_on else ["model.num_layers=1"])]
    words = ["256,1K" if re.fullmatch(r"[\dKM,]*[KM]", word) else word for word in words]
    return [*words, *(["--trials", "2"] if {"passkey", "induction"} & {*words} else []), *extra]


def run_here(line: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(smaller(shlex.split(line)[1:]))
    assert ended.value.code == 0


def test_every_command_is_run_or_listed() -> None:
    known = ("megalodon ", "curl ", "torchrun ", *NOT_RUN)
    assert [line for page in PAGES for line in lines(page) if not line.startswith(known)] == []
    unused = [start for start in NOT_RUN if not commands(start)]
    assert unused == []


@pytest.mark.parametrize("line", commands("megalodon ", but="megalodon serve"))
def test_commands_run(line: str, folder: Path) -> None:
    if line.startswith("megalodon convert checkpoint"):
        pytest.skip("a checkpoint of a mesh: see the test of torchrun")
    if "--context long.ctx" in line:
        run_here("megalodon generate runs/books/model --prompt-file long.txt --save-context long.ctx")
    if "path/to/out" in line and "linearize" not in line:
        shutil.copytree("MODEL", "path/to/out")
    run_here(line)


@pytest.mark.parametrize("line", mentioned())
def test_commands_in_the_prose_and_their_options_exist(line: str) -> None:
    command, words = None, shlex.split(line.replace("...", ""))[1:]
    command = typer.main.get_command(import_module(f"megalodon.cli.{words.pop(0)}").app)
    while hasattr(command, "commands") and words and words[0].islower():
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}


def configs() -> list:
    found = []
    for page in PAGES:
        for number, text in enumerate(blocks(page, "yaml")):
            found.append(pytest.param(text, id=f"{name(page)}-{number}"))
    return found


@pytest.mark.parametrize("text", configs())
def test_configs_and_parts_of_them_are_possible(text: str, folder: Path) -> None:
    given = yaml.safe_load(text)
    if "architectures" in given:
        Path("given.yaml").write_text(text)
        load_comparison(Path("given.yaml"))
        return
    base = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    if "model" in given or "mixture" in given.get("data", {}):
        base = {"run": base["run"]} | ({} if "model" in given else {"model": base["model"]})
        given.setdefault("data", {}).setdefault("corpus", {"source": "books/"}) if "model" in given else None
    Path("given.yaml").write_text(yaml.safe_dump(base | given))
    config = load_config(Path("given.yaml"))
    assert config.data is not None


def test_extras_and_targets_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"pip install ['\"]?(?:\.|megalodon-lm)\[([\w,]+)\]", text)
        assert {extra for group in named for extra in group.split(",")} <= project["optional-dependencies"].keys()
        assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets, name(page)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], text=True, stderr=subprocess.PIPE, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_servers_answer_the_calls_that_follow_them(page: str, folder: Path) -> None:
    found = [line for line in lines(ROOT / page) if line.startswith(("megalodon serve", "curl "))]
    assert found[0].startswith("megalodon serve") and len(found) > 1
    port = free_port()
    server = start("-m", *shlex.split(found[0]), "--port", str(port))
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        for line in found[1:]:
            words = shlex.split(line.replace("localhost:8000", f"localhost:{port}"))
            done = subprocess.run(
                [*words, "--silent", "--show-error", "--fail-with-body"], capture_output=True, text=True
            )
            answer: dict[str, Any] = json.loads(done.stdout)
            assert done.returncode == 0, answer
            if "completions" in line:
                assert answer["choices"][0]["finish_reason"] in ("length", "stop")
            else:
                assert answer["name"] == "war" and answer["tokens"] >= len(TEXT)
    finally:
        server.terminate()
        server.communicate(timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("line", commands("torchrun "))
def test_many_processes_train_and_their_checkpoint_converts(line: str, folder: Path) -> None:
    words = re.sub(r"nproc-per-node=\d+", "nproc-per-node=2", line).split()
    process = start("-m", "torch.distributed.run", *words[1:], *FEW_STEPS[2:])
    assert process.communicate(timeout=600)[1] is not None and process.returncode == 0
    (convert,) = [line for line in lines(ROOT / "docs" / "convert.md") if "convert checkpoint" in line]
    checkpoint = next(Path("runs/books/checkpoints").glob("step-*2"))
    run_here(convert.replace("runs/books/checkpoints/step-00002000", str(checkpoint)))
    assert Path("OUT/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", commands("python benchmarks/"))
def test_scripts_know_their_options(line: str) -> None:
    words = line.split()
    assert (ROOT / words[1]).is_file()
    done = subprocess.run(
        [sys.executable, words[1], "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words[2:] if word.startswith("--")), done.stdout

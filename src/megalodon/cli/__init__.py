"""The `megalodon` command. One file per command: parse, call, print. Commands are listed here and imported when
called. What a command needs, it imports when it runs, so that help and a misspelt option take no PyTorch.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import sys
import time

from megalodon import __version__

SECONDS_FOR_THE_FIRST = 10.0
"""How long another process than the first waits before it reports bad input itself."""

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers of libraries that warn at their import of what is no concern of a command's: parts of torchao for other
machines, and torchao's use of PyTorch."""

COMMANDS = {
    "train": "train a model from a YAML config",
    "generate": "continue a prompt, a file or standard input of any length",
    "serve": "answer OpenAI-style requests, with contexts that live on disk",
    "batch": "answer the prompts of a JSONL file",
    "evaluate": "measure a model on held-out text",
    "compare": "train architectures alike and compare them",
    "explain": "show what a model's layers attend to, and what a token was expected from",
    "tokenizer": "train a byte-pair encoding on your text",
    "plan": "choose a mesh for a model on many devices",
    "linearize": "turn a pretrained Transformer into a model of constant memory",
    "convert": "read and write other implementations' checkpoints",
    "info": "show versions, hardware and the back ends in use",
}


def overview() -> str:
    """The text of `megalodon --help`, made without importing any command, so that it is quick."""
    rows = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    return (
        f"megalodon {__version__}: language models with unlimited context\n\n"
        f"usage: megalodon COMMAND [ARGUMENTS]\n\n{rows}\n\n"
        "megalodon COMMAND --help tells each command's arguments."
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Bad input prints one line and exits with status 2; a defect keeps its traceback."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return
    if name in ("-V", "--version"):
        print(__version__)
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"megalodon: no command {name!r}: {hint}", file=sys.stderr)
        raise SystemExit(2)
    for logger in NOISY:
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        importlib.import_module(f"megalodon.cli.{name}").app(rest, prog_name=f"megalodon {name}")
    except ModuleNotFoundError as error:
        if name != "serve" or (error.name or "").startswith("megalodon"):
            raise
        extra = "ray" if error.name == "ray" else "serve"
        print(f"megalodon: serve needs {error.name}: pip install 'megalodon-lm[{extra}]'", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Of the processes that a launcher started, the first says it, and then the launcher ends the others. Were
            # this one to exit before, the first might be ended before it could.
            time.sleep(SECONDS_FOR_THE_FIRST)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and "free" not in str(error)
        advice = "; free some space and give the same command again" if full else ""
        print(f"megalodon: {error}{advice}", file=sys.stderr)
        raise SystemExit(2) from None

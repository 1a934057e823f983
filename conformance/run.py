"""Run Transformers' own model tests on MegalodonForCausalLM and GeckoForCausalLM: `python conformance/run.py`.

The tests come from the source distribution of the *installed* Transformers, fetched with pip into `.conformance/` (once
per version, ignored by git); none of their code lives in this repository. `suite.py` points them at a tiny Megalodon,
`not_applicable.py` is the one table of tests that cannot hold for it, each with its reason, and `conftest.py` fails the
run when a test in that table passes, is skipped by Transformers itself, or is gone.

A source distribution carries only the files `tests/test_*.py`; what it leaves out (the generation tests among it) is
named at the end of the run. A checkout of the same version has all of it: `--source DIR`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".conformance"

# Read when Transformers and its tests are imported, so they are set before either is: the tests use tiny random models
# and must neither wait for the network nor depend on the accelerator of the day.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")


def download(version: str) -> Path:
    """Fetch and unpack the tests of Transformers `version`; returns the folder that holds `tests/`.

    Raises:
        OSError: pip cannot get the source distribution, or it holds no tests.
    """
    folder = CACHE / f"transformers-{version}"
    if (folder / "tests").is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch]
        result = subprocess.run([sys.executable, "-m", "pip", *command, f"transformers=={version}"], check=False)
        archives = list(Path(scratch).glob("*.tar.gz"))
        if result.returncode or len(archives) != 1:
            raise OSError(f"pip could not get the source distribution of transformers {version}: see above")
        with tarfile.open(archives[0]) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and m.name.split("/", 2)[1:2] == ["tests"]]
            if not members:
                raise OSError(f"the source distribution of transformers {version} holds no tests/ folder")
            archive.extractall(scratch, members=members, filter="data")
        unpacked = Path(scratch) / members[0].name.split("/", 1)[0]
        # The repository's tests are a package; the marker file is one of those a source distribution leaves out.
        (unpacked / "tests" / "__init__.py").touch()
        unpacked.rename(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Run Transformers' own model tests on MegalodonForCausalLM.")
    parser.add_argument("--source", type=Path, help="a checkout of Transformers at the installed version")
    options, pytest_arguments = parser.parse_known_args()

    if importlib.util.find_spec("parameterized") is None:
        print(
            "conformance: Transformers' tests need the package parameterized: pip install -e '.[dev]'", file=sys.stderr
        )
        return 2
    import pytest
    import transformers

    try:
        source = options.source or download(transformers.__version__)
        if not (source / "tests" / "test_modeling_common.py").is_file():
            raise OSError(f"--source {source}: no tests/test_modeling_common.py there; give a checkout of Transformers")
    except OSError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    sys.path[:0] = [str(HERE), str(source)]
    fixed = ["-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE), str(HERE / "suite.py")]
    return int(pytest.main([*fixed, *pytest_arguments]))


if __name__ == "__main__":
    sys.exit(main())

"""One job of a comparison in a process of its own: `python -m megalodon.comparison.worker FOLDER`.

The folder holds `job.json`; the result is `record.json`. The process ends when its standard input does, so that none
outlives the one that started it; a run that was stopped, however, goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

import megalodon
from megalodon import training
from megalodon.comparison.config import merged
from megalodon.comparison.measuring import compress_texts, measure_speed, score_model
from megalodon.files import write_text
from megalodon.training.metrics import read_lines
from megalodon.training.progress import LineDisplay

CURVE_POINTS = 200
STANDARD_INPUT = 0
SECONDS_FOR_ANOTHER = 300.0
"""How long a process of an earlier start may take to end."""


def main(folder: Path) -> int:
    """Do the job of a folder; the exit status."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with FileLock(folder / ".job-lock", timeout=SECONDS_FOR_ANOTHER):
        if (folder / "record.json").exists():
            return 0
        detail = job["detail"]
        torch.set_num_threads(detail.get("threads", torch.get_num_threads()))
        begin = time.perf_counter()
        if job["kind"] == "train":
            result = _train(folder, detail)
        elif job["kind"] == "score":
            result = score_model(folder.parent / detail["of"] / "run" / "model", detail["test"], detail["cut"])
        elif job["kind"] == "speed":
            config = training.check_config(merged(detail["config"], {"run": {"folder": "speed"}}), job["key"])
            result = measure_speed(config, **detail["speed"])
        else:
            result = compress_texts(detail["corpus"], detail["max_bytes"])
        if result is None:
            return 128 + signal.SIGTERM
        record = {
            **{key: job[key] for key in ("key", "kind")},
            **job["about"],
            **result,
            "wall_seconds": round(time.perf_counter() - begin, 3),
            "detail": detail,
            "made_with": made_with(),
        }
        write_text(folder / "record.json", json.dumps(record, allow_nan=False))
        return 0


def made_with() -> dict[str, Any]:
    """Versions and the machine that a result was made with."""
    return {
        "megalodon": megalodon.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _train(folder: Path, detail: dict[str, Any]) -> dict[str, Any] | None:
    """Train, or go on; None if a signal came."""
    run = folder / "run"
    config = training.check_config(merged(detail["config"], {"run": {"folder": str(run)}}), folder.name)
    resolved = training.resolve(config, folder.name)
    settings = resolved.config.model_dump(mode="json")
    parameters = training.count_parameters(resolved.model_config)
    result: dict[str, Any] = {"parameters": parameters, "diverged": False, "settings": settings}
    try:
        if training.train(resolved, LineDisplay(config.run.steps)):
            return None
    except training.DivergedError as error:
        print(error, flush=True)
        result["diverged"], result["reason"] = True, str(error).splitlines()[0]
    metrics = read_lines(run / "metrics.jsonl")
    kept = ("step", "tokens", "seconds", "heldout_loss", "heldout_bits_per_byte")
    curve = [{key: m[key] for key in kept if key in m} for m in metrics if "heldout_loss" in m]
    losses = [m for m in metrics if "loss" in m]
    thin = losses[:: max(1, len(losses) // CURVE_POINTS)]
    last = curve[-1] if curve else {}
    return result | {
        "held_out": {"loss": last.get("heldout_loss"), "bits_per_byte": last.get("heldout_bits_per_byte")},
        "curve": curve,
        "training_loss": [[m["step"], round(m["loss"], 5)] for m in thin],
        "tokens": losses[-1]["tokens"] if losses else 0,
        "training_seconds": losses[-1]["seconds"] if losses else 0.0,
        "epochs": losses[-1]["epoch"] if losses else 0.0,
    }


def _end_with_parent() -> None:
    """Ask this process to stop when whoever started it is gone: then its end of the pipe closes."""
    while os.read(STANDARD_INPUT, 1):  # not through sys.stdin, whose lock the end of the interpreter waits for
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    raise SystemExit(main(Path(sys.argv[1])))

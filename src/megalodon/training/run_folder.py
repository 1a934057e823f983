"""A run's folder: the names in it, and that only one process at a time trains in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from megalodon.files import remove_partial


@dataclass(frozen=True)
class RunFolder:
    """Where each thing of a run lies."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, YAML."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoint folders."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object a sample."""
        return self.path / "samples.jsonl"

    @property
    def plot(self) -> Path:
        """The losses over the steps."""
        return self.path / "loss.png"

    @property
    def model(self) -> Path:
        """The trained model and its tokenizer, as Transformers saves them."""
        return self.path / "model"

    def open(self) -> FileLock:
        """Make the folder, hold it for this process, and remove what an interrupted write left in it.

        Returns:
            The lock; released with `release()`, or by the system when the process ends however it ends.

        Raises:
            ValueError: if another process trains in it.
            OSError: if it cannot be made.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"run.folder: {self.path} is a file; name a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"run.folder: another process is training in {self.path}; wait for it or stop it"
            ) from None
        for folder in (self.path, self.checkpoints):
            if folder.is_dir():
                remove_partial(folder)
        return lock

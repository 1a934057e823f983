"""The `mesh` section of a training config: five numbers, and how long a rank may keep the others waiting."""

from __future__ import annotations

from megalodon.parallel import MeshSizes
from megalodon.training.section import Section, changeable


class MeshSection(Section):
    """How the run is cut over processes; their product is the number of processes. A resumed run may change it."""

    replicate: int = changeable(1, ge=1, description="copies of the weights, each with rows of its own")
    shard: int = changeable(1, ge=1, description="weights and optimiser cut, each rank with rows of its own (FSDP2)")
    tensor: int = changeable(1, ge=1, description="heads, channels, feed-forward and vocabulary cut")
    pipeline: int = changeable(1, ge=1, description="layers cut; run.accumulation_steps are the micro-batches")
    chunk: int = changeable(1, ge=1, description="the sequence cut")
    virtual_stages: int = changeable(1, ge=1, description="stages a pipeline rank, interleaved")
    timeout_seconds: float = changeable(600.0, gt=0, description="a rank that keeps the others waiting longer is lost")

    @property
    def sizes(self) -> MeshSizes:
        """The five numbers."""
        return MeshSizes(self.replicate, self.shard, self.tensor, self.pipeline, self.chunk)

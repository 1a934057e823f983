"""A plain model and a mesh in, the same model over many processes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalodon.models import CausalLM, State
from megalodon.parallel.block import Axes, parallelize_blocks
from megalodon.parallel.mesh import Mesh
from megalodon.parallel.pipeline import Pipeline, PipelinedStage
from megalodon.parallel.sharding import own_part, reshard, shard_weights, synchronize_gradients, whole
from megalodon.parallel.spans import default_borders
from megalodon.parallel.stage import Rows, Stage, stage_layers
from megalodon.parallel.tensor import distribute_parameters, local

States = list[State | None]


class ParallelModel(nn.Module):
    """This rank's part of a model, and how to run it with the others.

    Attributes:
        layers: the indices of this rank's layers, in the order of its states.

    Args:
        model: the whole model, the same values on every rank; its parts are taken over. On the CPU, on `device`, or
            without values on the meta device: then `fill` gives them.
        mesh: the mesh.
        device: where this rank computes.
        precision: "float32", or "bfloat16" for autocast.
        virtual_stages: stages a rank on the pipeline axis, in turn; more than one interleaves them.
    """

    def __init__(
        self,
        model: CausalLM,
        mesh: Mesh,
        device: torch.device,
        precision: str = "float32",
        virtual_stages: int = 1,
    ) -> None:
        super().__init__()
        self.config, self.mesh, self.device, self.precision = model.config, mesh, device, precision
        sizes = mesh.sizes
        axes = Axes(
            mesh.group("tensor") if sizes.tensor > 1 else None, mesh.group("chunk") if sizes.chunk > 1 else None
        )
        if sizes.tensor > 1 or sizes.chunk > 1:
            parallelize_blocks(model, axes)
        if sizes.tensor > 1:
            distribute_parameters(model, mesh.parameters["tensor"])
        ranges = stage_layers(len(model.model.layers), sizes.pipeline * virtual_stages)
        own = ranges[mesh.rank("pipeline") :: sizes.pipeline]
        kind = PipelinedStage if sizes.pipeline > 1 else Stage
        stages: list[Any] = [kind(model, layers, axes, mesh.rank("chunk"), precision) for layers in own]
        self.stages: Any = nn.ModuleList(stages)
        self.layers = [layer for layers in own for layer in layers]
        for stage, layers in zip(stages, own, strict=True):
            stage.first_memory = self.layers.index(layers.start)
            if mesh.weights is not None:
                shard_weights(stage, mesh.weights, precision, sizes.pipeline > 1)
            empty = any(parameter.is_meta for parameter in stage.parameters())
            stage.to_empty(device=device) if empty else stage.to(device)
        self.pipeline = None
        if sizes.pipeline > 1:
            self.pipeline = Pipeline(stages, mesh.group("pipeline"), device)

    @property
    def _tied(self) -> nn.Parameter | None:
        """This rank's copy of the matrix that a pipeline's first and last stage share; None where there is none."""
        if self.pipeline is None or not self.config.share_emb:
            return None
        if self.mesh.rank("pipeline") == 0:
            return self.stages[0].model.embed_tokens.weight
        return self.stages[-1].lm_head.weight if self.has_last else None

    @property
    def has_last(self) -> bool:
        """Whether this rank holds the final norm and the head."""
        return self.stages[-1].is_last

    # --- parameters, under the names of the whole model -----------------------------------------------------

    def named_parameters(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the names that they have in the whole model."""
        tied = self._tied
        for name, parameter in super().named_parameters(*arguments, **options):
            yield "model.embed_tokens.weight" if parameter is tied else name.split(".", 2)[2], parameter

    @torch.no_grad()
    def fill(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take this rank's parts of whole parameters, given one by one under their names in the whole model.

        Raises:
            ValueError: one is missing, or has another shape.
        """
        missing = dict(self.named_parameters())
        for name, value in parameters:
            parameter = missing.pop(name, None)
            if parameter is None:
                continue
            if parameter.shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the model's is {tuple(parameter.shape)}")
            local(parameter).copy_(own_part(value, parameter))
        if missing:
            raise ValueError(f"weights are missing, such as {min(missing)}")

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale all ranks' gradients down to `max_norm` together. Returns the norm before, a scalar."""
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        copy = self._tied if self.mesh.rank("pipeline") else None
        once = [parameter for parameter in parameters if parameter is not copy]
        norm = whole(nn.utils.get_total_norm([p.grad for p in once if p.grad is not None]))
        if self.pipeline is not None:
            square = norm.square()
            dist.all_reduce(square, group=self.mesh.group("pipeline"))
            norm = square.sqrt()
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    # --- running --------------------------------------------------------------------------------------------

    def accumulate_gradients(self, parts: Sequence[Rows], divisor: float) -> tuple[Tensor, States]:
        """Add the gradients of the parts' summed losses over `divisor`, communicating once, after the last.

        Returns:
            The parts' loss over the whole mesh (scalar), and the states after them.
        """
        return self._run(parts, divisor, backward=True)

    @torch.no_grad()
    def losses(self, parts: Sequence[Rows]) -> tuple[Tensor, States]:
        """The parts' summed loss over the whole mesh (scalar), and the states after them; no gradients."""
        answer = self._run(parts, 1.0, backward=False)
        for stage in self.stages:
            reshard(stage)  # FSDP2 leaves the outermost weights whole for a backward pass, which does not come
        return answer

    def _run(self, parts: Sequence[Rows], divisor: float, backward: bool) -> tuple[Tensor, States]:
        if self.pipeline is not None:
            loss = self.pipeline.run(parts, divisor, self._shape(parts[0]), backward)
            if backward and self._tied is not None:
                self._add_tied_gradients(self._tied)
            states = self._join(len(parts))
        else:
            loss, states = self._run_stage(parts, divisor, backward)
        if self.mesh.rank("tensor"):  # its ranks all have the whole loss
            loss = torch.zeros_like(loss)
        dist.all_reduce(loss)
        return loss, states

    def _run_stage(self, parts: Sequence[Rows], divisor: float, backward: bool) -> tuple[Tensor, States]:
        (stage,) = self.stages
        total, states = torch.zeros((), device=self.device), []
        for number, rows in enumerate(parts):
            synchronize_gradients(stage, number == len(parts) - 1)
            loss, state = stage(None, rows)
            loss = loss / divisor
            if backward:
                loss.backward()
            total += loss.detach()
            states.append(None if state is None else state.detach())
        return total, states

    def _add_tied_gradients(self, matrix: nn.Parameter) -> None:
        """Give both ends of the pipeline the sum of their gradients of the one matrix; both cut it alike."""
        assert matrix.grad is not None
        own, group = local(matrix.grad), self.mesh.group("pipeline")
        other, peer = torch.empty_like(own), group.size() - 1 - group.rank()
        messages = [
            dist.P2POp(dist.isend, own, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        own.add_(other)

    def _shape(self, rows: Rows) -> tuple[int, int, int]:
        """Of the activations between stages on this rank."""
        batch, length = rows.input_ids.shape
        rank = self.mesh.rank("chunk")
        borders = default_borders(length, self.mesh.sizes.chunk)
        return batch, borders[rank + 1] - borders[rank], self.config.model_dim // self.mesh.sizes.tensor

    def _join(self, count: int) -> States:
        """One state for each part, of all this rank's stages in order."""
        joined: States = []
        for number in range(count):
            states = [stage.states[number] for stage in self.stages]
            if states[-1] is None:
                joined.append(None)
                continue
            layers = [layer for state in states for layer in state.layers]
            joined.append(type(states[-1])(layers, states[-1].final, states[-1].position, states[-1].dimensions))
        return joined

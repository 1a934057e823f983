"""How much memory the stages will take, before any of it is taken: a step of each on tensors without storage.

Every tensor that the step makes is counted while something holds it, so the figure follows the code, whatever the
recipe. Not counted are the libraries themselves, what kernels use inside, and what an allocator keeps for later.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalodon.linearize.activations import through
from megalodon.linearize.finetune import prepare
from megalodon.linearize.recipe import Batchwise, FineTune, Lesson, Transfer, moving
from megalodon.linearize.transfer import Pupils
from megalodon.models.kin import KinConfig, KinForCausalLM
from megalodon.models.kin.block import KinBlock
from megalodon.models.kin.mixers import Mixer
from megalodon.models.kin.mixers.projected import Projected
from megalodon.models.kin.model import new_mixer
from megalodon.ops.backend import ENVIRONMENT_VARIABLE
from megalodon.ops.layout import layout_of
from megalodon.training import launch
from megalodon.training.step import autocast

if TYPE_CHECKING:
    from megalodon.linearize.run import Linearization


class StageMemory(NamedTuple):
    """What a stage holds at its fullest, in bytes.

    Attributes:
        stage: its name. blocks: how many are in memory; None: the whole model.
        teacher: its weights that are there, of these blocks and the embedding, or of all where predictions are
            compared; on a CPU they are mapped from files.
        weights: what is new or moves and the optimiser's two numbers for each that moves; of a whole model, all of it.
        step: the most that is there besides in a step: activations and gradients.
    """

    stage: str
    blocks: int | None
    teacher: int
    weights: int
    step: int

    def __str__(self) -> str:
        count = "the whole model" if self.blocks is None else f"{self.blocks} blocks"
        what = "one block" if self.blocks == 1 else count
        kind = "weights and what moves them" if self.blocks is None else "new and moving weights"
        told = (
            f"{self.stage}, {what} in memory: {_size(self.weights + self.step)} ({kind} {_size(self.weights)}, "
            f"a step {_size(self.step)})"
        )
        return f"{told}, and the teacher's weights there, {_size(self.teacher)}" if self.teacher else told


def predicted(job: Linearization) -> list[StageMemory]:
    """What each stage will take."""
    found = []
    for stage in job.stages:
        if isinstance(stage, Transfer):
            layers = max(job.groups(), key=lambda group: (len(set(group) & set(job.replaced)), len(group)))
            few = [_of_layers(job, stage, layers[:count]) for count in range(1, min(len(layers), 2) + 1)]
            more, each = len(layers) - len(few), [last - first for first, last in zip(few[0], few[-1], strict=True)]
            found.append(
                StageMemory(stage.name, len(layers), *(x + more * y for x, y in zip(few[-1], each, strict=True)))
            )
        else:
            found.append(StageMemory(stage.name, None, *_of_model(job, stage)))
    return found


def _of_model(job: Linearization, stage: FineTune) -> tuple[int, int, int]:
    """(teacher, weights, step) of `StageMemory`: of one layer, and what each further kind of layer adds."""
    alone, kinds = _of_models(job, stage, [0]), [str(job.config.mixer_of(i)) for i in range(job.config.num_layers)]
    teacher, weights, step = alone
    for kind, count in Counter(kinds[1:]).items():
        both = _of_models(job, stage, [0, kinds.index(kind, 1)])
        more = [count * (y - x) for x, y in zip(alone, both, strict=True)]
        teacher, weights, step = teacher + more[0], weights + more[1], step + more[2]
    return teacher, weights, step


def _of_models(job: Linearization, stage: FineTune, layers: list[int]) -> tuple[int, int, int]:
    """(teacher, weights, step) of a step of a model of these layers."""
    data, parts, settings = job.settings.data, stage.section.accumulation_steps, job.settings
    rows, cpu, teacher, size = data.batch_size // parts, torch.device("cpu"), None, 0
    model = _form(job.config, layers, torch.float32).train()
    prepare(model, stage)
    if settings.run.gradient_checkpointing:
        launch.checkpoint_activations(model)
    weights = sum(_bytes(p) * (3 if p.requires_grad else 1) for p in model.parameters())
    if stage.objective is not None:
        teacher = _form(job.teacher.config, layers, job.dtype).eval()
        nn.Module.requires_grad_(teacher, False)
        size = sum(map(_bytes, teacher.parameters()))
    with _without_storage():
        for each in (model, teacher):
            if each is not None:
                _give_tensors(each)
        labels = torch.zeros(rows, data.sequence_length, dtype=torch.int64)
        with _Counting() as counted, autocast(cpu, settings.run.precision):
            for _ in range(parts):
                _loss_of(stage, model, teacher, labels).backward()
                gc.collect()
        return size, weights, counted.most


def _form(config: KinConfig, layers: list[int], dtype: torch.dtype) -> KinForCausalLM:
    """A model of some of the layers, on no device."""
    fields = {name: getattr(config, name) for name in KinConfig.architecture_fields()}
    entries = [config.mixer_of(layer) for layer in layers]
    mixers = [{"name": name, **parameters.model_dump(exclude_defaults=True)} for name, parameters in entries]
    few = KinConfig(**{**fields, "num_layers": len(layers), "mixers": mixers, "mixer_parameters": None})
    with torch.device("meta"), _default_dtype(dtype):
        return KinForCausalLM(few)


def _give_tensors(model: nn.Module) -> None:
    """Tensors as they are made here and now in place of all parameters and buffers, shared ones once."""
    made: dict[int, Any] = {}
    for part in model.modules():
        for owned in (part._parameters, part._buffers):
            for name, x in owned.items():
                if x is not None:
                    if id(x) not in made:
                        new = torch.empty(x.shape, dtype=x.dtype)
                        made[id(x)] = nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new
                    owned[name] = made[id(x)]


def _loss_of(stage: FineTune, model: KinForCausalLM, teacher: KinForCausalLM | None, labels: Tensor) -> Tensor:
    """As the stage's trainer computes it, but that embeddings are given: what token ids are is looked at."""
    given = {"inputs_embeds": model.model.embed_tokens(labels), "use_cache": False}
    if stage.objective is None or teacher is None:
        return model(**given, shift_labels=labels, num_items_in_batch=labels.numel(), return_logits=False).loss
    with torch.no_grad():
        embedded = teacher.model.embed_tokens(labels)
        theirs = teacher(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
    return stage.objective(Batchwise(model(**given, output_hidden_states=True), theirs, labels))


def _of_layers(job: Linearization, stage: Transfer, layers: range) -> tuple[int, int, int]:
    """(teacher, weights, step) of `StageMemory`, of a step of these layers."""
    data, sizes, parts = job.settings.data, job.teacher.config, stage.section.accumulation_steps
    cpu = torch.device("cpu")
    whole, of_part = (
        layout_of(rows, data.sequence_length, cpu) for rows in (data.batch_size, data.batch_size // parts)
    )
    with _without_storage():
        with _default_dtype(job.dtype):
            blocks = {layer: KinBlock(sizes, layer).requires_grad_(False).eval() for layer in layers}
            embedding = torch.empty(sizes.vocab_size, sizes.model_dim)
        teacher = _bytes(embedding) + sum(_bytes(p) for block in blocks.values() for p in block.parameters())
        mixers = {layer: _mixer(job, stage, layer, blocks[layer]) for layer in layers if layer in job.replaced}
        own = [p for layer, mixer in mixers.items() for p in _own(mixer, blocks[layer])]
        weights = sum(_bytes(p) * (3 if p.requires_grad else 1) for p in own)
        pupils = Pupils(mixers, blocks, len(job.replaced))
        ids = torch.empty(data.batch_size, data.sequence_length, dtype=torch.int64)

        def objective(lesson: Lesson) -> Tensor:
            gc.collect()  # what the layer before has left in cycles
            return stage.objective(lesson)

        with _Counting() as counted, autocast(cpu, job.settings.run.precision):
            x = torch.nn.functional.embedding(ids, embedding)
            if len(layers) < sizes.num_layers and job.settings.memory.activations == "recompute":
                x = through(blocks[layers.start], x, whole)
            outputs = []
            for part in x.chunk(parts):
                outputs.append(pupils.teach(part, of_part, objective, lambda loss: loss.backward())[1])
        return teacher, weights, counted.most


def _mixer(job: Linearization, stage: Transfer, layer: int, block: KinBlock) -> Mixer:
    """The new mixer of a layer as `pupils` makes it."""
    mixer = new_mixer(job.config, layer)
    job.recipe.start(mixer, cast(Projected, block.mixer))
    mixer.requires_grad_(False).train()
    for name in moving([name for name, _ in mixer.named_parameters()], stage.trainable):
        parent, _, last = name.rpartition(".")
        setattr(mixer.get_submodule(parent), last, nn.Parameter(torch.empty(mixer.get_parameter(name).shape)))
    return mixer


def _own(mixer: Mixer, block: KinBlock) -> list[Tensor]:
    """The parameters of a mixer that are not the teacher's."""
    theirs = {id(p) for p in block.mixer.parameters()}
    return [p for p in mixer.parameters() if id(p) not in theirs]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_storage() -> Iterator[None]:
    """Tensors that have shapes and no storage; operators run as plain PyTorch, for compiled loops ask for addresses."""
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = "blocked"
    try:
        with FakeTensorMode():
            yield
    finally:
        del os.environ[ENVIRONMENT_VARIABLE]
        if asked is not None:
            os.environ[ENVIRONMENT_VARIABLE] = asked


def _is_without_values(args: Any) -> bool:
    """Whether something is chosen by a mask that has no storage."""
    chosen = args[1][0]
    return isinstance(chosen, FakeTensor) and chosen.dtype == torch.bool


class _Counting(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live.

    Attributes:
        now: of those that live. most: that there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.index.Tensor and _is_without_values(args):
            out = args[0].flatten(0, args[1][0].ndim - 1).clone()  # which are chosen nobody can say: all
        else:
            out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

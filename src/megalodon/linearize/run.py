"""A linearisation from its teacher to its model: the stages in turn, each a run that goes on after a kill.

OUT/                        the model, its tokenizer: there when all is done
OUT/linearize/config.yaml   what was asked for
OUT/linearize/keep_attention.json   with keep_attention=auto: what each layer costs, and which stay
OUT/linearize/1-transfer/   a run folder; with blocks in turn, one for each group of layers in it
OUT/linearize/student/      the teacher's blocks with the new mixers, where a whole model is to be trained
OUT/linearize/2-finetune/   a run folder
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from megalodon.convert.teachers import Teacher
from megalodon.data import Batch, Tokenizer, check_vocabulary, load_tokenizer, same_tokens
from megalodon.files import load_tensors, remove_partial, write_file, write_folder, write_text
from megalodon.inference import choose_device, load_model
from megalodon.inference.loading import has_tokenizer
from megalodon.linearize.activations import OnDisk, Recomputed
from megalodon.linearize.assembly import assemble
from megalodon.linearize.config import LinearizeConfig, check
from megalodon.linearize.finetune import FineTuner, prepare
from megalodon.linearize.recipe import FineTune, Recipe, Stage, Transfer
from megalodon.linearize.selection import kept_by_cost
from megalodon.linearize.transfer import Pupils, TransferTrainer, pupils
from megalodon.models import CausalLM
from megalodon.models.kin import KinConfig
from megalodon.models.kin.block import KinBlock
from megalodon.training import corpora, launch
from megalodon.training.config import RunConfig, TrainConfig, changed_fields, train_config
from megalodon.training.config_file import config_text, parse_yaml
from megalodon.training.interrupt import StopRequest
from megalodon.training.model_section import model_section, resolved_section
from megalodon.training.optimizer import build_optimizer
from megalodon.training.progress import make_display
from megalodon.training.records import records_of
from megalodon.training.run_folder import RunFolder
from megalodon.training.snapshot import seed_everything
from megalodon.training.throughput import measure_peak_flops, training_flops_per_token
from megalodon.training.trainer import Parts, Trainer

WORK = "linearize"
"""The folder of stages in OUT."""


@dataclass(frozen=True)
class Linearization:
    """All that a run needs to know, checked.

    Attributes:
        config: of the model to be made. replaced: the layers that get new mixers.
    """

    recipe: Recipe
    settings: LinearizeConfig
    teacher: Teacher
    tokenizer: Tokenizer
    config: KinConfig
    replaced: list[int]
    out: Path

    @property
    def stages(self) -> list[Stage]:
        """What is done, in order."""
        return self.recipe.stages(self.settings)

    @property
    def dtype(self) -> torch.dtype:
        """Of the teacher's weights and of activations, while layers learn."""
        return torch.bfloat16 if self.settings.run.precision == "bfloat16" else torch.float32

    def groups(self) -> list[range]:
        """The layers that are in memory together while they learn, as far as the last that is replaced."""
        end = self.replaced[-1] + 1
        size = self.settings.memory.layers_at_once or end
        return [range(first, min(first + size, end)) for first in range(0, end, size)]


def plan(teacher: Path, out: Path, recipe: Recipe, settings: LinearizeConfig) -> Linearization:
    """Check everything before any work.

    Raises:
        FileNotFoundError, ValueError: teacher, tokenizer, recipe and settings do not fit each other, or `out` holds
            something else; the message names what.
    """
    there, here = teacher.expanduser().resolve(), out.expanduser().resolve()
    if there == here or there in here.parents or here / WORK in (there, *there.parents):
        raise ValueError(f"OUT: {out} lies in the teacher's folder, which is never written to: name another folder")
    if out.exists() and not (out.is_dir() and _is_ours(out)):
        raise ValueError(f"OUT: {out} is there already and holds something else: name another folder")
    source = Teacher(there)
    if settings.tokenizer is None and not has_tokenizer(there):
        raise FileNotFoundError(f"teacher: {teacher} holds no tokenizer: name one with tokenizer=...")
    tokenizer = load_tokenizer(settings.tokenizer or there)
    try:
        check_vocabulary(tokenizer, source.config.vocab_size)
    except ValueError as error:
        raise ValueError(f"tokenizer: {error}") from None
    if settings.tokenizer is not None and has_tokenizer(there):
        apart = same_tokens(tokenizer, load_tokenizer(there))
        if apart is not None:
            raise ValueError(f"tokenizer: {settings.tokenizer} is another than the teacher's: {apart}. Leave it out")
    if settings.data.sequence_length > source.length:
        raise ValueError(
            f"data.sequence_length: {settings.data.sequence_length} is more than the teacher was trained to read "
            f"({source.length}): it has nothing to teach beyond that"
        )
    kept = kept_layers(settings, source.config)
    told = recipe.problems(settings, source.config)
    if told:
        raise ValueError(f"--recipe {recipe.name}: {'; '.join(told)}")
    config = recipe.student_config(settings, source.config, kept)
    replaced = [layer for layer in range(source.config.num_layers) if layer not in kept]
    job = Linearization(recipe, settings, source, tokenizer, config, replaced, out)
    _check_adapters(job)
    return job


def _check_adapters(job: Linearization) -> None:
    """Refuse adapters for layers that no block has, before the stages that come first."""
    for stage in job.stages:
        if isinstance(stage, FineTune) and stage.lora is not None:
            with torch.device("meta"):
                block = KinBlock(job.config, job.replaced[0])
            there = sorted({name.rpartition(".")[2] for name, x in block.named_modules() if isinstance(x, nn.Linear)})
            missing = [name for name in stage.lora.targets if name not in there]
            if missing:
                raise ValueError(
                    f"lora.targets: no linear layer is called {missing[0]}: a block has {', '.join(there)}"
                )
            if find_spec("peft") is None:
                raise ImportError("adapters need PEFT: pip install peft, or give lora=null")


def _is_ours(out: Path) -> bool:
    """Whether a folder holds nothing, or a run that has begun."""
    work = RunFolder(out / WORK)
    if work.config.is_file():
        return True
    inside = work.path.iterdir() if work.path.is_dir() else ()
    others = (path for path in out.iterdir() if path != work.path)
    return not any(others) and all(path.name.startswith(".") for path in inside)


def kept_layers(settings: LinearizeConfig, teacher: KinConfig) -> list[int]:
    """The layers that stay as they are.

    Raises:
        ValueError: one is not there, or all would stay.
    """
    kept = settings.keep_attention
    if kept == "auto":  # chosen when the run begins
        if settings.keep.number(teacher.num_layers) >= teacher.num_layers:
            raise ValueError(
                f"keep.count: {settings.keep.number(teacher.num_layers)} of {teacher.num_layers} layers would stay as "
                "they are: nothing would change"
            )
        return []
    for layer in kept:
        if not 0 <= layer < teacher.num_layers:
            raise ValueError(f"keep_attention: there is no layer {layer}: the teacher has {teacher.num_layers}, from 0")
    if len(set(kept)) == teacher.num_layers:
        raise ValueError("keep_attention: all layers would stay as they are: nothing would change")
    return sorted(set(kept))


def linearize(job: Linearization) -> StopRequest:
    """Run the stages that are not done yet, and write the model.

    Returns:
        The request that stopped the run; false if the model is written.

    Raises:
        ValueError: `out` holds stages of another teacher or with other settings.
        DivergedError, OSError: as training.
    """
    work = RunFolder(job.out / WORK)
    stop = StopRequest()
    with launch.opened(work):
        _require_same(job, work)
        if (job.out / "config.json").is_file():
            return stop
        if job.settings.keep_attention == "auto":
            job = _chosen(job, work.path)
        for number, stage in enumerate(job.stages, 1):
            folder = work.path / f"{number}-{stage.name}"
            if isinstance(stage, Transfer):
                stop = _transfer(job, stage, folder, number)
            else:
                stop = _finetune(job, stage, folder, number)
            if stop:
                return stop
        _publish(job, _student(job, len(job.stages)))
        return stop


def _chosen(job: Linearization, work: Path) -> Linearization:
    """The run with those layers kept that cost most."""
    settings, display = job.settings, make_display(1)
    device = choose_device(None if settings.run.device == "auto" else settings.run.device)
    rows = -(-settings.keep.tokens // settings.data.sequence_length)

    def read() -> Batch:
        config = _stage_config(job, job.stages[0], work)
        config = config.model_copy(update={"data": settings.data.model_copy(update={"batch_size": rows})})
        display.say("which layers keep their attention: measuring what each costs")
        return corpora.build_loader(config, corpora.prepare(config, job.tokenizer, display).training, 0, 1).batch_at(0)

    kept = kept_by_cost(settings.keep, job.teacher, work / "keep_attention.json", read, device, job.dtype)
    display.say(f"layers {', '.join(map(str, kept))} keep their attention")
    config = job.recipe.student_config(settings, job.teacher.config, kept)
    replaced = [layer for layer in range(config.num_layers) if layer not in kept]
    return replace(job, config=config, replaced=replaced)


def _require_same(job: Linearization, work: RunFolder) -> None:
    """Note the settings of a run that has learned nothing yet; refuse to go on with others than one learned with."""
    own = {"teacher": str(job.teacher.folder), "recipe": job.recipe.name}
    if not work.config.is_file() or not _has_learned(work.path):
        now = own | job.settings.model_dump(mode="json")
        write_text(work.config, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))
        return
    before = parse_yaml(work.config.read_text(encoding="utf-8"), str(work.config))
    changed = [(name, before.pop(name, None), value) for name, value in own.items()]
    changed = [each for each in changed if each[1] != each[2]]
    if not changed:
        settings = check(job.recipe.config, before, str(work.config))
        free = ("checkpoint", "evaluation")
        changed = [each for each in changed_fields(settings, job.settings) if each[0].partition(".")[0] not in free]
    if changed:
        name, old, new = changed[0]
        raise ValueError(
            f"OUT: {job.out} was begun with other settings: {name} was {old!r} and is {new!r}: name another folder"
        )


def _has_learned(work: Path) -> bool:
    """Whether something lies there that depends on the settings."""
    return (work / "keep_attention.json").is_file() or any(work.rglob("*.safetensors"))


def _stage_config(job: Linearization, stage: Stage, folder: Path) -> TrainConfig:
    settings, section = job.settings, stage.section
    empty = model_section(job.config.model_type)()
    model = resolved_section(empty, job.config)
    return train_config(job.config.model_type)(
        model=model,
        tokenizer=settings.tokenizer or str(job.teacher.folder),
        data=settings.data,
        optimizer=section.optimizer,
        schedule=section.schedule,
        run=RunConfig(
            folder=str(folder),
            steps=section.steps(settings.data),
            seed=settings.run.seed,
            precision=settings.run.precision,
            device=settings.run.device,
            accumulation_steps=section.accumulation_steps,
            gradient_checkpointing=settings.run.gradient_checkpointing and isinstance(stage, FineTune),
            log_every=settings.run.log_every,
        ),
        checkpoint=settings.checkpoint,
        evaluation=settings.evaluation,
    )


def _run(
    job: Linearization,
    config: TrainConfig,
    folder: RunFolder,
    what: str,
    make: Callable[[torch.device], tuple[Any, Callable[..., Trainer]]],
) -> StopRequest:
    """One run to its end or to a signal. `make`: from a device to (what trains, its trainer)."""
    display = make_display(config.run.steps)
    device = choose_device(None if config.run.device == "auto" else config.run.device)
    with launch.opened(folder):
        display.say(what)
        checkpoint = launch.find_checkpoint(config, folder, display.say)
        texts = corpora.prepare(config, job.tokenizer, display)
        seed_everything(config.run.seed)
        model, trainer_of = make(device)
        parts = _parts(job, config, texts, model, device)
        trainer = trainer_of(config, folder, parts, display, records_of(config, folder))
        if checkpoint is not None:
            trainer.restore(checkpoint)
            display.say(f"resuming from {checkpoint}")
        write_text(folder.config, config_text(config))
        with display, StopRequest() as stop:
            trainer.train(stop)
        return stop


def _parts(job: Linearization, config: TrainConfig, texts: corpora.Texts, model: Any, device: torch.device) -> Parts:
    length = config.data.sequence_length
    whole = model if isinstance(model, CausalLM) else None
    moving = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    flops = 6.0 * moving if whole is None else training_flops_per_token(whole, job.config, length)
    return Parts(
        model=cast(CausalLM, model),
        optimizer=build_optimizer(model, config.optimizer),
        tokenizer=job.tokenizer,
        loader=corpora.build_loader(config, texts.training, 0, 1),
        heldout=corpora.held_out_sets(config, texts, 0, 1, corpora.held_out_rows(config, texts)),
        flops_per_token=flops,
        peak_flops=measure_peak_flops(device, torch.bfloat16 if config.run.precision == "bfloat16" else torch.float32),
        device=device,
    )


def _group_folder(folder: Path, layers: range, groups: int) -> Path:
    return folder if groups == 1 else folder / f"layers-{layers.start:03d}-{layers.stop - 1:03d}"


def _transfer(job: Linearization, stage: Transfer, folder: Path, number: int) -> StopRequest:
    groups, stop = job.groups(), StopRequest()
    earlier = _trained(job, number - 1)
    for layers in groups:
        run = RunFolder(_group_folder(folder, layers, len(groups)))
        if run.model.is_dir():
            continue

        def make(device: torch.device, layers: range = layers) -> tuple[Pupils, Callable[..., Trainer]]:
            arguments = (job.teacher, layers.start, device, job.dtype)
            held_out = lessons = Recomputed(*arguments)
            if job.settings.memory.activations == "disk":
                lessons = OnDisk(*arguments, folder / "activations", layers.stop)
            model = pupils(
                *(job.recipe, stage, job.config, job.teacher, layers, earlier, job.replaced),
                *(job.settings.run.seed, device, job.dtype),
            )
            return model, lambda *rest: TransferTrainer(stage, lessons, held_out, *rest)

        told = f"stage {number} of {len(job.stages)}: {stage.name}, layers {layers.start} to {layers.stop - 1}"
        stop = _run(job, _stage_config(job, stage, run.path), run, told, make)
        if stop:
            return stop
    shutil.rmtree(folder / "activations", ignore_errors=True)
    return stop


def _trained(job: Linearization, stages: int) -> dict[str, Tensor]:
    """What the transfers among the first so many stages made of the mixers, by `LAYER.NAME`."""
    found: dict[str, Tensor] = {}
    groups = job.groups()
    for number, stage in enumerate(job.stages[:stages], 1):
        if isinstance(stage, Transfer):
            for layers in groups:
                own = _group_folder(job.out / WORK / f"{number}-{stage.name}", layers, len(groups))
                tensors = load_tensors(own / "model" / "model.safetensors")
                found |= {name.removeprefix("mixers."): value for name, value in tensors.items()}
    return found


def _student(job: Linearization, stages: int) -> Path:
    """The folder of the model after the first so many stages, made where none of them made one."""
    for number in range(stages, 0, -1):
        if isinstance(job.stages[number - 1], FineTune):
            return RunFolder(job.out / WORK / f"{number}-{job.stages[number - 1].name}").model
    folder = job.out / WORK / "student"
    if not folder.is_dir():
        trained = _trained(job, stages)
        arguments = (job.recipe, job.config, job.teacher, job.tokenizer, trained, job.replaced, job.settings.run.seed)
        write_folder(folder, lambda empty: assemble(empty, *arguments))
    return folder


def _finetune(job: Linearization, stage: FineTune, folder: Path, number: int) -> StopRequest:
    run = RunFolder(folder)
    if run.model.is_dir():
        return StopRequest()

    def make(device: torch.device) -> tuple[CausalLM, Callable[..., Trainer]]:
        model = load_model(_student(job, number - 1), device, torch.float32)
        prepare(model, stage)
        if job.settings.run.gradient_checkpointing:
            launch.checkpoint_activations(model)
        teacher = None if stage.objective is None else job.teacher.model(device, job.dtype)
        return model, lambda *rest: FineTuner(stage, teacher, *rest)

    told = f"stage {number} of {len(job.stages)}: {stage.name}"
    return _run(job, _stage_config(job, stage, folder), run, told, make)


def _publish(job: Linearization, folder: Path) -> None:
    """Put the files of a model into OUT, the config last: where it is, all is there."""
    remove_partial(job.out)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        write_file(job.out / path.name, partial(shutil.copyfile, path))

"""Transformers of other libraries as attention kin, a block at a time: what linearisation starts from.

A folder is read where it lies: its safetensors files are mapped, so that a block takes memory only while it is used.
The folder is never written to.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from megalodon.convert.peers import refuse
from megalodon.inference.loading import quiet_transformers
from megalodon.models.kin import KinConfig, KinForCausalLM
from megalodon.models.kin.block import KinBlock

LENGTH_FREE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary scaling whose frequencies do not depend on how long the text at hand is."""

ATTENTIONS = ("attention", "hip", "sliding_attention")
"""Mixers that have attention's own weights and no others."""


class Kind(NamedTuple):
    """How a model type stands to the kin.

    Attributes:
        fields: its config -> those of `KinConfig`, but the rotary ones.
        names: of our modules in a block, longest first, and theirs; after @, the part of its rows that is ours.
        final_norm: what it calls the norm before the head.
    """

    fields: Callable[[Any], dict[str, Any]]
    names: tuple[tuple[str, str], ...]
    final_norm: str = "model.norm"


class Teacher:
    """A Transformer in a folder.

    Attributes:
        config: of the kin model that it is.
        length: tokens that it was trained to read, as its config says.
        dtype: of its weights.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            FileNotFoundError: there is no model in the folder, or a file of it is missing.
            ValueError: its type or an option of it is not known here, or its weights are not what the config says; the
                message names it.
        """
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"teacher: {folder} holds no config.json: give the folder of a Transformers model")
        model_type = _mapping(folder / "config.json").get("model_type")
        if model_type not in KINDS:
            raise ValueError(
                f"teacher: {folder} holds a model of type {model_type!r}: it must be one of {', '.join(sorted(KINDS))}"
            )
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.model_type, self.kind = str(model_type), KINDS[model_type]
        try:
            fields = self.kind.fields(config) | rotary_fields(config)
        except ValueError as error:
            raise ValueError(f"teacher: {folder}: {error}") from None
        if getattr(config, "quantization_config", None):
            raise ValueError(f"teacher: {folder}: quantization_config: its weights are rounded; save it as it was")
        self.config = KinConfig(**fields)
        self.length = int(config.max_position_embeddings)
        self._files = _files_of(folder)
        self._open: dict[str, Any] = {}
        self.dtype = self.tensor("model.embed_tokens.weight").dtype
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"teacher: {folder} holds weights in {self.dtype}: save it in bfloat16 or float32")
        self._check_shapes()

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of a model that takes over its weights: theirs, but where memories would have too little range, float32."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def with_attention(self, name: str, parameters: Mapping[str, Any]) -> Teacher:
        """This model, its weights as they are, with another attention in the layers that see everything.

        Args:
            name: of `ATTENTIONS`.
            parameters: of this mixer, such as its window; those of the projections are the model's.

        Raises:
            ValueError: there is no such attention or parameter, or a value does not fit; the message names it.
        """
        if name not in ATTENTIONS:
            raise ValueError(f"attention is {name!r}: with a model's own weights it must be {', '.join(ATTENTIONS)}")
        own = self.config.architecture_fields()
        fields = {field: getattr(self.config, field) for field in own if field not in ("mixers", "mixer_parameters")}
        mixers: list[str | dict[str, Any]] = []
        for layer in range(self.config.num_layers):
            kind, given = self.config.mixer_of(layer)
            entry = {"name": kind, **given.model_dump()}
            mixers.append({**entry, "name": name, **parameters} if kind == "attention" else entry)
        other = copy.copy(self)
        other.config = KinConfig(**fields, mixers=mixers)
        return other

    def tensor(self, name: str) -> Tensor:
        """One of its parameters by the name in its files, mapped.

        Raises:
            ValueError: the files lack it.
        """
        return self._file_with(name).get_tensor(name)

    def _file_with(self, name: str) -> Any:
        if name not in self._files:
            raise ValueError(f"teacher: the weights in {self.folder} lack {name}")
        file = self._files[name]
        if file not in self._open:
            if not (self.folder / file).is_file():
                raise FileNotFoundError(f"teacher: {self.folder} lacks {file}, which holds {name}")
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"teacher: {self.folder / file} is damaged: {error}") from None
        return self._open[file]

    def _check_shapes(self) -> None:
        """Refuse weights that are missing or not as the config says, before any is read."""
        own = self.config
        wanted: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (own.vocab_size, own.model_dim),
            f"{self.kind.final_norm}.weight": (own.model_dim,),
        }
        if not own.share_emb:
            wanted["lm_head.weight"] = (own.vocab_size, own.model_dim)
        for name, shape in wanted.items():
            self._require_shape(name, self._shape(name), shape)
        for layer in range(own.num_layers):
            for name, form in self._form(layer).items():
                theirs, rows = self._named(layer, name)
                found = self._shape(theirs)
                if rows:
                    begin, end = self._rows(rows, found[0])
                    found = (min(end, found[0]) - begin, *found[1:])
                self._require_shape(f"{name} of layer {layer}", found, tuple(form.shape))

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_with(name).get_slice(name).get_shape())

    @staticmethod
    def _require_shape(what: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise ValueError(f"teacher: {what} has shape {found}: its config says {wanted}")

    def _form(self, layer: int) -> dict[str, Tensor]:
        with torch.device("meta"):
            return dict(KinBlock(self.config, layer).state_dict())

    def block_tensors(self, layer: int) -> dict[str, Tensor]:
        """The parameters of a block, by their names in a `KinBlock`."""
        found = {}
        for name in self._form(layer):
            theirs, rows = self._named(layer, name)
            whole = self.tensor(theirs)
            found[name] = whole[slice(*self._rows(rows, len(whole)))] if rows else whole
        return found

    def _named(self, layer: int, name: str) -> tuple[str, str]:
        """What it calls a parameter of a block, and the part of its rows that is ours."""
        for ours, theirs in self.kind.names:
            if name.startswith(f"{ours}."):
                module, _, rows = theirs.partition("@")
                return f"model.layers.{layer}.{module}{name.removeprefix(ours)}", rows
        raise AssertionError(name)

    def _rows(self, part: str, count: int) -> tuple[int, int]:
        """Of a matrix of `count` rows that holds several: queries, keys and values, or gate and up."""
        own = self.config
        heads, groups = own.num_heads * own.head_size, own.key_value_heads * own.head_size
        return {
            "q": (0, heads),
            "k": (heads, heads + groups),
            "v": (heads + groups, heads + 2 * groups),
            "gate": (0, count // 2),
            "up": (count // 2, count),
        }[part]

    def other_tensors(self) -> dict[str, Tensor]:
        """What belongs to no block, by the names of a `KinForCausalLM`; a tied output matrix is not there."""
        found = {"model.embed_tokens.weight": self.tensor("model.embed_tokens.weight")}
        for kind in ("weight", "bias") if self.config.norm == "layer" else ("weight",):
            found[f"model.final_norm.{kind}"] = self.tensor(f"{self.kind.final_norm}.{kind}")
        if not self.config.share_emb:
            found["lm_head.weight"] = self.tensor("lm_head.weight")
        if self.config.head_bias:
            found["lm_head.bias"] = self.tensor("lm_head.bias")
        return found

    def block(self, layer: int, device: torch.device, dtype: torch.dtype) -> KinBlock:
        """A block, in evaluation mode and frozen. On a CPU weights that have the dtype stay mapped."""
        with torch.device("meta"):
            block = KinBlock(self.config, layer)
        tensors = {name: value.to(device, dtype) for name, value in self.block_tensors(layer).items()}
        block.load_state_dict(tensors, assign=True)
        block.requires_grad_(False)
        return block.eval()

    def model(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> KinForCausalLM:
        """All of it, in evaluation mode and frozen."""
        with torch.device("meta"):
            model = KinForCausalLM(self.config)
        tensors = self.other_tensors()
        for layer in range(self.config.num_layers):
            tensors |= {f"model.layers.{layer}.{name}": value for name, value in self.block_tensors(layer).items()}
        if self.config.share_emb:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        model.load_state_dict(
            {name: value.to(device, dtype or self.dtype) for name, value in tensors.items()}, assign=True
        )
        model.tie_weights()
        nn.Module.requires_grad_(model, False)
        return model.eval()


def rotary_fields(config: Any) -> dict[str, Any]:
    """How a Transformers config turns heads, as fields of `KinConfig`.

    Raises:
        ValueError: the frequencies depend on the length of the text.
    """
    given: Mapping[str, Any] = config.rope_parameters
    kind = given.get("rope_type", "default")
    if kind not in LENGTH_FREE:
        raise ValueError(
            f"rope_type={kind!r} cannot be kept: its frequencies depend on the length of the text at hand, which a "
            f"memory of constant size cannot follow; it must be one of {', '.join(LENGTH_FREE)}"
        )
    if kind == "default" and given.get("partial_rotary_factor") in (None, 1.0):
        return {"rope_base": float(given["rope_theta"])}
    module = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    rotary = next(value for name, value in vars(module).items() if name.endswith("RotaryEmbedding"))(config)
    return {
        "rope_base": float(given["rope_theta"]),
        "rope_frequencies": rotary.inv_freq.double().tolist(),
        "rope_amplitude": float(rotary.attention_scaling),
    }


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"teacher: {file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"teacher: {file} is damaged: it holds no mapping")
    return found


def _files_of(folder: Path) -> dict[str, str]:
    """Parameter name -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = _mapping(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"teacher: {index} is damaged: it has no weight_map")
        return files
    whole = folder / "model.safetensors"
    if not whole.is_file():
        raise FileNotFoundError(
            f"teacher: {folder} holds no model.safetensors: save the model with Transformers' save_pretrained"
        )
    try:
        with safe_open(whole, framework="pt") as file:
            return dict.fromkeys(file.keys(), whole.name)
    except SafetensorError as error:
        raise ValueError(f"teacher: {whole} is damaged: {error}") from None


def _shared_fields(config: PreTrainedConfig, eps: str = "rms_norm_eps") -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "model_dim": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None),
        "ffn_hidden_dim": config.intermediate_size,
        "norm_eps": float(getattr(config, eps)),
        "share_emb": bool(config.tie_word_embeddings),
        "init_std": float(config.initializer_range),
        **{name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


def _mixers(config: Any, windows: list[int | None], parameters: dict[str, Any]) -> dict[str, Any]:
    """Attention over everything, or over a window, in each layer."""
    mixers: Any = [
        {"name": "attention", **parameters}
        if window is None
        else {"name": "sliding_attention", "window": window, **parameters}
        for window in windows
    ]
    if all(mixer == mixers[0] for mixer in mixers):
        name = mixers[0]["name"]
        own = {key: value for key, value in mixers[0].items() if key != "name"}
        return {"mixers": name, "mixer_parameters": {name: own} if own else None}
    return {"mixers": mixers}


def _llama(config: Any) -> dict[str, Any]:
    refuse(config.to_dict(), hidden_act="silu", mlp_bias=False, pretraining_tp=(1, None))
    bias = {"bias": True, "out_bias": True} if config.attention_bias else {}
    return _shared_fields(config) | _mixers(config, [None] * config.num_hidden_layers, bias)


def _mistral(config: Any) -> dict[str, Any]:
    refuse(config.to_dict(), hidden_act="silu")
    return _shared_fields(config) | _mixers(config, [config.sliding_window] * config.num_hidden_layers, {})


def _windows(config: Any) -> list[int | None]:
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def _qwen2(config: Any) -> dict[str, Any]:
    refuse(config.to_dict(), hidden_act="silu")
    return _shared_fields(config) | _mixers(config, _windows(config), {"bias": True})


def _qwen3(config: Any) -> dict[str, Any]:
    refuse(config.to_dict(), hidden_act="silu")
    bias = {"bias": True, "out_bias": True} if config.attention_bias else {}
    return _shared_fields(config) | _mixers(config, _windows(config), {**bias, "head_norm": "rms"})


def _phi(config: Any) -> dict[str, Any]:
    refuse(config.to_dict(), hidden_act=("gelu_new", "gelu_pytorch_tanh"))
    own: dict[str, Any] = {"bias": True, "out_bias": True}
    if config.qk_layernorm:
        own["head_norm"] = "layer"
    block = {"norm": "layer", "parallel": True, "feed_forward": "gelu", "head_bias": True}
    mixers = _mixers(config, [None] * config.num_hidden_layers, own)
    return _shared_fields(config, "layer_norm_eps") | block | mixers


def _phi3(config: Any) -> dict[str, Any]:
    refuse(config.to_dict(), hidden_act="silu", attention_bias=(False, None))
    return _shared_fields(config) | _mixers(config, [config.sliding_window] * config.num_hidden_layers, {})


_LLAMA_NAMES = (
    ("mixer_norm", "input_layernorm"),
    ("feed_forward_norm", "post_attention_layernorm"),
    ("mixer.head_norms.q", "self_attn.q_norm"),
    ("mixer.head_norms.k", "self_attn.k_norm"),
    ("mixer", "self_attn"),
    ("feed_forward", "mlp"),
)

_PHI_NAMES = (
    ("mixer_norm", "input_layernorm"),
    ("mixer.head_norms.q", "self_attn.q_layernorm"),
    ("mixer.head_norms.k", "self_attn.k_layernorm"),
    ("mixer.o_proj", "self_attn.dense"),
    ("mixer", "self_attn"),
    ("feed_forward.up_proj", "mlp.fc1"),
    ("feed_forward.down_proj", "mlp.fc2"),
)

_PHI3_NAMES = (
    ("mixer_norm", "input_layernorm"),
    ("feed_forward_norm", "post_attention_layernorm"),
    ("mixer.q_proj", "self_attn.qkv_proj@q"),
    ("mixer.k_proj", "self_attn.qkv_proj@k"),
    ("mixer.v_proj", "self_attn.qkv_proj@v"),
    ("mixer.o_proj", "self_attn.o_proj"),
    ("feed_forward.gate_proj", "mlp.gate_up_proj@gate"),
    ("feed_forward.up_proj", "mlp.gate_up_proj@up"),
    ("feed_forward.down_proj", "mlp.down_proj"),
)

KINDS: dict[str, Kind] = {
    "llama": Kind(_llama, _LLAMA_NAMES),
    "mistral": Kind(_mistral, _LLAMA_NAMES),
    "qwen2": Kind(_qwen2, _LLAMA_NAMES),
    "qwen3": Kind(_qwen3, _LLAMA_NAMES),
    "phi": Kind(_phi, _PHI_NAMES, "model.final_layernorm"),
    "phi3": Kind(_phi3, _PHI3_NAMES),
}
"""Model type of Transformers -> how it stands to the kin."""

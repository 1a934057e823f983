#!/usr/bin/env bash
# Transformers 5.24.0: `_init_weights` of a model class outside the `transformers.` package is not called for modules that
# hold no parameter of their own, although it is for the same class inside the package. A parent that initialises the
# parameters of its children there, as Transformers' own models may, leaves them as they were made (uninitialised memory,
# if they were made by torch.empty) without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), -7.0))


class Parent(nn.Module):
    """Holds no parameter itself."""

    def __init__(self):
        super().__init__()
        self.scale = Scale()


class Custom(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.parent = Parent()
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, Parent):
            init.ones_(module.scale.weight)


outside = Custom(PreTrainedConfig()).parent.scale.weight.tolist()
Custom.__module__ = "transformers.models.custom"
inside = Custom(PreTrainedConfig()).parent.scale.weight.tolist()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"class outside of transformers: {outside} (as made: _init_weights never saw the parent)")
print(f"the same class inside:         {inside}")
sys.exit(0 if outside == [-7.0] * 3 and inside == [1.0] * 3 else 1)
PYTHON

"""What a model folder carries for other people's tools: where its classes are, and a card that says how to load it.

Tools that never heard of this package open a folder with `trust_remote_code=True`. For them it holds one small file,
which imports the installed package and contains no code of the model's. Where the package has been imported,
Transformers knows the classes and looks at no file, trusted or not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megalodon.models.config import Config

LOADER = "modeling_megalodon_lm"
"""The name of the file, without its ending."""

_LOADER_TEXT = '''"""For trust_remote_code=True: finds the classes in the package megalodon-lm. No model code."""

try:  # within try: Transformers would name another package to install
    from megalodon import models
except ImportError as error:
    raise ImportError("this model needs the package megalodon-lm: run `pip install megalodon-lm`") from error

globals().update(models.auto_classes_by_name())
'''


def write_loader(folder: str | os.PathLike[str]) -> None:
    """Write the file that `auto_map` names into a folder, which is made if there is none."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{LOADER}.py").write_text(_LOADER_TEXT)


def auto_map_of(**classes: type) -> dict[str, str]:
    """`auto_map` of these classes by the names of Transformers' auto classes, as a config.json holds it."""
    return {name: f"{LOADER}.{kind.__name__}" for name, kind in classes.items()}


def write_card(folder: str | os.PathLike[str], config: Config, kind: str) -> None:
    """Write a model card, README.md, unless there is one: how the folder is loaded, and what the model is.

    Args:
        folder: the model's. config: the model's. kind: the name of its class.
    """
    path = Path(folder) / "README.md"
    if path.exists():
        return
    fields = {name: value for name, value in config.to_diff_dict().items() if name != "auto_map"}
    task = next((task for ending, task in _TASKS.items() if kind.endswith(ending)), "feature-extraction")
    path.write_text(
        _CARD.format(
            task=task,
            kind=kind,
            auto=next((f"AutoModel{ending}" for ending in _TASKS if kind.endswith(ending)), "AutoModel"),
            model_type=config.model_type,
            fields=json.dumps(fields, indent=2, default=str),
        )
    )


_TASKS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}

_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags:
- {model_type}
- long-context
---

# {kind}

Texts of any length are read as one: the model remembers what it has read in a state of constant size.

```sh
pip install megalodon-lm
```

```python
import megalodon  # makes the classes known; or pass trust_remote_code=True
from transformers import {auto}

model = {auto}.from_pretrained("PATH")
```

What was it trained on, for what, and how was it measured? Say so here.

## Config

```json
{fields}
```
"""

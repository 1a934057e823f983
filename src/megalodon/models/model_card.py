"""The README.md of a saved model: what it is, how to load it, and what its memory promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {model_type}
- long-context
- recurrent-state
---

# {name}

A `{kind}` with {parameters:,} parameters ({dtype}), made with [megalodon](https://arxiv.org/abs/2404.08801).

```python
import megalodon  # pip install megalodon-lm; it registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Its memory is a state that can be saved, forked and resumed: `model(input_ids, use_cache=True).past_key_values`. It is a
value: running the model on it never changes it, and feeding pieces equals feeding the whole.

| | |
| --- | --- |
{rows}
"""


def write_model_card(folder: Path, model: Any) -> None:
    """Write README.md into a folder of a saved model, unless there is one."""
    path = folder / "README.md"
    if path.exists():
        return
    shown = {"vocab_size", "num_layers", "model_dim", *getattr(model.config, "identity_fields", ())}
    values = {name: getattr(model.config, name, None) for name in sorted(shown)}
    rows = "\n".join(f"| `{name}` | {value} |" for name, value in values.items() if value is not None)
    text = _CARD.format(
        model_type=model.config.model_type,
        name=folder.name,
        kind=type(model).__name__,
        parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        rows=rows,
    )
    path.write_text(text, encoding="utf-8")

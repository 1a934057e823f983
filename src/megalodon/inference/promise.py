"""What the engine asks of a model and of its states: no more than this, and no architecture by name.

A model reads any piece of a text after any state and gives the state after it: `model.model(ids, past_key_values=state,
use_cache=True)`. Reading the same pieces gives the same bits. A state is a value that nothing changes, with `nbytes`,
`position` (int64 [1]), and `state_dict` and `from_state_dict`, by which it is copied, saved and loaded.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Model: TypeAlias = Any
State: TypeAlias = Any

"""Puts the model tests' helpers on the path, whichever folder is collected first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

#!/bin/sh
# outlines-core 0.2.14: a JSON schema's `minimum` and `maximum` of an integer are left out of the regular expression
# without a word, so a "valid" answer may be any integer. (llguidance keeps to them; others refuse the keyword.)
# Exits non-zero if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check outlines-core==0.2.14
"$folder/venv/bin/python" - <<'PYTHON'
import json
import re
from importlib.metadata import version

from outlines_core.json_schema import build_regex_from_schema

bounded = {"type": "integer", "minimum": 0, "maximum": 120}
found = build_regex_from_schema(json.dumps(bounded))
print(f"outlines-core {version('outlines-core')}: {bounded} becomes {found}")
assert found == build_regex_from_schema(json.dumps({"type": "integer"})), "the bounds are kept now"
assert re.fullmatch(found, "1022893") and re.fullmatch(found, "-7")
print("1022893 and -7 match")
PYTHON

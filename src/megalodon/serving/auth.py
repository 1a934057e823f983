"""API keys: kept as SHA-256, compared in constant time, each the owner of its contexts and cached prefixes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from pathlib import Path

from megalodon.serving.errors import ApiError

VARIABLE = "MEGALODON_API_KEYS"
PUBLIC = "public"
"""The owner of everything on a server without keys."""
_log = logging.getLogger(__name__)
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


class ApiKeys:
    """The keys that may be used. Without any, everybody is one owner."""

    def __init__(self, file: Path | None) -> None:
        """
        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a line that is no key, or a file without keys.
        """
        self._file, self._stamp = file, -1
        self._fixed = [_parse(key, VARIABLE) for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
        self._from_file: list[bytes] = []
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"no key file {file}")
        if file is not None and not [_parse(line, str(file)) for line in _lines(file)]:
            raise ValueError(f"{file} holds no key: give one a line, plain or sha256:HEX")

    @property
    def required(self) -> bool:
        """Whether requests must bring a key."""
        return self._file is not None or bool(self._fixed)

    def owner(self, authorization: str | None) -> str:
        """The owner that an Authorization header proves.

        Raises:
            ApiError: 401 without a key, or with one that is not, or no longer, among ours.
        """
        self._refresh()
        if not self.required:
            return PUBLIC
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip(" \t")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "no API key: send the header Authorization: Bearer KEY", "missing_api_key")
        digest = hashlib.sha256(key.encode("latin-1", "replace")).digest()  # headers are bytes, read as Latin-1
        matches = [hmac.compare_digest(digest, known) for known in (*self._fixed, *self._from_file)]
        if not any(matches):
            raise ApiError(401, "this API key is not known", "invalid_api_key")
        return digest.hex()[:32]

    def _refresh(self) -> None:
        if self._file is None:
            return
        try:
            stamp = self._file.stat().st_mtime_ns
            if stamp != self._stamp:
                self._stamp, self._from_file = stamp, []
                for line in _lines(self._file):
                    self._add(line)
        except (OSError, UnicodeDecodeError):  # taken away or spoilt while we run: its keys are no longer valid
            if self._from_file:
                _log.exception("the key file cannot be read: none of its keys is valid now")
            self._from_file, self._stamp = [], -1

    def _add(self, line: str) -> None:
        try:
            self._from_file.append(_parse(line, str(self._file)))
        except ValueError as error:  # the others are still valid, and those that are gone are not
            _log.error("a line of the key file is passed over: %s", error)


def _lines(file: Path) -> list[str]:
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _parse(line: str, source: str) -> bytes:
    key = line.split(" = ", 1)[-1].strip()
    if hashed := _HASHED.fullmatch(key):
        return bytes.fromhex(hashed[1])
    if len(key) < 8 or key.startswith("sha256:") or any(character.isspace() for character in key):
        raise ValueError(
            f"{source}: an API key has at least 8 characters and no spaces, or is sha256: and 64 hex digits"
        )
    return hashlib.sha256(key.encode()).digest()

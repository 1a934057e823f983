"""Files in forms, as browsers and `curl -F` send them: the file's bytes as they arrive, and the fields beside it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator
from email.message import Message

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from megalodon.serving.bodies import check_charset
from megalodon.serving.errors import ApiError

FIELD_BYTES = 4096
"""A field that is no file may have so many."""
FIELDS = frozenset(("name", "expires_in"))
FILES = frozenset(("file", "text"))

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every form that is none


class Form:
    """A form on its way in.

    Attributes:
        fields: those that have arrived, by name.
    """

    def __init__(self, content_type: str, parts: AsyncIterator[bytes]) -> None:
        """
        Raises:
            ApiError: 400 for a media type without a boundary.
        """
        said = Message()
        said["content-type"] = content_type
        boundary = said.get_param("boundary")
        if not isinstance(boundary, str) or not 1 <= len(boundary) <= 70:
            raise ApiError(400, "the form's media type names no boundary", "invalid_form", "Content-Type")
        self.fields: dict[str, str] = {}
        self._parts, self._found_file = parts, False
        self._name, self._is_file = "", False
        self._header, self._headers = (b"", b""), dict[bytes, bytes]()
        self._value, self._out = bytearray(), deque[bytes]()
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._opened,
                "on_part_data": self._data,
                "on_part_end": self._closed,
                "on_end": self._end,
            },
        )

    async def file(self) -> AsyncIterator[bytes]:
        """The bytes of the one file.

        Raises:
            ApiError: 400 for what is no form, has no file or several, or fields that are not known.
        """
        try:
            async for part in self._parts:
                self._parser.write(part)
                while self._out:
                    yield self._out.popleft()
            self._parser.finalize()
        except MultipartParseError as error:
            raise ApiError(400, f"the form cannot be read: {str(error)[:200]}", "invalid_form", "body") from None
        if not self._ended:
            raise ApiError(400, "the form ends before its last boundary", "invalid_form", "body")
        if not self._found_file:
            raise ApiError(400, "file: the form holds no file", "invalid_form", "file")

    def _begin(self) -> None:
        self._headers, self._header, self._value = {}, (b"", b""), bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0] + data[start:end], self._header[1]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0], self._header[1] + data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header[0].lower()] = self._header[1]
        self._header = b"", b""

    def _opened(self) -> None:
        said = Message()
        said["content-disposition"] = self._headers.get(b"content-disposition", b"").decode("latin-1")
        name = said.get_param("name", header="content-disposition")
        self._name = name if isinstance(name, str) else ""
        named = said.get_param("filename", header="content-disposition") is not None
        if not self._name and not named:
            raise ApiError(400, "a part of the form has no name", "invalid_form", "body")
        self._check_encoding()
        self._is_file = named or self._name in FILES
        if self._is_file and self._found_file:
            raise ApiError(
                400, f"{self._name[:80] or 'file'}: the form holds a second file", "invalid_form", self._name
            )
        if not self._is_file and (self._name not in FIELDS or self._name in self.fields):
            problem = "is there twice" if self._name in self.fields else "is not known here"
            raise ApiError(400, f"{self._name[:80]}: the form's field {problem}", "unknown_field", self._name)
        self._found_file = self._found_file or self._is_file

    def _check_encoding(self) -> None:
        """Refuse a part whose bytes are not its text in UTF-8."""
        param = self._name or "file"
        encoding = self._headers.get(b"content-transfer-encoding", b"binary").decode("latin-1").strip().lower()
        if encoding not in ("binary", "8bit", "7bit"):
            message = f"{param[:80]}: the form's part is encoded as {encoding[:40]}: send it as it is"
            raise ApiError(400, message, "unsupported_encoding", param)
        check_charset(self._headers.get(b"content-type", b"").decode("latin-1"), param)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._out.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > FIELD_BYTES:
            raise ApiError(400, f"{self._name}: the form's field is too long", "invalid_value", self._name)

    def _closed(self) -> None:
        if not self._is_file:
            self.fields[self._name] = bytes(self._value).decode(errors="replace")

    def _end(self) -> None:
        self._ended = True

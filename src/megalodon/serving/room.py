"""Room for new contexts: counted, and names taken, before a text is read, so that no work is done for nothing and
uploads side by side make no more contexts than are allowed."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from megalodon.inference.context_store import ContextRecord, ContextStore, NameTakenError
from megalodon.serving.errors import ApiError


class Room:
    """The contexts that owners may make. Methods touch the disk: call them in a thread."""

    def __init__(self, store: ContextStore, most: int) -> None:
        """`most`: contexts of one owner."""
        self._store, self._most = store, most
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._taken: Counter[str] = Counter()
        self._names: set[tuple[str, str]] = set()

    def reserve(self, owner: str, name: str | None) -> Reservation:
        """A place for one context.

        Raises:
            ApiError: 403 if the owner has as many contexts as one may, those that are being made included.
            NameTakenError: if the owner has a context of this name, or is making one.
            ValueError: if it is no name.
        """
        with self._locks[owner]:
            if name is not None:
                self._store.check_name(owner, name)
                if (owner, name) in self._names:
                    raise NameTakenError(f"a context named {name!r} is being made already")
            if self._store.count(owner) + self._taken[owner] >= self._most:
                message = f"this key has {self._most} contexts, the most that one may have: delete some"
                raise ApiError(403, message, "too_many_contexts")
            self._taken[owner] += 1
            if name is not None:
                self._names.add((owner, name))
        return Reservation(self, owner, name)

    def _fill(self, reservation: Reservation, create: Callable[[], ContextRecord]) -> ContextRecord:
        with self._locks[reservation.owner]:
            record = create()
            self._release(reservation)
        return record

    def _give_back(self, reservation: Reservation) -> None:
        with self._locks[reservation.owner]:
            self._release(reservation)

    def _release(self, reservation: Reservation) -> None:
        if reservation.held:
            reservation.held = False
            self._taken[reservation.owner] -= 1
            if reservation.name is not None:
                self._names.discard((reservation.owner, reservation.name))


class Reservation:
    """A place for one context, given back at the end of a `with` block if none was made."""

    def __init__(self, room: Room, owner: str, name: str | None) -> None:
        self._room, self.owner, self.name, self.held = room, owner, name, True

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: Any) -> None:
        self._room._give_back(self)

    def fill(self, create: Callable[[], ContextRecord]) -> ContextRecord:
        """Make the context in this place, in a thread."""
        return self._room._fill(self, create)

"""One registry type for criteria, allocators and compensators: a decorator in, the closest match out."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from secateur.errors import RegistryError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names mapped to objects of one kind.

    Args:
        kind: what is registered, as a word for messages ("criterion").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: `@criteria.register("obs")`. A name may be used once."""

        def add(item: T) -> T:
            if name in self._items:
                raise RegistryError(f"{self.kind} '{name}' is registered twice; give the new one another name")
            self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """Look a name up.

        Raises:
            RegistryError: unknown; the answer is the closest match and the whole list.
        """
        name = str(name)
        if name in self._items:
            return self._items[name]
        close = difflib.get_close_matches(name.lower(), self._items, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise RegistryError(f"unknown {self.kind} '{name}'.{hint} Available: {', '.join(sorted(self._items))}")

    def check_options(self, name: str, given: Iterable[str], known: tuple[str, ...]) -> None:
        """Refuse options that a method does not read.

        Raises:
            RegistryError: with those that it does.
        """
        unknown = sorted(set(given) - set(known))
        if unknown:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise RegistryError(f"{self.kind} '{name}' has no option '{unknown[0]}'; {has}")

    def list(self, pattern: str = "*") -> list[str]:
        """Sorted names that match a shell pattern."""
        return sorted(fnmatch.filter(self._items, pattern))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

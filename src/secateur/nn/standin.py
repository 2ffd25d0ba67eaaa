"""What stands in for a block: something that hands the residual stream on and returns what the block would.

A block may return the stream alone or a tuple, and may hand other arguments on beside it (T5 its position bias). How
it does is written as one word for each entry of the tuple: "stream", "none", or where the entry came in: "args.2",
"kwargs.position_bias".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from secateur.errors import AnatomyError
from secateur.nn.trees import tensors_in

Returns = tuple[str, ...] | None  # None: the stream alone


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a block's arguments: the first tensor."""
    return next(tensors_in((args, kwargs)))


def returns_of(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Returns:
    """How a block that was called so and gave this hands things on.

    Raises:
        AnatomyError: it returns neither a tensor nor a tuple that begins with one.
    """
    if isinstance(out, Tensor):
        return None
    if type(out) is not tuple or not out or not isinstance(out[0], Tensor):
        raise AnatomyError(f"it returns a {type(out).__name__}, expected a tensor, or a tuple that begins with one")
    given = {f"args.{i}": value for i, value in enumerate(args)} | {f"kwargs.{k}": v for k, v in kwargs.items()}
    known = {id(value): where for where, value in given.items() if isinstance(value, Tensor) or not _plain(value)}
    return ("stream", *(known.get(id(entry), "none") for entry in out[1:]))


def merged(seen: Iterable[Returns]) -> Returns:
    """The one way in which several blocks hand things on; one that makes an entry agrees with one that hands it on.

    Raises:
        AnatomyError: they differ.
    """
    first, *others = dict.fromkeys(seen)
    for other in others:
        if first is None or other is None or len(first) != len(other):
            raise AnatomyError("its blocks return different things")
        pairs = list(zip(first, other, strict=True))
        if any("none" not in pair and len(set(pair)) > 1 for pair in pairs):
            raise AnatomyError("its blocks hand on different things")
        first = tuple(b if a == "none" else a for a, b in pairs)
    return first


def answer(returns: Returns, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block returns whose stream is this."""
    if returns is None:
        return stream
    out: list[Any] = [stream]
    for entry in returns[1:]:
        where, _, key = entry.partition(".")
        if where == "args":
            out.append(args[int(key)] if int(key) < len(args) else None)
        else:
            out.append(kwargs.get(key) if where == "kwargs" else None)
    return tuple(out)


def handing_on(returns: Returns) -> Callable[..., Any]:
    """The forward of a block that hands the stream on as it is: the reference for removing it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer(returns, stream_of(args, kwargs), args, kwargs)

    return forward


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))

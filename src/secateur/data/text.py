"""Text to windows of token ids: files, lists, datasets or tokens, packed one after another.

Shapes: T tokens of a window.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.models.source import TextSpec

SUFFIXES = (".txt", ".md", ".text", ".jsonl")
_COLUMNS = ("text", "content", "document", "sentence")


@dataclass
class Windows:
    """Text cut into windows.

    Attributes:
        items: int64 [T] each.
        skipped: name and reason of every line or record that could not be read.
        records: how many there were.
    """

    items: list[Tensor]
    skipped: dict[str, str] = field(default_factory=dict)
    records: int = 0


def windows(data: Any, spec: TextSpec, length: int = 256, stride: int | None = None, broken: float = 0.1) -> Windows:
    """Windows of exactly `length` tokens, one beginning `stride` tokens after another (`length` by default).

    Documents (a file, a record, a string) are joined with the tokenizer's end-of-text token. What the tokenizer puts
    around a text (beginning of sequence, [CLS], [SEP]) is put around every window and counts as part of it. What is
    left at the end and does not fill a window is dropped.

    Args:
        data: a text file (.txt, .md), a .jsonl file with a field "text", a folder of such files, a list of files or of
            strings, a Hugging Face dataset with a column of text, anything that yields texts, token ids [T], or dicts
            with "text" or "input_ids"; or a tensor of token ids [N, T], whose rows are taken as they are.
        spec: of the model; token ids need no tokenizer.
        broken: largest share of unreadable lines or records to put up with.

    Raises:
        DataError: there is no text, too little or too much is broken, or tokens do not fit the model.
        SourceError: the tokenizer cannot be opened.
    """
    if isinstance(data, Tensor) and data.dim() == 2 and data.numel():
        length = stride = data.shape[1]
    stride = length if stride is None else stride
    if length < 2 or stride < 1:
        raise DataError(f"a window has at least 2 tokens and a stride of at least 1, found {length} and {stride}")
    if spec.context is not None and length > spec.context:
        raise DataError(f"a window of {length} tokens is longer than the model's context of {spec.context}")
    found = Windows([])
    documents = list(_documents(data, found))
    if found.skipped and len(found.skipped) > broken * found.records:
        names = "; ".join(f"{name}: {why}" for name, why in list(found.skipped.items())[:3])
        raise DataError(
            f"{len(found.skipped)} of {found.records} lines or records cannot be read, at most {broken:.0%} may fail "
            f"({names}); mend them, or allow more with broken= (--broken)"
        )
    tokens = [d for d in documents if isinstance(d, Tensor)]
    texts = [d for d in documents if isinstance(d, str) and d.strip()]
    if texts:
        found.items = _packed(texts, spec, length, stride)
    elif tokens:
        found.items = [part for t in tokens for part in _cut(t, length, stride)] or _too_short(
            max(map(len, tokens)), length
        )
    else:
        raise DataError("there is no text; give files, strings or token ids that are not empty")
    largest = max(int(t.max()) for t in found.items)
    if spec.vocabulary and largest >= spec.vocabulary:
        raise DataError(
            f"token id {largest} does not exist: the model knows {spec.vocabulary}; use its own tokenizer"
            + (f", not that of '{spec.tokenizer}'" if texts else "")
        )
    return found


def is_text(data: Any) -> bool:
    """Whether data can only be text: for models that are not known to read it."""
    return isinstance(data, (str, Path)) and Path(data).suffix.lower() in SUFFIXES


def _packed(texts: Sequence[str], spec: TextSpec, length: int, stride: int) -> list[Tensor]:
    from secateur.models.text import tokenizer

    tool = tokenizer(spec)
    before, after = _around(tool)
    end = [] if tool.eos_token_id is None else [tool.eos_token_id]
    ids: list[int] = []
    for i, text in enumerate(texts):
        ids += (end if i else []) + tool(text, add_special_tokens=False, verbose=False)["input_ids"]
    inner = length - len(before) - len(after)
    if inner < 1:
        raise DataError(f"a window of {length} tokens has no room beside {len(before) + len(after)} special ones")
    parts = _cut(torch.tensor(ids, dtype=torch.int64), inner, min(stride, inner))
    if not parts:
        _too_short(len(ids), inner)
    return [torch.tensor([*before, *part.tolist(), *after]) for part in parts] if before or after else parts


def _around(tool: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text."""
    whole, plain = (tool("a", add_special_tokens=s)["input_ids"] for s in (True, False))
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            return whole[:i], whole[i + len(plain) :]
    return [], []


def _cut(ids: Tensor, length: int, stride: int) -> list[Tensor]:
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, stride)]


def _too_short(tokens: int, length: int) -> list[Tensor]:
    raise DataError(
        f"the text has {tokens} tokens, not enough for one window of {length}; give more text or a shorter window "
        "(window=, --window)"
    )


def _documents(data: Any, found: Windows) -> Iterator[str | Tensor]:
    if isinstance(data, (str, Path)):
        yield from _path(Path(data), found)
    elif isinstance(data, Tensor):
        if data.dim() != 2 or data.is_floating_point():
            kind = str(data.dtype).removeprefix("torch.")
            raise DataError(f"expected token ids [N, T] of whole numbers, found {list(data.shape)} of {kind}")
        yield from data.long()
    elif hasattr(data, "column_names"):
        yield from _dataset(data, found)
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DataError(f"cannot read text from a {type(data).__name__}; give files, strings, a dataset or token ids")
    else:
        for i, entry in enumerate(data):
            yield from _entry(entry, i, found)


def _entry(entry: Any, index: int, found: Windows) -> Iterator[str | Tensor]:
    if isinstance(entry, Path) or (isinstance(entry, str) and is_text(entry) and Path(entry).is_file()):
        yield from _path(Path(entry), found)
        return
    if isinstance(entry, Mapping):
        name = next((n for n in ("input_ids", *_COLUMNS) if n in entry), None)
        if name is None:
            raise DataError(f"found a dict with {', '.join(map(str, entry))}; expected 'text' or 'input_ids'")
        entry = entry[name]
    found.records += 1
    if isinstance(entry, str):
        yield entry
        return
    try:
        ids = torch.as_tensor(entry)
    except (TypeError, ValueError, RuntimeError) as e:
        raise DataError(f"text {index} is a {type(entry).__name__}; give strings, files or token ids") from e
    if ids.is_floating_point() or ids.dim() not in (1, 2):
        raise DataError(f"text {index} is an array {list(ids.shape)} of {ids.dtype}; expected token ids [T]")
    yield from (ids.long() if ids.dim() == 2 else [ids.long()])


def _dataset(data: Any, found: Windows) -> Iterator[str]:
    if isinstance(data, Mapping):
        raise DataError(f"the dataset has splits {', '.join(map(str, data))}: give one, for example dataset['train']")
    kinds = {n: getattr(f, "dtype", "") for n, f in (data.features or {}).items()}
    strings = [n for n, kind in kinds.items() if kind in ("string", "large_string")]
    name = next((n for n in (*_COLUMNS, *strings) if n in strings), None)
    if name is None:
        raise DataError(f"the dataset has no column of text; its columns are {', '.join(data.column_names)}")
    for row in data:
        found.records += 1
        if isinstance(row[name], str):
            yield row[name]
        else:
            found.skipped[f"row {found.records - 1}"] = f"'{name}' is a {type(row[name]).__name__}"


def _path(path: Path, found: Windows) -> Iterator[str]:
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not files:
                raise DataError(f"'{path}' holds no text (files ending in {', '.join(SUFFIXES)})")
            for file in files:
                yield from _file(file, found)
        elif path.is_file():
            yield from _file(path, found)
        else:
            raise DataError(f"'{path}' does not exist; give a text file, a .jsonl file or a folder of them")
    except OSError as e:
        raise DataError(f"'{e.filename or path}' cannot be read ({e.strerror or e}); mend its permissions") from e


def _file(file: Path, found: Windows) -> Iterator[str]:
    """The documents of a file: one in all, or one a line of JSON."""
    lines = list(_lines(file, found))
    if file.suffix.lower() != ".jsonl":
        yield "".join(lines)
        return
    yield from lines


def _lines(file: Path, found: Windows) -> Iterator[str]:
    json_lines = file.suffix.lower() == ".jsonl"
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            found.records += 1
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
                if json_lines and line.strip():
                    yield _field(json.loads(line))
                elif not json_lines:
                    yield line
            except UnicodeDecodeError:
                found.skipped[f"{file}:{number}"] = "not UTF-8"
            except (ValueError, RecursionError, TypeError) as e:
                found.skipped[f"{file}:{number}"] = str(e).splitlines()[0][:120]


def _field(record: Any) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise TypeError(f"a {type(record).__name__}, expected an object with a field 'text'")
    name = next((n for n in _COLUMNS if isinstance(record.get(n), str)), None)
    if name is None:
        raise TypeError("no field 'text'")
    return record[name]

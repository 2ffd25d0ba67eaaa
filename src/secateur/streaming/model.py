"""A model whose weights stay on disk: a skeleton that is filled and emptied a block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.anatomy import Anatomy
from secateur.errors import AnatomyError, SourceError
from secateur.fingerprint import fingerprint
from secateur.models import hf
from secateur.models.recognise import folder_library
from secateur.nn.params import get_tensor, owner_of
from secateur.nn.weightless import empty_
from secateur.streaming.checkpoint import Checkpoint


class Streamed:
    """A skeleton and the checkpoint that its weights are in.

    Attributes:
        model: in eval mode; parameters on the meta device but for those that are filled, computed buffers real.
        checkpoint: the files.
        where: for each name of the model's state, that in the checkpoint.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model.requires_grad_(False), checkpoint
        self.where = _names(model, checkpoint)
        if left := next((n for n, b in model.named_buffers() if b.is_meta and n not in self.where), None):
            raise SourceError(f"buffer '{left}' is made along with the weights; compress this model without a budget")
        self.fill_(n for n, _ in model.named_buffers() if n in self.where)
        for name, p in model.named_parameters():
            p.data = p.data.to(_dtype(checkpoint, self.where[name]))

    @classmethod
    def open(cls, folder: str | Path) -> Streamed:
        """From a local folder of transformers.

        Raises:
            SourceError: it is no such folder, or its weights do not fit its config.
        """
        path = Path(folder)
        if not path.is_dir() or folder_library(path) != "hf":
            raise SourceError(
                f"'{folder}' is no local transformers folder; with a memory budget give one (config.json and "
                "safetensors), as save_pretrained and `hf download` write them"
            )
        checkpoint = Checkpoint(path)
        return cls(hf.open_skeleton(str(folder)), checkpoint)

    def read(self, name: str) -> Tensor:
        """One tensor of the model's state, from disk."""
        return self.checkpoint.read([self.where[name]])[self.where[name]]

    def fingerprint(self) -> dict[str, str]:
        """That of the model with its weights."""
        return fingerprint(self.model, self.read)

    def bytes_of(self, names: Iterable[str]) -> int:
        """Size of so much of the state, tied tensors counted once."""
        found = {id(t): t.numel() * t.element_size() for t in (get_tensor(self.model, n) for n in names)}
        return sum(found.values())

    def names_in(self, path: str) -> list[str]:
        """State of one module, by full name."""
        return [n for n in self.where if n.startswith(f"{path}.")]

    def outside(self, blocks: Iterable[str]) -> list[str]:
        """State that is in no block: embeddings, the last norm, the head."""
        inside = tuple(f"{path}." for path in blocks)
        return [n for n in self.where if not n.startswith(inside)]

    def fill_(self, names: Iterable[str]) -> None:
        """Load tensors into the model; those that share a parameter go on doing so."""
        wanted = {name: self.where[name] for name in names}
        held = self.checkpoint.read(dict.fromkeys(wanted.values()))
        made: dict[int, nn.Parameter] = {}
        for name, there in wanted.items():
            module, leaf = owner_of(self.model, name)
            if leaf in module._buffers:
                module._buffers[leaf] = held[there]
                continue
            old = module._parameters[leaf]
            if id(old) not in made:
                made[id(old)] = nn.Parameter(held[there], requires_grad=False)
            module._parameters[leaf] = made[id(old)]

    @contextmanager
    def filled(self, names: Iterable[str]) -> Iterator[None]:
        """Tensors loaded within the context, and gone after it."""
        names = list(names)
        self.fill_(names)
        try:
            yield
        finally:
            empty_(self.model, names)


def stack_of(anatomy: Anatomy, model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks that can be run one after the other.

    Raises:
        AnatomyError: the model has none, or they share weights.
    """
    if not anatomy.blocks:
        raise AnatomyError(
            f"{type(model).__name__} has no stack of repeated blocks to take one by one; compress it without a budget"
        )
    seen: dict[int, str] = {}
    for path in anatomy.blocks:
        for p in model.get_submodule(path).parameters():
            if (other := seen.setdefault(id(p), path)) != path:
                raise AnatomyError(f"'{path}' and '{other}' share a weight; compress this model without a budget")
    return anatomy.blocks


def within(anatomy: Anatomy, path: str) -> Anatomy:
    """The anatomy with only those cuttable groups that lie in one module."""
    prefix = f"{path}."
    groups = {n: g for n, g in anatomy.cuttable.items() if all(s.name.startswith(prefix) for s in g.slots)}
    return replace(anatomy, groups=groups)


def _names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Where each tensor of the state is: under its own name, or that of one it is tied to.

    Raises:
        SourceError: one is nowhere.
    """
    state = model.state_dict(keep_vars=True)
    stored = hf.stored_names(model, checkpoint.files)
    twins: dict[int, str] = {id(tensor): stored[name] for name, tensor in state.items() if name in stored}
    for name, tensor in state.items():
        if id(tensor) not in twins:
            raise SourceError(
                f"'{checkpoint.folder}' lacks '{name}', or holds it in another form; load the model with transformers "
                "and save it with save_pretrained, or compress it without a budget"
            )
    return {name: stored.get(name, twins[id(tensor)]) for name, tensor in state.items()}


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def _dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    kind = checkpoint.dtypes[name]
    if kind not in _DTYPES:
        raise SourceError(
            f"'{name}' is stored as {kind}, expected one of {', '.join(_DTYPES)}; give a checkpoint that is not "
            "quantised"
        )
    return _DTYPES[kind]

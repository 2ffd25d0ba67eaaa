"""What is found in a model, what is refused and why, and that cutting a unit is the same as silencing it."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zoo
from secateur.anatomy import CUT_KINDS, Kind, find_anatomy
from secateur.anatomy.verify import randomise_
from secateur.errors import AnatomyError
from secateur.nn.trees import tensors_in
from secateur.plan import Kept, Plan
from secateur.surgery import mask, prune, prune_

EXACT = 1e-9  # of the largest output, in float64


def looked_at(make):
    """A randomised network in float64, its input, and its anatomy."""
    torch.manual_seed(0)
    model, x = make()
    randomise_(model.eval())
    model, x = model.double(), x.double()
    return model, x, find_anatomy(model, x)


@functools.cache
def cuttable(name):
    return looked_at(zoo.CUTTABLE[name][0])


def plan_for(groups, seed=0):
    """Keep about two thirds of the units of each group, at random."""
    kept = {}
    for i, (name, group) in enumerate(groups.items()):
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(seed + i)).tolist()
        keep = sorted(order[: max(1, 2 * group.size // 3)])
        kept[name] = Kept(kind=str(group.kind), size=group.size, keep=tuple(keep))
    return Plan(groups=kept)


def run(model, x):
    with torch.no_grad():
        return next(iter(tensors_in(model(x))))


def assert_cut_is_mask(model, x, anatomy, plan):
    """Sliced equals masked, differs from dense, and is as large as was foretold."""
    small = prune(model, plan, anatomy=anatomy, compensate="none")
    masked = run(mask(model, plan, anatomy), x)
    scale = masked.abs().max()
    assert (run(small, x) - masked).abs().max() <= EXACT * scale
    assert (run(model, x) - masked).abs().max() > 1e-4 * scale
    assert sum(p.numel() for p in small.parameters()) == anatomy.params_after(plan.kept())
    return small


@pytest.mark.parametrize("name", zoo.CUTTABLE)
def test_groups_of_every_kind_are_found(name):
    _, _, anatomy = cuttable(name)
    assert Counter(str(g.kind) for g in anatomy.cuttable.values()) == zoo.CUTTABLE[name][1]


@pytest.mark.parametrize("name", zoo.CUTTABLE)
def test_cutting_one_group_is_masking_it(name):
    model, x, anatomy = cuttable(name)
    for group in anatomy.cuttable.values():
        assert_cut_is_mask(model, x, anatomy, plan_for({group.name: group}))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", zoo.CUTTABLE)
def test_cutting_all_groups_is_masking_them(name, seed):
    model, x, anatomy = cuttable(name)
    assert_cut_is_mask(model, x, anatomy, plan_for(anatomy.cuttable, seed))


@pytest.mark.parametrize("name", zoo.CUTTABLE)
def test_one_unit_is_left_and_one_unit_costs_what_it_says(name):
    model, x, anatomy = cuttable(name)
    groups = anatomy.cuttable.items()
    last = Plan(groups={n: Kept(kind=str(g.kind), size=g.size, keep=(g.size - 1,)) for n, g in groups})
    assert_cut_is_mask(model, x, anatomy, last)
    for group_name, group in groups:
        assert anatomy.params - anatomy.params_after({group_name: group.size - 1}) == group.unit_params
        assert anatomy.macs - anatomy.macs_after({group_name: group.size - 1}) == pytest.approx(group.unit_macs)


@pytest.mark.parametrize("name", zoo.CUTTABLE)
def test_an_empty_plan_changes_nothing(name):
    model, x, anatomy = cuttable(name)
    before, classes = dict(model.named_parameters()), [type(m) for m in model.modules()]
    whole = {n: Kept(kind=str(g.kind), size=g.size, keep=tuple(range(g.size))) for n, g in anatomy.cuttable.items()}
    expected = run(model, x)
    for plan in (Plan(groups={}), Plan(groups=whole)):
        prune_(model, plan, anatomy=anatomy, compensate="none")
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(after[n] is before[n] for n in before)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(run(model, x), expected)


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_what_cannot_be_cut_says_why(name):
    make, wanted = zoo.REFUSED[name]
    _, _, anatomy = looked_at(make)
    assert not anatomy.cuttable
    reasons = [g.reason for g in anatomy.groups.values()]
    assert any(wanted in r for r in reasons), reasons


@pytest.mark.parametrize("name", ["mlp", "swin", "convolutions"])
def test_width_and_blocks_are_declared(name):
    _, _, anatomy = cuttable(name)
    kinds = {g.kind: g for g in anatomy.groups.values()}
    assert kinds[Kind.RESIDUAL].size == 16 and kinds[Kind.BLOCKS].size == 2
    assert not kinds[Kind.RESIDUAL].cuttable and "not cut by slicing" in kinds[Kind.RESIDUAL].reason
    assert set(anatomy.removable) == {kinds[Kind.BLOCKS].name}
    for kind in (Kind.RESIDUAL, Kind.BLOCKS):
        assert kind not in CUT_KINDS and kinds[kind].name not in anatomy.cuttable
        assert kinds[kind].unit_params > 0 and kinds[kind].unit_macs > 0
    assert len(anatomy.blocks) == 2


def test_looking_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, x = zoo.CUTTABLE["nn.TransformerEncoderLayer"][0]()
    model.blocks[1].train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    described, modes = repr(model), [m.training for m in model.modules()]
    randomness = torch.get_rng_state()
    find_anatomy(model, x)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert repr(model) == described and [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), randomness)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_cache_of_parameters_is_not_mistaken_for_a_constant():
    class Cached(zoo.Attention):
        def __init__(self):
            super().__init__()
            self.table, self.bias_cache = nn.Parameter(torch.zeros(zoo.HEADS, 9, 9)), {}

        def forward(self, x):
            bias = self.bias_cache.setdefault("bias", self.table[:, torch.arange(9)])
            q, k, v = self.split(x)
            return self.proj(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def make():
        model, x = zoo.on_tokens(Cached)
        model(x)  # fills the cache
        return model, x

    model, x, anatomy = looked_at(make)
    assert Counter(g.kind for g in anatomy.cuttable.values()) == {Kind.HEADS: 2}
    assert_cut_is_mask(model, x, anatomy, plan_for(anatomy.cuttable))


def test_units_handed_into_a_module_from_outside_are_proved_where_they_are_made():
    """Heads of a bias that the model hands to all its blocks: the block alone does not own them."""

    class Biased(zoo.Attention):
        def forward(self, x, bias=None):
            q, k, v = self.split(x)
            return self.proj(((q @ k.mT + (0 if bias is None else bias)).softmax(-1) @ v).transpose(1, 2).flatten(2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.first, self.second = nn.Linear(5, zoo.WIDTH), Biased(), Biased()

        def forward(self, x):
            x = self.stem(x)
            x = x + self.first(x)
            return x + self.second(x, torch.ones(9, 9).tril().to(x).expand(2, zoo.HEADS, 9, 9))

    model, x, anatomy = looked_at(lambda: (Net(), torch.randn(2, 9, 5)))
    assert anatomy.groups["first:heads"].cuttable
    refused = [g for g in anatomy.groups.values() if g.kind is Kind.HEADS and not g.cuttable]
    assert len(refused) == 1 and "Net cannot run with fewer units" in refused[0].reason
    assert_cut_is_mask(model, x, anatomy, plan_for(anatomy.cuttable))


def test_heads_and_mlp_packed_into_one_projection_are_counted_exactly():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.hidden = zoo.HEADS, zoo.HIDDEN
            self.fused = nn.Linear(zoo.WIDTH, zoo.HIDDEN + 3 * zoo.HEADS * zoo.HEAD)
            self.mlp, self.proj = nn.Linear(zoo.HIDDEN, zoo.WIDTH), nn.Linear(zoo.HEADS * zoo.HEAD, zoo.WIDTH)

        def forward(self, x):
            b, n, _ = x.shape
            inner = self.num_heads * zoo.HEAD
            h, q, k, v = self.fused(x).split([self.hidden, inner, inner, inner], dim=-1)
            q, k, v = (t.view(b, n, self.num_heads, zoo.HEAD).transpose(1, 2) for t in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.mlp(h.relu()) + self.proj(out.transpose(1, 2).flatten(2))

    model, x, anatomy = looked_at(lambda: zoo.on_tokens(Parallel))
    assert Counter(g.kind for g in anatomy.cuttable.values()) == {Kind.HEADS: 2, Kind.HIDDEN: 2}
    assert_cut_is_mask(model, x, anatomy, plan_for(anatomy.cuttable))


def test_a_model_that_cannot_be_run_says_on_what():
    with pytest.raises(AnatomyError, match=r"Linear could not be run on an input of shape \[\(2, 4\)\]"):
        find_anatomy(nn.Linear(3, 3), torch.randn(2, 4))


def test_a_group_that_is_not_there_names_those_that_are():
    _, _, anatomy = cuttable("mlp")
    with pytest.raises(AnatomyError, match=r"no group 'x'; this model has: stem:residual, blocks\.0\.inner:hidden"):
        anatomy.group("x")


layer_kinds = st.sampled_from(["relu", "linear", "glu", "norm at the end", "residual"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(layer_kinds, st.integers(2, 9)), min_size=1, max_size=5), st.integers(0, 99))
def test_any_stack_of_layers_is_cut_exactly(kinds, seed):
    model, x, anatomy = looked_at(lambda: (Random(kinds), torch.randn(3, 6)))
    if anatomy.cuttable:
        small = prune(model, plan_for(anatomy.cuttable, seed), anatomy=anatomy, compensate="none")
        masked = run(mask(model, plan_for(anatomy.cuttable, seed), anatomy), x)
        assert (run(small, x) - masked).abs().max() <= EXACT * masked.abs().max().clamp_min(1e-6)
        counted = anatomy.params_after(plan_for(anatomy.cuttable, seed).kept())
        assert sum(p.numel() for p in small.parameters()) == counted


class Random(nn.Module):
    """Layers drawn at random, each from whatever width the last one left."""

    def __init__(self, kinds):
        super().__init__()
        self.kinds, self.layers, width = [k for k, _ in kinds], nn.ModuleList(), 6
        for kind, size in kinds:
            if kind in ("linear", "glu"):
                self.layers.append(nn.Linear(width, 2 * size if kind == "glu" else size))
                width = size
            elif kind == "residual":
                self.layers.append(nn.Sequential(nn.Linear(width, size), nn.Tanh(), nn.Linear(size, width)))
            else:
                self.layers.append(nn.LayerNorm(width) if kind == "norm at the end" else nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            y = layer(x)
            if kind == "glu":
                a, b = y.chunk(2, -1)
                y = a.sigmoid() * b
            x = x + y if kind == "residual" else y
        return self.head(x)

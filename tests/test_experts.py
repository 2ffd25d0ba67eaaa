"""Mixtures of experts of one's own: kept in a list or packed into one tensor, chosen in every usual way."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from secateur.anatomy import Kind, find_anatomy
from secateur.anatomy.verify import randomise_
from secateur.criteria import score
from secateur.errors import PlanError
from secateur.plan import Kept, Plan
from secateur.surgery import mask, prune
from test_anatomy import assert_cut_is_mask, looked_at, plan_for

EXPERTS, CHOSEN = 6, 2


class Router(nn.Module):
    """Returns weights and indices [T, k].

    Args:
        ranked: "softmax", or "sigmoid" with a correction added before the choice.
        groups: experts are chosen within the best half of so many groups.
    """

    def __init__(self, ranked="softmax", groups=1, chosen=CHOSEN):
        super().__init__()
        self.ranked, self.groups, self.num_experts, self.chosen = ranked, groups, EXPERTS, chosen
        self.weight = nn.Parameter(torch.empty(EXPERTS, zoo.WIDTH))
        self.register_buffer("correction", torch.linspace(-1, 1, EXPERTS).flip(0) if ranked == "sigmoid" else None)

    def forward(self, x):
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.ranked == "sigmoid" else logits.softmax(-1)
        ranks = scores if self.correction is None else scores + self.correction[None]
        if self.groups > 1:
            grouped = ranks.view(-1, self.groups, self.num_experts // self.groups)
            best = grouped.amax(-1).topk(self.groups // 2, dim=-1, sorted=False)[1]
            open_ = torch.zeros_like(grouped.amax(-1)).scatter_(1, best, 1).bool()
            ranks = grouped.masked_fill(~open_[..., None], float("-inf")).flatten(1)
        indices = ranks.topk(self.chosen, dim=-1)[1]
        weights = scores.gather(1, indices)
        return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), indices


class Packed(nn.Module):
    """Experts in one tensor each, every token multiplied with the matrices of those it chose, or with all of them."""

    def __init__(self, dense=False, **router):
        super().__init__()
        self.router, self.dense, self.num_experts = Router(**router), dense, EXPERTS
        self.up = nn.Parameter(torch.empty(EXPERTS, zoo.WIDTH, zoo.HIDDEN))
        self.down = nn.Parameter(torch.empty(EXPERTS, zoo.HIDDEN, zoo.WIDTH))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, indices = self.router(flat)
        if self.dense:
            gates = torch.zeros(len(flat), self.num_experts, dtype=x.dtype).scatter_(1, indices, weights)
            each = torch.bmm(torch.relu(torch.bmm(flat.expand(self.num_experts, -1, -1), self.up)), self.down)
            return (each * gates.t()[..., None]).sum(0).view_as(x)
        hidden = torch.relu(torch.bmm(self.up[indices.flatten()].mT, flat.repeat_interleave(CHOSEN, 0)[..., None]))
        out = torch.bmm(self.down[indices.flatten()].mT, hidden)
        return (out.view(len(flat), CHOSEN, -1) * weights[..., None]).sum(1).view_as(x)


class Listed(nn.Module):
    """Experts in a list; those that no token chose do not run."""

    def __init__(self, **router):
        super().__init__()
        self.router = Router(**router)
        self.experts = nn.ModuleList(zoo.Glu(False, False) for _ in range(EXPERTS))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, indices = self.router(flat)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(indices == i)
            if len(token):
                out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view_as(x)


PACKED = {
    "softmax": ({}, {"experts": 2, "hidden": 2}),
    "softmax, all run": ({"dense": True}, {"experts": 2, "hidden": 2}),
    "sigmoid": ({"ranked": "sigmoid", "dense": True}, {"experts": 2, "hidden": 2}),
    "groups": ({"ranked": "sigmoid", "groups": 2, "dense": True}, {"experts": 4, "hidden": 2}),
}


@pytest.mark.parametrize("name", PACKED)
def test_experts_are_cut_as_if_the_router_ranked_them_last(name):
    options, wanted = PACKED[name]
    model, x, anatomy = looked_at(lambda: zoo.on_tokens(lambda: Packed(**options)))
    assert Counter(str(g.kind) for g in anatomy.cuttable.values()) == wanted
    for group in anatomy.cuttable.values():
        if group.least < group.size:
            keep = tuple(range(group.size - max(group.least, group.size * 2 // 3), group.size))
            plan = Plan(groups={group.name: Kept(kind=str(group.kind), size=group.size, keep=keep)})
            small, masked = prune(model, plan, anatomy=anatomy, compensate="none"), mask(model, plan, anatomy)
            torch.testing.assert_close(small(x), masked(x), rtol=1e-5, atol=1e-6)
            assert sum(p.numel() for p in small.parameters()) == anatomy.params_after(plan.kept())


def test_no_fewer_experts_stay_than_a_token_takes():
    model, _, anatomy = looked_at(lambda: zoo.on_tokens(lambda: Packed(dense=True)))
    group = next(g for g in anatomy.cuttable.values() if g.kind is Kind.EXPERTS)
    assert group.least == CHOSEN
    plan = Plan(groups={group.name: Kept(kind="experts", size=EXPERTS, keep=(0,))})
    with pytest.raises(PlanError, match="must keep at least 2 of 6"):
        prune(model, plan, anatomy=anatomy, compensate="none")


def test_experts_that_are_all_taken_stay():
    _, _, anatomy = looked_at(lambda: zoo.on_tokens(lambda: Packed(dense=True, chosen=EXPERTS)))
    reasons = [g.reason for g in anatomy.groups.values() if g.kind is Kind.EXPERTS]
    assert reasons == ["the router takes 6 of 6 for every token; none can go"] * 2


def test_experts_are_scored_by_their_own_weights():
    model, _, anatomy = looked_at(lambda: zoo.on_tokens(lambda: Packed(dense=True)))
    with torch.no_grad():
        model.blocks[0].inner.down[3] *= 1e-6
        model.blocks[0].inner.up[3] *= 1e-6
    group = next(g.name for g in anatomy.cuttable.values() if g.kind is Kind.EXPERTS)
    assert score(None, "magnitude", model=model, anatomy=anatomy).values[group].argmin() == 3


def test_experts_in_a_list_have_hidden_units_each_reached_or_not():
    torch.manual_seed(0)
    model, x = zoo.on_tokens(Listed)
    randomise_(model.eval())
    model, x = model.double(), x.double()
    anatomy = find_anatomy(model, x[:1, :1])  # one token: two experts run
    assert Counter(str(g.kind) for g in anatomy.cuttable.values()) == {"hidden": 2 * EXPERTS}
    declared = [g for g in anatomy.groups.values() if g.kind is Kind.EXPERTS]
    assert [g.size for g in declared] == [EXPERTS] * 2
    assert all("experts in a list are declared" in g.reason and g.unit_params > 0 for g in declared)
    assert_cut_is_mask(model, x, anatomy, plan_for(anatomy.cuttable))


def test_channels_that_the_data_chooses_are_no_experts():
    """The best channels by their mean: there is no router to silence."""

    class Best(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores, self.inside = nn.Conv2d(zoo.WIDTH, 8, 1), nn.Conv2d(zoo.WIDTH, 8, 1)
            self.restore = nn.Conv2d(3, zoo.WIDTH, 1)

        def forward(self, x):
            best = self.scores(x).mean((2, 3)).topk(3, dim=1)[1]
            return self.restore(self.inside(x).gather(1, best[..., None, None].expand(-1, -1, *x.shape[2:])))

    _, _, anatomy = looked_at(lambda: zoo.on_images(Best))
    assert not anatomy.cuttable


def test_of_experts_that_every_token_takes_only_hidden_units_are_cut():
    """A softmax over all of them, and no choice."""

    class Soft(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(zoo.WIDTH, EXPERTS)
            self.up = nn.Parameter(torch.empty(EXPERTS, zoo.WIDTH, zoo.HIDDEN))
            self.down = nn.Parameter(torch.empty(EXPERTS, zoo.HIDDEN, zoo.WIDTH))

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            hidden = torch.relu(torch.bmm(flat.expand(len(self.up), -1, -1), self.up))
            return (torch.bmm(hidden, self.down) * self.router(flat).softmax(-1).t()[..., None]).sum(0).view_as(x)

    _, _, anatomy = looked_at(lambda: zoo.on_tokens(Soft))
    assert Counter(str(g.kind) for g in anatomy.cuttable.values()) == {"hidden": 2}

"""The algebra of dimensions: unify, split, cut and regroup agree with what reshaping really does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secateur.anatomy.dims import Misaligned, Note, Space


@pytest.fixture
def space():
    return Space()


def sizes(dims):
    return [d.size for d in dims]


def test_a_split_width_is_heads_times_head_size(space):
    width = space.new(384)
    heads, size = space.split(width, [6, 64])
    assert list(space.leaves(width)) == [heads, size]
    assert space.units(width, heads).tolist() == [i // 64 for i in range(384)]
    assert space.units(width, size).tolist() == [i % 64 for i in range(384)]


def test_a_cut_width_is_parts_side_by_side(space):
    packed, hidden = space.new(10), space.new(5)
    for part in space.cut(packed, [5, 5]):
        space.unify(part, hidden)
    assert space.units(packed, hidden).tolist() == [0, 1, 2, 3, 4] * 2


def test_unify_refines_both_sides(space):
    a, b = space.new(24), space.new(24)
    outer, _ = space.split(a, [4, 6])
    _, inner = space.split(b, [12, 2])
    space.unify(a, b)
    assert space.find(a) is space.find(b)
    assert sizes(space.leaves(a)) == [4, 3, 2]
    assert space.contains(b, outer) and space.contains(a, inner)


def test_unify_of_parts_cuts_where_either_side_does(space):
    a, b = space.new(10), space.new(10)
    space.cut(a, [4, 6])
    space.cut(b, [7, 3])
    space.unify(a, b)
    assert sizes(space.leaves(a)) == [4, 3, 3] == sizes(space.leaves(b))


def test_a_packed_projection_splits_into_parts_and_heads(space):
    packed = space.new(3 * 24)
    q, k, v = space.cut(packed, [24, 24, 24])
    heads, _ = space.split(q, [4, 6])
    for other in (k, v):
        space.unify(space.split(other, [4, 6])[0], heads)
    units = space.units(packed, heads)
    assert units.tolist() == [i % 24 // 6 for i in range(72)]


def test_a_concatenation_of_widths_splits_over_a_shared_inner_size(space):
    a, b = space.new(8), space.new(12)
    outer, inner = space.split(space.concat([a, b]), [5, 4])
    assert outer.size == 5 and sizes(space.leaves(a)) == [2, 4] and sizes(space.leaves(b)) == [3, 4]
    assert list(space.leaves(a))[1] is space.find(inner)


@pytest.mark.parametrize(
    "tear",
    [
        lambda s: s.unify(s.new(4), s.new(5)),
        lambda s: s.cut(s.merge([s.new(3), s.new(4)]), [5, 7]),
        lambda s: s.split(s.merge([s.new(3), s.new(5)]), [5, 3]),
        lambda s: s.regroup([s.new(3), s.new(5)], [5, 3]),
    ],
)
def test_what_would_tear_a_piece_is_refused(space, tear):
    with pytest.raises(Misaligned):
        tear(space)


def test_only_the_run_of_axes_that_does_not_align_is_given_up(space):
    batch, height, width, channels = (space.new(n) for n in (2, 3, 5, 8))
    out, lost = space.regroup_aligned([batch, height, width, channels], [2, 5, 3, 8])
    assert out[0] is batch and out[3] is channels
    assert {id(d) for d in lost} == {id(d) for d in (height, width, *out[1:3])}


def test_a_unit_owned_twice_is_refused(space):
    leaf = space.new(3)
    with pytest.raises(Misaligned):
        space.units(space.merge([leaf, leaf]), leaf)


def test_axes_of_size_one_come_and_go(space):
    a = space.new(6)
    assert sizes(space.regroup([space.new(1), a], [6, 1, 1])) == [6, 1, 1]
    assert space.merge([space.new(1), a]) is a
    assert space.split(a, [1, 6])[1] is a


def test_notes_reach_every_leaf_and_only_those_used_stay(space):
    width = space.new(12)
    space.note(width, Note("reduce", "a", "sum"), nodes=[3])
    space.note(width, Note("norm", "b", "a norm"))
    leaves = space.split(width, [3, 4])
    assert {d: len(n) for d, n in space.notes().items()} == dict.fromkeys(leaves, 2)
    space.forget_unused({1, 2})
    assert {n.kind for notes in space.notes().values() for n in notes} == {"norm"}


factors = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(factors, st.data())
def test_reshapes_keep_every_index_in_its_place(shape, data):
    """Regrouping a merged axis at random finds, for each leaf, the index that numbering the elements finds."""
    space = Space()
    leaves = [space.new(n) for n in shape]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(shape)))) | {len(shape)})
    target = [math.prod(shape[a:b]) for a, b in zip([0, *cuts], cuts, strict=False)]
    out = space.regroup(leaves, target)
    assert sizes(out) == target
    grid = torch.arange(math.prod(shape)).reshape(shape)
    for axis, leaf in enumerate(leaves):
        assume(leaf.size > 1)
        index = torch.arange(leaf.size).reshape([-1 if i == axis else 1 for i in range(len(shape))]).expand_as(grid)
        seen = torch.full((grid.numel(),), -1)
        for i, dim in enumerate(out):
            if space.contains(dim, leaf):
                units = space.units(dim, leaf)
                seen = units.reshape([-1 if j == i else 1 for j in range(len(out))]).expand(target).reshape(-1)
        assert torch.equal(seen, index.reshape(-1))

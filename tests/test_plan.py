"""Plans and budgets: what goes out comes back, and whatever else comes in is refused in one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import ArtifactError, BudgetError, PlanError, SecateurError
from secateur.plan import VERSION, Budget, Kept, Plan

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def kept(draw):
    size = draw(st.integers(1, 40))
    keep = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return Kept(kind=draw(words), size=size, keep=tuple(sorted(keep)))


plans = st.builds(
    Plan,
    model=st.dictionaries(words, words, max_size=3),
    groups=st.dictionaries(words, kept(), max_size=5),
    made_by=st.dictionaries(words, json_values, max_size=4),
    budget=st.dictionaries(words, numbers, max_size=2),
    predicted=st.dictionaries(words, numbers, max_size=4),
)


@given(plans)
def test_a_plan_survives_json(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


def parse(text) -> Plan | None:
    """A plan that can be written again, or None where it was refused as it should be."""
    try:
        plan = Plan.from_json(text)
    except PlanError:
        return None
    assert Plan.from_json(plan.to_json()) == plan
    return plan


@given(st.text())
def test_any_text_gives_a_plan_or_a_plan_error(text):
    parse(text)


@given(json_values)
def test_any_json_gives_a_plan_or_a_plan_error(value):
    parse(json.dumps(value))


nearly = st.fixed_dictionaries(
    {},
    optional={
        "version": st.integers(-2, 3) | json_values,
        "groups": st.dictionaries(
            words,
            st.fixed_dictionaries(
                {}, optional={"kind": json_values, "size": json_values, "keep": st.lists(json_values) | json_values}
            ),
            max_size=3,
        ),
        "model": json_values,
        "made_by": json_values,
        "predicted": st.dictionaries(words, json_values, max_size=3),
        "more": json_values,
    },
)


@given(nearly)
def test_anything_like_a_plan_gives_a_plan_or_a_plan_error(value):
    parse(json.dumps(value))


@settings(max_examples=50)
@given(plans, st.data())
def test_a_truncated_plan_is_refused(plan, data):
    text = plan.to_json()
    assert parse(text[: data.draw(st.integers(0, len(text) - 1))]) is None


GROUP = {"kind": "hidden", "size": 3, "keep": [0, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('"\ud800"', "not valid JSON"),
        ("[]", "holds a list"),
        ('{"version": 99}', "format version 99, this Secateur reads up to 1; upgrade"),
        ('{"version": true}', "no format version"),
        ('{"version": 0}', "no format version"),
        ('{"made_by": {"a": 1e999}}', "damaged at 'made_by'"),
        ('{"predicted": {"params": NaN}}', "not valid JSON"),
        ('{"surprise": 1}', "damaged at 'surprise'"),
        (json.dumps({"groups": {"g": GROUP | {"keep": []}}}), "at least one unit"),
        (json.dumps({"groups": {"g": GROUP | {"keep": [0, 3]}}}), "below 3"),
        (json.dumps({"groups": {"g": GROUP | {"keep": [1, 1]}}}), "distinct"),
        (json.dumps({"groups": {"g": GROUP | {"keep": [2, 0]}}}), "ascending"),
        (json.dumps({"groups": {"g": GROUP | {"keep": [-1, 0]}}}), "groups.g.keep.0"),
        (json.dumps({"groups": {"g": GROUP | {"keep": ["0"]}}}), "groups.g.keep.0"),
        (json.dumps({"groups": {"g": GROUP | {"keep": [0.0]}}}), "groups.g.keep.0"),
        (json.dumps({"groups": {"g": GROUP | {"size": 0}}}), "groups.g.size"),
    ],
)
def test_what_makes_no_sense_is_refused(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_files(tmp_path):
    plan = Plan(groups={"é:hidden": Kept(**GROUP)}, predicted={"params": 0.1 + 0.2})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["version"] == VERSION
    (tmp_path / "latin").write_bytes(b'{"model": {"name": "\xe9"}}')
    for name, message in (("none.json", "does not exist"), ("", "cannot be read"), ("latin", "cannot be read")):
        with pytest.raises(PlanError, match=message):
            Plan.load(tmp_path / name)
    with pytest.raises(ArtifactError):
        plan.save(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of params, macs and quality"),
        ({"params": 0.5, "macs": 0.5}, "exactly one"),
        ({"params": 0}, "above 0 and at most 1"),
        ({"params": -0.5}, "above 0"),
        ({"params": 1.01}, "at most 1$"),
        ({"macs": 75}, "for 75 percent give 0.75"),
        ({"quality": float("nan")}, "above 0"),
        ({"quality": float("inf")}, "above 0"),
        ({"params": "half"}, "valid number"),
        ({"latency": 0.5}, "latency"),
    ],
)
def test_a_budget_is_one_share(given, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**given)


def test_budgets():
    assert (Budget(params=1).kind, Budget(params=1).share) == ("params", 1.0)
    assert (Budget(macs=0.5).kind, Budget(quality=0.9).kind) == ("macs", "quality")
    assert issubclass(BudgetError, SecateurError)

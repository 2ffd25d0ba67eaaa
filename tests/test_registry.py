"""Names in, objects out; unknown names are answered with the closest and with all."""

import pytest

import secateur as sc
from secateur.errors import RegistryError
from secateur.registry import Registry


@pytest.fixture
def fruit():
    registry = Registry("fruit")
    for name in ("apple", "apricot", "pear"):
        registry.register(name)(name.upper())
    return registry


def test_names_are_found_and_listed(fruit):
    assert fruit.get("pear") == "PEAR"
    assert fruit.list() == list(fruit) == ["apple", "apricot", "pear"]
    assert fruit.list("ap*") == ["apple", "apricot"]


@pytest.mark.parametrize("name", ["aple", "APPLE", "Apple"])
def test_an_unknown_name_is_answered_with_the_closest(fruit, name):
    with pytest.raises(RegistryError, match=rf"unknown fruit '{name}'. Did you mean 'apple'\? Available: apple, apri"):
        fruit.get(name)


@pytest.mark.parametrize("name", ["", "zzz", 3, None])
def test_without_a_close_one_the_list_is_enough(fruit, name):
    with pytest.raises(RegistryError, match=r"unknown fruit .* Available: apple, apricot, pear"):
        fruit.get(name)


def test_a_name_is_given_once(fruit):
    with pytest.raises(RegistryError, match="'pear' is registered twice"):
        fruit.register("pear")(0)


def test_the_public_lists():
    for names in (sc.list_criteria(), sc.list_allocators(), sc.list_compensators(), sc.list_losses()):
        assert names == sorted(names)
        assert names
    assert sc.list_criteria("rand*") == ["random"]

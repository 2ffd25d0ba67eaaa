"""What the documents say is true: commands and examples run, names and options exist, links lead somewhere."""

import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import torch

import secateur as sc
from conftest import TIMM, TIMM_OPTIONS, run_command
from secateur.allocation import allocators
from secateur.anatomy.rules.base import RULES
from secateur.criteria import criteria
from secateur.surgery import compensators
from secateur.workflow import Settings

ROOT = Path(__file__).parent.parent
MODEL = "timm/vit_small_patch14_reg4_dinov2.lvd142m"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


WALK = ["inspect", "calibrate", "plan", "plan", "prune", "evaluate", "measure", "compress"]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """Every `secateur ...` of the bash blocks, as arguments."""
    lines = "\n".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("secateur ")]


@pytest.fixture(scope="module")
def mostly_mlp(tmp_path_factory) -> Path:
    """A tiny model with a real one's proportions: most of it is MLPs."""
    torch.manual_seed(0)
    model = sc.load_model(TIMM, **TIMM_OPTIONS, depth=2, mlp_ratio=10)
    return sc.save(model, tmp_path_factory.mktemp("mlp") / "dense")


@pytest.fixture
def desk(mostly_mlp, photos, tmp_path, monkeypatch):
    """A working folder with dense/, which stands for the model of the documents, and photos/."""
    (tmp_path / "dense").symlink_to(mostly_mlp)
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_registries():
    """What examples register is forgotten again."""
    with (
        mock.patch.dict(criteria._items),
        mock.patch.dict(allocators._items),
        mock.patch.dict(compensators._items),
        mock.patch.dict(RULES),
    ):
        yield


# What runs


@pytest.mark.parametrize(("name", "verbs"), [("README.md", ["compress"]), ("docs/index.md", WALK)])
def test_commands(desk, capfd, name, verbs):
    """In the order of the page, each from what those before it wrote."""
    found = commands(name)
    assert [c[0] for c in found] == verbs
    for arguments in found:
        assert any(MODEL in argument for argument in arguments)
        status = run_command(*(a.replace(MODEL, "dense") for a in arguments))
        out, err = capfd.readouterr()
        assert (status, err) == (0, ""), arguments
        assert out
    assert sc.parameters(sc.load("small/")) <= 0.75 * sc.parameters(sc.load("dense"))


def test_the_page_about_language_models(language, text_file, tmp_path, monkeypatch, capfd):
    (tmp_path / "llama").symlink_to(language)
    (tmp_path / "corpus.txt").symlink_to(text_file)
    monkeypatch.chdir(tmp_path)
    few = ("--window", 16, "--limit", 8)
    compress, evaluate = commands("docs/language.md")
    assert run_command(*compress, *few, "--align", 1) == 0, capfd.readouterr()
    assert run_command(*evaluate, *few) == 0, capfd.readouterr()
    assert "perplexity per word" in capfd.readouterr().out
    (block,) = blocks("docs/language.md", "python")
    exec(block.replace('"affine")', '"affine", align=1, window=16, limit=8)'), {})
    dense, cut = map(float, capfd.readouterr().out.split()[-2:])
    assert 0 < dense < cut * 2


def test_the_page_about_memory(language, text_file, tmp_path, monkeypatch, capfd):
    (tmp_path / "llama").symlink_to(language)
    (tmp_path / "corpus.txt").symlink_to(text_file)
    monkeypatch.chdir(tmp_path)
    (arguments,) = commands("docs/memory.md")
    assert run_command(*arguments, "--window", 16, "--limit", 8, "--align", 1) == 0, capfd.readouterr()
    assert len(list(Path("small").glob("*.safetensors"))) == 4
    space: dict = {}
    (block,) = blocks("docs/memory.md", "python")
    exec(block.replace("batch_size=1", "batch_size=1, window=16, limit=4"), space)
    assert space["scores"].meta["criterion"] == "hfprune"


def test_the_readmes_python(desk, own_registries):
    space: dict = {}
    run_blocks("README.md", space)
    assert sc.parameters(space["result"].model) <= 0.75 * sc.parameters(space["model"])
    assert space["plan"].predicted["params"] <= 0.75 * space["plan"].predicted["dense_params"]
    assert sc.source_of(sc.load("small/")).library == "timm"
    assert "peak" in sc.list_criteria()
    view_rows = space["model"].blocks[0].mlp.fc2.weight.abs().amax(0)
    assert torch.equal(space["scores"].values["blocks.0.mlp:hidden"], view_rows)


def test_the_python_of_contributing(desk, own_registries):
    """After the README's, whose model, statistics and plan it goes on with."""
    space: dict = {}
    run_blocks("README.md", space)
    assert len(blocks("CONTRIBUTING.md", "python")) == 4
    run_blocks("CONTRIBUTING.md", space)
    assert "second-moment" in list(criteria)
    assert "last-first" in list(allocators)
    assert "rescale" in list(compensators)
    assert space["plan"].made_by["allocator"] == "last-first"
    assert sc.parameters(space["small"]) <= 0.75 * sc.parameters(space["model"])
    assert "linalg_cross" in RULES


def run_blocks(name: str, space: dict) -> None:
    found = blocks(name, "python")
    assert found
    for block in found:
        code = compile(block.replace(MODEL, "dense"), f"{name}", "exec", dont_inherit=True)
        exec(code, space)


def test_the_example_of_a_rule_is_needed():
    """Without the rule the same module cannot be cut, and the operation is named."""
    block = blocks("CONTRIBUTING.md", "python")[-1]
    head, _, module = block.partition("class Spin")
    assert "@rule" in head
    space: dict = {}
    exec("import torch\nimport secateur as sc\nclass Spin" + module.partition("assert ")[0], space)
    anatomy = sc.inspect(space["Spin"](), torch.randn(2, 3, 8))
    assert not anatomy.cuttable
    assert any("cross" in group.reason for group in anatomy.groups.values())


# What is named


def table_under(heading: str, text: str) -> list[list[str]]:
    """Cells of the first table after a heading, its own heading left out."""
    rows = re.findall(r"^\|(.*)\|$", text.partition(heading)[2].partition("\n## ")[0], re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows[2:]]


def names(cells: list[str]) -> set[str]:
    return {name for cell in cells for name in re.findall(r"`([a-z-]+)`", cell)}


def test_the_readmes_methods_are_the_registries():
    rows = table_under("## Methods", page("README.md"))
    defaults = Settings()
    for column, registry, default in (
        (0, criteria, defaults.criterion),
        (2, allocators, defaults.allocator),
        (4, compensators, defaults.compensator),
    ):
        assert names([row[column] for row in rows]) == set(registry)
        assert [row[column] for row in rows if row[column + 1].endswith("(default)")] == [f"`{default}`"]


def test_the_methods_page_describes_every_method():
    text = page("docs/methods.md")
    for heading, registered in (
        ("## Losses", sc.list_losses()),
        ("## Criteria", sc.list_criteria()),
        ("## Compensators", sc.list_compensators()),
    ):
        rows = table_under(heading, text)
        assert names([row[0] for row in rows]) == set(registered)
    section = text.partition("## Allocators")[2].partition("\n## ")[0]
    assert set(re.findall(r"\*\*`([a-z-]+)`", section)) == set(sc.list_allocators())


def options_of_the_command_line() -> dict[str, set[str]]:
    from typer.main import get_command

    from secateur.cli.app import app

    found = get_command(app).commands
    return {verb: {o for p in command.params for o in p.opts + p.secondary_opts} for verb, command in found.items()}


@pytest.mark.parametrize("file", PAGES, ids=lambda p: p.name)
def test_every_option_and_verb_that_is_named_exists(file):
    options = options_of_the_command_line()
    text = file.read_text(encoding="utf-8")
    for snippet in re.findall(r"`([^`]+)`", text):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", snippet):
            assert option == "--nproc-per-node" or any(option in known for known in options.values()), option
        if found := re.match(r"(?:\S+ )*secateur ([a-z]+)(?: |$)", snippet):
            assert found[1] in options, snippet


def test_the_table_of_budgets_is_of_compress():
    rows = table_under("## Budgets", page("docs/index.md"))
    said = {option for row in rows for option in re.findall(r"--[a-z-]+", row[0])}
    assert said <= options_of_the_command_line()["compress"]
    assert len(said) == 6


@pytest.mark.parametrize("file", PAGES, ids=lambda p: p.name)
def test_every_name_of_the_package_that_is_named_exists(file):
    for name in re.findall(r"\b(?:sc|secateur)\.([a-z_]\w*)\b(?!\.\w)", file.read_text(encoding="utf-8")):
        assert name in sc.__all__ or name in ("json", "anatomy"), name


@pytest.mark.parametrize("file", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(file):
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (file.parent / path).resolve() if path else file
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([a-z-]+\.md)$", page("mkdocs.yml"), re.MULTILINE))
    assert {p.name for p in (ROOT / "docs").glob("*.md")} <= listed


def test_the_files_of_a_result_are_those_that_the_page_names(desk):
    sc.save(sc.load("dense"), "plain")
    text = page("docs/index.md")
    about = json.loads(Path("plain/secateur.json").read_text())
    assert all(f"`{name}`" in text for name in ("model.safetensors", "secateur.json", "plan.json"))
    assert {"source", "recipe", "sha256", "figures"} <= set(about)  # origin, structure, hashes, figures

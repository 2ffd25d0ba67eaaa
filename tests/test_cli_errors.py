"""Whatever goes wrong ends in one line that says what to do, a status that is not 0, and nothing half-written."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TIMM, run_command

COMPRESS = ("compress", "dense", "--images", "photos", "--batch-size", 8, "--out", "out")
CALIBRATE = ("calibrate", "dense", "--images", "photos", "--out", "out")
PLAN = ("plan", "dense", "--statistics", "stats.safetensors", "--out", "out")
PRUNE = ("prune", "dense", "--plan", "plan.json", "--statistics", "stats.safetensors", "--out", "out")
EVALUATE = ("evaluate", "dense", "--against", "dense")
BUDGET = ("--keep-params", 0.75)


@pytest.fixture
def refused(secateur, here):
    """Run a command that must be refused, and find nothing new in the working folder; the line it printed."""

    def run(*arguments):
        before = sorted(p.relative_to(here) for p in here.rglob("*"))
        ended = secateur(*arguments)
        assert sorted(p.relative_to(here) for p in here.rglob("*")) == before
        assert ended.out == ""
        return ended.error

    return run


# Budgets and names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*COMPRESS, "--keep-params", 0),
            "bad budget (params=0.0): params is the share to keep, above 0 and at",
        ),
        ((*COMPRESS, "--keep-params", 1.5), "above 0 and at most 1"),
        ((*COMPRESS, "--keep-params", "nan"), "above 0 and at most 1"),
        ((*COMPRESS, "--keep-macs", 60), "for 60 percent give 0.6"),
        ((*COMPRESS, "--min-quality", -1), "quality is the share to keep, above 0"),
        (COMPRESS, "give exactly one of keep_params, keep_macs and min_quality"),
        ((*COMPRESS, *BUDGET, "--keep-macs", 0.5), "give exactly one of keep_params, keep_macs and min_quality"),
        (
            (*COMPRESS, "--keep-params", 0.3),
            "with a floor of 10% in every group 55.4% remain; raise the",
        ),
        (
            (*COMPRESS, *BUDGET, "--kinds", "kv_groups"),
            "no group of kind 'kv_groups' can be cut; this model has",
        ),
        ((*COMPRESS, *BUDGET, "--kinds", "heads", "--floor", 0.9), "cannot be reached: with a floor of 90%"),
        ((*COMPRESS, *BUDGET, "--kinds", "hidden", "--align", 192), "cannot be reached"),
        ((*COMPRESS, *BUDGET, "--criterion", "obss"), "unknown criterion 'obss'. Did you mean 'obs'? Available: "),
        (
            (*COMPRESS, *BUDGET, "--allocator", "curv"),
            "unknown allocator 'curv'. Did you mean 'curve'? Available: ",
        ),
        (
            (*COMPRESS, *BUDGET, "--compensate", "afine"),
            "unknown compensator 'afine'. Did you mean 'affine'?",
        ),
        ((*COMPRESS, *BUDGET, "--dtype", "int4"), "dtype 'int4' is not known; use float32 or bfloat16"),
        (
            (*COMPRESS, *BUDGET, "--criterion", "amp", "--batch-size", 1),
            "give at least 2 images and batch_size 2",
        ),
        (("demo", "--keep-params", 3), "above 0 and at most 1"),
        (PLAN, "give exactly one of params, macs and quality"),
        ((*PLAN, "--keep-params", 0), "above 0 and at most 1"),
        ((*PLAN, "--keep-params", 0.3), "raise the budget, or lower floor or align"),
        ((*PLAN, *BUDGET, "--kinds", "neurons"), "no scored group is of kind neurons; this model has heads, hidden"),
        ((*PLAN, *BUDGET, "--criterion", "ob"), "unknown criterion 'ob'. Did you mean 'obs'?"),
        ((*PLAN, *BUDGET, "--allocator", "unifrom"), "Did you mean 'uniform'?"),
        ((*PLAN, *BUDGET, "--allocator", "amp-bisect"), "allocator 'amp-bisect' measures the model: give --images"),
        ((*PLAN, *BUDGET, "--option", "tolerance"), "--option takes NAME=VALUE, found 'tolerance'"),
        (
            (*PLAN, *BUDGET, "--allocator", "global", "--option", "standardise=x"),
            "standardise 'x' is not known; use",
        ),
        (
            ("plan", "dense", *BUDGET, "--out", "out"),
            "criterion 'obs' needs statistics; calibrate first",
        ),
        ((*PRUNE, "--compensate", "ridg"), "unknown compensator 'ridg'. Did you mean 'ridge'?"),
        ((*PRUNE, "--compensate", "sequential"), "reads the calibration images again: give --images"),
        (("prune", "dense", "--plan", "plan.json", "--out", "out"), "needs --statistics; or use --compensate none"),
        ((*CALIBRATE, "--batch-size", 1), "give at least 2 images and batch_size 2"),
        ((*CALIBRATE, "--loss", "entropi"), "unknown loss 'entropi'. Did you mean 'entropy'?"),
        ((*CALIBRATE, "--loss", "cross-entropy"), "needs labels (a folder with one subfolder a class)"),
        ((*CALIBRATE, "--dtype", "float16"), "dtype 'float16' is not known"),
        (("evaluate", "dense"), "give --images with --against to compare with the dense model, or --knn"),
        (("evaluate", "dense", "--images", "photos"), "give --images with --against"),
        (("evaluate", "dense", "--knn", "photos"), "'photos/train' does not exist"),
    ],
)
def test_settings(refused, arguments, message):
    assert message in refused(*arguments)


# Images


@pytest.mark.parametrize("command", [(*COMPRESS, *BUDGET), CALIBRATE, EVALUATE])
def test_folders_without_pictures(refused, here, command):
    (here / "empty").mkdir()
    (here / "notes").mkdir()
    (here / "notes" / "a.txt").write_text("no picture")
    (here / "broken").mkdir()
    for name in ("a.jpg", "b.png"):
        (here / "broken" / name).write_text("no picture")
    for folder, message in (
        ("empty", "'empty' holds no images (files ending in "),
        ("notes", "'notes' holds no images (files ending in "),
        ("nowhere", "'nowhere' does not exist; give a folder of images"),
        ("broken", "none of 2 images can be read (broken/a.jpg: not an image, "),
    ):
        assert message in refused(*(x for x in command if x not in ("--images", "photos")), "--images", folder)


def test_one_picture(refused, here):
    (here / "one").mkdir()
    shutil.copy("photos/000.png", "one")
    one = ("--images", "one")
    assert "at least 2 readable images, found 1; some hundred are better" in refused(*COMPRESS, *BUDGET, *one)
    assert "give at least 2 images and batch_size 2" in refused(*CALIBRATE, *one)
    assert "fidelity needs at least 2 readable images, found 1" in refused(*EVALUATE, *one)
    assert run_command(*CALIBRATE, *one, "--loss", "none") == 0


def test_folders_that_may_not_be_read_or_written(here, capfd):
    """As a user without rights: of a folder of pictures, and of a place to write to."""
    closed = here / "closed"
    shutil.copytree(here / "photos", closed)
    closed.chmod(0)
    model = (TIMM, "--random-weights", "--image-size", 64)
    free = Path(tempfile.gettempdir()) / f"{here.parent.name}.st"
    for arguments, message in (
        (("calibrate", *model, "--images", closed, "--out", free), "cannot be read (Permission denied); mend its"),
        (("calibrate", *model, "--images", closed, "--out", closed / "s.st"), "no permission to write"),
        (("compress", *model, "--images", closed, *BUDGET, "--out", closed / "x"), "no permission to write"),
    ):
        child = os.fork()
        if not child:
            try:
                os.chdir("/")
                if os.getuid() == 0:
                    os.setuid(65534)
                os._exit(run_command(*arguments))
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]
    closed.chmod(0o700)
    assert not free.exists()
    assert sorted(p.name for p in closed.iterdir()) == sorted(p.name for p in (here / "photos").iterdir())


# Models


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "is neither a folder nor a known form (did you mean 'timm/nowhere'?)"),
        ("timm/vit_tinny_patch16_224", "timm has no model 'vit_tinny_patch16_224'; close names: "),
        ("jax/vit", "is neither a folder nor a known form"),
        ("", "is neither a folder nor a known form"),
        ("open_clip/ViT-B-32", "name the weights: 'open_clip/ViT-B-32:TAG' with TAG one of openai, "),
        ("photos", "'photos' has neither secateur.json, open_clip_config.json nor a config.json"),
    ],
)
def test_models_that_are_not_there(refused, model, message):
    for command in (("inspect", model), ("measure", model), ("calibrate", model, *CALIBRATE[2:])):
        assert message in refused(*command)


@pytest.mark.parametrize("name", ["timm", "hf-dinov2", "open_clip"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: b"", None])
def test_damaged_model_folders(refused, model_folders, here, name, damage):
    files = [p.name for p in model_folders[name].iterdir() if p.suffix in (".json", ".safetensors")]
    assert len(files) >= 2
    for file in files:
        folder = Path(shutil.copytree(model_folders[name], here / f"without {file}"))
        raw = (folder / file).read_bytes()
        (folder / file).unlink()
        if damage is not None:
            (folder / file).write_bytes(damage(raw))
        assert folder.name in refused("inspect", folder)


def test_a_damaged_result(refused, made, here):
    for file in ("model.safetensors", "secateur.json", "plan.json"):
        folder = Path(shutil.copytree(made / "small", here / f"damaged {file}"))
        (folder / file).write_bytes((folder / file).read_bytes()[:-20])
        assert folder.name in refused("measure", folder)


def test_nan_weights(refused, secateur, here):
    shutil.copytree(here / "dense", here / "nan")
    weights = load_file("nan/model.safetensors")
    weights["blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(weights, "nan/model.safetensors")
    finite = "the model's output is not finite (NaN or infinity); check its weights"
    assert finite in refused("compress", "nan", *COMPRESS[2:], *BUDGET)
    assert finite in refused("calibrate", "nan", *CALIBRATE[2:])
    data_free = ("--criterion", "magnitude", "--allocator", "global", *BUDGET, "--out", "out")
    assert "gave NaN or infinite scores for 'blocks.0.mlp:hidden'; check" in refused("plan", "nan", *data_free)
    message = "the cut model's features are not finite (NaN or infinity); check its weights"
    assert message in refused("evaluate", "nan", "--against", "dense", "--images", "photos")
    assert secateur("inspect", "nan").status == 0


def test_models_that_do_not_go_together(refused, model_folders, shallow):
    tiny = model_folders["timm"]
    assert "the plan was made for" in refused(
        "prune", tiny, "--plan", "plan.json", "--compensate", "none", "--out", "x"
    )
    assert "these statistics belong to another model" in refused("prune", tiny, *PRUNE[2:])
    assert "these statistics belong to another model" in refused("plan", tiny, *PLAN[2:], *BUDGET)
    assert "was cut before; compress the dense one" in refused("compress", "small", *COMPRESS[2:], *BUDGET)


def test_models_that_cannot_be_compared(secateur, model_folders, here, tmp_path):
    ended = secateur("evaluate", "dense", "--against", model_folders["hf-dinov2"], "--images", "photos")
    assert ended.status == 1
    assert "'dense' takes images of 64 x 64" in ended.err.splitlines()[-1]
    narrow = ("--against", TIMM, "--random-weights", "--image-size", 64)
    ended = secateur("evaluate", model_folders["hf-dinov2"], *narrow, "--images", "photos")
    assert "takes images of 32 x 32" in ended.err.splitlines()[-1]


# Files


@pytest.mark.parametrize("damage", [lambda raw: raw[:1000], lambda raw: raw[:-10], lambda raw: b"", lambda raw: b"{}"])
def test_damaged_statistics(refused, here, damage):
    (here / "s.st").write_bytes(damage((here / "stats.safetensors").read_bytes()))
    for command in ((*PLAN, *BUDGET), PRUNE):
        message = "'s.st' is not a readable statistics file (SafetensorError); calibrate again"
        assert message in refused(*command, "--statistics", "s.st")


def test_files_that_are_no_statistics(refused, here):
    save_file({"a": torch.zeros(2)}, here / "other.safetensors")
    for name in ("other.safetensors", "nowhere", "photos", "plan.json"):
        assert f"'{name}' is not a readable statistics file" in refused(*PLAN, *BUDGET, "--statistics", name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("[]", "holds a list, expected an object with 'groups'"),
        ('{"version": 9}', "has format version 9, this Secateur reads up to 1; upgrade Secateur"),
        ('{"groups": {"blocks.0.mlp:hidden": {"kind": "hidden", "size": 4, "keep": [0]}}}', "blocks.0.mlp:hidden"),
        ('{"groups": {"a": {"kind": "hidden", "size": 4, "keep": [3, 1]}}}', "must be ascending, distinct and below 4"),
        ('{"groups": {"a": {"kind": "hidden", "size": 4, "keep": [1]}}}', "'a'"),
        (None, "is not valid JSON"),
    ],
)
def test_damaged_plans(refused, here, text, message):
    (here / "p.json").write_text((here / "plan.json").read_text()[:-50] if text is None else text)
    assert message in refused(*PRUNE, "--plan", "p.json")


def test_files_that_are_no_plan(refused):
    assert "'nowhere' does not exist; write a plan with `secateur plan`" in refused(*PRUNE, "--plan", "nowhere")
    assert "cannot be read as a plan" in refused(*PRUNE, "--plan", "photos/000.png")


# Places


@pytest.mark.parametrize("command", [(*COMPRESS, *BUDGET), CALIBRATE, (*PLAN, *BUDGET), PRUNE])
def test_places_that_are_taken_are_found_out_before_a_model_is_loaded(refused, here, monkeypatch, command):
    for place in ("secateur.artifact.load_model", "secateur.workflow.load_model"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("a model was loaded"))
    (here / "mine").write_text("mine")
    (here / "full").mkdir()
    (here / "full" / "mine").write_text("mine")
    folder = command[0] in ("compress", "prune")
    taken = "exists and was not written by Secateur; give another folder or remove it"
    assert (taken if folder else "'full' is a folder; give the name of a file") in refused(*command, "--out", "full")
    if folder:
        assert taken in refused(*command, "--out", "mine")
    assert "'mine/x' cannot be made, a file is in the way" in refused(*command, "--out", "mine/x")


def test_a_full_disk(refused, secateur, small_disk, model_folders, monkeypatch):
    tiny = model_folders["timm"]
    full = "the disk is full: '{}' was not written; free some space and try again"
    message = refused("calibrate", tiny, "--images", "photos", "--out", small_disk / "s.st")
    assert message == full.format(small_disk / "s.st")
    data_free = ("--criterion", "magnitude", "--allocator", "uniform", "--compensate", "none", "--keep-params", 0.99)
    ended = secateur("compress", tiny, "--images", "photos", *data_free, "--out", small_disk / "small")
    work = small_disk / "small.work"
    note = f"; finished steps are kept in '{work}': the same again with resume (--resume) goes on"
    assert ended.error == full.format(small_disk / "small") + note
    assert [p.name for p in small_disk.iterdir()] == ["small.work"]
    assert sorted(json.loads((work / "run.json").read_text())) != []


# What the machine does


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory; use a smaller --batch-size or fewer images (--limit)"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory; use a smaller --batch-size"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "out of memory; use",
        ),
        (OSError(28, "No space left on device"), "No space left on device; check the path"),
        (OSError(5, "Input/output error", "/mnt/x"), "Input/output error ('/mnt/x'); check the path, its permissions"),
    ],
)
def test_what_no_command_can_foresee(refused, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("secateur.calibration._one_batch", fail)
    assert message in refused(*CALIBRATE)


def test_a_defect_keeps_its_traceback(here, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr("secateur.calibration._one_batch", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        run_command(*CALIBRATE)

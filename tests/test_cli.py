"""Every command does what it says, prints it in 80 columns, and ends with where the result is."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import secateur as sc
from conftest import TIMM, picture, run_command, write_pictures
from secateur.models import example_input, features

COMMANDS = ["inspect", "compress", "calibrate", "rotate", "plan", "prune", "evaluate", "measure", "demo"]
QUICK = ("--images", "photos", "--batch-size", "8")


def assert_readable(text: str) -> None:
    assert all(len(line) <= 80 for line in text.splitlines()), text
    assert "\x1b" not in text
    assert not re.search(r"[ \t]$", text, re.MULTILINE), "blanks at the end of a line"
    assert "\n\n\n" not in text


def embedding(model):
    with torch.no_grad():
        return features(model, example_input(model)).embedding


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_the_command_accepts(secateur, command):
    done = secateur(command, "--help")
    assert (done.status, done.err) == (0, "")
    text = "\n".join(line.rstrip() for line in done.out.splitlines())
    assert all(len(line) <= 80 for line in text.splitlines())
    examples = re.findall(rf"secateur {command}\b(?:[^\n]*\\\n)*[^\n]*", text.partition("Examples")[2])
    assert examples
    for example in examples:
        for option in re.findall(r"--[a-z-]+", example):
            assert option == "--nproc-per-node" or text.count(option) > example.count(option), option


def test_the_commands(secateur):
    done = secateur("--help")
    assert re.findall(r"^│ ([a-z]+) ", done.out, re.MULTILINE) == COMMANDS
    assert secateur("--version").out == f"secateur {sc.__version__}\n"
    assert secateur().out.split() == done.out.split()
    for wrong in (["prun"], ["compress", "dense"], ["measure", "dense", "--rounds", "0"], ["inspect"]):
        ended = secateur(*wrong)
        assert ended.status == 2
        assert "Traceback" not in ended.err
        assert "Usage: secateur" in ended.err


def test_nothing_heavy_is_imported_for_help():
    code = "import sys; sys.argv = ['secateur', '--help']\nfrom secateur.cli.app import main\ntry: main()\nfinally: "
    code += "print('HEAVY', [m for m in ('torch', 'timm', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


# One command after another


def test_inspect(secateur, here):
    done = secateur("inspect", "dense")
    assert (done.status, done.err) == (0, "")
    assert_readable(done.out)
    anatomy = sc.inspect(sc.load_model("dense"))
    assert done.out.startswith("dense: 134 k parameters, 2.25 M MACs per image of 3 x 64 x 64\n")
    hidden = sum(g.unit_params * g.size for g in anatomy.cuttable.values() if g.kind == "hidden") / anatomy.params
    assert re.search(rf"blocks\.\*\.mlp:hidden \(x 2\) +192 +{hidden:.1%}", done.out)
    assert re.search(r"Can be removed whole, with --kinds blocks\n.*\n.*\nblocks:blocks +2 ", done.out)
    listed = secateur("inspect", "dense", "--all").out
    assert all(name.removeprefix(":") in listed for name in anatomy.groups)
    told = json.loads(secateur("inspect", "dense", "--json").out)
    assert {g["name"]: (g["units"], g["cuttable"]) for g in told["groups"]} == {
        name: (g.size, g.cuttable) for name, g in anatomy.groups.items()
    }
    assert (told["params"], told["macs"]) == (anatomy.params, anatomy.macs)


def test_equal_reasons_are_said_once(secateur, tmp_path):
    shape = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}
    model = sc.load_model("timm/convnextv2_atto", pretrained=False, **shape)
    done = secateur("inspect", sc.save(model, tmp_path / "model"))
    assert done.out.count("GlobalResponseNorm") == 1
    assert "mean couples all units in stages.*.blocks.*.mlp.grn (GlobalResponseNorm):\n" in done.out


def test_calibrate(secateur, here):
    done = secateur("calibrate", "dense", *QUICK, "--limit", 10, "--loss", "none", "--no-covariance", "--out", "s.st")
    assert (done.status, done.err) == (0, "")
    last = "written to s.st; plan from it with secateur plan --statistics s.st\n"
    assert done.out == "10 images, 4 layers, losses: none\n" + last
    assert sc.Statistics.load("s.st").images == 10
    for _ in range(2):
        assert secateur("calibrate", "dense", *QUICK, "--checkpointing", "--out", "t.st").status == 0
    assert sc.Statistics.load("t.st").losses == ["entropy", "features"]


def test_plan(secateur, here):
    arguments = ("--statistics", "stats.safetensors", "--criterion", "variance", "--allocator", "global")
    macs = ("--keep-macs", 0.8, "--kinds", "hidden", "--floor", 0.2, "--align", 16, "--option", "standardise=mean")
    done = secateur("plan", "dense", *arguments, *macs, "--out", "p.json")
    assert (done.status, done.err) == (0, "")
    assert_readable(done.out)
    plan = sc.Plan.load("p.json")
    assert plan.budget == {"macs": 0.8}
    assert plan.made_by["criterion"] == "variance"
    assert plan.made_by["options"] == {"standardise": "mean"}
    assert (plan.made_by["floor"], plan.made_by["align"]) == (0.2, 16)
    assert {g.kind for g in plan.groups.values()} == {"hidden"}
    assert done.out.splitlines()[-1] == "written to p.json; apply it with secateur prune --plan p.json"
    share = plan.predicted["macs"] / plan.predicted["dense_macs"]
    assert f"MACs {share:.1%} of the dense model" in done.out


def test_plan_without_data_and_with_measuring(secateur, here):
    without = ("--criterion", "dgmr", "--allocator", "uniform", "--uniform-width", "--keep-params", 0.8)
    assert secateur("plan", "dense", *without, "--out", "a.json").status == 0
    measuring = ("--statistics", "stats.safetensors", "--criterion", "amp", "--allocator", "amp-bisect")
    done = secateur("plan", "dense", *measuring, "--images", "photos", "--keep-params", 0.8, "--all", "--out", "b.json")
    assert done.status == 0
    assert "blocks.0.mlp:hidden" in done.out
    for name in ("a.json", "b.json"):
        plan = sc.Plan.load(name)
        assert plan.predicted["params"] <= 0.8 * plan.predicted["dense_params"]


def test_prune_is_what_python_makes(secateur, here):
    affine = ("--plan", "plan.json", "--statistics", "stats.safetensors", "--ridge", 0.01)
    done = secateur("prune", "dense", *affine, "--out", "my small/")
    assert (done.status, done.err) == (0, "")
    dense, plan, stats = sc.load_model("dense"), sc.Plan.load("plan.json"), sc.Statistics.load("stats.safetensors")
    expected = sc.prune(dense, plan, compensate="affine", stats=stats, ridge=0.01)
    assert torch.equal(embedding(sc.load("my small")), embedding(expected))
    before, after = sc.parameters(dense), sc.parameters(expected)
    first, last = done.out.splitlines()
    assert first.endswith(f" parameters ({after / before:.1%})")
    assert last == "written to my small; load it with secateur.load('my small')"


def test_prune_by_a_plan_that_cuts_nothing_says_so(secateur, here):
    Path("whole.json").write_text("{}")
    done = secateur("prune", "dense", "--plan", "whole.json", "--compensate", "none", "--out", "out")
    assert (done.status, done.err) == (0, "note: nothing was cut: the plan keeps every unit\n")
    assert torch.equal(embedding(sc.load("out")), embedding(sc.load_model("dense")))


def test_evaluate(secateur, here, classes_folder):
    done = secateur("evaluate", "small/", "--against", "dense", *QUICK, "--knn", classes_folder, "--k", 1)
    assert (done.status, done.err) == (0, "")
    assert_readable(done.out)
    dense, small = sc.load_model("dense"), sc.load("small")
    found = sc.fidelity(small, dense, sc.batches("photos", sc.source_of(dense).image))
    assert done.out.startswith("Kept, on 24 images\n")
    assert re.search(rf"CLS cosine to dense +{found.cls_cosine:.4f}\n", done.out)
    assert re.search(r"kNN top-1 \(k=1\) +1.0000\n", done.out)
    done = secateur("evaluate", "dense", "--against", "dense", "--images", "photos", "--limit", 5)
    assert re.search(r"on 5 images\n(.*\n){3}.*1.0000\n", done.out)


def test_measure(secateur, here):
    done = secateur("measure", "small", "--against", "dense", "--batch-size", 2, "--rounds", 3)
    assert (done.status, done.err) == (0, "")
    assert_readable(done.out)
    ratio = sc.parameters(sc.load("small")) / sc.parameters(sc.load_model("dense"))
    assert done.out.startswith("Median of 3 (1 CPU thread, float32)\n")
    assert re.search(rf"parameters +134 k +\d+ k +{ratio:.3f}\n", done.out)
    assert "latency, batch 2 (ms)" in done.out
    assert "ratio" not in secateur("measure", TIMM, "--random-weights", "--image-size", 64, "--rounds", 1).out


def test_compress(secateur, here):
    budget = ("--keep-params", 0.75, "--criterion", "variance", "--compensate", "affine", "--held-out", 3)
    done = secateur("compress", "dense", *QUICK, *budget, "--out", "out")
    assert (done.status, done.err) == (0, "")
    assert_readable(done.out)
    titles = [
        line for line in done.out.splitlines() if line and done.out.split(line)[1].startswith("\n") and line[0] != " "
    ]
    assert [t for t in titles if t.startswith(("Units", "Gained", "Kept"))] == [
        "Units kept",
        "Gained (1 CPU thread, float32)",
        "Kept, on 3 held-out images",
    ]
    assert done.out.splitlines()[-1] == "written to out; load it with secateur.load('out')"
    figures = json.loads(Path("out/secateur.json").read_text())["figures"]
    assert figures["settings"]["criterion"] == "variance"
    assert figures["settings"]["held_out"] == 3
    assert re.search(rf"parameters +134 k .* {figures['table'][0]['ratio']:.3f}\n", done.out)
    assert re.search(rf"CLS cosine to dense +{figures['fidelity']['cls_cosine']:.4f}\n", done.out)
    assert sorted(p.name for p in here.iterdir() if not p.is_symlink()) == ["out"]


def test_compress_with_two_images_says_that_none_is_held_out(secateur, here, tmp_path):
    write_pictures(tmp_path / "two", 2)
    budget = ("--keep-params", 0.8, "--criterion", "magnitude", "--allocator", "uniform", "--compensate", "none")
    done = secateur("compress", "dense", "--images", "two", *budget, "--out", "out")
    assert "Kept, on 2 calibration images: too few to hold any out\n" in done.out


def test_notes_are_lines_on_standard_error(secateur, here):
    budget = ("--keep-params", 1.0, "--criterion", "magnitude", "--allocator", "global", "--compensate", "none")
    done = secateur("compress", "dense", *QUICK, *budget, "--out", "out")
    assert done.status == 0
    assert done.err == "note: nothing was cut: the budget leaves the whole model as it is\n"


@pytest.mark.parametrize("name", ["hf-dinov2", "open_clip"])
def test_every_command_on_a_folder_of_another_library(secateur, model_folders, here, name):
    dense, few = model_folders[name], ("--images", "photos", "--limit", 12)
    for command in (
        ("inspect", dense),
        ("calibrate", dense, *few, "--out", "s.st"),
        ("plan", dense, "--statistics", "s.st", "--keep-macs", 0.8, "--out", "p.json"),
        ("prune", dense, "--plan", "p.json", "--statistics", "s.st", "--out", "cut"),
        ("evaluate", "cut", "--against", dense, *few),
        ("measure", "cut", "--against", dense, "--rounds", 2),
        ("compress", dense, *few, "--keep-macs", 0.8, "--out", "out"),
    ):
        done = secateur(*command)
        assert done.status == 0, done.err
        assert_readable(done.out.replace(str(dense), "dense"))
        assert len(done.err.splitlines()) <= 1  # of transformers: no preprocessor_config.json
    for folder in ("cut", "out"):
        assert sc.macs(sc.load(folder)) < sc.macs(sc.load_model(dense))
    assert json.loads(Path("out/secateur.json").read_text())["figures"]["table"][1]["ratio"] <= 0.8


# Pictures


def test_odd_pictures_are_read(secateur, here):
    folder = Path("odd")
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = [picture(rng) for _ in range(3)]
    grey = np.asarray(images[0].convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    images[0].convert("CMYK").save(folder / "cmyk.jpg")
    images[0].convert("L").save(folder / "grey.png")
    images[0].convert("RGBA").save(folder / "alpha.webp")
    images[0].save(folder / "animated.gif", save_all=True, append_images=images[1:])
    done = secateur("calibrate", "dense", "--images", folder, "--loss", "none", "--out", "s.st")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("5 images,")


def test_unreadable_pictures_are_named(secateur, here):
    folder = write_pictures(Path("some"), 16)
    (folder / "003.png").write_text("no picture")
    done = secateur("calibrate", "dense", "--images", folder, "--loss", "none", "--out", "s.st")
    assert done.status == 0
    reason = "not an image, or of a format that is not known"
    assert done.err == f"skipped 1 unreadable image(s): {folder / '003.png'}: {reason}\n"
    refused = secateur("calibrate", "dense", "--images", folder, "--broken", 0.05, "--loss", "none", "--out", "t.st")
    assert "1 of 16 images cannot be read, at most 5% may fail" in refused.error
    assert "allow more with broken= (--broken)" in refused.error
    assert not Path("t.st").exists()


# On a terminal


def test_progress_and_colours_are_for_terminals_only(here):
    main_end, terminal = pty.openpty()
    child = os.fork()
    if not child:
        os.close(main_end)
        for stream in (1, 2):
            os.dup2(terminal, stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        try:
            os.environ["TERM"] = "xterm"
            status = run_command("compress", "dense", *QUICK, "--keep-params", "0.8", "--out", "out")
            sys.stdout.flush()
            os._exit(status)
        finally:
            os._exit(3)
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(main_end, 65536)
        except OSError:  # the other end was closed
            break
        shown += part
    os.close(main_end)
    assert os.waitpid(child, 0)[1] == 0, shown.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    for what in ("Reading images", "Calibrating", "Scoring (obs)", "Refitting blocks", "Comparing", "Timing"):
        assert re.search(rf"{re.escape(what)} +━+ (\d+)/\1 ", text), what
    assert text.rstrip().endswith("written to out; load it with secateur.load('out')")

"""An interrupted run, taken up, ends in the same bytes; another run is told what differs."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur import workflow
from secateur.errors import ArtifactError, DataError
from test_workflow import compress, contents


@pytest.fixture(scope="module")
def whole(shallow, photos, tmp_path_factory):
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "small"
    compress(shallow, photos, out=out)
    return contents(out)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(at: str, *args, **options) -> None:
    """A run in a child process that is killed when it comes to a function."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(at, die)
                compress(*args, **options)
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


MOMENTS = {  # the run comes to it when these steps are finished
    "secateur.calibration.Collector": [],
    "secateur.workflow.score": ["statistics"],
    "secateur.workflow.allocate": ["statistics", "scores"],
    "secateur.workflow.prune": ["statistics", "scores", "plan"],
    "secateur.api.refit_": ["statistics", "scores", "plan"],
    "secateur.workflow.fidelity": ["statistics", "scores", "plan"],
    "secateur.workflow.save": ["statistics", "scores", "plan"],
    "secateur.files._swap": ["statistics", "scores", "plan"],
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_ends_in_the_same_bytes(shallow, photos, whole, tmp_path, moment):
    out = tmp_path / "small"
    killed(moment, shallow, photos, out=out)
    assert not out.exists()
    result = compress(shallow, photos, out=out, resume=True)
    assert result.reused == MOMENTS[moment]
    assert contents(out) == whole
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["small"]


def test_killed_in_the_middle_of_writing_a_step(shallow, photos, whole, tmp_path):
    out = tmp_path / "small"
    killed("safetensors.torch.save_file", shallow, photos, out=out)
    assert not (tmp_path / "small.work" / "statistics.safetensors").exists()
    result = compress(shallow, photos, out=out, resume=True)
    assert result.reused == []
    assert contents(out) == whole


def test_killed_twice(shallow, photos, whole, tmp_path):
    out = tmp_path / "small"
    killed("secateur.workflow.score", shallow, photos, out=out)
    killed("secateur.workflow.prune", shallow, photos, out=out, resume=True)
    assert compress(shallow, photos, out=out, resume=True).reused == ["statistics", "scores", "plan"]
    assert contents(out) == whole


@pytest.fixture(scope="module")
def interrupted_once(shallow, photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("interrupted")
    killed("secateur.workflow.prune", shallow, photos, out=root / "small")
    return root


@pytest.fixture
def interrupted(interrupted_once, tmp_path):
    """The output folder of a run that was killed before the cut, of the test's own."""
    shutil.copytree(interrupted_once / "small.work", tmp_path / "small.work")
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_params": 0.7}, r"another keep_params \(0.75, now 0.7\): give the same again"),
        (
            {"keep_params": None, "keep_macs": 0.7},
            r"keep_params \(0.75, now null\); another keep_macs \(null, now 0.7\)",
        ),
        ({"criterion": "variance"}, r"another criterion \(\"obs\", now \"variance\"\)"),
        ({"compensator": "affine"}, r"another compensator \(\"sequential\", now \"affine\"\)"),
        ({"kinds": ("hidden",)}, r"another kinds \(null, now \[\"hidden\"\]\)"),
        ({"ridge": 0.01}, r"another ridge \(0.001, now 0.01\)"),
        ({"seed": 1}, r"another calibration images; another held-out images; another seed \(0, now 1\)"),
    ],
)
def test_other_settings_are_refused_with_what_differs(shallow, photos, interrupted, settings, message):
    before = contents(interrupted.with_name("small.work"))
    with pytest.raises(ArtifactError, match=message) as caught:
        compress(shallow, photos, out=interrupted, resume=True, **settings)
    assert "or begin anew without resume (--resume)" in str(caught.value)
    assert contents(interrupted.with_name("small.work")) == before


def test_another_model_and_other_images_are_refused(shallow, photos, interrupted, tmp_path):
    model = sc.load_model(shallow)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(2)
    with pytest.raises(ArtifactError, match="a run with another model: give the same"):
        compress(model, photos, out=interrupted, resume=True)
    copied = Path(shutil.copytree(photos, tmp_path / "copied"))
    with pytest.raises(ArtifactError, match="another calibration images; another held-out images: give the same"):
        compress(shallow, copied, out=interrupted, resume=True)


def test_other_settings_begin_anew_without_resume(shallow, photos, interrupted):
    result = compress(shallow, photos, out=interrupted, keep_params=0.8)
    assert result.reused == []
    assert result.settings.keep_params == 0.8
    assert not interrupted.with_name("small.work").exists()


@pytest.mark.parametrize("step", ["statistics.safetensors", "scores.safetensors", "plan.json"])
def test_a_damaged_step_is_made_again(shallow, photos, whole, interrupted, step):
    file = interrupted.with_name("small.work") / step
    file.write_bytes(file.read_bytes()[:-30])
    result = compress(shallow, photos, out=interrupted, resume=True)
    assert step.partition(".")[0] not in result.reused
    assert len(result.reused) == 2
    assert contents(interrupted) == whole


@pytest.mark.parametrize("text", ["", "3", "{", "[1]"])
def test_a_damaged_list_of_settings(shallow, photos, interrupted, text):
    (interrupted.with_name("small.work") / "run.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"run.json' is damaged .*; begin anew without resume"):
        compress(shallow, photos, out=interrupted, resume=True)


def test_a_folder_of_that_name_that_is_none_of_ours(shallow, photos, tmp_path):
    (tmp_path / "small.work").mkdir()
    (tmp_path / "small.work" / "thesis.tex").write_text("years")
    for resume in (False, True):
        with pytest.raises(ArtifactError, match="is in the way of this run's finished steps; move it away"):
            compress(shallow, photos, out=tmp_path / "small", resume=resume)
    assert (tmp_path / "small.work" / "thesis.tex").read_text() == "years"


def test_what_ends_a_run_says_that_steps_are_kept(shallow, photos, tmp_path, monkeypatch):
    for error in (KeyboardInterrupt, lambda: DataError("no")):

        def fail(*_, error=error, **__):
            raise error()

        monkeypatch.setattr(workflow, "prune", fail)
        with pytest.raises((KeyboardInterrupt, DataError)) as caught:
            compress(shallow, photos, out=tmp_path / "small")
        note = f"finished steps are kept in '{tmp_path / 'small.work'}': the same again with resume (--resume) goes on"
        assert caught.value.__notes__ == [note]

"""Ctrl-C and kill in the middle of a command: one line, nothing half-written, and --resume ends in the same bytes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import run_command

COMPRESS = ("compress", "dense", "--images", "photos", "--batch-size", 8, "--keep-params", 0.75, "--out", "small")
CALIBRATE = ("calibrate", "dense", "--images", "photos", "--batch-size", 8, "--out", "s.st")
IN_CALIBRATION, IN_SURGERY = "secateur.calibration._one_batch", "secateur.surgery.sequential.grabbed"
KEPT = "error: interrupted; finished steps are kept in 'small.work': the same again with resume (--resume) goes on"
NOTHING = "error: interrupted; nothing half-written was left: give the same command again"


def stopped(place: str, how: signal.Signals, *arguments) -> int:
    """A command in a child process, sent a signal when it comes to a function for the second time; its status."""
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
            times = iter(range(99))
            with pytest.MonkeyPatch.context() as patch:
                module, _, name = place.rpartition(".")
                original = getattr(sys.modules[module], name)

                def wait(*args, **options):
                    if next(times) == 1:
                        os.write(tell, b"here")
                        time.sleep(60)
                    return original(*args, **options)

                patch.setattr(place, wait)
                os._exit(run_command(*arguments))
        finally:
            os._exit(3)
    os.close(tell)
    assert os.read(ready, 4) == b"here"
    os.close(ready)
    os.kill(child, how)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict:
    """What a result holds, without what was timed."""
    out = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    about = json.loads(out["secateur.json"])
    del about["figures"]["timings"]
    about["figures"]["table"] = about["figures"]["table"][:2]
    return {**out, "secateur.json": about}


def own_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.is_symlink())


@pytest.fixture
def place(here):
    """The working folder, without a small/ of others."""
    (here / "small").unlink()
    return here


@pytest.fixture(scope="module")
def whole(shallow, photos, tmp_path_factory):
    """What an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "dense").symlink_to(shallow)
    (folder / "photos").symlink_to(photos)
    with contextlib.chdir(folder):
        assert run_command(*COMPRESS) == 0
    return contents(folder / "small")


def test_ctrl_c_in_calibrate(place, capfd):
    assert stopped(IN_CALIBRATION, signal.SIGINT, *CALIBRATE) == 130
    assert capfd.readouterr() == ("", f"{NOTHING}\n")
    assert own_files(place) == []


@pytest.mark.parametrize(("where", "message"), [(IN_CALIBRATION, NOTHING), (IN_SURGERY, KEPT)])
def test_ctrl_c_in_compress_and_on_with_resume(place, whole, secateur, capfd, where, message):
    assert stopped(where, signal.SIGINT, *COMPRESS) == 130
    assert capfd.readouterr() == ("", f"{message}\n")
    assert own_files(place) == ([] if message == NOTHING else ["small.work"])
    done = secateur(*COMPRESS, "--resume")
    assert (done.status, done.err) == (0, "")
    told = "taken up from the interrupted run: statistics, scores, plan\n"
    assert done.out.startswith(told) == (message == KEPT)
    assert contents(place / "small") == whole
    assert own_files(place) == ["small"]


@pytest.mark.parametrize("where", [IN_CALIBRATION, IN_SURGERY])
def test_killed_and_on_with_resume(place, whole, secateur, where):
    assert stopped(where, signal.SIGKILL, *COMPRESS) == -signal.SIGKILL
    assert not (place / "small").exists()
    assert secateur(*COMPRESS, "--resume").status == 0
    assert contents(place / "small") == whole
    assert [name for name in own_files(place) if not name.startswith(".")] == ["small"]


def test_resume_with_other_settings_says_what_differs(place, secateur):
    stopped(IN_SURGERY, signal.SIGKILL, *COMPRESS)
    ended = secateur(*COMPRESS, "--resume", "--keep-params", 0.8, "--criterion", "amp")
    assert ended.error == (
        "'small.work' holds the steps of a run with another keep_params (0.75, now 0.8); another criterion "
        '("obs", now "amp"): give the same again, or begin anew without resume (--resume)'
    )
    assert own_files(place) == ["small.work"]


def test_the_installed_command_from_start_to_interruption(place, model_folders):
    """As a user does it: the program itself, a signal from outside, no terminal."""
    command = [Path(sys.executable).with_name("secateur"), *map(str, COMPRESS)]
    command[2] = str(model_folders["timm"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 60
    while not (place / "small.work" / "plan.json").exists() and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", f"{KEPT}\n")

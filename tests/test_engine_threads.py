"""Promises about which threads compute."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from rag import generator
from rag.engine.own_thread import in_own_thread
from rag.errors import GeneratorError
from rag.settings import Settings

_COUNT = """
import os, sys, time
import torch
from rag.engine.own_thread import in_own_thread

def work():
    a = torch.rand(600, 600)
    return a @ a + a.exp()

torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
work() if sys.argv[1] == "here" else in_own_thread(lambda: (torch.set_num_threads(2), work()))
time.sleep(0.5)  # the system takes ended threads off its list a moment later
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(("where", "left"), [("here", 1), ("in its own thread", 0)])
def test_a_team_of_threads_ends_with_the_thread_that_it_belongs_to(where: str, left: int) -> None:
    # Two teams on two processors made every forward a quarter slower.
    run = subprocess.run([sys.executable, "-c", _COUNT, where], capture_output=True, text=True, check=True)
    assert int(run.stdout) == left


def test_a_model_is_loaded_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_load_here", lambda settings: threading.current_thread())
    loaded_in: object = generator.load_generator(Settings())
    assert isinstance(loaded_in, threading.Thread)
    assert loaded_in is not threading.current_thread() and not loaded_in.is_alive()


def test_ctrl_c_does_not_wait_for_a_model_that_is_being_loaded() -> None:
    script = (
        "import time; from rag.engine.own_thread import in_own_thread\n"
        "in_own_thread(lambda: (print('loading', flush=True), time.sleep(60)))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) != 0
        finally:
            process.kill()


def test_what_goes_wrong_there_reaches_the_caller() -> None:
    def fail() -> None:
        raise GeneratorError("no such model")

    with pytest.raises(GeneratorError, match="no such model"):
        in_own_thread(fail)

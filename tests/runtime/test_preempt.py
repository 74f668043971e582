"""Signals: the first asks, a second ends, and all processes get the same answer."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from mora_jax import sharding
from train.console.exits import SIGNALLED
from train.runtime.preempt import LAG, SIGNALS, Stop, ended_at_once


@pytest.fixture(autouse=True)
def sighup_is_not_ignored():
    """As in a terminal, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def mesh():
    return sharding.make_mesh(1)


def wait_for(condition) -> None:
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_handlers_are_restored(mesh, number, capfd):
    before = [signal.getsignal(s) for s in SIGNALS]
    with Stop(mesh) as stop:
        assert not stop.asked()
        os.kill(os.getpid(), number)
        wait_for(stop.asked)
        assert stop.asked()  # and it stays so
        printed = ""
        while not printed:  # a thread prints it
            printed = capfd.readouterr().err
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert printed.startswith(f"mora: {number.name}: stopping with a checkpoint")
    assert ("once more" in printed) == (number != signal.SIGHUP)


def test_other_signals_do_not_ask(mesh):
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with Stop(mesh) as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            assert not stop.asked()
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_repeated_hangups_do_not_end_the_run(mesh):
    with Stop(mesh) as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
            wait_for(stop.asked)
            time.sleep(0.1)  # else two of them may arrive as one


def test_under_nohup_hangups_are_ignored(mesh):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(mesh) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not stop.asked()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_besides_the_main_one_receives_no_signals(mesh):
    asked = []

    def run() -> None:
        with Stop(mesh) as stop:
            asked.append(stop.asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]


def test_sigint_ends_the_program_until_a_run_handles_it():
    before = signal.getsignal(signal.SIGINT)
    with ended_at_once():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        with Stop(sharding.make_mesh(1)):
            assert signal.getsignal(signal.SIGINT) not in (signal.SIG_DFL, before)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


STALLED = """
import os, signal, sys, time
from mora_jax import sharding
from train.runtime.preempt import Stop
reading, writing = os.pipe()
os.set_blocking(writing, False)
with open(writing, "wb", buffering=0) as full:
    while full.write(bytes(1 << 12)):
        pass
    os.set_blocking(writing, True)
    os.dup2(writing, 2)
with Stop(sharding.make_mesh(1)) as stop:
    os.kill(os.getpid(), signal.SIGINT)
    while not stop.asked():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""


def test_a_second_signal_ends_at_once_if_the_message_of_the_first_blocks():
    with subprocess.Popen([sys.executable, "-c", STALLED]) as process:
        try:
            assert process.wait(15) == SIGNALLED + signal.SIGTERM
        finally:
            process.kill()


BUSY = """
import hashlib, sys
from mora_jax import sharding
from train.runtime.preempt import Stop
data = bytes(1 << 27)
with Stop(sharding.make_mesh(1)) as stop:
    print("busy", flush=True)
    for _ in range(100):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)  # no handler runs in this call
"""


def test_a_second_signal_ends_a_call_that_no_handler_can_interrupt():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", BUSY], **pipes) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"busy\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert b"SIGINT: stopping" in process.stderr.readline()
        assert process.poll() is None
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == SIGNALLED + signal.SIGTERM
        finally:
            process.kill()
        assert time.monotonic() - asked < 5


VOTE = """
import os, signal, sys, time
import jax
index, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from mora_jax import sharding
from train.runtime.preempt import Stop
with Stop(sharding.make_mesh(4)) as stop:
    answers = []
    for question in range(12):
        if index == 1 and question == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop._asked.is_set():
                time.sleep(0.01)
        answers.append(stop.asked())
print("answers", *map(int, answers), flush=True)
"""


def test_all_processes_get_the_same_answer_to_the_same_question():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", VOTE, str(i), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    answers = [out.splitlines()[-1] for out, _ in said]
    expected = [0] * (5 + LAG) + [1] * (12 - 5 - LAG)
    assert answers == ["answers " + " ".join(map(str, expected))] * 2, said

"""Processes of their own for what needs one: a signal, a kill, a rank. They are forked from a
server that has imported once what is slow to import; where it could not, they do so themselves."""

import multiprocessing
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot", "scipy.stats", "backtrack",
                               "degrade", "toy2d.study", "imagenet64.fid", "sdxl.assembly"])


def execute(code, environment, said):
    """Run `code` with all that it says in the file `said`."""
    out = os.open(said, os.O_WRONLY)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run behind
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # of a server that a study started
    import torch

    from toy2d import metrics

    torch.set_num_threads(1)
    metrics.Evaluation.samples = 1000  # as in conftest.py
    exec(code, {"__name__": "__main__"})


class Started:
    """Python code in a process of its own, with more variables in its environment."""

    def __init__(self, code, **variables):
        self.file = tempfile.NamedTemporaryFile()  # noqa: SIM115  (it lives as long as this)
        self.process = SERVER.Process(target=execute, args=(
            code, dict(os.environ) | variables, self.file.name))
        self.process.start()
        self.pid = self.process.pid

    def runs(self):
        return self.process.exitcode is None

    def wait_for(self, condition):
        """Until condition(); the process must live as long."""
        while not condition():
            assert self.runs(), self.ended()
            time.sleep(0.02)

    def ended(self, timeout=300):
        """What it said, and its exit status, negative where a signal killed it."""
        self.process.join(timeout)
        if self.runs():
            self.process.kill()
        self.process.join()
        return Path(self.file.name).read_text(), self.process.exitcode


def two_ranks(code):
    """Run `code` on two ranks, as torchrun starts them; what they said, and their exit statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [Started(code, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                     MASTER_ADDR="localhost", MASTER_PORT=str(port)) for rank in range(2)]
    said, codes = zip(*(rank.ended() for rank in ranks))
    return "".join(said), [*codes]


def stages(*words, first=""):
    """Code that runs stages (name, *argv) without figures; `first` comes before them."""
    argv = [[str(word) for word in stage] for stage in words]
    return f"""
import os, sys
import backtrack, degrade, disback
from runtime import cli, files, place, ranks, results, run
from toy2d import figures
figures.draw = lambda *args: None
{first}
for name, *argv in {argv!r}:
    dict(degrade=degrade, backtrack=backtrack)[name].main(argv)
"""

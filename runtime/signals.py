"""SIGINT and SIGTERM let the current step end and be saved."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


@contextlib.contextmanager
def heeding_signals() -> Iterator[list[int]]:
    """The signals that came, and ask to stop after the current step. A second SIGINT kills at once;
    a second SIGTERM is ignored, as torchrun repeats it."""
    came: list[int] = []

    def heed(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(2, b"\nstopping after this step\n")

    # Of what a shell starts in a script's background it has SIGINT ignored: Ctrl-C is another's.
    before = {number: signal.signal(number, heed) for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(signals: list[int]) -> str:
    """The signal that this rank or another got; empty where none did."""
    number = signals[0] if signals else 0
    if dist.is_initialized():
        found = torch.tensor(number)  # on the CPU: the accelerator is not waited for
        dist.all_reduce(found, dist.ReduceOp.MAX)
        number = int(found)
    return signal.Signals(number).name if number else ""

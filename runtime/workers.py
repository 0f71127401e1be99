"""Jobs of a study, in processes of their own."""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from disback import Refusal


def work(function: Callable, jobs: Sequence, processes: int, take: Callable[[Any], None]) -> None:
    """take(function(job)) of every job, those first that are done first. Refusal where a process
    was killed; that and an interrupt wait for no job under way."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ProcessPoolExecutor(
            min(processes, len(jobs) or 1), context, follow_parent, (folder,)) as pool:
        try:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for workers' life
            try:
                futures = [pool.submit(function, job) for job in jobs]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in tqdm(as_completed(futures), "jobs", len(jobs), smoothing=0.02):
                take(future.result())
        except BaseException as error:
            for worker in multiprocessing.active_children():
                worker.kill()
            if isinstance(error, BrokenProcessPool):
                raise Refusal("a process of a job was killed, maybe for want of memory: start "
                              "again with fewer --jobs; what is done is kept") from error
            raise


def follow_parent(folder: str) -> None:
    """A worker whose parent was killed would wait for work for ever. Temporary files go into
    `folder`, which outlives a worker that is killed."""
    tempfile.tempdir = folder
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, of which a killed worker leaves one

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

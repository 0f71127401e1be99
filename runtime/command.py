"""How a command of this project ends, and what its words may be."""

import argparse
import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from disback import Refusal
from runtime import errors, folder, ranks

os.environ["MPLBACKEND"] = "agg"  # of matplotlib, loaded later: figures need no screen
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
SECONDS_OF_FIRST_RANK = 5


def run(main: Callable[[list[str]], None], memory: str = "") -> None:
    """Run a command. A Refusal, a failing disk, a failing compiler or too little memory, where
    `memory` helps, ends it in a line, status 2; an interrupt in a line, status 130."""
    came: list[int] = []

    def stop(number: int, _: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    sys.excepthook = sys.__excepthook__  # what was set for the imports
    with contextlib.suppress(AttributeError):  # of what is no terminal, pipe or file
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the locale cannot write
    sys.stdout, sys.stderr = (Forgiving(stream or open(os.devnull, "w"))  # noqa: SIM115
                              for stream in (sys.stdout, sys.stderr))
    try:
        words = [word for word in (*sys.argv, errors.cache()) if not word.isascii()]
        if words and sys.getfilesystemencoding() != "utf-8":  # not every library heeds another one
            raise Refusal(f"the locale is not UTF-8, as {ascii(words[0])} is: set PYTHONUTF8=1")
        for word in words:
            if any("\udc80" <= letter <= "\udcff" for letter in word):  # bytes, to Python
                raise Refusal(f"an argument, DISBACK_CACHE or HOME is not UTF-8: {ascii(word)}")
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as in a script's background
                signal.signal(number, stop)
        keep_memory()
        main(sys.argv[1:])
    except KeyboardInterrupt as interrupt:
        end(130, ": ".join(["interrupted", *map(str, interrupt.args)]))
    except Exception as error:
        if came:  # a library's reader or writer that is cut off may blame its file
            end(130, "interrupted")
        if errors.out_of_memory(error):
            end(2, str(error) or "out of memory", f"({memory})" if memory else "")
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            told = str(error).partition("Output:")[2].strip() or str(error)  # a compiler's own
            end(2, "--compile failed: --no-compile runs without;", told[:300])
        if dist.is_initialized() and isinstance(error, RuntimeError) and "gloo" in str(error):
            end(2, "another rank has ended before")
        if isinstance(error, ModuleNotFoundError):
            end(2, f"{error}: pip install -r requirements.txt")
        if isinstance(error, ImportError):
            end(2, str(error))
        if not isinstance(error, Refusal | OSError):
            raise
        words = str(error) if isinstance(error, Refusal) else errors.in_words(error)
        try:
            folder.must_be_here()
        except Refusal as moved:  # the cause of what fails on the files in there
            words = str(moved)
        end(2, words)
    finally:
        folder.leave()
        for number in (signal.SIGINT, signal.SIGTERM):
            atexit.register(signal.signal, number, signal.SIG_IGN)  # nothing is left to stop
    if dist.is_initialized():
        dist.destroy_process_group()


class Forgiving:
    """A stream whose reader may be gone: what is said to it is lost, and the work goes on."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_memory() -> None:
    """glibc gives blocks above 128 KB back at once, and the system must clear their pages anew in
    every iteration: let it keep blocks of up to 32 MB, its most. Other libraries lack mallopt."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**30)


def end(status: int, *said: str) -> None:
    """End with a line. What the first rank says as well is not said twice: torchrun, which sees it
    end, ends the others while they wait."""
    if os.environ.get("RANK", "").strip("0"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_OF_FIRST_RANK)
    who = f"error on rank {ranks.rank()}:" if dist.is_initialized() else "error:"
    print("\n" * (status != 2) + who, *" ".join(said).split(), file=sys.stderr)
    sys.exit(status)


def refuse(message: str) -> None:
    raise Refusal(f"{message} (--help lists what there is)")


def parser(prog: str, doc: str, **more: Any) -> argparse.ArgumentParser:
    """One that takes whole flags alone, and refuses what it does not know."""
    made = argparse.ArgumentParser(prog, description=doc, allow_abbrev=False, **more,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.error = refuse
    return made


def home(text: str) -> str:
    """A word of the command line that may be a path; ~ is the home folder, as in a shell. An empty
    one is an unset variable's."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if (whole := os.path.expanduser(text)).startswith("~"):
        raise argparse.ArgumentTypeError(f"{text} is in no user's home; ./{text} is here")
    return whole


def path(text: str) -> Path:
    return Path(home(text))


def count(text: str) -> int:
    """The type of a flag that says how many."""
    if not 0 < int(text) < 2**40:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 2**40, not {text}")
    return int(text)


def runs(program: str) -> bool:
    """Whether there is such a program, which does what it is asked for, as torch will ask."""
    with contextlib.suppress(OSError):
        return not subprocess.run([program, "--version"], capture_output=True).returncode
    return False


def check_compiler(on_gpu: bool) -> None:
    """Refuse --compile where the compiler of what torch generates is missing: Triton's of C on a
    GPU, Inductor's of C++ on a CPU."""
    variable, usual, others = "CC", "gcc", ["clang"]
    if not on_gpu:
        variable, usual, others = "CXX", "clang++" if sys.platform == "darwin" else "g++", []
    named = os.environ.get(variable)
    if not any(map(runs, [usual, *others] if named is None else [named])):
        why = (f"finds no {usual}: install it" if named is None
               else f"{variable} names none, but {named!r}: unset it")
        refuse(f"--compile needs a compiler and {why}, or use --no-compile")


def check_common(args: argparse.Namespace, stage: str) -> None:
    """Refuse numbers out of range, and shards without ranks; settle what flags decide together."""
    if stage == "backtrack":
        settle(args)
    if stage == "degrade" and args.config.nodes > args.config.degrade_steps:
        refuse(f"--nodes must be at most {args.config.degrade_steps}, the --steps")
    if not 0 <= args.seed < 2**63:
        refuse(f"--seed must be from 0 to 2**63 - 1, not {args.seed}")
    if args.accumulate < 1:
        refuse(f"--accumulate must be at least 1, not {args.accumulate}")
    if args.shard and not os.environ.get("RANK"):
        refuse("--shard spreads over ranks: torchrun --nproc_per_node=N starts them")
    if args.compile:
        check_compiler(torch.cuda.is_available())


def settle(args: argparse.Namespace) -> None:
    """What --target and --out decide of stage 2: how the fake starts, and where the path is, which
    plain VSD does without."""
    args.fake_init = args.fake_init or ("degraded" if args.target == "path" else "teacher")
    if (args.target, args.fake_init) != ("teacher", "teacher"):
        args.path = args.path or args.out / "path"
    elif args.path:
        refuse(f"--path {args.path} is of no use to --target teacher alone: leave it out")

"""What an iteration of backtrack.py costs beside its networks alone: python -m imagenet64.bench

Runs the stage itself, plain VSD on the digits, for 20 and for 100 iterations (about two minutes;
before them the teacher, on first use). No other work should run on the machine meanwhile.
"""

from imagenet64 import problem
from toy2d.bench import report

if __name__ == "__main__":
    report("imagenet64", problem.make(), repeats=5, short=20, long=100)

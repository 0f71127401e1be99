"""Nineteen ways to one step. METHOD runs one of them and prints its line; `all` runs what is
missing and draws table.md and gallery.png; `table` draws them from the lines alone.

    python -m toy2d.gallery METHOD [--variant NAME] [--backtrack | --double] [--seed N]
    python -m toy2d.gallery all [--seeds 5]
    python -m toy2d.gallery table
"""

import argparse
import ast
import hashlib
import importlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType

import torch
from torch.nn.modules.module import register_module_forward_hook
from tqdm import tqdm

from disback import Refusal
from runtime import cli, files
from runtime.study import appending, follow_parent
from toy2d import model
from toy2d.gallery import report
from toy2d.gallery.core import Toy

METHODS = ("vsd", "swiftbrush", "snoopi", "fdistill", "msd", "phased", "flash", "sprint", "tbcm",
           "rcm", "mdt", "hypersd", "twinflow", "boot", "instaflow", "hipa", "distillspec", "pvd",
           "stepbystep")

"""DisBack on SDXL. See quiet.py; the variables are for what the libraries say while they load."""

import os

for library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")

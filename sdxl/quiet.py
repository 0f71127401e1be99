"""To import this hides the libraries' warnings and bars, of which there are dozens a run, and which
would hide its own line; those of a download, which takes minutes, are left."""

from diffusers.utils import logging as of_diffusers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from huggingface_hub.utils import logging as of_hub
from transformers.utils import logging as of_transformers

hidden = are_progress_bars_disabled()
for library in (of_diffusers, of_hub, of_transformers):
    library.set_verbosity_error()
for library in (of_diffusers, of_transformers):
    library.disable_progress_bar()
if not hidden:  # transformers has hidden the hub's as well
    enable_progress_bars()

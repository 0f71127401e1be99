"""ImageNet-64 and the digits."""

import runtime  # noqa: F401  (first: it tells of an interrupt while the rest loads)

"""Nineteen ways to one step, a file each: python -m toy2d.gallery, see README.md."""

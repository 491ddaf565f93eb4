"""Triton kernels, imported as tokenexit.kernels; nothing is imported here (see setup.py)."""

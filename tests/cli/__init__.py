"""Tests of ``qmpfd/cli/``."""

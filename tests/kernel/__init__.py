"""Tests of ``qmpfd/kernel/``."""

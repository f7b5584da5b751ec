"""Tests of ``qmpfd/policy/``."""

"""Tests of ``qmpfd/server/``."""

"""Tests of ``qmpfd/server/listen/``."""

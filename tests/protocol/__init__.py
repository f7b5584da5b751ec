"""Tests of ``qmpfd/protocol/``."""

"""Tests of ``qmpfd/server/takeover/``."""

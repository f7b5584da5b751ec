"""Tests of ``qmpfd/client/``."""

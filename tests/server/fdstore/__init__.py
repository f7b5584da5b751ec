"""Tests of ``qmpfd/server/fdstore/``."""

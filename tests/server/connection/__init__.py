"""Tests of ``qmpfd/server/connection/``."""

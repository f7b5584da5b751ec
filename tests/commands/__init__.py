"""Tests of ``qmpfd/commands/``."""

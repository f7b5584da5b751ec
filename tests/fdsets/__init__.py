"""Tests of ``qmpfd/fdsets/``."""

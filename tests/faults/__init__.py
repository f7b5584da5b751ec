"""Attacks on a daemon process, while a well-behaved client measures its round trips."""

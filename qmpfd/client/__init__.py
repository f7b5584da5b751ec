"""Clients for qmpfd and any other QMP server: one for Trio, one that blocks."""

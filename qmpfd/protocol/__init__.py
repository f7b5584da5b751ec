"""QMP without I/O: JSON dialect, requests, replies, and assignment of descriptors to commands."""

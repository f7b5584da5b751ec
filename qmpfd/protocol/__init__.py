"""QMP without I/O: the JSON dialect, requests and replies, and which command gets which fd."""

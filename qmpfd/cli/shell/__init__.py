"""``qmpfd shell``: interactive QMP."""

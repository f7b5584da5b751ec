"""Run by its folder's path: ``python -I -S -W ignore .../qmpfd/supervisor``."""

import sys

if not __package__:
    # sys.path[0] is this folder: its parent has the package.  Behind the standard library, nothing
    # there can be mistaken for a module of that.
    sys.path.append(sys.path.pop(0).rpartition("/")[0])
    __package__ = "supervisor"  # what relative imports go by (PEP 366)

from .main import main

sys.exit(main(sys.argv[1:]))

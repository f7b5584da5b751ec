"""The parent program, run by the path of its folder: ``python -I -S -W ignore .../supervisor``."""

import sys

if not __package__:
    # sys.path[0] is this folder; replace it by the folder above, which has the package.  At the end
    # of sys.path, no file there can shadow a module of the standard library.
    sys.path.append(sys.path.pop(0).rpartition("/")[0])
    __package__ = "supervisor"  # for relative imports (PEP 366)

from .main import main

sys.exit(main(sys.argv[1:]))

"""The limit of descriptors in flight."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from qmpfd.kernel.in_flight import in_flight_is_limited


def test_the_limit_of_descriptors_in_flight() -> None:
    """Without CAP_SYS_RESOURCE and CAP_SYS_ADMIN, root has the limit too (unix(7))."""
    setpriv = shutil.which("setpriv")
    if in_flight_is_limited() or setpriv is None:
        pytest.skip("needs root with one of both capabilities, and setpriv")
    code = "from qmpfd.kernel.in_flight import in_flight_is_limited as limited; print(limited())"
    command = [setpriv, "--bounding-set=-sys_admin,-sys_resource", sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    assert output.stdout == "True\n"

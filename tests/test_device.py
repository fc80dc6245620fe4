"""The tests on another device, in a process of their own: a process cannot unregister a device."""

import subprocess
import sys
from pathlib import Path

DEVICE = Path(__file__).parent / "device"


def test_equal_on_another_device(pytestconfig):
    # The files are not named test_*.py, so that nothing else collects them.
    files = [DEVICE / "pruning.py", DEVICE / "training.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *files]
    command += [f"-W{warning}" for warning in pytestconfig.option.pythonwarnings or ()]
    done = subprocess.run(command, cwd=DEVICE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]

"""The tests on another device, in a process of their own: a process cannot unregister a device."""

from pathlib import Path

from support import forks

DEVICE = Path(__file__).parent / "device"


@forks.IN_ONE_WORKER
def test_equal_on_another_device(pytestconfig):
    # The files are not named test_*.py, so that nothing else collects them.
    files = [DEVICE / "pruning.py", DEVICE / "training.py"]
    # A fork has imported the plugins of pytest already.
    options = ["-p", "no:cacheprovider", "--tb=short", "-Wignore:Module already imported"]
    options += [f"-W{warning}" for warning in pytestconfig.option.pythonwarnings or ()]
    done = forks.run(forks.run_tests, DEVICE.parents[1], *options, *files, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]

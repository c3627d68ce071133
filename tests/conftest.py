"""Three workers share two cores, as browsers and installations wait now and then (pytest-xdist; `-n 0` runs in one process). Ctrl-C as a person has it: a shell that starts the tests in the background leaves SIGINT ignored, and what is tested about it would not happen."""
import os
import pathlib
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))   # before torch; also for kernels that tests start

os.environ.setdefault("CURVTOOLS_CACHE", str(pathlib.Path(__file__).parents[1]/".cache"))   # where the real model of `smollm` is kept

os.environ.setdefault("HF_HUB_OFFLINE", "1")   # no test asks a hub; where none is to be had, a name that is no model costs a minute of attempts

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = ["test_notebooks.py", "test_tutorials.py", "test_lab.py", "test_zoo.py", "test_widgets.py", "test_cli.py", "test_vision.py", "test_real.py"]   # first, so that no worker waits for another at the end


def pytest_collection_modifyitems(items): items.sort(key=lambda i: LONG.index(i.path.name) if i.path.name in LONG else len(LONG))


def pytest_xdist_make_scheduler(config, log):
    "A file goes to one worker, as its fixtures are made once a file; notebooks share none, so each goes where there is room."
    from xdist.scheduler import LoadFileScheduling
    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid): return nodeid if "test_notebooks.py" in nodeid or "test_tutorials.py" in nodeid else super()._split_scope(nodeid)
    return Files(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _own_ctrl_c():
    "What a test, or a notebook that is run as one, has left behind for Ctrl-C is not there for the next: a real SIGINT in that would end the worker."
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Two workers share the cores (pytest-xdist; `-n 0` runs in one process). Ctrl-C as a person has it: a shell that starts the tests in the background leaves SIGINT ignored, and what is tested about it would not happen."""
import os
import pathlib
import signal

if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))   # before torch; also for kernels that tests start

os.environ.setdefault("CURVTOOLS_CACHE", str(pathlib.Path(__file__).parents[1]/".cache"))   # where the real model of `smollm` is kept

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

"""One thread for torch: tests are many small tensors, and the machine may be shared."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

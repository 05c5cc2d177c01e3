"""One file a claim: `python -m benchmarks.NAME` measures it beside what people use today.

Every process is held to one thread: on a shared machine two threads of one arm mostly measure the other arms.
"""

import os

from pefomed_ray.cli.environment import set_defaults

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
set_defaults()

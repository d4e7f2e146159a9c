"""Real commands, killed at every moment that matters, and gone on with: `python -m tests.kill --kills 200 --seed 0`.

`children.py` starts and kills commands, `jobs.py` says which commands, how to go on, and what the result is,
`__main__.py` plans the kills, runs them side by side and prints what became of them.
"""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before numpy and torch are imported: threads do not survive a fork

"""Settings of every test process."""

from __future__ import annotations

import os

import torch

# pytest-xdist runs one process per core: threads within each would only fight over them.
torch.set_num_threads(1)

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

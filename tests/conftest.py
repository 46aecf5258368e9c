"""Settings of every test process."""

from __future__ import annotations

import torch

# pytest-xdist runs one process per core: threads within each would only fight over them.
torch.set_num_threads(1)

"""One thread: these tensors are tiny, and the tests run in parallel."""

import torch

torch.set_num_threads(1)

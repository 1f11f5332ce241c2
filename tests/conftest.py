"""Few threads: the models of the tests are tiny, and tests may run beside other work."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import toys`
torch.set_num_threads(2)

"""qpruner: structured pruning, mixed-precision quantization and recovery as one tracked search."""

import os

# bitsandbytes compiles its CPU kernels anew for every shape, seconds each, and pruned models have many shapes.
# Nothing here gains from torch.compile, so it is off; set before anything imports torch.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

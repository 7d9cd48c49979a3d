"""qpruner: structured pruning, mixed-precision quantization and recovery as one tracked search."""

GIB = 2**30

"""What makes a model smaller: structures that go, bits, and which of either matter."""

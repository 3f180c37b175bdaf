"""`genkern bench`: genkern against what a user would otherwise run, on the same tensors, side by side in one run."""

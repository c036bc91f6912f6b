"""Tensor parallelism under torchrun: groups, layers, collective calls, and the watchdog."""

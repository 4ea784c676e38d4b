"""Sixteen text tasks on a pretrained sentence encoder, shaped like the vision benchmarks of the DC-Merge paper (Section 4)."""

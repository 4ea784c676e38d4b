"""The text benchmark with models fine-tuned in full: the setting of the DC-Merge paper's Table 2 (Section 4)."""

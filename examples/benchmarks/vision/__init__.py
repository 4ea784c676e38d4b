"""Eight image tasks on a pretrained vision transformer, the form in which the DC-Merge paper measures (Section 4)."""

"""Reading, writing and fusing adapters."""

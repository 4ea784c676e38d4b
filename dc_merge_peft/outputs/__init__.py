"""Where merged deltas go: adapter directories and the Hub, PEFT models in memory, fused models."""

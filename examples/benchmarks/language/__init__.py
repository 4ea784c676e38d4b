"""Eight tasks of a small causal language model, answered by greedy generation and scored by exact match."""

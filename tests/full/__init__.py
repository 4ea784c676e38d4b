"""Merging full fine-tuned models."""

"""The demo: real LoRA adapters of a real text encoder, merged by several methods and measured."""

"""MM-MergeBench: LLaVA-1.5-7B with the LoRA adapters of eight tasks, measured on them and on four others (Tables 3 and 13)."""

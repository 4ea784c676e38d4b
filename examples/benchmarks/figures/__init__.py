"""The paper's figures, drawn from any suite's adapters: what is measured, the numbers as CSV, pictures and captions from those alone."""

"""``python -m dc_merge_peft`` is ``dc-merge``."""

from __future__ import annotations

from dc_merge_peft.cli import main

if __name__ == "__main__":
    main()

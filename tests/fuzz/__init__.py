"""Damaged and hostile inputs by the thousand: ``python -m tests.fuzz`` runs them, ``python -m tests.fuzz.kill`` kills runs."""

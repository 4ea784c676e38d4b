"""All accuracy benchmarks by one command, and what they say together: ``docs/benchmarks.md`` and the guide to choosing a method."""

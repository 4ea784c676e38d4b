"""Merging measured by what the merged model gets right: adapters and data from a suite, all else the same for every suite."""

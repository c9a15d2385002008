"""What a run records: read `run` first (the run directory and its events), then `trackers` (which also receive them).

`plots`, `page` and `compare` read the events, during the run or later. `profiler` and `rank_usage` look inside
training: gradients and time while it runs, the use of the adapters' rank at its end.
"""

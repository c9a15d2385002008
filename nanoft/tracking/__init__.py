"""What a run records: read `run` first (the run directory and its events), then `trackers` (who else receives them).

`plots`, `page` and `compare` read them back, during the run or later. `profiler` and `rank_usage` look inside training:
gradients and time while it runs, the use of the adapters' rank when it is over.
"""

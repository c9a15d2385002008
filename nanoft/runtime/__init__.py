"""The process and its machine; nothing here knows about models or runs.

`device` (device, dtype, random state) and `memory` (readings, limits, a monitor) hide the differences of CUDA, Metal
and the CPU. `distributed` has the collectives of several processes, `command` the exit codes and signals of the
commands, `energy` the hardware counters.
"""

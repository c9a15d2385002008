"""Everything around the loop of train.py, in the order of a run.

`setup` builds what the loop needs; `preflight`, `memory_plan`, `plan` and `self_test` check that it fits and is right;
`state`, `progress` and `recovery` keep a run going; `finalize` evaluates and writes the result. `doctor` checks a
machine.
"""

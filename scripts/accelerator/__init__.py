"""Everything of this repository that wants an accelerator, for a device that is at hand for minutes.

`__main__.py` is the command, `parts.py` what it runs and in which order, `job.py` how; `correctness.py` and `steps.py`
are parts that are no commands of their own elsewhere, and `smollm2.py` is a whole job, which is one part here.
"""

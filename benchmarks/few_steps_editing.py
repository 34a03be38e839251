"""Edits in 2 learned calls against plain ones and the plain model's own in 25 (see comparison.py).

`python benchmarks/few_steps_editing.py [--quick]`. Objective: PSNR to the teacher, the plain model's edit in 25 calls.
"""

from comparison import main

if __name__ == "__main__":
    main("few-steps-editing")

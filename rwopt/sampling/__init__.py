"""How a picture is made from noise: the loop that a search runs, its gradient, and several candidates at once.

`grids.py`: noise levels by rule; `course.py`: those of one run, what the U-Net is told there; `denoise.py`: what one
U-Net call says; `solvers.py`: from one level to the next; `sample.py`: the loop; `batched.py`: several candidates
through one loop; `backprop.py`: from a reward of the picture back to the weights; `memory.py`: what that takes.
Importing this package loads no torch.
"""

GRADIENTS = ("full", "truncated", "detached")
"""Ways of a gradient through the sampler: `rwopt.sampling.backprop.GradientPath`."""
